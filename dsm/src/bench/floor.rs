//! The physical floor: what the kernel alone takes for the steps that no page fault over the network can do without.

use super::{BenchError, io_step};
use crate::addr::{HomeRange, MemberId, PAGE_SIZE};
use crate::layout::{Layout, Page};
use crate::region::{Kernel, Region, RegionError, Wake};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::thread;
use std::time::Instant;

/// Bytes of a request and of its answer in the round trip.
const ASK: usize = 64;
const ANSWER: usize = 4096;

/// Nanoseconds of every single step, in the order they were taken.
pub type Samples = Vec<u64>;

/// Nanoseconds since `start`.
pub(super) fn nanos(start: Instant) -> u64 {
    crate::clock::nanos(start.elapsed())
}

/// Answers requests of [`round_trips`] until the other end is gone.
pub fn echo(mut stream: TcpStream) {
    let mut ask = [0; ASK];
    let answer = [7; ANSWER];
    // The other end goes away when it has had enough; that is no error.
    let _ = stream.set_nodelay(true);
    while stream.read_exact(&mut ask).and_then(|()| stream.write_all(&answer)).is_ok() {}
}

/// Times `count` round trips of 64 bytes one way and 4096 the other.
pub fn round_trips(stream: &mut TcpStream, count: usize) -> Result<Samples, BenchError> {
    let step = || io_step("the round trip over loopback failed");
    stream.set_nodelay(true).map_err(step())?;
    let ask = [1; ASK];
    let mut answer = [0; ANSWER];
    let mut samples = Vec::with_capacity(count);
    for _ in 0..count {
        let start = Instant::now();
        stream.write_all(&ask).map_err(step())?;
        stream.read_exact(&mut answer).map_err(step())?;
        samples.push(nanos(start));
    }
    Ok(samples)
}

/// Bytes of a message without a page.
const SHORT: usize = 48;

/// Sends back every 48 bytes until the other end is gone.
pub fn bounce(mut stream: TcpStream) {
    let mut bytes = [0; SHORT];
    let _ = stream.set_nodelay(true);
    while stream.read_exact(&mut bytes).and_then(|()| stream.write_all(&bytes)).is_ok() {}
}

/// Times `count` rounds of 48 bytes to all streams, then as many from each.
pub fn fan_out(streams: &mut [TcpStream], count: usize) -> Result<Samples, BenchError> {
    let step = || io_step("the round trip over loopback failed");
    let mut bytes = [1; SHORT];
    let mut samples = Vec::with_capacity(count);
    for _ in 0..count {
        let start = Instant::now();
        for stream in &mut *streams {
            stream.write_all(&bytes).map_err(step())?;
        }
        for stream in &mut *streams {
            stream.read_exact(&mut bytes).map_err(step())?;
        }
        samples.push(nanos(start));
    }
    Ok(samples)
}

/// Uses so many bytes of memory and gives them back. A virtual machine may have to get a page from its host when it uses one that it has
/// not used for long, which takes longer than all else that is done to it: after this there are enough that it has.
pub fn warm_up(bytes: u64) {
    let mut memory = vec![0u8; usize::try_from(bytes).unwrap_or(0)];
    memory.iter_mut().step_by(ANSWER).for_each(|byte| *byte = 1);
    std::hint::black_box(&memory);
}

/// Sends `len` bytes, 64 pages at a time.
pub fn pour(mut stream: TcpStream, len: u64) {
    let bytes = vec![5; 64 * 4096];
    let mut left = len;
    while left > 0 {
        let n = left.min(bytes.len() as u64);
        let now = usize::try_from(n).ok().and_then(|n| bytes.get(..n)).unwrap_or(&bytes);
        // The other end goes away when it has had enough; that is no error.
        if stream.write_all(now).is_err() {
            return;
        }
        left -= n;
    }
}

/// Page faults that a thread of the process answers at once.
#[derive(Debug, Default)]
pub struct LocalFaults {
    /// Reads of absent pages.
    pub read: Samples,
    /// Writes to pages that are there, write-protected.
    pub protected: Samples,
    /// Writes to absent pages.
    pub write: Samples,
}

impl LocalFaults {
    /// Adds those of another run.
    pub fn extend(&mut self, other: LocalFaults) {
        self.read.extend(other.read);
        self.protected.extend(other.protected);
        self.write.extend(other.write);
    }
}

/// Times `count` faults of each kind, in the order in which the members' are timed.
pub fn local_faults(count: u32) -> Result<LocalFaults, BenchError> {
    let bytes = u64::from(count) * 2 * PAGE_SIZE;
    let layout = Layout::new(&[HomeRange { start: 0, len: bytes, home: MemberId(0) }])
        .map_err(|_| BenchError::Options("the number of pages must be positive"))?;
    let region = Region::new(&layout, 1)?;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let handler = scope.spawn(|| handle(&region, &stop));
        let memory = region.memory();
        let timed = |first: u32, write: bool| -> Samples {
            super::scattered(count.into())
                .filter_map(|n| {
                    let word = memory.u64_at((u64::from(first) + n) * PAGE_SIZE)?;
                    let start = Instant::now();
                    if write {
                        word.store(1, SeqCst);
                    } else {
                        word.load(SeqCst);
                    }
                    Some(nanos(start))
                })
                .collect()
        };
        let read = timed(0, false);
        let protected = timed(0, true);
        let write = timed(count, true);
        stop.store(true, Relaxed);
        match handler.join() {
            Ok(Ok(())) => Ok(LocalFaults { read, protected, write }),
            Ok(Err(e)) => Err(e.into()),
            Err(_) => Err(BenchError::Options("the fault handler panicked")),
        }
    })
}

fn handle(region: &Region, stop: &AtomicBool) -> Result<(), RegionError> {
    let failed = |source: io::Error| RegionError::Step { step: "wait for faults", gpa: 0, source };
    let Some(fd) = region.shard_fd(0) else { return Ok(()) };
    let contents = Box::new([5u8; 4096]);
    let mut faults = Vec::new();
    let mut present = std::collections::BTreeSet::<Page>::new();
    while !stop.load(Relaxed) {
        let mut fds = [PollFd::new(&fd, PollFlags::IN)];
        let timeout = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
        poll(&mut fds, Some(&timeout)).map_err(|e| failed(e.into()))?;
        region.faults(0, &mut faults).map_err(failed)?;
        for fault in faults.drain(..) {
            if present.insert(fault.page) {
                region.fill(fault.page, &*contents, !fault.write, Wake::Now)?;
            } else {
                region.unprotect(fault.page, Wake::Now)?;
            }
        }
    }
    Ok(())
}
