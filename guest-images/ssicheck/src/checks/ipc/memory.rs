//! Messages in shared memory, announced by futex, eventfd or signal.

use std::borrow::Borrow;
use std::fs::File;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::checks::ipc::channel::{Channel, MAX_MESSAGE};
use crate::context::PATIENCE;
use crate::failure::{During, Failure, expect_eq};
use crate::sys::shared::{PAGE, Shared};
use crate::sys::{futex, io, process};

/// One of the two sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The one that asks.
    A,
    /// The one that answers.
    B,
}

impl Side {
    fn other(self) -> Side {
        if self == Side::A { Side::B } else { Side::A }
    }
}

/// The memory: per direction a page with the message count and the length, then the bytes.
#[derive(Debug)]
pub struct Mailbox;

/// Pages of a message.
const DATA_PAGES: usize = MAX_MESSAGE.div_ceil(PAGE);

impl Mailbox {
    /// Pages that both directions need.
    pub const PAGES: usize = 2 * (1 + DATA_PAGES);
}

/// The box that `from` fills: (count, length, bytes).
fn letterbox(memory: &Shared, from: Side) -> Result<(&AtomicU32, &AtomicU32, &[AtomicU8]), Failure> {
    let first = if from == Side::A { 0 } else { 1 + DATA_PAGES };
    let words = memory.words().get(first * PAGE / 4..).unwrap_or_default();
    let bytes = memory.bytes().get((first + 1) * PAGE..).unwrap_or_default();
    match words {
        [count, length, ..] => Ok((count, length, bytes)),
        _ => Err(Failure::Other("the shared memory is too small".into())),
    }
}

/// Puts a message into the box; the count makes it visible last.
fn put(memory: &Shared, from: Side, message: &[u8]) -> Result<u32, Failure> {
    let (count, length, bytes) = letterbox(memory, from)?;
    for (to, byte) in bytes.iter().zip(message) {
        to.store(*byte, Ordering::Relaxed);
    }
    length.store(u32::try_from(message.len()).unwrap_or(0), Ordering::Relaxed);
    Ok(count.fetch_add(1, Ordering::Release))
}

/// Takes the message out of the box; it must be the only one that came since the last.
fn take(memory: &Shared, from: Side, seen: &mut u32) -> Result<Vec<u8>, Failure> {
    let (count, length, bytes) = letterbox(memory, from)?;
    *seen += 1;
    expect_eq("messages put into shared memory", *seen, count.load(Ordering::Acquire))?;
    let length = usize::try_from(length.load(Ordering::Relaxed)).unwrap_or(0);
    Ok(bytes.iter().take(length.min(MAX_MESSAGE)).map(|b| b.load(Ordering::Relaxed)).collect())
}

/// Announced by a futex on the message count.
#[derive(Debug)]
pub struct ByFutex<M> {
    memory: M,
    side: Side,
    seen: u32,
}

impl<M: Borrow<Shared>> ByFutex<M> {
    /// One side's end.
    pub fn new(memory: M, side: Side) -> Self {
        ByFutex { memory, side, seen: 0 }
    }
}

impl<M: Borrow<Shared>> Channel for ByFutex<M> {
    fn send(&mut self, message: &[u8]) -> Result<(), Failure> {
        put(self.memory.borrow(), self.side, message)?;
        futex::wake(letterbox(self.memory.borrow(), self.side)?.0, 1);
        Ok(())
    }

    fn receive(&mut self) -> Result<Vec<u8>, Failure> {
        let count = letterbox(self.memory.borrow(), self.side.other())?.0;
        let start = Instant::now();
        while count.load(Ordering::Acquire) == self.seen {
            let left = PATIENCE.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Err(Failure::timeout("futex wake from the other process", PATIENCE));
            }
            // To the end, not in short naps: a lost wake must show as a failure.
            futex::wait(count, self.seen, left.max(Duration::from_millis(1)));
            if start.elapsed() >= PATIENCE {
                return Err(Failure::timeout("futex wake from the other process", PATIENCE));
            }
        }
        take(self.memory.borrow(), self.side.other(), &mut self.seen)
    }
}

/// Announced by an eventfd each way.
#[derive(Debug)]
pub struct ByEventfd<'a> {
    memory: &'a Shared,
    side: Side,
    own: &'a File,
    peer: &'a File,
    seen: u32,
}

impl<'a> ByEventfd<'a> {
    /// One side's end: it waits for `own` and rings `peer`.
    pub fn new(memory: &'a Shared, side: Side, own: &'a File, peer: &'a File) -> Self {
        ByEventfd { memory, side, own, peer, seen: 0 }
    }
}

impl Channel for ByEventfd<'_> {
    fn send(&mut self, message: &[u8]) -> Result<(), Failure> {
        put(self.memory, self.side, message)?;
        self.peer.write_all(&1u64.to_ne_bytes()).during("ringing an eventfd")
    }

    fn receive(&mut self) -> Result<Vec<u8>, Failure> {
        io::wait_readable(self.own, PATIENCE, "eventfd from the other process")?;
        let mut count = [0u8; 8];
        self.own.read_exact(&mut count).during("reading an eventfd")?;
        expect_eq("eventfd count", 1, u64::from_ne_bytes(count))?;
        take(self.memory, self.side.other(), &mut self.seen)
    }
}

/// Announced by SIGUSR1.
#[derive(Debug)]
pub struct BySignal<'a> {
    memory: &'a Shared,
    side: Side,
    peer: i32,
    seen: u32,
}

impl<'a> BySignal<'a> {
    /// One side's end; `peer` is the other process.
    pub fn new(memory: &'a Shared, side: Side, peer: i32) -> Self {
        BySignal { memory, side, peer, seen: 0 }
    }
}

impl Channel for BySignal<'_> {
    fn send(&mut self, message: &[u8]) -> Result<(), Failure> {
        put(self.memory, self.side, message)?;
        process::kill(self.peer, libc::SIGUSR1)
    }

    fn receive(&mut self) -> Result<Vec<u8>, Failure> {
        expect_eq("sender of SIGUSR1", self.peer, process::take_sigusr1()?)?;
        take(self.memory, self.side.other(), &mut self.seen)
    }
}
