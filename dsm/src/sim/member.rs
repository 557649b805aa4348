//! One member: the node's own code over simulated memory, sockets and time.

use super::memory::Memory;
use super::net::{Pipe, Stream};
use super::sched::Event;
use super::workload::Thread;
use super::world::World;
use crate::addr::{Epoch, MemberId};
use crate::clock::nanos;
use crate::layout::{Layout, Page};
use crate::node::Cause;
use crate::node::engine::Engine;
use crate::node::shard::{Env, PageBuf};
use crate::protocol::{Core, CoreConfig, Event as Input, MemberSet};
use crate::region::{Fault, Kernel, RegionError, Wake};
use crate::transport::frame::Header;
use crate::transport::link::{Link, Queue};
use crate::transport::reader::FrameReader;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::rc::Rc;

/// Why a member's memory has failed.
pub(super) type Failure = (Option<MemberId>, Cause);

/// One connection: what goes out and what comes in.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) link: Link<Rc<Pipe>>,
    pub(super) reader: RefCell<FrameReader<Stream>>,
    pub(super) incoming: Rc<Pipe>,
    /// Whether its receive thread is at work on a frame.
    pub(super) is_receiving: Cell<bool>,
    /// Breaks of the connection that will heal.
    pub(super) blips: Cell<u32>,
}

/// What the simulation remembers of an event while it is handled.
#[derive(Clone, Copy, Debug, Default)]
struct Handling {
    at: u64,
    is_remote: bool,
}

/// A member.
pub(super) struct Member {
    pub(super) number: u16,
    /// Number of the table of homes that it has.
    pub(super) epoch: Cell<Epoch>,
    pub(super) engine: Engine,
    pub(super) memory: RefCell<Memory>,
    pub(super) peers: Vec<Option<Peer>>,
    pub(super) threads: RefCell<Vec<Thread>>,
    /// Faults that the fault thread has read and not yet served.
    pub(super) batch: RefCell<VecDeque<Fault>>,
    pub(super) is_watching: Cell<bool>,
    /// Whether a thread of the node has the lock of its one shard.
    pub(super) is_busy: Cell<bool>,
    /// Whether it holds the lock of a link's queue.
    pub(super) is_queueing: Cell<bool>,
    pub(super) backlog: RefCell<Vec<Event>>,
    /// Whether the keeper is at work.
    pub(super) is_keeping: Cell<bool>,
    replaced: Cell<u64>,
    pub(super) stopped_until: Cell<u64>,
    pub(super) slowness: Cell<u64>,
    pub(super) is_dead: Cell<bool>,
    pub(super) failure: RefCell<Option<Failure>>,
    /// When each page came from elsewhere, if it did.
    pub(super) came: RefCell<Vec<Option<u64>>>,
    /// The event that is being handled.
    handling: Cell<Handling>,
    /// Pages that lost a right while the event was handled.
    lost: RefCell<Vec<Page>>,
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Member").field("number", &self.number).finish_non_exhaustive()
    }
}

impl Member {
    pub(super) fn new(
        number: u16,
        core: &CoreConfig,
        budget: Option<u64>,
        peers: Vec<Option<Peer>>,
    ) -> Member {
        let pages = core.layout.pages();
        Member {
            number,
            epoch: Cell::new(super::world::EPOCH),
            engine: Engine::new(core, 0, budget),
            memory: RefCell::new(Memory::new(pages)),
            peers,
            threads: RefCell::default(),
            batch: RefCell::default(),
            is_watching: Cell::default(),
            is_busy: Cell::default(),
            is_queueing: Cell::default(),
            backlog: RefCell::default(),
            is_keeping: Cell::default(),
            replaced: Cell::default(),
            stopped_until: Cell::default(),
            slowness: Cell::new(1),
            is_dead: Cell::default(),
            failure: RefCell::default(),
            came: RefCell::new(vec![None; pages as usize]),
            handling: Cell::default(),
            lost: RefCell::default(),
        }
    }

    pub(super) fn peer(&self, number: u16) -> Option<&Peer> {
        self.peers.get(usize::from(number))?.as_ref()
    }

    /// Whether the node still answers.
    pub(super) fn is_running(&self) -> bool {
        !self.is_dead.get() && self.failure.borrow().is_none()
    }

    fn set_came(&self, page: Page) {
        let Handling { at, is_remote } = self.handling.get();
        if let Some(came) = self.came.borrow_mut().get_mut(page.0 as usize) {
            *came = is_remote.then_some(at);
        }
    }
}

/// A member in its world: what the node's code sees of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place<'a> {
    pub(super) world: &'a World,
    pub(super) member: &'a Member,
}

impl Place<'_> {
    fn trace(&self, page: Page, text: impl FnOnce() -> String) {
        self.world.trace(Some(self.member.number), Some(page), text);
    }

    /// Tells the world which right this member has to the page now.
    fn set_right(&self, page: Page) {
        let copy = self.member.memory.borrow().copy(page).map(|c| c.writable);
        let truth = &mut *self.world.truth.borrow_mut();
        let result = truth.set_right(self.member.number, page, copy.is_some(), copy == Some(true));
        self.world.expect(Some(page), result);
    }

    /// A page that came from elsewhere stays for its hold time, unless this member asks for more of it itself.
    fn check_hold(&self, core: &Core<PageBuf>) {
        let Handling { at: now, .. } = self.member.handling.get();
        // Ages are known to a microsecond.
        let least = nanos(self.world.plan.hold.min).saturating_sub(2048);
        for page in self.member.lost.borrow_mut().drain(..) {
            let came = self.member.came.borrow().get(page.0 as usize).copied().flatten();
            let Some(came) = came else { continue };
            if now.saturating_sub(came) < least && !core.cache().is_pending(page) {
                let what = format!(
                    "member {} gave up page {} after {} ns, before its hold time was over",
                    self.member.number,
                    page.0,
                    now - came
                );
                self.world.expect(Some(page), Err(what));
            }
        }
    }

    fn wake_all(&self, page: Page, count: u32) {
        let number = self.member.number;
        for page in (page.0..page.0 + count).map(Page) {
            self.trace(page, || "wake".into());
            self.member.memory.borrow_mut().wake(page, |thread| self.world.thread_soon(number, thread));
        }
    }

    fn hiccup(&self) -> bool {
        self.world.sched.rng.chance(self.world.plan.hiccups)
    }
}

fn os_error(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

impl Kernel for Place<'_> {
    fn gpa_of(&self, page: Page) -> u64 {
        self.world.layout.gpa_of(page)
    }

    fn sys_copy(&self, page: Page, bytes: &[u8], protect: bool, wake: Wake) -> (usize, io::Result<()>) {
        self.world.pause();
        let mut done = 0;
        for (n, chunk) in (0..).zip(bytes.chunks(super::memory::PAGE)) {
            let next = Page(page.0 + n);
            if self.hiccup() {
                self.world.count(|t| t.again += 1);
                if n == 0 && self.world.sched.rng.chance(300) {
                    self.member.memory.borrow_mut().obstruct(next);
                }
                if n > 0 || !self.member.memory.borrow().is_occupied(next) {
                    break;
                }
            }
            if self.member.memory.borrow().is_occupied(next) {
                self.trace(next, || "COPY: EEXIST".into());
                self.world.count(|t| t.exists += 1);
                if done == 0 {
                    return (0, Err(os_error(libc::EEXIST)));
                }
                break;
            }
            if let Ok(page) = chunk.try_into() {
                let result = self.world.truth.borrow().check_contents(next, page);
                self.world.expect(Some(next), result);
            }
            self.member.memory.borrow_mut().put(next, chunk, !protect);
            self.member.set_came(next);
            self.trace(next, || format!("COPY{}", if protect { " with WP" } else { "" }));
            self.set_right(next);
            done += chunk.len();
        }
        if wake == Wake::Now && done > 0 {
            self.wake_all(page, u32::try_from(done / super::memory::PAGE).unwrap_or(u32::MAX));
        }
        self.world.pause();
        if done == bytes.len() { (done, Ok(())) } else { (done, Err(os_error(libc::EAGAIN))) }
    }

    fn sys_write_protect(&self, first: Page, count: u32, protect: bool, wake: Wake) -> io::Result<()> {
        for page in (first.0..first.0 + count).map(Page) {
            self.world.pause();
            if self.hiccup() {
                self.world.count(|t| t.again += 1);
                return Err(os_error(libc::EAGAIN));
            }
            self.trace(page, || if protect { "protect".into() } else { "unprotect".into() });
            if self.member.memory.borrow().copy(page).is_none() {
                let what = format!("protection of page {}, which is not there", page.0);
                self.world.expect(Some(page), Err(what));
            }
            self.member.memory.borrow_mut().protect(page, protect);
            if protect {
                self.member.lost.borrow_mut().push(page);
            } else {
                self.member.set_came(page);
            }
            self.set_right(page);
        }
        if wake == Wake::Now && !protect {
            self.wake_all(first, count);
        }
        self.world.pause();
        Ok(())
    }

    fn sys_move(&self, page: Page, out: Option<&mut Vec<u8>>) -> io::Result<()> {
        self.world.pause();
        // A kernel that can't, or a page that the kernel itself is reading.
        if self.world.sched.rng.chance(300) {
            return Err(os_error(libc::EBUSY));
        }
        let mut memory = self.member.memory.borrow_mut();
        let copy = memory.copy(page).ok_or_else(|| os_error(libc::ENOENT))?;
        if let Some(out) = out {
            out.extend_from_slice(&*copy.bytes);
        }
        memory.discard(page);
        drop(memory);
        self.trace(page, || "move away".into());
        self.member.lost.borrow_mut().push(page);
        self.set_right(page);
        self.world.pause();
        Ok(())
    }

    fn sys_wake(&self, page: Page, count: u32) -> io::Result<()> {
        self.world.pause();
        self.wake_all(page, count);
        self.world.pause();
        Ok(())
    }

    fn sys_discard(&self, page: Page, count: u32) -> io::Result<()> {
        for page in (page.0..page.0 + count).map(Page) {
            self.world.pause();
            self.trace(page, || "drop".into());
            if self.member.memory.borrow().copy(page).is_some() {
                self.member.lost.borrow_mut().push(page);
            }
            self.member.memory.borrow_mut().discard(page);
            self.set_right(page);
        }
        self.world.pause();
        Ok(())
    }

    fn read(&self, page: Page, out: &mut Vec<u8>) -> Result<(), RegionError> {
        self.world.pause();
        match self.member.memory.borrow().copy(page) {
            Some(copy) => out.extend_from_slice(&*copy.bytes),
            None => {
                let what = format!("the node itself reads page {}, which is not there, and waits", page.0);
                self.world.expect(Some(page), Err(what));
            }
        }
        self.world.pause();
        Ok(())
    }

    fn note_replaced(&self) {
        self.member.replaced.set(self.member.replaced.get() + 1);
    }

    fn replaced(&self) -> u64 {
        self.member.replaced.get()
    }
}

impl Env for Place<'_> {
    type Kernel = Self;

    fn kernel(&self) -> &Self {
        self
    }

    fn me(&self) -> MemberId {
        MemberId(self.member.number)
    }

    fn epoch(&self) -> Epoch {
        self.member.epoch.get()
    }

    fn layout(&self) -> &Layout {
        &self.world.layout
    }

    fn now(&self) -> u64 {
        self.world.sched.now()
    }

    fn push(&self, to: MemberId, header: &Header) -> bool {
        let Some(peer) = self.member.peer(to.0) else { return false };
        peer.link.push(header);
        self.world.trace_sent(self.member.number, to.0, header);
        self.world.flushed_by_another(self.member.number, to.0);
        self.world.pause();
        true
    }

    fn push_with(
        &self,
        to: MemberId,
        fill: impl FnOnce(&mut Queue) -> Result<(), RegionError>,
    ) -> Result<bool, RegionError> {
        let Some(peer) = self.member.peer(to.0) else { return Ok(false) };
        self.member.is_queueing.set(true);
        let result = peer.link.push_with(|queue| {
            let at = queue.bytes().len();
            fill(queue)?;
            let sent = |header: Header| self.world.trace_sent(self.member.number, to.0, &header);
            queue.headers(at).for_each(sent);
            Ok(())
        });
        self.member.is_queueing.set(false);
        result?;
        self.world.flushed_by_another(self.member.number, to.0);
        self.world.pause();
        Ok(true)
    }

    fn set_timer(&self, at: u64, page: Page) {
        self.trace(page, || format!("holds it until {}.{:03} us", at / 1000, at % 1000));
        self.world.count(|t| t.holds += 1);
        let late = self.world.sched.rng.skewed(self.world.plan.step * 4);
        let event = Event::Timer { member: self.member.number, page: page.0 };
        self.world.sched.at(at.saturating_add(late), event);
    }

    fn is_running(&self) -> bool {
        self.member.is_running()
    }

    fn fail(&self, peer: Option<MemberId>, cause: Cause) {
        self.world.fail(self.member, (peer, cause));
    }

    fn flush(&self, talk: MemberSet, _now: u64) {
        for peer in talk.iter() {
            self.world.flushed_soon(self.member.number, peer.0);
        }
    }

    fn before(&self, now: u64, event: &Input<PageBuf>) {
        self.world.note(self.member.number, now, event);
        self.member.is_busy.set(true);
        self.member.handling.set(Handling { at: now, is_remote: matches!(event, Input::Message { .. }) });
    }

    fn after(&self, core: &Core<PageBuf>) {
        self.check_hold(core);
        self.member.is_busy.set(false);
        for event in self.member.backlog.borrow_mut().drain(..) {
            self.world.sched.after(0, event);
        }
    }
}
