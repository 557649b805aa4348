//! The pages a member has: faults in, grants in, demands of the homes served.
//!
//! ```text
//!              Grant(Shared)               Grant(Modified, keep)
//!   Invalid ------------------> Shared ---------------------------> Modified
//!      ^  \                     |   ^                                |  |
//!      |   \---------------------------- Grant(Modified) ----------->|  |
//!      |---- Invalidate, Forward(write) ----|     ^--- Forward(read) ---|  |
//!      |------------------- Forward(write) --------------------------------|
//! ```

use super::core::{Command, Effects};
use super::hold::Hold;
use super::message::{Contents, MemberSet, Msg, Right, Served, Terms, Token, Want};
use super::pages::Share;
use super::slots::Slots;
use crate::addr::MemberId;
use crate::layout::Page;
use crate::seeded::{SeededFault, is_on};
use std::collections::BTreeMap;

/// What a member has of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Nothing.
    Invalid,
    /// A read-only copy.
    Shared,
    /// The only copy, writable.
    Modified,
}

/// Low bits of a page's byte: its state.
const STATE_MASK: u8 = 3;
/// Three bits of a page's byte: its hold level.
const LEVEL_SHIFT: u8 = 2;
const LEVEL_MASK: u8 = 7 << LEVEL_SHIFT;
/// Of a Modified page: its contents are still in the image ([`super::cut`]), not in memory.
const IN_IMAGE: u8 = 1 << 6;
/// Of a Modified page: it has not been written to since the last cut; the memory is write-protected.
const CLEAN: u8 = 1 << 7;
/// Stamps count units of 1024 ns and wrap; 0 means that the page never came from elsewhere.
const STAMP_SHIFT: u32 = 10;
/// An event may be this many units older than the page's stamp: a second.
const SKEW: u32 = 1 << 20;

/// A request of this member that is on its way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Pending<D> {
    token: Token,
    write: bool,
    /// Somebody wants to write while the page is being fetched for a reader.
    then_write: bool,
    want: Want,
    since: u64,
    remote: bool,
    /// No thread has touched the page yet.
    ahead: bool,
    /// The home may decline.
    hint: bool,
    /// It could not be answered at once.
    waited: bool,
    /// Who acknowledged so far.
    acked: MemberSet,
    grant: Option<(Terms, Contents<D>)>,
}

/// Why a page is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reason {
    pub(super) write: bool,
    /// No thread waits for it yet.
    pub(super) ahead: bool,
    /// The home may decline.
    pub(super) hint: bool,
}

impl Reason {
    /// A thread waits for it.
    fn fault(write: bool) -> Reason {
        Reason { write, ahead: false, hint: false }
    }
}

/// What the home asks of a member that has a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Demand {
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
struct Deferred {
    demand: Demand,
    until: u64,
}

/// The member's side of the protocol for one core's share of the pages.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Cache<D> {
    me: MemberId,
    share: Share,
    bytes: Vec<u8>,
    stamps: Vec<u32>,
    pending: BTreeMap<Page, Pending<D>>,
    deferred: BTreeMap<Page, Deferred>,
    /// Pages that this event made the member ask itself for.
    fresh: Vec<Page>,
    hold: Hold,
    slots: Slots,
    /// The last slot of which this member has had its part: nobody here used the memory for a while, or waited for
    /// another member.
    served: Option<u64>,
    /// Nobody here uses the memory at the moment.
    resting: bool,
    /// Until then somebody here waits for another member.
    soft_until: u64,
    key: u64,
    requests: u64,
}

/// A rule that a peer broke.
pub(super) type Rule = &'static str;

impl<D> Cache<D> {
    pub(super) fn new(me: MemberId, share: Share, pages: u32, hold: Hold, key: u64) -> Cache<D> {
        let slots = share.slots(pages);
        Cache {
            me,
            share,
            bytes: vec![0; slots],
            stamps: vec![0; slots],
            pending: BTreeMap::new(),
            deferred: BTreeMap::new(),
            fresh: Vec::new(),
            hold,
            slots: Slots::default(),
            served: None,
            resting: false,
            soft_until: 0,
            key,
            requests: 0,
        }
    }

    /// What the member has of a page.
    pub fn state(&self, page: Page) -> State {
        match self.bytes.get(self.share.slot(page)).map(|b| b & STATE_MASK) {
            Some(1) => State::Shared,
            Some(2) => State::Modified,
            _ => State::Invalid,
        }
    }

    pub(super) fn set(&mut self, page: Page, state: State) {
        if let Some(byte) = self.bytes.get_mut(self.share.slot(page)) {
            *byte = (*byte & LEVEL_MASK) | state as u8;
        }
    }

    fn flag(&self, page: Page, flag: u8) -> bool {
        self.bytes.get(self.share.slot(page)).is_some_and(|b| b & flag != 0)
    }

    /// Whether a Modified page has not been written to since the last cut.
    pub fn is_clean(&self, page: Page) -> bool {
        self.flag(page, CLEAN)
    }

    /// Whether a Modified page's contents are still in the image.
    pub fn is_in_image(&self, page: Page) -> bool {
        self.flag(page, IN_IMAGE)
    }

    /// Whether a Modified page may be written to.
    pub(super) fn is_writable(&self, page: Page) -> bool {
        self.state(page) == State::Modified && !self.flag(page, CLEAN | IN_IMAGE)
    }

    /// A Modified page has been saved: the next write shows as a fault. The shell write-protects it.
    pub(super) fn set_clean(&mut self, page: Page) {
        if let Some(byte) = self.bytes.get_mut(self.share.slot(page)) {
            *byte |= CLEAN;
        }
    }

    /// The page is here, and its contents are in the image.
    pub(super) fn adopt(&mut self, page: Page) {
        self.set(page, State::Modified);
        if let Some(byte) = self.bytes.get_mut(self.share.slot(page)) {
            *byte |= CLEAN | IN_IMAGE;
        }
    }

    /// Brings the contents of a page from the image, if they are still there. Says whether they were.
    pub(super) fn load(&mut self, page: Page, write: bool, wake: bool, fx: &mut Effects<D>) -> bool {
        if !self.is_in_image(page) {
            return false;
        }
        if let Some(byte) = self.bytes.get_mut(self.share.slot(page)) {
            *byte &= if write { !(IN_IMAGE | CLEAN) } else { !IN_IMAGE };
        }
        fx.push(Command::Load { page, protect: !write, wake });
        true
    }

    /// Whether nothing is under way here.
    pub(super) fn is_quiet(&self) -> bool {
        self.pending.is_empty() && self.deferred.is_empty()
    }

    /// An event has been handled in full: what is not answered now has to wait.
    pub(super) fn settle(&mut self) {
        while let Some(page) = self.fresh.pop() {
            if let Some(pending) = self.pending.get_mut(&page) {
                pending.waited = true;
            }
        }
    }

    /// Whether a request for the page is on its way.
    pub fn is_pending(&self, page: Page) -> bool {
        self.pending.contains_key(&page)
    }

    /// Pages with a request on its way.
    pub fn waiting(&self) -> impl Iterator<Item = Page> + '_ {
        self.pending.keys().copied()
    }

    /// Numbers of pages held shared and modified. Walks the whole table.
    pub fn resident(&self) -> (u64, u64) {
        self.bytes.iter().fold((0, 0), |(s, m), b| match b & STATE_MASK {
            1 => (s + 1, m),
            2 => (s, m + 1),
            _ => (s, m),
        })
    }

    fn level(&self, page: Page) -> u8 {
        self.bytes.get(self.share.slot(page)).map_or(0, |b| (b & LEVEL_MASK) >> LEVEL_SHIFT)
    }

    fn set_level(&mut self, page: Page, level: u8) {
        if let Some(byte) = self.bytes.get_mut(self.share.slot(page)) {
            *byte = (*byte & !LEVEL_MASK) | ((level << LEVEL_SHIFT) & LEVEL_MASK);
        }
    }

    fn stamp(&mut self, now: u64, page: Page) {
        if let Some(stamp) = self.stamps.get_mut(self.share.slot(page)) {
            *stamp = units(now);
        }
    }

    /// Time since the page came from elsewhere, in nanoseconds; `None` if it never did.
    fn age(&self, now: u64, page: Page) -> Option<u64> {
        let stamp = *self.stamps.get(self.share.slot(page))?;
        let age = units(now).wrapping_sub(stamp);
        // Another thread may have taken its time before the one that put the page in place.
        let age = if age > u32::MAX - SKEW { 0 } else { age };
        (stamp != 0).then(|| u64::from(age) << STAMP_SHIFT)
    }

    fn next_token(&mut self, now: u64) -> Token {
        self.requests = self.requests.wrapping_add(1);
        // SplitMix64: peers that are not told a token can't guess it from others.
        let mut z = self.key.wrapping_add(self.requests.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        if self.key != 0 {
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^= z >> 31;
        } else {
            z = self.requests;
        }
        Token(z).patient(self.is_patient(now))
    }

    /// Whether this member has had its part of the present slot.
    fn is_patient(&self, now: u64) -> bool {
        let slot = self.slots.number(now);
        slot.is_some() && slot == self.served
    }

    /// A thread of this member touched a page without the right to.
    pub(super) fn fault(&mut self, now: u64, page: Page, write: bool, home: MemberId, fx: &mut Effects<D>) {
        match self.state(page) {
            State::Modified if self.load(page, write, true, fx) => return,
            State::Modified if write && self.is_clean(page) => {
                if let Some(byte) = self.bytes.get_mut(self.share.slot(page)) {
                    *byte &= !CLEAN;
                }
                return fx.push(Command::Reopen { page });
            }
            State::Modified => return fx.push(Command::Wake { page }),
            State::Shared if !write => return fx.push(Command::Wake { page }),
            _ => {}
        }
        // A contended page that is read is written next: one request instead of two (migratory sharing; Stenstrom, Brorsson,
        // Sandberg 1993).
        let write = write || self.is_contended(page);
        if let Some(pending) = self.pending.get_mut(&page) {
            pending.then_write |= write && (!pending.write || pending.hint);
            pending.ahead = false;
            return;
        }
        self.request(now, page, Reason::fault(write), home, fx);
    }

    /// Asks for a page that a thread of this member is about to miss, unless it is here or on its way.
    pub(super) fn ahead(&mut self, now: u64, page: Page, home: MemberId, fx: &mut Effects<D>) {
        if self.state(page) == State::Invalid && !self.is_pending(page) {
            self.request(now, page, Reason { write: true, ahead: true, hint: false }, home, fx);
        }
    }

    /// The state of a page that may go: it is here, nothing about it is under way, and its hold time is over.
    pub(super) fn evictable(&self, now: u64, page: Page) -> Option<State> {
        let state = self.state(page);
        let is_held = || self.age(now, page).is_some_and(|age| age <= self.hold.time(self.level(page)));
        let is_free = !self.is_pending(page) && !self.deferred.contains_key(&page);
        let is_here = state != State::Invalid && !self.is_in_image(page);
        (is_here && is_free && !is_held()).then_some(state)
    }

    /// Asks the home to take a page back, or to forget this copy, unless something is under way here.
    pub(super) fn evict(&mut self, now: u64, page: Page, home: MemberId, fx: &mut Effects<D>) {
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
    pub(super) fn release(
        &mut self,
        page: Page,
        token: Token,
        home: MemberId,
        fx: &mut Effects<D>,
    ) -> Result<(), Rule> {
        if self.state(page) != State::Shared {
            return Err("released a copy that is not here");
        }
        if self.deferred.contains_key(&page) {
            return Err("started a transaction before the one in front of it had ended");
        }
        fx.push(Command::Drop { page });
        self.set(page, State::Invalid);
        fx.send(home, page, Msg::Done { token });
        Ok(())
    }

    /// Asks for a page that a thread of this member may touch, unless it is here or on its way.
    pub(super) fn hint(&mut self, now: u64, page: Page, reason: Reason, home: MemberId, fx: &mut Effects<D>) {
        if self.state(page) == State::Invalid && !self.is_pending(page) && !self.is_contended(page) {
            self.request(now, page, reason, home, fx);
        }
    }

    /// The home would rather not.
    pub(super) fn declined(
        &mut self,
        now: u64,
        page: Page,
        from: MemberId,
        token: Token,
        home: MemberId,
        fx: &mut Effects<D>,
    ) -> Result<(), Rule> {
        let pending = self.pending.get(&page).filter(|p| p.hint && p.token == token && from == home);
        let Some(pending) = pending else { return Err("declined what nobody asked for") };
        if pending.grant.is_some() || !pending.acked.is_empty() {
            return Err("declined what was granted");
        }
        let (is_awaited, write) = (!pending.ahead, pending.then_write);
        self.pending.remove(&page);
        if is_awaited {
            self.request(now, page, Reason::fault(write), home, fx);
        }
        Ok(())
    }

    /// Whether others ask for the page again and again right after it came.
    pub fn is_contended(&self, page: Page) -> bool {
        self.hold.is_contended(self.level(page))
    }

    /// Holds nothing long for a while, beginning with what is held now.
    pub(super) fn soften(
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
    pub(super) fn yield_contended(
        &mut self,
        now: u64,
        home_of: impl Fn(Page) -> Option<MemberId>,
        fx: &mut Effects<D>,
    ) {
        let has_slots = self.slots.number(now).is_some();
        self.let_go(now, |deferred| !has_slots || deferred.until <= now, home_of, fx);
    }

    /// What a remote fault costs here, in nanoseconds; 0 if nobody knows yet.
    pub fn transfer(&self) -> u64 {
        self.hold.transfer()
    }

    /// The members have agreed on their slots.
    pub(super) fn set_slots(&mut self, slots: Slots) {
        self.slots = slots;
    }

    fn let_go(
        &mut self,
        now: u64,
        is_meant: impl Fn(&Deferred) -> bool,
        home_of: impl Fn(Page) -> Option<MemberId>,
        fx: &mut Effects<D>,
    ) {
        let meant = self.deferred.iter().filter(|(page, d)| self.is_contended(**page) && is_meant(d));
        let pages: Vec<Page> = meant.map(|(page, _)| *page).collect();
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
        let Some(deferred) = self.deferred.get_mut(&page) else { return };
        if age < least {
            let until = now.saturating_add(least - age);
            if until < deferred.until {
                deferred.until = until;
                fx.push(Command::Timer { page, at: until });
            }
        } else if let (Some(home), Some(deferred)) = (home_of(page), self.deferred.remove(&page)) {
            self.serve(page, deferred.demand, home, fx);
        }
    }

    /// Remembers whether anybody here uses the memory, and lets go of what was held if not.
    pub(super) fn rest(
        &mut self,
        now: u64,
        resting: bool,
        home_of: impl Fn(Page) -> Option<MemberId>,
        fx: &mut Effects<D>,
    ) {
        self.resting = resting;
        self.served = self.slots.number(now);
        let held: Vec<Page> = if resting { self.deferred.keys().copied().collect() } else { Vec::new() };
        for page in held {
            self.shorten(now, page, &home_of, fx);
        }
    }

    fn request(&mut self, now: u64, page: Page, reason: Reason, home: MemberId, fx: &mut Effects<D>) {
        let Reason { write, ahead, hint } = reason;
        if write {
            // Holding on to a copy that somebody waits for would only delay our own write, which queues behind it.
            if let Some(deferred) = self.deferred.remove(&page) {
                self.serve(page, deferred.demand, home, fx);
            }
        }
        let token = self.next_token(now);
        let want = match self.state(page) {
            State::Shared => Want::Upgrade,
            _ if write => Want::Write,
            _ => Want::Read,
        };
        let remote = home != self.me;
        if !remote {
            self.fresh.push(page);
        }
        self.pending.insert(
            page,
            Pending {
                token,
                write,
                then_write: false,
                want,
                since: now,
                remote,
                ahead,
                hint,
                waited: false,
                acked: MemberSet::EMPTY,
                grant: None,
            },
        );
        fx.send(home, page, Msg::Get { write, token, hint });
    }

    /// The page arrives, or the right to write the copy that is here.
    #[allow(clippy::too_many_arguments)] // One argument per field of the message.
    pub(super) fn grant(
        &mut self,
        now: u64,
        page: Page,
        from: MemberId,
        terms: Terms,
        contents: Contents<D>,
        home: MemberId,
        fx: &mut Effects<D>,
    ) -> Result<(), Rule> {
        let state = self.state(page);
        let Some(pending) = self.pending.get_mut(&page) else {
            return Err("granted a page that nobody asked for");
        };
        if pending.token != terms.token {
            return Err("granted a page without the right to");
        }
        if pending.grant.is_some() {
            return Err("granted a page that is granted already");
        }
        if pending.write && terms.right == Right::Shared {
            return Err("granted a read where a write was asked for");
        }
        if terms.right == Right::Shared && !terms.acks.is_empty() {
            return Err("granted a read that waits for acknowledgements");
        }
        if !terms.done && from != home {
            return Err("granted a page behind its home's back");
        }
        if terms.acks.has(self.me) {
            return Err("told the requester to wait for itself");
        }
        let keep = matches!(contents, Contents::Keep);
        if keep != (state == State::Shared) {
            return Err(if keep {
                "granted a write to a copy that is not there"
            } else {
                "sent a page that is already here"
            });
        }
        pending.remote |= from != self.me;
        pending.grant = Some((terms, contents));
        self.complete(now, page, home, fx)
    }

    /// A sharer dropped its copy for this member's write.
    pub(super) fn inv_ack(
        &mut self,
        now: u64,
        page: Page,
        from: MemberId,
        token: Token,
        home: MemberId,
        fx: &mut Effects<D>,
    ) -> Result<(), Rule> {
        let Some(pending) = self.pending.get_mut(&page).filter(|p| p.write) else {
            return Err("acknowledged an invalidation that nobody waits for");
        };
        if pending.token != token {
            return Err("acknowledged an invalidation without the right to");
        }
        if pending.acked.has(from) {
            return Err("acknowledged an invalidation twice");
        }
        pending.remote |= from != self.me;
        pending.acked = pending.acked.with(from);
        self.complete(now, page, home, fx)
    }

    fn complete(&mut self, now: u64, page: Page, home: MemberId, fx: &mut Effects<D>) -> Result<(), Rule> {
        let Some(pending) = self.pending.get(&page) else { return Ok(()) };
        let Some((terms, _)) = &pending.grant else { return Ok(()) };
        if pending.acked.0 & !terms.acks.0 != 0 {
            return Err("the acknowledgements are not the ones that the home asked for");
        }
        if pending.acked != terms.acks && !is_on(SeededFault::WriteBeforeAcks) {
            return Ok(());
        }
        let Some(pending) = self.pending.remove(&page) else { return Ok(()) };
        let Some((terms, contents)) = pending.grant else { return Ok(()) };
        let state = match terms.right {
            Right::Shared => State::Shared,
            Right::Modified => State::Modified,
        };
        self.set(page, state);
        // Who waited in line needs its time as well, even if nobody else had to answer in the end.
        if pending.remote || pending.waited {
            self.stamp(now, page);
        }
        if pending.remote {
            // What a contended page costs is mostly the others' holds.
            if !self.is_contended(page) {
                self.hold.learn(now.saturating_sub(pending.since));
            }
        }
        let served =
            Served { want: pending.want, remote: pending.remote, since: pending.since, ahead: pending.ahead };
        fx.push(Command::Install { page, right: terms.right, contents, served });
        if terms.done {
            fx.send(home, page, Msg::Done { token: terms.token });
        }
        if pending.then_write && state == State::Shared {
            self.request(now, page, Reason::fault(true), home, fx);
        }
        Ok(())
    }

    /// The home wants something of a page that this member has.
    pub(super) fn demand(
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
        if self.deferred.contains_key(&page) {
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
    pub(super) fn awaited(
        &mut self,
        now: u64,
        page: Page,
        requester: MemberId,
        is_patient: bool,
        home: MemberId,
        fx: &mut Effects<D>,
    ) {
        let Some(until) = self.deferred.get(&page).map(|d| d.until) else { return };
        let age = self.age(now, page).unwrap_or(u64::MAX);
        let sooner = self.held_until(now, page, age, requester, is_patient);
        if sooner >= until {
            return;
        }
        if sooner <= now {
            if let Some(deferred) = self.deferred.remove(&page) {
                self.serve(page, deferred.demand, home, fx);
            }
        } else if let Some(deferred) = self.deferred.get_mut(&page) {
            deferred.until = sooner;
            fx.push(Command::Timer { page, at: sooner });
        }
    }

    /// A hold time may have run out.
    pub(super) fn timer(&mut self, now: u64, page: Page, home: MemberId, fx: &mut Effects<D>) {
        // An early timer is left over from a hold that ended early; every hold sets its own.
        if self.deferred.get(&page).is_some_and(|d| d.until <= now)
            && !is_on(SeededFault::EndlessHold)
            && let Some(deferred) = self.deferred.remove(&page)
        {
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
}

/// Nanoseconds in stamp units, never 0.
fn units(now: u64) -> u32 {
    let wrapped = (now >> STAMP_SHIFT) & u64::from(u32::MAX);
    u32::try_from(wrapped).unwrap_or(0).max(1)
}
