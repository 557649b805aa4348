//! Getting a vCPU thread's attention. A real-time signal makes KVM_RUN return EINTR; its handler also sets
//! `immediate_exit`, so that a signal which comes just before KVM_RUN is not lost.

use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicU8, Ordering};

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs; null elsewhere. Const-initialised and without a
    /// destructor, so the signal handler may touch it.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
    /// The vCPU's timer has fired since it was last armed.
    static TIMER_FIRED: Cell<bool> = const { Cell::new(false) };
}

/// Signal for "look at your mailbox".
pub(super) fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Signal of the vCPU's own timer.
pub(super) fn timer_signal() -> libc::c_int {
    libc::SIGRTMIN() + 1
}

extern "C" fn on_signal(number: libc::c_int) {
    let immediate_exit = IMMEDIATE_EXIT.get();
    if !immediate_exit.is_null() {
        // SAFETY: set by `Attention` for as long as the vCPU's mapping lives, on this very thread.
        unsafe { AtomicU8::from_ptr(immediate_exit) }.store(1, Ordering::SeqCst);
    }
    if number == timer_signal() {
        TIMER_FIRED.set(true);
    }
}

/// Installs the handlers, once per process.
fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for number in [kick_signal(), timer_signal()] {
            // SAFETY: an all-zero sigaction is valid, the handler only does async-signal-safe things (atomic
            // store, thread-local cells without lazy initialisation).
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = on_signal as *const () as libc::sighandler_t;
                libc::sigemptyset(&mut action.sa_mask);
                libc::sigaction(number, &action, ptr::null_mut());
            }
        }
    });
}

/// While it lives, signals to this thread set `immediate_exit` of one vCPU, and the thread has a timer.
#[derive(Debug)]
pub(super) struct Attention {
    timer: libc::timer_t,
}

impl Attention {
    /// # Errors
    /// No more timers (RLIMIT_SIGPENDING).
    ///
    /// # Safety
    /// `immediate_exit` stays valid until the result is dropped, which happens on this thread.
    pub unsafe fn new(immediate_exit: *mut u8) -> io::Result<Attention> {
        install();
        // SAFETY: zeroed is valid for sigevent; all fields that SIGEV_THREAD_ID needs are set.
        let timer = unsafe {
            let mut event: libc::sigevent = std::mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = timer_signal();
            event.sigev_notify_thread_id = libc::gettid();
            let mut timer = ptr::null_mut();
            if libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) != 0 {
                return Err(io::Error::last_os_error());
            }
            // Timer expiry in HLT is a futex timeout: without this it may come 50 us late.
            libc::prctl(libc::PR_SET_TIMERSLACK, 1u64);
            timer
        };
        IMMEDIATE_EXIT.set(immediate_exit);
        Ok(Attention { timer })
    }

    /// Lets the timer signal come in `ns` nanoseconds (at least one).
    pub fn arm(&self, ns: u64) {
        TIMER_FIRED.set(false);
        let clamp = |v: u64| i64::try_from(v).unwrap_or(i64::MAX);
        let value = libc::timespec { tv_sec: clamp(ns / 1_000_000_000), tv_nsec: clamp(ns % 1_000_000_000) };
        let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let value = if ns == 0 { libc::timespec { tv_nsec: 1, ..zero } } else { value };
        let spec = libc::itimerspec { it_interval: zero, it_value: value };
        // SAFETY: our timer, a valid itimerspec; with these it can't fail.
        unsafe { libc::timer_settime(self.timer, 0, &spec, ptr::null_mut()) };
    }

    /// Has the timer signal come since [`Attention::arm`]?
    pub fn fired(&self) -> bool {
        TIMER_FIRED.get()
    }
}

impl Drop for Attention {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
        // SAFETY: ours, deleted once.
        unsafe { libc::timer_delete(self.timer) };
    }
}

/// This thread's kernel id, for [`kick`].
pub(super) fn current_tid() -> i32 {
    // SAFETY: no arguments, can't fail.
    unsafe { libc::gettid() }
}

/// Sends the kick signal to a thread of this process. A thread that is gone is no error.
pub(super) fn kick(tid: i32) {
    // SAFETY: tgkill only looks at its arguments.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, kick_signal()) };
}
