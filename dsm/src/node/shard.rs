//! One core's share of the pages: how what the core commands becomes system calls and frames, in which order.
//!
//! No thread, socket or clock: those are behind [`Env`], so the simulation runs this code as it is. [`runs`] does together
//! what concerns neighbouring pages.

mod runs;

use super::PAGE;
use super::evict::Budget;
use super::failure::Cause;
use crate::addr::{Epoch, MemberId};
use crate::layout::{Layout, Page};
use crate::protocol::{Command, Contents, Core, Event, MemberSet, Msg, Right};
use crate::region::{Kernel, RegionError, Wake};
use crate::seeded::{SeededFault, is_on};
use crate::stats::ShardStats;
use crate::transport::frame::Header;
use crate::transport::link::Queue;
use std::io;
use std::sync::Arc;

/// Page buffers kept for reuse per core.
const SPARE: usize = 4;

/// A page on its way in.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum PageBuf {
    /// One that may have to wait until others have answered, too.
    Own(Box<[u8; PAGE]>),
    /// The page with this number of the frame that is at hand, which is put in place at once.
    Nth(u32),
}

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

    /// Queues the frames that `fill` makes; `false` if there is no such peer. See
    /// [`crate::transport::link::Link::push_with`].
    fn push_with(
        &self,
        to: MemberId,
        fill: impl FnOnce(&mut Queue) -> Result<(), RegionError>,
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
    /// Pages that somebody waited for and that are there now, the first and how many. Neighbours that came along don't
    /// count: who waits for one has a fault of its own to be read, and finds the page there.
    pub(crate) came: Option<(Page, u32)>,
    /// Those whose waiters are still to be woken.
    pub(crate) wake: Option<(Page, u32)>,
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
        debug_assert!(
            other.came.is_none() && other.wake.is_none(),
            "an event whose thread waits must be followed up itself"
        );
        self.talk = MemberSet(self.talk.0 | other.talk.0);
        self.lost.extend(other.lost);
        self.has_come |= other.has_come;
        if self.failure.is_none() {
            self.failure = other.failure;
        }
    }

    /// Notes that who waits for these pages is to be woken. Who waits for one in between others is woken, too: it looks
    /// again.
    fn wake_later(&mut self, page: Page, count: u32) {
        self.wake = Some(around(self.wake, page, count));
        self.note_came(page, count);
    }

    /// The same of a page whose waiters have been woken with the page put in place.
    fn note_came(&mut self, page: Page, count: u32) {
        self.came = Some(around(self.came, page, count));
    }

    /// Wakes who waits. Comes first of what is left to do.
    pub(crate) fn wake(&mut self, kernel: &impl Kernel) {
        if let Some((page, count)) = self.wake.take()
            && let Err(e) = kernel.wake(page, count)
        {
            self.failure.get_or_insert((None, Cause::Local(e.to_string())));
        }
    }
}

/// The pages from the first to the last of both.
fn around(before: Option<(Page, u32)>, page: Page, count: u32) -> (Page, u32) {
    let (first, pages) = before.unwrap_or((page, 0));
    let start = first.min(page);
    let end = (first.0.saturating_add(pages)).max(page.0.saturating_add(count));
    (start, end - start.0)
}

/// A core, and what belongs to the same pages.
pub(crate) struct Shard {
    pub(crate) core: Core<PageBuf>,
    pub(crate) stats: ShardStats,
    out: Vec<Command<PageBuf>>,
    /// Where in `out` the commands of each event end.
    ends: Vec<usize>,
    /// Commands that can be carried out together.
    batch: Vec<Command<PageBuf>>,
    spare: Vec<Box<[u8; PAGE]>>,
    budget: Arc<Budget>,
}

impl Shard {
    pub(crate) fn new(core: Core<PageBuf>, stats: ShardStats, budget: Arc<Budget>) -> Shard {
        let (out, batch) = (Vec::new(), Vec::new());
        Shard { core, stats, out, ends: Vec::new(), batch, spare: Vec::new(), budget }
    }

    /// Gives events to the core and carries out what it commands. If there are several, each is about a page of its own.
    /// `bytes` has the pages that come with them.
    pub(crate) fn process(
        &mut self,
        env: &impl Env,
        now: u64,
        events: impl IntoIterator<Item = Event<PageBuf>>,
        bytes: &[u8],
    ) -> After {
        let mut after = After::default();
        let mut out = std::mem::take(&mut self.out);
        let mut ends = std::mem::take(&mut self.ends);
        for event in events {
            env.before(now, &event);
            if let Err(violation) = self.core.handle(now, event, &mut out) {
                after.failure = Some((Some(violation.from), Cause::Violation(violation.to_string())));
                break;
            }
            ends.push(out.len());
        }
        if after.failure.is_none()
            && let Err(e) = self.carry_out_all(env, &mut out, &ends, bytes, &mut after)
        {
            after.failure = Some((None, Cause::Local(e.to_string())));
        }
        out.clear();
        ends.clear();
        (self.out, self.ends) = (out, ends);
        after
    }

    fn carry_out_all(
        &mut self,
        env: &impl Env,
        commands: &mut Vec<Command<PageBuf>>,
        ends: &[usize],
        bytes: &[u8],
        after: &mut After,
    ) -> Result<(), RegionError> {
        let mut batch = std::mem::take(&mut self.batch);
        let mut result = runs::in_turns(commands, ends, |command| {
            if batch.last().is_some_and(|last| !runs::follows(env.layout(), last, &command)) {
                self.carry_out_batch(env, &mut batch, bytes, after)?;
            }
            batch.push(command);
            Ok(())
        });
        if result.is_ok() {
            result = self.carry_out_batch(env, &mut batch, bytes, after);
        }
        batch.clear();
        self.batch = batch;
        result
    }

    fn carry_out_batch(
        &mut self,
        env: &impl Env,
        batch: &mut Vec<Command<PageBuf>>,
        bytes: &[u8],
        after: &mut After,
    ) -> Result<(), RegionError> {
        if batch.len() > 1 {
            self.carry_out_run(env, batch, bytes, after)?;
            batch.clear();
        } else if let Some(command) = batch.pop() {
            self.carry_out(env, command, bytes, after)?;
        }
        Ok(())
    }

    fn carry_out(
        &mut self,
        env: &impl Env,
        command: Command<PageBuf>,
        bytes: &[u8],
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
                let is_late = is_on(SeededFault::ReadBeforeProtect);
                if protect && !drop && !is_late {
                    kernel.protect(page, 1)?;
                }
                let is_known = env.push_with(to, |queue| {
                    let frame = queue.begin();
                    let at = queue.bytes().len();
                    if drop && !is_late {
                        kernel.take(page, !protect, queue.bytes())?;
                    } else {
                        kernel.read(page, queue.bytes())?;
                    }
                    if protect && is_late {
                        kernel.protect(page, 1)?;
                    }
                    let is_zero = queue.bytes().get(at..).is_some_and(is_zero);
                    if is_zero {
                        queue.bytes().truncate(at);
                    }
                    if drop {
                        if is_late {
                            kernel.discard(page, 1)?;
                        }
                        self.budget.add(-1);
                    }
                    stats.gave(page, is_zero);
                    let contents = if is_zero { Contents::Zero } else { Contents::Bytes(()) };
                    let gpa = env.layout().gpa_of(page);
                    let msg = Msg::Grant { terms, contents };
                    queue.finish(frame, Header::message(env.me(), env.epoch(), gpa, &msg));
                    Ok(())
                })?;
                if is_known {
                    after.talk = after.talk.with(to);
                }
                if drop && self.core.cache().is_contended(page) {
                    after.lost.push(page);
                }
            }
            Command::Drop { page } => {
                kernel.drop_one(page)?;
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
                // Nobody is known to wait for a page that comes ahead; who does nevertheless has a fault still to be read,
                // and finds the page there.
                let is_awaited = !served.ahead;
                // With the lock still held: a call of its own would cost more than a woken thread that faults again has to
                // wait for the lock at most.
                let wake =
                    if is_awaited && !is_on(SeededFault::ForgottenWake) { Wake::Now } else { Wake::Later };
                match contents {
                    Contents::Bytes(PageBuf::Own(own)) => {
                        kernel.fill(page, &*own, protect, wake)?;
                        if self.spare.len() < SPARE {
                            self.spare.push(own);
                        }
                    }
                    Contents::Bytes(PageBuf::Nth(n)) => {
                        let nth = bytes.chunks_exact(PAGE).nth(usize::try_from(n).unwrap_or(usize::MAX));
                        let lacking = || kernel.step("fill", page, io::ErrorKind::InvalidInput.into());
                        kernel.fill(page, nth.ok_or_else(lacking)?, protect, wake)?;
                    }
                    Contents::Zero => kernel.fill_zero(page, 1, protect, wake)?,
                    Contents::Keep => kernel.unprotect(page, wake)?,
                }
                stats.served(page, &served, env.now());
                after.has_come = true;
                if wake == Wake::Now {
                    after.note_came(page, 1);
                } else if is_awaited && replaced == kernel.replaced() {
                    after.wake_later(page, 1);
                }
            }
            Command::Zero { page, count, served } => {
                kernel.fill_zero(page, count, false, Wake::Later)?;
                self.budget.add(i64::from(count));
                stats.first_touch(page, count, &served, env.now());
                after.wake_later(page, 1);
                after.has_come = true;
            }
            Command::Load { page, protect, wake } => {
                let mut bytes = self.buffer(&[]);
                env.image(page, &mut bytes)?;
                kernel.fill(page, &*bytes, protect, Wake::Later)?;
                self.budget.add(1);
                after.has_come = true;
                if self.spare.len() < SPARE {
                    self.spare.push(bytes);
                }
                if wake {
                    after.wake_later(page, 1);
                }
            }
            Command::Reopen { page } => {
                kernel.unprotect(page, Wake::Now)?;
                stats.reopened();
                after.note_came(page, 1);
            }
            Command::Wake { page } => {
                after.wake_later(page, 1);
                stats.spurious();
            }
            Command::Timer { page, at } => {
                env.set_timer(at, page);
                stats.held();
            }
        }
        Ok(())
    }

    /// Where the page of a message is: the protocol may keep it only if others have to acknowledge first.
    pub(crate) fn attach(&mut self, msg: Msg<()>, bytes: &[u8]) -> Msg<PageBuf> {
        let waits = matches!(&msg, Msg::Grant { terms, .. } if !terms.acks.is_empty());
        msg.map(|()| if waits { PageBuf::Own(self.buffer(bytes)) } else { PageBuf::Nth(0) })
    }

    fn buffer(&mut self, bytes: &[u8]) -> Box<[u8; PAGE]> {
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
