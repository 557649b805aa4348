//! Futexes on shared memory (not the process-private kind, so that they work between processes).

use std::sync::atomic::AtomicU32;
use std::time::Duration;

/// Sleeps while `word` is `seen`, at most `limit`. May return early: check and call again.
pub fn wait(word: &AtomicU32, seen: u32, limit: Duration) {
    let spec = libc::timespec {
        tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(limit.subsec_nanos()),
    };
    // SAFETY: `word` and `spec` are alive across the call; the kernel reads them and writes nothing.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, seen, &raw const spec);
    }
}

/// Wakes at most `count` sleepers of `word` and returns how many there were.
pub fn wake(word: &AtomicU32, count: i32) -> i64 {
    // SAFETY: FUTEX_WAKE uses the address of `word` as a key only.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, count) }
}
