//! Hearing a peer at once: where the next bytes come sooner than a thread is worth to be put to sleep and woken again, its receive
//! thread looks for them again and again instead of sleeping. At both ends of a page fault:
//!
//! ```text
//!  who asks                                          who answers
//!  fault thread    request sent, ask() -> signal
//!                                           |        receive thread  answer sent, expect_more()
//!  receive thread  asleep in recv ----------+-> looks                looks
//!                  has the answer <--------------------------------
//!                  the page's waiter runs, faults again -----------> has the request
//! ```
//!
//! Who waits for an answer has no use for the processor meanwhile; who waits for a request may have. Both are done only with peers
//! that were that fast the last times: how long they took is measured with everything that comes. When requests end, one look is in
//! vain, of at most twice the time that they took to come, less than it cost to answer a few of them.

use crate::clock::nanos;
use std::io::{self, Read};
use std::net::TcpStream;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::net::RecvFlags;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

/// A peer that takes longer is not waited for this way, nanoseconds.
const QUICK: u64 = 60_000;
/// For so long the receive thread looks for an answer at most, before it sleeps as usual.
const PATIENCE: Duration = Duration::from_micros(100);
/// How much a new time counts: one part of so many.
const WEIGHT: u64 = 8;

/// The average, in nanoseconds, after it `took` so long once more. What took for ever, because a processor was taken away or
/// nobody wanted anything, says little about the next time.
fn learn(average: u64, took: u64) -> u64 {
    average - average / WEIGHT + took.min(2 * QUICK) / WEIGHT
}

/// The signal that makes a receive thread look. The first two real-time signals are left to who uses this crate.
fn signal() -> libc::c_int {
    SIGRTMIN() + 2
}

extern "C" fn on_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // All that it is for is that recv returns.
}

/// What the receive thread of a peer and those who ask that peer know of each other.
#[derive(Debug)]
pub struct Ear {
    /// Kernel id of the receive thread; 0 while there is none.
    thread: AtomicI32,
    /// It sleeps, or is about to.
    sleeps: AtomicBool,
    /// When the peer was asked for something that has not come yet; 0 if it was not.
    asked: AtomicU64,
    /// How long an answer takes, nanoseconds; a moving average.
    takes: AtomicU64,
}

impl Default for Ear {
    fn default() -> Ear {
        Ear {
            thread: AtomicI32::new(0),
            sleeps: AtomicBool::new(false),
            asked: AtomicU64::new(0),
            takes: AtomicU64::new(2 * QUICK),
        }
    }
}

impl Ear {
    /// The peer has just been asked for something (at `now`, nanoseconds of the node's clock).
    pub fn ask(&self, now: u64) {
        if self.asked.compare_exchange(0, now.max(1), Ordering::Relaxed, Ordering::Relaxed).is_ok()
            && self.is_quick()
            && self.sleeps.swap(false, Ordering::Relaxed)
        {
            let thread = self.thread.load(Ordering::Relaxed);
            // SAFETY: tgkill only looks at its arguments; a thread that is gone is an error that does not matter.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal()) };
        }
    }

    fn is_quick(&self) -> bool {
        self.takes.load(Ordering::Relaxed) < QUICK
    }

    /// Something should come soon.
    fn is_due(&self) -> bool {
        self.asked.load(Ordering::Relaxed) != 0 && self.is_quick()
    }

    /// Something has come from the peer, at `now`.
    pub fn heard(&self, now: u64) {
        let asked = self.asked.swap(0, Ordering::Relaxed);
        if asked != 0 {
            let takes = self.takes.load(Ordering::Relaxed);
            self.takes.store(learn(takes, now.saturating_sub(asked)), Ordering::Relaxed);
        }
    }

    /// The calling thread is the receive thread, and reads from `stream`. It sleeps unless it `may_look`.
    pub fn attend<'a>(&'a self, stream: &'a TcpStream, may_look: bool) -> Listener<'a> {
        static IS_HANDLED: OnceLock<bool> = OnceLock::new();
        let is_handled = IS_HANDLED.get_or_init(|| {
            let result = register_signal_handler(signal(), on_signal);
            result.inspect_err(|e| tracing::warn!("receive threads sleep until answers come: {e}")).is_ok()
        });
        // Without a handler the signal would end the process: then nobody learns which thread it is.
        if *is_handled && may_look {
            // SAFETY: no arguments, can't fail.
            self.thread.store(unsafe { libc::gettid() }, Ordering::Relaxed);
        }
        Listener { ear: self, stream, may_look, more: None, gap: 2 * QUICK }
    }
}

/// The receive thread's end of a stream.
#[derive(Debug)]
pub struct Listener<'a> {
    ear: &'a Ear,
    stream: &'a TcpStream,
    may_look: bool,
    /// Since when the next request is waited for.
    more: Option<Instant>,
    /// How long that takes, nanoseconds; a moving average.
    gap: u64,
}

impl Drop for Listener<'_> {
    fn drop(&mut self) {
        self.ear.thread.store(0, Ordering::Relaxed);
    }
}

impl Listener<'_> {
    /// The peer's requests that came so far have been answered.
    pub fn expect_more(&mut self) {
        self.more = self.may_look.then(Instant::now);
    }

    /// For how long to look before sleeping, if it is worth it.
    fn patience(&self) -> Option<Duration> {
        if !self.may_look {
            None
        } else if self.ear.is_due() {
            Some(PATIENCE)
        } else {
            (self.more.is_some() && self.gap < QUICK).then(|| Duration::from_nanos(2 * self.gap))
        }
    }

    /// Looks for what should be here soon.
    fn look(&self, buf: &mut [u8], patience: Duration) -> rustix::io::Result<usize> {
        let start = Instant::now();
        while start.elapsed() < patience {
            match rustix::net::recv(self.stream, &mut *buf, RecvFlags::DONTWAIT) {
                Err(rustix::io::Errno::AGAIN) => std::hint::spin_loop(),
                result => return result.map(|(_, n)| n),
            }
        }
        Err(rustix::io::Errno::AGAIN)
    }

    fn hear(&self, buf: &mut [u8]) -> rustix::io::Result<usize> {
        loop {
            if let Some(patience) = self.patience() {
                match self.look(buf, patience) {
                    Err(rustix::io::Errno::AGAIN) => {}
                    result => return result,
                }
            }
            match self.sleep(buf) {
                // Perhaps it is to look.
                Err(rustix::io::Errno::INTR) => {}
                result => return result,
            }
        }
    }

    fn sleep(&self, buf: &mut [u8]) -> rustix::io::Result<usize> {
        self.ear.sleeps.store(true, Ordering::Relaxed);
        let result = rustix::net::recv(self.stream, &mut *buf, RecvFlags::empty());
        self.ear.sleeps.store(false, Ordering::Relaxed);
        result.map(|(_, n)| n)
    }
}

impl Read for Listener<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let result = self.hear(buf);
        if let Some(since) = self.more.take() {
            self.gap = learn(self.gap, nanos(since.elapsed()));
        }
        Ok(result?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::TcpListener;

    #[test]
    fn requests_are_looked_for_while_they_come_quickly() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let stream = listener.accept().unwrap().0;
        let ear = Ear::default();
        let mut listener = ear.attend(&stream, true);
        listener.expect_more();
        assert_eq!(listener.patience(), None, "nobody knows yet how quick they are");
        (0..64).for_each(|_| listener.gap = learn(listener.gap, 1000));
        assert!(listener.patience().is_some_and(|p| p < Duration::from_micros(20)), "{}", listener.gap);
        let mut byte = [0];
        peer.write_all(&[7]).unwrap();
        assert_eq!((listener.read(&mut byte).unwrap(), byte), (1, [7]));
        assert_eq!(listener.patience(), None, "nothing has been answered since");
        // A few that do not come are enough.
        (0..10).for_each(|_| listener.gap = learn(listener.gap, u64::MAX));
        listener.expect_more();
        assert_eq!(listener.patience(), None, "{}", listener.gap);
        listener.gap = 0;
        assert_eq!(listener.patience(), Some(Duration::ZERO));
        listener.may_look = false;
        assert_eq!(listener.patience(), None, "it may not");
        drop(peer);
        assert_eq!(listener.read(&mut byte).unwrap(), 0);
    }
}
