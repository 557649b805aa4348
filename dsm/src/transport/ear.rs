//! Hearing a peer's answer at once: the receive thread of a peer that has just been asked for a page, and that answers
//! faster than a thread is put to sleep and woken again, looks for the answer again and again instead of sleeping.
//!
//! ```text
//!  fault thread    request sent, ask() ---> signal
//!                                             |
//!  receive thread  asleep in recv ------------+-> looks, looks, looks, has it
//! ```
//!
//! Whoever waits for the page has no use for the processor meanwhile. Whether a peer is that fast is measured with every answer.

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
/// How much a new answer counts: one part of so many.
const WEIGHT: u64 = 8;

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
            // One answer that took for ever, because a processor was taken away, says little about the next.
            let took = now.saturating_sub(asked).min(2 * QUICK);
            let takes = self.takes.load(Ordering::Relaxed);
            self.takes.store(takes - takes / WEIGHT + took / WEIGHT, Ordering::Relaxed);
        }
    }

    /// The calling thread is the receive thread, and reads from `stream`.
    pub fn attend<'a>(&'a self, stream: &'a TcpStream) -> Listener<'a> {
        static IS_HANDLED: OnceLock<bool> = OnceLock::new();
        let is_handled = IS_HANDLED.get_or_init(|| {
            let result = register_signal_handler(signal(), on_signal);
            result.inspect_err(|e| tracing::warn!("receive threads sleep until answers come: {e}")).is_ok()
        });
        // Without a handler the signal would end the process: then nobody learns which thread it is.
        if *is_handled {
            // SAFETY: no arguments, can't fail.
            self.thread.store(unsafe { libc::gettid() }, Ordering::Relaxed);
        }
        Listener { ear: self, stream }
    }
}

/// The receive thread's end of a stream.
#[derive(Debug)]
pub struct Listener<'a> {
    ear: &'a Ear,
    stream: &'a TcpStream,
}

impl Drop for Listener<'_> {
    fn drop(&mut self) {
        self.ear.thread.store(0, Ordering::Relaxed);
    }
}

impl Listener<'_> {
    /// Looks for an answer that should be here soon.
    fn look(&self, buf: &mut [u8]) -> rustix::io::Result<usize> {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            match rustix::net::recv(self.stream, &mut *buf, RecvFlags::DONTWAIT) {
                Err(rustix::io::Errno::AGAIN) => std::hint::spin_loop(),
                result => return result.map(|(_, n)| n),
            }
        }
        Err(rustix::io::Errno::AGAIN)
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
        loop {
            if self.ear.is_due() {
                match self.look(buf) {
                    Err(rustix::io::Errno::AGAIN) => {}
                    result => return Ok(result?),
                }
            }
            match self.sleep(buf) {
                // Perhaps it is to look.
                Err(rustix::io::Errno::INTR) => {}
                result => return Ok(result?),
            }
        }
    }
}
