//! The home's side: who has a page, whose turn it is, and who must be told.

use super::Violation;
use super::cache::Rule;
use super::core::Effects;
use super::message::{Contents, MemberSet, Msg, Right, Terms, Token};
use super::page_map::PageMap;
use super::pages::Share;
use crate::addr::MemberId;
use crate::layout::Page;
use crate::seeded::{SeededFault, is_on};
use std::collections::VecDeque;

/// Who has a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Holders {
    /// Nobody has touched it: it is zero.
    Untouched,
    /// Read-only copies; `owner` (one of them) answers for the contents.
    Shared {
        /// Who answers.
        owner: MemberId,
        /// Who has a copy.
        sharers: MemberSet,
    },
    /// The only copy, writable.
    Modified {
        /// Who has it.
        owner: MemberId,
    },
}

/// [`Holders`] in 16 bytes whose zero is `Untouched`, so that the table costs nothing until pages are used.
type Packed = [u64; 2];
const SHARED: u64 = 1 << 16;
const MODIFIED: u64 = 2 << 16;
/// Of a shared page: its contents are those of the last cut ([`super::cut`]).
const SAVED: u64 = 4 << 16;

fn pack(holders: Holders) -> Packed {
    match holders {
        Holders::Untouched => [0, 0],
        Holders::Shared { owner, sharers } => [sharers.0, u64::from(owner.0) | SHARED],
        Holders::Modified { owner } => [0, u64::from(owner.0) | MODIFIED],
    }
}

fn unpack([sharers, word]: Packed) -> Holders {
    let owner = MemberId(u16::try_from(word & 0xFFFF).unwrap_or(0));
    match word & (SHARED | MODIFIED) {
        SHARED => Holders::Shared { owner, sharers: MemberSet(sharers) },
        MODIFIED => Holders::Modified { owner },
        _ => Holders::Untouched,
    }
}

fn is_saved([_, word]: Packed) -> bool {
    word & (SHARED | SAVED) == SHARED | SAVED
}

/// What a directory says of a page that somebody has touched, to be told to another home.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Entry(Packed);

impl Entry {
    /// Whether it makes sense and names no other members than these.
    pub fn is_about(&self, members: MemberSet) -> bool {
        let [sharers_of, word] = self.0;
        let plain = [sharers_of, word & !SAVED];
        match unpack(self.0) {
            Holders::Untouched => false,
            Holders::Modified { owner } => members.has(owner) && self.0 == pack(Holders::Modified { owner }),
            Holders::Shared { owner, sharers } => {
                sharers.has(owner)
                    && sharers.0 & !members.0 == 0
                    && plain == pack(Holders::Shared { owner, sharers })
            }
        }
    }

    /// Whether this member has the page.
    pub fn names(&self, member: MemberId) -> bool {
        match unpack(self.0) {
            Holders::Untouched => false,
            Holders::Modified { owner } => owner == member,
            Holders::Shared { sharers, .. } => sharers.has(member),
        }
    }
}

/// What somebody asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Request {
    pub(super) from: MemberId,
    pub(super) write: bool,
    pub(super) token: Token,
    pub(super) hint: bool,
}

/// Who broke a rule: with a queue, not always the one that spoke last.
#[derive(Debug)]
pub(super) struct Blame {
    pub(super) who: MemberId,
    pub(super) rule: Rule,
}

impl Blame {
    pub(super) fn on(self, page: Page) -> Violation {
        Violation { from: self.who, page, what: self.rule }
    }
}

/// A transaction that has begun, and those that wait for its end.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Busy {
    token: Token,
    /// Whose `Done` ends it: the requester, or this member when it answers alone.
    closer: MemberId,
    /// Who must not ask again before it has its answer; nobody if it did not ask.
    requester: Option<MemberId>,
    /// Who was told to answer.
    answering: MemberSet,
    queue: VecDeque<Request>,
}

impl Busy {
    /// Tells those that answer who waits behind the one for whom they do: see [`Msg::Awaited`].
    fn announce<D>(&self, page: Page, waiting: &Request, fx: &mut Effects<D>) {
        // Nobody holds a page against itself.
        for holder in self.answering.without(waiting.from).iter() {
            let patient = waiting.token.is_patient();
            fx.send(holder, page, Msg::Awaited { requester: waiting.from, patient });
        }
    }
}

/// The directory of one core's share of the pages homed at this member.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Directory {
    me: MemberId,
    share: Share,
    entries: Vec<Packed>,
    busy: PageMap<Busy>,
}

impl Directory {
    pub(super) fn new(me: MemberId, share: Share, pages: u32) -> Directory {
        Directory { me, share, entries: vec![[0, 0]; share.slots(pages)], busy: PageMap::default() }
    }

    /// Who has a page, as of the transaction that was begun last.
    pub fn holders(&self, page: Page) -> Holders {
        unpack(self.entries.get(self.share.slot(page)).copied().unwrap_or([0, 0]))
    }

    pub(super) fn set(&mut self, page: Page, holders: Holders) {
        if let Some(entry) = self.entries.get_mut(self.share.slot(page)) {
            *entry = pack(holders);
        }
    }

    /// All that is known of a page that somebody has touched.
    pub(super) fn entry(&self, page: Page) -> Option<Entry> {
        let packed = self.entries.get(self.share.slot(page)).copied().unwrap_or([0, 0]);
        (packed != [0, 0]).then_some(Entry(packed))
    }

    /// Takes over what another home knew of a page.
    pub(super) fn set_entry(&mut self, page: Page, entry: Option<Entry>) {
        if let Some(place) = self.entries.get_mut(self.share.slot(page)) {
            *place = entry.map_or([0, 0], |entry| entry.0);
        }
    }

    /// Changes who has a copy of a shared page, which does not change its contents.
    fn set_sharers(&mut self, page: Page, owner: MemberId, sharers: MemberSet) {
        let saved = self.is_saved(page);
        self.set(page, Holders::Shared { owner, sharers });
        if saved {
            self.set_saved(page);
        }
    }

    /// Whether a shared page's contents are those of the last cut.
    pub fn is_saved(&self, page: Page) -> bool {
        self.entries.get(self.share.slot(page)).is_some_and(|packed| is_saved(*packed))
    }

    /// Who has neighbouring pages of one block, and whether each is saved: see [`Directory::is_saved`].
    pub(super) fn entries(&self, first: Page, count: usize) -> impl Iterator<Item = (Holders, bool)> + '_ {
        let at = self.share.slot(first);
        let entries = self.entries.get(at..at.saturating_add(count)).unwrap_or(&[]);
        entries.iter().map(|packed| (unpack(*packed), is_saved(*packed)))
    }

    /// A shared page has been saved.
    pub(super) fn set_saved(&mut self, page: Page) {
        if let Some([_, word]) = self.entries.get_mut(self.share.slot(page)) {
            *word |= SAVED;
        }
    }

    /// Whether no transaction is under way here.
    pub(super) fn is_quiet(&self) -> bool {
        self.busy.is_empty()
    }

    /// Pages that `member` alone has, as of the transactions that were begun last.
    pub fn only_at(&self, member: MemberId) -> impl Iterator<Item = Page> + '_ {
        let is_alone = move |holders| match holders {
            Holders::Untouched => false,
            Holders::Modified { owner } => owner == member,
            Holders::Shared { sharers, .. } => sharers == MemberSet::only(member),
        };
        let alone = self.entries.iter().enumerate().filter(move |(_, packed)| is_alone(unpack(**packed)));
        alone.map(|(slot, _)| self.share.page(slot))
    }

    /// Whether a transaction of the page is under way.
    pub fn is_busy(&self, page: Page) -> bool {
        self.busy.contains_key(page)
    }

    /// Somebody asks for a page.
    pub(super) fn get<D>(&mut self, page: Page, request: Request, fx: &mut Effects<D>) -> Result<(), Blame> {
        let Request { from, token, .. } = request;
        if let Some(busy) = self.busy.get_mut(page) {
            if busy.requester == Some(from) || busy.queue.iter().any(|r| r.from == from) {
                return Err(Blame { who: from, rule: "asked again before it had its answer" });
            }
            if request.hint {
                fx.send(from, page, Msg::Decline { token });
            } else {
                busy.announce(page, &request, fx);
                busy.queue.push_back(request);
            }
            return Ok(());
        }
        // A page that has data is not taken from those who have it for somebody who only may come to write it.
        if request.hint && request.write && self.holders(page) != Holders::Untouched {
            fx.send(from, page, Msg::Decline { token });
            return Ok(());
        }
        self.start(page, request, VecDeque::new(), fx)
    }

    /// A holder would like to be rid of a page. Says whether this member is to ask for it: it is the last copy. One copy
    /// of several is let go in a transaction of its own. If another transaction is under way nothing happens.
    pub(super) fn put<D>(&mut self, page: Page, from: MemberId, token: Token, fx: &mut Effects<D>) -> bool {
        if self.is_busy(page) {
            return false;
        }
        match self.holders(page) {
            Holders::Modified { owner } => owner == from && from != self.me,
            Holders::Shared { owner, sharers } if sharers.has(from) => {
                let others = sharers.without(from);
                let Some(first) = others.iter().next() else { return from != self.me };
                let owner = match owner {
                    owner if owner != from => owner,
                    _ if others.has(self.me) => self.me,
                    _ => first,
                };
                self.set_sharers(page, owner, others);
                fx.send(from, page, Msg::Release { token });
                let answering = MemberSet::EMPTY;
                let busy = Busy { token, closer: from, requester: None, answering, queue: VecDeque::new() };
                self.busy.insert(page, busy);
                false
            }
            _ => false,
        }
    }

    /// A transaction has ended; the next in line begins.
    pub(super) fn done<D>(
        &mut self,
        page: Page,
        from: MemberId,
        token: Token,
        fx: &mut Effects<D>,
    ) -> Result<(), Blame> {
        match self.busy.get(page) {
            Some(busy) if busy.closer == from && busy.token == token => {}
            Some(_) if is_on(SeededFault::DoneByAnyone) => {}
            None if is_on(SeededFault::EarlyNext) => return Ok(()),
            _ => return Err(Blame { who: from, rule: "ended a transaction that is not its own" }),
        }
        let mut queue = self.busy.remove(page).map(|b| b.queue).unwrap_or_default();
        match queue.pop_front() {
            Some(next) => self.start(page, next, queue, fx),
            None => Ok(()),
        }
    }

    /// Begins a transaction. Requests that the home can grant alone with one message end right here; then the
    /// next in line begins.
    fn start<D>(
        &mut self,
        page: Page,
        request: Request,
        mut queue: VecDeque<Request>,
        fx: &mut Effects<D>,
    ) -> Result<(), Blame> {
        let mut next = Some(request);
        while let Some(request) = next {
            let Request { from: requester, token, .. } = request;
            if let Some((closer, answering)) =
                self.transact(page, request, fx).map_err(|rule| Blame { who: requester, rule })?
                && !is_on(SeededFault::EarlyNext)
            {
                let busy = Busy { token, closer, requester: Some(requester), answering, queue };
                for waiting in &busy.queue {
                    busy.announce(page, waiting, fx);
                }
                self.busy.insert(page, busy);
                return Ok(());
            }
            next = queue.pop_front();
        }
        Ok(())
    }

    /// Sends what a request takes. Returns whose `Done` will end the transaction and who must answer before, or `None` if it
    /// has ended.
    fn transact<D>(
        &mut self,
        page: Page,
        request: Request,
        fx: &mut Effects<D>,
    ) -> Result<Option<(MemberId, MemberSet)>, Rule> {
        let Request { from, write, token, .. } = request;
        let me = self.me;
        let right = if write { Right::Modified } else { Right::Shared };
        match self.holders(page) {
            Holders::Untouched => {
                self.set(page, Holders::Modified { owner: from });
                let terms = Terms { token, right: Right::Modified, acks: MemberSet::EMPTY, done: false };
                fx.send(from, page, Msg::Grant { terms, contents: Contents::Zero });
                Ok(None)
            }
            Holders::Modified { owner } => {
                if owner == from {
                    return Err("asked for a page that only it has");
                }
                self.set(
                    page,
                    if write {
                        Holders::Modified { owner: from }
                    } else {
                        Holders::Shared { owner, sharers: MemberSet::only(owner).with(from) }
                    },
                );
                let done = owner != me;
                let terms = Terms { token, right, acks: MemberSet::EMPTY, done };
                fx.send(owner, page, Msg::Forward { requester: from, terms, data: true });
                Ok(Some((if done { from } else { me }, MemberSet::only(owner))))
            }
            Holders::Shared { owner, sharers } if !write => {
                if sharers.has(from) {
                    return Err("asked to read a page that it has");
                }
                self.set_sharers(page, owner, sharers.with(from));
                let source = if sharers.has(me) { me } else { owner };
                let done = source != me;
                let terms = Terms { token, right, acks: MemberSet::EMPTY, done };
                fx.send(source, page, Msg::Forward { requester: from, terms, data: true });
                Ok(Some((if done { from } else { me }, MemberSet::only(source))))
            }
            Holders::Shared { owner, sharers } => {
                let data = !sharers.has(from);
                let others = sharers.without(from);
                self.set(page, Holders::Modified { owner: from });
                // The home answers where it can: then nobody needs to be told the end of it.
                let source = if others.has(me) {
                    Some(me)
                } else if data {
                    Some(owner)
                } else {
                    None
                };
                let mut acks = source.map_or(others, |s| others.without(s));
                if !data && is_on(SeededFault::UpgradeSkipsSharer) {
                    acks = acks.iter().next().map_or(acks, |first| acks.without(first));
                }
                let done = !acks.is_empty() || source.is_some_and(|s| s != me);
                let terms = Terms { token, right, acks, done };
                for sharer in acks.iter().skip(usize::from(is_on(SeededFault::LostInvalidation))) {
                    fx.send(sharer, page, Msg::Invalidate { requester: from, token });
                }
                match source {
                    Some(source) => {
                        fx.send(source, page, Msg::Forward { requester: from, terms, data });
                        Ok(Some((if done { from } else { me }, acks.with(source))))
                    }
                    None => {
                        fx.send(from, page, Msg::Grant { terms, contents: Contents::Keep });
                        Ok(done.then_some((from, acks)))
                    }
                }
            }
        }
    }
}
