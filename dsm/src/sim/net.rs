//! The simulated network: one pipe of bytes per direction of a connection, as TCP is one.
//!
//! Bytes arrive late, in pieces of any size, and in order; different pipes know nothing of each other. A pipe has room
//! for so much; it can stall, end, or break.

use super::sched::{Event, Sched};
use crate::transport::link::Socket;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{self, Read};
use std::rc::Rc;

/// How a pipe behaves.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wire {
    /// Shortest time from sending to arrival, in nanoseconds.
    pub(super) fastest: u64,
    /// Longest.
    pub(super) slowest: u64,
    /// Bytes that it has room for.
    pub(super) room: usize,
    /// Whether bytes arrive in pieces of any size.
    pub(super) splits: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Open,
    /// What was sent arrives, then the stream ends.
    Closed,
    /// Nothing arrives any more.
    Broken,
}

#[derive(Debug)]
struct State {
    segments: VecDeque<(u64, Vec<u8>)>,
    /// Bytes of the first segment that have been read.
    read: usize,
    held: usize,
    last: u64,
    stalled_until: u64,
    is_full: bool,
    is_armed: bool,
    end: End,
}

/// Bytes on their way from one member to another.
#[derive(Debug)]
pub(super) struct Pipe {
    sched: Rc<Sched>,
    from: u16,
    to: u16,
    wire: Wire,
    state: RefCell<State>,
}

impl Pipe {
    pub(super) fn new(sched: Rc<Sched>, from: u16, to: u16, wire: Wire) -> Pipe {
        let state = State {
            segments: VecDeque::new(),
            read: 0,
            held: 0,
            last: 0,
            stalled_until: 0,
            is_full: false,
            is_armed: false,
            end: End::Open,
        };
        Pipe { sched, from, to, wire, state: RefCell::new(state) }
    }

    fn arm(&self, state: &mut State, at: u64) {
        if !state.is_armed {
            state.is_armed = true;
            self.sched.at(at.max(state.stalled_until), Event::Receive { member: self.to, from: self.from });
        }
    }

    /// The receiver has looked and goes to sleep until there is something again.
    pub(super) fn rearm(&self) {
        let mut state = self.state.borrow_mut();
        state.is_armed = false;
        if let Some((arrival, _)) = state.segments.front() {
            let at = *arrival;
            self.arm(&mut state, at);
        } else if state.end != End::Open {
            let now = self.sched.now();
            self.arm(&mut state, now);
        }
    }

    /// The receiver goes on at `at`.
    pub(super) fn resume(&self, at: u64) {
        let mut state = self.state.borrow_mut();
        state.is_armed = false;
        self.arm(&mut state, at);
    }

    /// Nothing arrives before `until`.
    pub(super) fn stall(&self, until: u64) {
        let mut state = self.state.borrow_mut();
        state.stalled_until = state.stalled_until.max(until);
        // Who is woken too early finds nothing and sleeps until then.
    }

    /// The stream ends; what is in flight still arrives, unless it is `broken`.
    pub(super) fn close(&self, broken: bool) {
        let mut state = self.state.borrow_mut();
        state.end = if broken { End::Broken } else { End::Closed };
        if broken {
            state.segments.clear();
            state.read = 0;
        }
        let at = state.last.max(self.sched.now());
        state.is_armed = false;
        self.arm(&mut state, at);
    }

    /// A new connection in the place of the one that broke.
    pub(super) fn reopen(&self) {
        let mut state = self.state.borrow_mut();
        state.segments.clear();
        (state.read, state.held, state.last) = (0, 0, self.sched.now());
        (state.is_full, state.is_armed, state.end) = (false, false, End::Open);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.state.borrow().segments.is_empty()
    }
}

impl Socket for Rc<Pipe> {
    fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.state.borrow_mut();
        if state.end != End::Open {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let room = self.wire.room.saturating_sub(state.held);
        let rng = &self.sched.rng;
        let mut n = bytes.len().min(room);
        if self.wire.splits && n > 1 && rng.chance(200) {
            n = rng.index(n) + 1;
        }
        if n == 0 {
            state.is_full = true;
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let arrival = self.sched.now() + rng.range(self.wire.fastest, self.wire.slowest);
        state.last = state.last.max(arrival);
        let arrival = state.last;
        state.held += n;
        state.segments.push_back((arrival, bytes.get(..n).unwrap_or(&[]).to_vec()));
        self.arm(&mut state, arrival);
        Ok(n)
    }

    fn abort(&self) {
        // Both ends of a pipe learn from the world that it has broken.
    }
}

/// The receiving end of a pipe. An error of kind `WouldBlock` where a socket would wait.
#[derive(Debug)]
pub(super) struct Stream(pub(super) Rc<Pipe>);

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let pipe = &*self.0;
        let mut state = pipe.state.borrow_mut();
        let now = pipe.sched.now();
        let start = state.read;
        let Some((arrival, bytes)) = state.segments.front() else {
            return match state.end {
                End::Open => Err(io::ErrorKind::WouldBlock.into()),
                End::Closed => Ok(0),
                End::Broken => Err(io::ErrorKind::ConnectionReset.into()),
            };
        };
        if *arrival > now || state.stalled_until > now {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let rest = bytes.get(start..).unwrap_or(&[]);
        let mut n = rest.len().min(buf.len());
        if pipe.wire.splits && n > 1 && pipe.sched.rng.chance(100) {
            n = pipe.sched.rng.index(n) + 1;
        }
        if let (Some(to), Some(from)) = (buf.get_mut(..n), rest.get(..n)) {
            to.copy_from_slice(from);
        }
        let is_done = n == rest.len();
        state.read = if is_done { 0 } else { start + n };
        if is_done {
            state.segments.pop_front();
        }
        state.held -= n;
        if std::mem::take(&mut state.is_full) {
            pipe.sched.at(now, Event::Flush { member: pipe.from, to: pipe.to });
        }
        Ok(n)
    }
}
