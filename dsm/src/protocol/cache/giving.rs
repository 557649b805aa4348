//! Giving pages up: what the homes ask for, now or when a hold time is over, and what this member wants to be rid of.

use super::super::core::{Command, Effects};
use super::super::message::{Contents, Msg, Right, Terms, Token};
use super::{Cache, Rule, State};
use crate::addr::MemberId;
use crate::layout::Page;
use crate::seeded::{SeededFault, is_on};

/// What the home asks of a member that has a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::protocol) enum Demand {
    /// Grant it to `requester`.
    Give { requester: MemberId, terms: Terms, data: bool },
    /// Drop it and tell `requester`.
    Drop { requester: MemberId, token: Token },
}

impl Demand {
    /// Who is to get the page, and its token.
    fn requester(self) -> (MemberId, Token) {
        match self {
            Demand::Give { requester, terms, .. } => (requester, terms.token),
            Demand::Drop { requester, token } => (requester, token),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Deferred {
    demand: Demand,
    until: u64,
}

impl<D> Cache<D> {
    /// The home wants something of a page that this member has.
    pub(in crate::protocol) fn demand(
        &mut self,
        now: u64,
        page: Page,
        demand: Demand,
        home: MemberId,
        fx: &mut Effects<D>,
    ) -> Result<(), Rule> {
        let state = self.state(page);
        let loses = match demand {
            Demand::Give { requester, terms, data } => {
                if requester == self.me {
                    return Err("asked a member to grant a page to itself");
                }
                if state == State::Invalid {
                    return Err("asked for a page that is not here");
                }
                if !data && (state != State::Shared || terms.right != Right::Modified) {
                    return Err("asked for a grant without the contents that nobody else has");
                }
                if terms.acks.has(self.me) || terms.acks.has(requester) {
                    return Err("asked for acknowledgements of members that have none to give");
                }
                terms.right == Right::Modified || state == State::Modified
            }
            Demand::Drop { requester, .. } => {
                if requester == self.me {
                    return Err("asked a member to invalidate for itself");
                }
                if state == State::Modified {
                    return Err("asked to drop the only copy of a page");
                }
                true
            }
        };
        if self.deferred.contains_key(page) {
            return Err("started a transaction before the one in front of it had ended");
        }
        if loses
            && state != State::Invalid
            && let Some(age) = self.age(now, page)
        {
            let level = self.level(page);
            let (requester, token) = demand.requester();
            let until = self.held_until(now, page, age, requester, token.is_patient());
            let next = self.hold.next_level(level, age);
            if next != level {
                self.set_level(page, next);
            }
            if until > now && !self.is_pending(page) && !is_on(SeededFault::NoHold) {
                self.deferred.insert(page, Deferred { demand, until });
                fx.push(Command::Timer { page, at: until });
                return Ok(());
            }
        }
        self.serve(page, demand, home, fx);
        Ok(())
    }

    /// Until when a page that came `age` ago stays here. The past if it need not.
    fn held_until(&self, now: u64, page: Page, age: u64, requester: MemberId, is_patient: bool) -> u64 {
        let level = self.level(page);
        let until = |hold: u64| now.saturating_add(hold.saturating_sub(age));
        let least = until(self.hold.time(0));
        if self.resting || now < self.soft_until {
            return least;
        }
        let (mine, theirs) = (self.is_patient(now), is_patient);
        if mine && !theirs && self.hold.is_contended(level) {
            return least;
        }
        let turn = self.slots.turn_of(now, requester, self.me, theirs && !mine);
        match turn.filter(|_| self.hold.is_contended(level)) {
            Some(turn) => turn.max(least),
            None => until(self.hold.time(level)),
        }
    }

    /// Somebody waits behind the one that a held page is for: a hold that one would not have to wait for ends.
    pub(in crate::protocol) fn awaited(
        &mut self,
        now: u64,
        page: Page,
        requester: MemberId,
        is_patient: bool,
        home: MemberId,
        fx: &mut Effects<D>,
    ) {
        let Some(until) = self.deferred.get(page).map(|d| d.until) else { return };
        let age = self.age(now, page).unwrap_or(u64::MAX);
        let sooner = self.held_until(now, page, age, requester, is_patient);
        if sooner >= until {
            return;
        }
        if sooner <= now {
            self.serve_deferred(page, home, fx);
        } else if let Some(deferred) = self.deferred.get_mut(page) {
            deferred.until = sooner;
            fx.push(Command::Timer { page, at: sooner });
        }
    }

    /// A hold time may have run out.
    pub(in crate::protocol) fn timer(&mut self, now: u64, page: Page, home: MemberId, fx: &mut Effects<D>) {
        // An early timer is left over from a hold that ended early; every hold sets its own.
        if self.deferred.get(page).is_some_and(|d| d.until <= now)
            && !is_on(SeededFault::EndlessHold)
            && let Some(deferred) = self.deferred.remove(page)
        {
            self.serve(page, deferred.demand, home, fx);
        }
    }

    /// Does what was put off, if anything was.
    pub(super) fn serve_deferred(&mut self, page: Page, home: MemberId, fx: &mut Effects<D>) {
        if let Some(deferred) = self.deferred.remove(page) {
            self.serve(page, deferred.demand, home, fx);
        }
    }

    fn serve(&mut self, page: Page, demand: Demand, home: MemberId, fx: &mut Effects<D>) {
        let state = self.state(page);
        match demand {
            Demand::Give { requester, terms, data } => {
                let write = terms.right == Right::Modified;
                if data {
                    self.load(page, false, false, fx);
                    let protect = self.is_writable(page);
                    fx.push(Command::Give { to: requester, page, terms, protect, drop: write });
                } else {
                    fx.push(Command::Drop { page });
                    fx.send(requester, page, Msg::Grant { terms, contents: Contents::Keep });
                }
                self.set(page, if write { State::Invalid } else { State::Shared });
                if home == self.me && !terms.done {
                    fx.send(home, page, Msg::Done { token: terms.token });
                }
            }
            Demand::Drop { requester, token } => {
                if is_on(SeededFault::AckBeforeDrop) {
                    fx.send(requester, page, Msg::InvAck { token });
                }
                if state != State::Invalid {
                    if !is_on(SeededFault::KeptCopy) {
                        fx.push(Command::Drop { page });
                    }
                    self.set(page, State::Invalid);
                }
                if !is_on(SeededFault::AckBeforeDrop) {
                    fx.send(requester, page, Msg::InvAck { token });
                }
            }
        }
    }

    /// Holds nothing long for a while, beginning with what is held now.
    pub(in crate::protocol) fn soften(
        &mut self,
        now: u64,
        home_of: impl Fn(Page) -> Option<MemberId>,
        fx: &mut Effects<D>,
    ) {
        self.soft_until = now.saturating_add(self.hold.soft());
        self.served = self.slots.number(now);
        self.let_go(now, |_| true, home_of, fx);
    }

    /// Lets go of the contended pages that somebody waits for, those whose hold is over if there are slots.
    pub(in crate::protocol) fn yield_contended(
        &mut self,
        now: u64,
        home_of: impl Fn(Page) -> Option<MemberId>,
        fx: &mut Effects<D>,
    ) {
        let has_slots = self.slots.number(now).is_some();
        self.let_go(now, |deferred| !has_slots || deferred.until <= now, home_of, fx);
    }

    fn let_go(
        &mut self,
        now: u64,
        is_meant: impl Fn(&Deferred) -> bool,
        home_of: impl Fn(Page) -> Option<MemberId>,
        fx: &mut Effects<D>,
    ) {
        let meant = self.deferred.iter().filter(|(page, d)| self.is_contended(*page) && is_meant(d));
        let pages: Vec<Page> = meant.map(|(page, _)| page).collect();
        for page in pages {
            self.shorten(now, page, &home_of, fx);
        }
    }

    /// Ends a hold early, but not before the shortest one is over: the instruction that the page came for needs it.
    fn shorten(
        &mut self,
        now: u64,
        page: Page,
        home_of: &impl Fn(Page) -> Option<MemberId>,
        fx: &mut Effects<D>,
    ) {
        let age = self.age(now, page).unwrap_or(u64::MAX);
        let least = self.hold.time(0);
        let Some(deferred) = self.deferred.get_mut(page) else { return };
        if age < least {
            let until = now.saturating_add(least - age);
            if until < deferred.until {
                deferred.until = until;
                fx.push(Command::Timer { page, at: until });
            }
        } else if let (Some(home), Some(deferred)) = (home_of(page), self.deferred.remove(page)) {
            self.serve(page, deferred.demand, home, fx);
        }
    }

    /// Remembers whether anybody here uses the memory, and lets go of what was held if not.
    pub(in crate::protocol) fn rest(
        &mut self,
        now: u64,
        resting: bool,
        home_of: impl Fn(Page) -> Option<MemberId>,
        fx: &mut Effects<D>,
    ) {
        self.resting = resting;
        self.served = self.slots.number(now);
        let held: Vec<Page> = if resting { self.deferred.keys().collect() } else { Vec::new() };
        for page in held {
            self.shorten(now, page, &home_of, fx);
        }
    }

    /// The state of a page that may go: it is here, nothing about it is under way, and its hold time is over.
    pub(in crate::protocol) fn evictable(&self, now: u64, page: Page) -> Option<State> {
        let state = self.state(page);
        let is_held = || self.age(now, page).is_some_and(|age| age <= self.hold.time(self.level(page)));
        let is_free = !self.is_pending(page) && !self.deferred.contains_key(page);
        let is_here = state != State::Invalid && !self.is_in_image(page);
        (is_here && is_free && !is_held()).then_some(state)
    }

    /// Asks the home to take a page back, or to forget this copy, unless something is under way here.
    pub(in crate::protocol) fn evict(&mut self, now: u64, page: Page, home: MemberId, fx: &mut Effects<D>) {
        let Some(state) = self.evictable(now, page) else { return };
        if state == State::Modified && home == self.me {
            return;
        }
        if state == State::Shared && is_on(SeededFault::SilentEviction) {
            fx.push(Command::Drop { page });
            return self.set(page, State::Invalid);
        }
        let token = self.next_token(now);
        fx.send(home, page, Msg::Put { token });
    }

    /// The home has found another sharer to answer for the page: this copy may go.
    pub(in crate::protocol) fn release(
        &mut self,
        page: Page,
        token: Token,
        home: MemberId,
        fx: &mut Effects<D>,
    ) -> Result<(), Rule> {
        if self.state(page) != State::Shared {
            return Err("released a copy that is not here");
        }
        if self.deferred.contains_key(page) {
            return Err("started a transaction before the one in front of it had ended");
        }
        fx.push(Command::Drop { page });
        self.set(page, State::Invalid);
        fx.send(home, page, Msg::Done { token });
        Ok(())
    }
}
