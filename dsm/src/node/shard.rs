//! One core's share of the pages: how what the core commands becomes system calls and frames, in which order.
//!
//! No thread, socket or clock: those are behind [`Env`], so the simulation runs this code as it is.

use super::PAGE;
use super::evict::Budget;
use super::failure::Cause;
use crate::addr::{Epoch, MemberId};
use crate::layout::{Layout, Page};
use crate::protocol::{Command, Contents, Core, Event, MemberSet, Msg, Right};
use crate::region::{Kernel, RegionError};
use crate::seeded::{SeededFault, is_on};
use crate::stats::ShardStats;
use crate::transport::frame::Header;
use std::sync::Arc;

/// Page buffers kept for reuse per core.
const SPARE: usize = 32;

/// A page on its way in.
pub(crate) type PageBuf = Box<[u8; PAGE]>;

/// What surrounds a shard.
pub(crate) trait Env {
    /// The guest's memory.
    type Kernel: Kernel;

    fn kernel(&self) -> &Self::Kernel;

    fn me(&self) -> MemberId;

    fn epoch(&self) -> Epoch;

    fn layout(&self) -> &Layout;

    /// Nanoseconds since the start.
    fn now(&self) -> u64;

    /// Queues a frame without a page; `false` if there is no such peer.
    fn push(&self, to: MemberId, header: &Header) -> bool;

    /// Queues a frame with a page; see [`crate::transport::link::Link::push_page`].
    fn push_page(
        &self,
        to: MemberId,
        fill: impl FnOnce(&mut Vec<u8>) -> Result<Header, RegionError>,
    ) -> Result<bool, RegionError>;

    /// Sees to it that [`Event::Timer`] comes at `at`.
    fn set_timer(&self, at: u64, page: Page);

    /// The contents of a page that are still in the image.
    ///
    /// # Errors
    /// The image can't be read; its text says why.
    fn image(&self, page: Page, _out: &mut [u8; PAGE]) -> Result<(), RegionError> {
        Err(RegionError::Image { gpa: self.layout().gpa_of(page), what: "there is none".into() })
    }

    /// Whether the memory has neither failed nor been shut down.
    fn is_running(&self) -> bool;

    /// The memory has failed, by the fault of `peer` if there is one.
    fn fail(&self, peer: Option<MemberId>, cause: Cause);

    /// Writes what is queued for these peers, without waiting.
    fn flush(&self, talk: MemberSet, now: u64);

    /// An event is about to be given to its core, with the core's lock held; for the simulation.
    fn before(&self, _now: u64, _event: &Event<PageBuf>) {}

    /// What the core commanded has been carried out, the lock is still held; for the simulation.
    fn after(&self, _core: &Core<PageBuf>) {}
}

/// What is left to do without the shard's lock.
#[derive(Default)]
pub(crate) struct After {
    /// Peers for whom frames were queued.
    pub(crate) talk: MemberSet,
    /// The page whose waiters are to be woken: with the lock still held, a woken thread that runs at once on this CPU and
    /// faults again would wait for it. Neighbours that came along need no wake: who waits for one has a fault of its own
    /// to be read, and finds the page there.
    pub(crate) wake: Option<Page>,
    /// Whether pages have come.
    pub(crate) has_come: bool,
    /// Contended pages that this member has just given away.
    pub(crate) lost: Vec<Page>,
    /// Whom to blame, and for what, if the memory has failed.
    pub(crate) failure: Option<(Option<MemberId>, Cause)>,
}

impl After {
    /// Adds what another event left to do. That one must have woken nobody.
    pub(crate) fn add(&mut self, other: After) {
        debug_assert!(other.wake.is_none(), "an event whose thread waits must be followed up itself");
        self.talk = MemberSet(self.talk.0 | other.talk.0);
        self.lost.extend(other.lost);
        self.has_come |= other.has_come;
        if self.failure.is_none() {
            self.failure = other.failure;
        }
    }

    /// Wakes who waits. Comes first of what is left to do.
    pub(crate) fn wake(&mut self, kernel: &impl Kernel) {
        if let Some(page) = self.wake.take()
            && let Err(e) = kernel.wake(page)
        {
            self.failure.get_or_insert((None, Cause::Local(e.to_string())));
        }
    }
}

/// A core, and what belongs to the same pages.
pub(crate) struct Shard {
    pub(crate) core: Core<PageBuf>,
    pub(crate) stats: ShardStats,
    out: Vec<Command<PageBuf>>,
    spare: Vec<PageBuf>,
    budget: Arc<Budget>,
}

impl Shard {
    pub(crate) fn new(core: Core<PageBuf>, stats: ShardStats, budget: Arc<Budget>) -> Shard {
        Shard { core, stats, out: Vec::new(), spare: Vec::new(), budget }
    }

    /// Gives an event to the core and carries out what it commands.
    pub(crate) fn process(&mut self, env: &impl Env, now: u64, event: Event<PageBuf>) -> After {
        let mut after = After::default();
        let mut out = std::mem::take(&mut self.out);
        if let Err(violation) = self.core.handle(now, event, &mut out) {
            after.failure = Some((Some(violation.from), Cause::Violation(violation.to_string())));
            return after;
        }
        for command in out.drain(..) {
            if let Err(e) = self.carry_out(env, command, &mut after) {
                after.failure = Some((None, Cause::Local(e.to_string())));
                break;
            }
        }
        self.out = out;
        after
    }

    fn carry_out(
        &mut self,
        env: &impl Env,
        command: Command<PageBuf>,
        after: &mut After,
    ) -> Result<(), RegionError> {
        let kernel = env.kernel();
        let stats = &mut self.stats;
        match command {
            Command::Send { to, page, msg } => {
                stats.sent(&msg);
                let gpa = env.layout().gpa_of(page);
                if env.push(to, &Header::message(env.me(), env.epoch(), gpa, &msg)) {
                    after.talk = after.talk.with(to);
                }
            }
            Command::Give { to, page, terms, protect, drop } => {
                if protect && !is_on(SeededFault::ReadBeforeProtect) {
                    kernel.protect(page)?;
                }
                let is_known = env.push_page(to, |queue| {
                    let at = queue.len();
                    kernel.read(page, queue)?;
                    if protect && is_on(SeededFault::ReadBeforeProtect) {
                        kernel.protect(page)?;
                    }
                    let is_zero = queue.get(at..).is_some_and(is_zero);
                    if is_zero {
                        queue.truncate(at);
                    }
                    if drop {
                        kernel.discard(page)?;
                        self.budget.add(-1);
                    }
                    stats.gave(page, is_zero);
                    let contents = if is_zero { Contents::Zero } else { Contents::Bytes(()) };
                    let gpa = env.layout().gpa_of(page);
                    Ok(Header::message(env.me(), env.epoch(), gpa, &Msg::Grant { terms, contents }))
                })?;
                if is_known {
                    after.talk = after.talk.with(to);
                }
                if drop && self.core.cache().is_contended(page) {
                    after.lost.push(page);
                }
            }
            Command::Drop { page } => {
                kernel.discard(page)?;
                self.budget.add(-1);
                stats.dropped(page);
                if self.core.cache().is_contended(page) {
                    after.lost.push(page);
                }
            }
            Command::Install { page, right, contents, served } => {
                let protect = right == Right::Shared;
                let replaced = kernel.replaced();
                self.budget.add(i64::from(!matches!(contents, Contents::Keep)));
                match contents {
                    Contents::Bytes(bytes) => {
                        kernel.fill(page, &bytes, protect)?;
                        if self.spare.len() < SPARE {
                            self.spare.push(bytes);
                        }
                    }
                    Contents::Zero => kernel.fill_zero(page, 1, protect)?,
                    Contents::Keep => kernel.unprotect(page)?,
                }
                stats.served(page, &served, env.now());
                after.has_come = true;
                // Nobody is known to wait for a page that comes ahead; who does nevertheless has a fault still to be read,
                // and finds the page there.
                let is_awaited = !served.ahead;
                if is_awaited && (!is_on(SeededFault::ForgottenWake) || replaced == kernel.replaced()) {
                    after.wake = Some(page);
                }
            }
            Command::Zero { page, count, served } => {
                kernel.fill_zero(page, count, false)?;
                self.budget.add(i64::from(count));
                stats.first_touch(page, count, &served, env.now());
                after.wake = Some(page);
                after.has_come = true;
            }
            Command::Load { page, protect, wake } => {
                let mut bytes = self.buffer(&[]);
                env.image(page, &mut bytes)?;
                kernel.fill(page, &bytes, protect)?;
                self.budget.add(1);
                after.has_come = true;
                if self.spare.len() < SPARE {
                    self.spare.push(bytes);
                }
                if wake {
                    after.wake = Some(page);
                }
            }
            Command::Reopen { page } => {
                kernel.unprotect(page)?;
                stats.reopened();
                after.wake = Some(page);
            }
            Command::Wake { page } => {
                after.wake = Some(page);
                stats.spurious();
            }
            Command::Timer { page, at } => {
                env.set_timer(at, page);
                stats.held();
            }
        }
        Ok(())
    }

    /// Turns a decoded message and the bytes behind it into one that owns its page.
    pub(crate) fn attach(&mut self, msg: Msg<()>, bytes: &[u8]) -> Msg<PageBuf> {
        match msg {
            Msg::Grant { terms, contents } => {
                let contents = match contents {
                    Contents::Bytes(()) => Contents::Bytes(self.buffer(bytes)),
                    Contents::Zero => Contents::Zero,
                    Contents::Keep => Contents::Keep,
                };
                Msg::Grant { terms, contents }
            }
            Msg::Get { write, token, hint } => Msg::Get { write, token, hint },
            Msg::Decline { token } => Msg::Decline { token },
            Msg::Forward { requester, terms, data } => Msg::Forward { requester, terms, data },
            Msg::Invalidate { requester, token } => Msg::Invalidate { requester, token },
            Msg::InvAck { token } => Msg::InvAck { token },
            Msg::Put { token } => Msg::Put { token },
            Msg::Release { token } => Msg::Release { token },
            Msg::Done { token } => Msg::Done { token },
        }
    }

    fn buffer(&mut self, bytes: &[u8]) -> PageBuf {
        let mut buf = self.spare.pop().unwrap_or_else(|| Box::new([0; PAGE]));
        if let Ok(page) = <&[u8; PAGE]>::try_from(bytes) {
            buf.copy_from_slice(page);
        }
        buf
    }
}

fn is_zero(page: &[u8]) -> bool {
    static ZERO: [u8; PAGE] = [0; PAGE];
    page == ZERO || (is_on(SeededFault::ZeroGrant) && page.starts_with(&[0; 8]))
}
