//! The pages a member has: faults in, grants in; [`giving`] serves the demands of the homes.
//!
//! ```text
//!              Grant(Shared)               Grant(Modified, keep)
//!   Invalid ------------------> Shared ---------------------------> Modified
//!      ^  \                     |   ^                                |  |
//!      |   \---------------------------- Grant(Modified) ----------->|  |
//!      |---- Invalidate, Forward(write) ----|     ^--- Forward(read) ---|  |
//!      |------------------- Forward(write) --------------------------------|
//! ```

mod giving;

pub(super) use giving::Demand;

use super::core::{Command, Effects};
use super::hold::Hold;
use super::message::{Contents, MemberSet, Msg, Right, Served, Terms, Token, Want};
use super::page_map::PageMap;
use super::pages::Share;
use super::slots::Slots;
use crate::addr::MemberId;
use crate::layout::Page;
use crate::seeded::{SeededFault, is_on};
use giving::Deferred;

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

fn state_of(byte: u8) -> State {
    match byte & STATE_MASK {
        1 => State::Shared,
        2 => State::Modified,
        _ => State::Invalid,
    }
}

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
    /// Who granted it.
    from: MemberId,
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

/// The member's side of the protocol for one core's share of the pages.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Cache<D> {
    me: MemberId,
    share: Share,
    bytes: Vec<u8>,
    stamps: Vec<u32>,
    pending: PageMap<Pending<D>>,
    deferred: PageMap<Deferred>,
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
            pending: PageMap::default(),
            deferred: PageMap::default(),
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
        state_of(self.bytes.get(self.share.slot(page)).copied().unwrap_or(0))
    }

    /// What it has of neighbouring pages of one block, and whether each is clean: see [`Cache::is_clean`].
    pub(super) fn states(&self, first: Page, count: usize) -> impl Iterator<Item = (State, bool)> + '_ {
        let at = self.share.slot(first);
        let bytes = self.bytes.get(at..at.saturating_add(count)).unwrap_or(&[]);
        bytes.iter().map(|byte| (state_of(*byte), byte & CLEAN != 0))
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
            if let Some(pending) = self.pending.get_mut(page) {
                pending.waited = true;
            }
        }
    }

    /// Whether a request for the page is on its way.
    pub fn is_pending(&self, page: Page) -> bool {
        self.pending.contains_key(page)
    }

    /// Pages with a request on its way.
    pub fn waiting(&self) -> impl Iterator<Item = Page> + '_ {
        self.pending.keys()
    }

    /// Numbers of pages held shared and modified. Walks the whole table.
    pub fn resident(&self) -> (u64, u64) {
        self.bytes.iter().fold((0, 0), |(s, m), b| match state_of(*b) {
            State::Shared => (s + 1, m),
            State::Modified => (s, m + 1),
            State::Invalid => (s, m),
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
        if let Some(pending) = self.pending.get_mut(page) {
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
        let pending = self.pending.get(page).filter(|p| p.hint && p.token == token && from == home);
        let Some(pending) = pending else { return Err("declined what nobody asked for") };
        if pending.grant.is_some() || !pending.acked.is_empty() {
            return Err("declined what was granted");
        }
        let (is_awaited, write) = (!pending.ahead, pending.then_write);
        self.pending.remove(page);
        if is_awaited {
            self.request(now, page, Reason::fault(write), home, fx);
        }
        Ok(())
    }

    /// Whether others ask for the page again and again right after it came.
    pub fn is_contended(&self, page: Page) -> bool {
        self.hold.is_contended(self.level(page))
    }

    /// What a remote fault costs here, in nanoseconds; 0 if nobody knows yet.
    pub fn transfer(&self) -> u64 {
        self.hold.transfer()
    }

    /// The members have agreed on their slots.
    pub(super) fn set_slots(&mut self, slots: Slots) {
        self.slots = slots;
    }

    fn request(&mut self, now: u64, page: Page, reason: Reason, home: MemberId, fx: &mut Effects<D>) {
        let Reason { write, ahead, hint } = reason;
        if write {
            // Holding on to a copy that somebody waits for would only delay our own write, which queues behind it.
            self.serve_deferred(page, home, fx);
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
                from: self.me,
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
        let Some(pending) = self.pending.get_mut(page) else {
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
        pending.from = from;
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
        let Some(pending) = self.pending.get_mut(page).filter(|p| p.write) else {
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
        let Some(pending) = self.pending.get(page) else { return Ok(()) };
        let Some((terms, _)) = &pending.grant else { return Ok(()) };
        if pending.acked.0 & !terms.acks.0 != 0 {
            return Err("the acknowledgements are not the ones that the home asked for");
        }
        if pending.acked != terms.acks && !is_on(SeededFault::WriteBeforeAcks) {
            return Ok(());
        }
        let Some(pending) = self.pending.remove(page) else { return Ok(()) };
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
        // Where nothing came from elsewhere it is the others' copies that had to go.
        let moved = pending.from != self.me && !matches!(contents, Contents::Keep);
        let other = pending.acked.without(self.me).iter().next().filter(|_| !moved);
        let served = Served {
            want: pending.want,
            remote: pending.remote,
            from: other.unwrap_or(pending.from),
            since: pending.since,
            ahead: pending.ahead,
        };
        fx.push(Command::Install { page, right: terms.right, contents, served });
        if terms.done {
            fx.send(home, page, Msg::Done { token: terms.token });
        }
        if pending.then_write && state == State::Shared {
            self.request(now, page, Reason::fault(true), home, fx);
        }
        Ok(())
    }
}

/// Nanoseconds in stamp units, never 0.
fn units(now: u64) -> u32 {
    let wrapped = (now >> STAMP_SHIFT) & u64::from(u32::MAX);
    u32::try_from(wrapped).unwrap_or(0).max(1)
}
