//! The one thread for everything that waits: hold times, sockets that are full, heartbeats and deadlines.

use super::failure::Cause;
use super::shell::Shell;
use crate::clock::nanos;
use crate::layout::Page;
use crate::protocol::MemberSet;
use crate::transport::frame::Header;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::OwnedFd;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Time that peers have to notice a farewell.
const LINGER: Duration = Duration::from_millis(500);

/// Nanoseconds between two beats of the slots' clock.
const LEAD: u64 = 250_000_000;

/// What other threads tell the keeper.
#[derive(Debug)]
pub(super) struct Keeper {
    /// Readable when there is something new.
    kicked: OwnedFd,
    /// Readable for ever once the node has stopped; every fault thread waits on it, too.
    stopped: OwnedFd,
    timers: Mutex<BinaryHeap<Reverse<(u64, Page)>>>,
}

impl Keeper {
    pub(super) fn new() -> io::Result<Keeper> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Keeper {
            kicked: eventfd(0, flags)?,
            stopped: eventfd(0, flags)?,
            timers: Mutex::new(BinaryHeap::new()),
        })
    }

    fn timers(&self) -> std::sync::MutexGuard<'_, BinaryHeap<Reverse<(u64, Page)>>> {
        self.timers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Delivers a timer event for the page at `at`.
    pub(super) fn set_timer(&self, at: u64, page: Page) {
        let is_first = {
            let mut timers = self.timers();
            let is_first = timers.peek().is_none_or(|Reverse((first, _))| at < *first);
            timers.push(Reverse((at, page)));
            is_first
        };
        if is_first {
            self.kick();
        }
    }

    /// The pages whose time has come, earliest first.
    fn due(&self, now: u64) -> Vec<Page> {
        let mut timers = self.timers();
        let mut due = Vec::new();
        while let Some(Reverse((at, page))) = timers.peek().copied()
            && at <= now
        {
            timers.pop();
            due.push(page);
        }
        due
    }

    fn next(&self) -> Option<u64> {
        self.timers().peek().map(|Reverse((at, _))| *at)
    }

    /// Makes the keeper look again.
    pub(super) fn kick(&self) {
        // It can only fail when it is kicked already as often as a counter can count.
        let _ = rustix::io::write(&self.kicked, &1u64.to_ne_bytes());
    }

    /// Ends the keeper and the fault threads.
    pub(super) fn stop(&self) {
        let _ = rustix::io::write(&self.stopped, &1u64.to_ne_bytes());
        self.kick();
    }

    pub(super) fn stopped_fd(&self) -> &OwnedFd {
        &self.stopped
    }
}

pub(super) fn run(shell: &Shell) {
    let keeper = shell.keeper();
    let deadline = nanos(shell.config().deadline).max(4_000_000);
    let beat = deadline / 4;
    let mut checked = shell.now();
    let mut next_beat = 0;
    while shell.is_running() {
        let due = keeper.due(shell.now());
        if !due.is_empty() {
            shell.timers(&due);
        }
        let now = shell.now();
        if now >= next_beat {
            next_beat = now.saturating_add(LEAD);
            shell.flush_quietly(shell.lead());
        }
        if now.saturating_sub(checked) >= beat {
            // This process was stopped, or starved: its peers' words may still wait to be read.
            if now.saturating_sub(checked) > 2 * beat {
                shell.links().for_each(|l| l.forgive(now));
            }
            checked = now;
            heartbeat(shell, now, beat, deadline);
        }
        wait(shell, keeper.next().unwrap_or(u64::MAX).min(checked + beat).min(next_beat));
    }
    if shell.is_leaving() {
        linger(shell);
    }
}

/// After a farewell: lets the peers finish, then ends what is left of the streams, so that no receive thread waits for
/// ever.
fn linger(shell: &Shell) {
    let end = Instant::now() + LINGER;
    while Instant::now() < end && !shell.links().all(|l| l.has_ended()) {
        std::thread::sleep(Duration::from_millis(2));
    }
    shell.links().for_each(|l| l.close());
}

fn wait(shell: &Shell, until: u64) {
    let keeper = shell.keeper();
    let full: Vec<_> =
        shell.links().filter(|l| l.full_since() != 0).map(|l| (l.peer(), l.stream())).collect();
    let mut fds = vec![PollFd::new(&keeper.kicked, PollFlags::IN)];
    fds.extend(full.iter().map(|(_, stream)| PollFd::new(&**stream, PollFlags::OUT)));
    let left = until.saturating_sub(shell.now());
    let timeout = Timespec {
        tv_sec: i64::try_from(left / 1_000_000_000).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(left % 1_000_000_000).unwrap_or(0),
    };
    match poll(&mut fds, Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(e) => return shell.fail(None, Cause::Local(format!("can't wait: {e}"))),
    }
    let mut count = [0; 8];
    // Empty when it was not kicked.
    let _ = rustix::io::read(&keeper.kicked, &mut count);
    let talk = full.iter().fold(MemberSet::EMPTY, |set, l| set.with(l.0));
    shell.flush_quietly(talk);
}

fn heartbeat(shell: &Shell, now: u64, beat: u64, deadline: u64) {
    let mut talk = MemberSet::EMPTY;
    for link in shell.links().filter(|l| !l.has_left() && !l.is_broken()) {
        let silent = now.saturating_sub(link.heard());
        let full = link.full_since();
        let is_stuck = full != 0 && now.saturating_sub(full) > deadline;
        if link.keeps() && (silent > deadline || is_stuck) {
            // Half open, perhaps: its receive thread looks for the peer again.
            link.give_up();
            continue;
        }
        if silent > deadline {
            return shell.fail(Some(link.peer()), Cause::Silent(shell.config().deadline));
        }
        if is_stuck {
            return shell.fail(Some(link.peer()), Cause::Stuck(shell.config().deadline));
        }
        if full == 0 && now.saturating_sub(link.spoke()) >= beat {
            link.push(&Header::ping(shell.config().me, shell.epoch()));
            talk = talk.with(link.peer());
        }
    }
    shell.flush_quietly(talk);
}
