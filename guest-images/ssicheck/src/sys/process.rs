//! Processes and signals.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::context::PATIENCE;
use crate::failure::Failure;
use crate::sys::cpu;

/// How a process ended, or stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// exit(code).
    Exited(i32),
    /// Killed by a signal.
    Killed(i32),
    /// Stopped by a signal, not ended.
    Stopped(i32),
}

/// A forked child; killed and reaped when dropped.
#[derive(Debug)]
pub struct Task {
    /// Its process id.
    pub pid: i32,
    reaped: bool,
}

/// Exit code of a child that could not pin itself.
const NOT_PINNED: i32 = 99;

/// Forks a child that runs `body` on `cpu` and exits with what it returns.
///
/// Refused while this process has other threads: the child of a multi-threaded process may find locks held by
/// threads that it does not have.
pub fn spawn(cpu: usize, body: impl FnOnce() -> i32) -> Result<Task, Failure> {
    wait_single_threaded()?;
    // SAFETY: this is the only thread, so the child is a complete copy and may run any code. It leaves through _exit,
    // so nothing of the parent's (destructors, buffers) runs twice.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        return Err(Failure::last_os("fork"));
    }
    if pid == 0 {
        die_with_parent();
        let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            if cpu::pin(cpu).is_err() { NOT_PINNED } else { body() }
        }));
        // SAFETY: ends the process.
        unsafe { libc::_exit(code.unwrap_or(101)) }
    }
    Ok(Task { pid, reaped: false })
}

/// A thread that was joined may stay visible for a moment.
fn wait_single_threaded() -> Result<(), Failure> {
    let start = Instant::now();
    loop {
        let threads = std::fs::read_dir("/proc/self/task").map(Iterator::count).unwrap_or(1);
        if threads <= 1 {
            return Ok(());
        }
        if start.elapsed() > Duration::from_secs(5) {
            return Err(Failure::Other(format!("can't fork with {threads} threads")));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

impl Task {
    /// Waits until the child ends (or stops, with `stops`), at most [`PATIENCE`].
    pub fn wait_change(&mut self, stops: bool) -> Result<Ended, Failure> {
        let start = Instant::now();
        let mut pause = Duration::from_micros(50);
        let flags = libc::WNOHANG | if stops { libc::WUNTRACED } else { 0 };
        loop {
            let mut status = 0;
            // SAFETY: the kernel writes one int.
            let rc = unsafe { libc::waitpid(self.pid, &raw mut status, flags) };
            if rc < 0 {
                return Err(Failure::last_os(format!("waiting for process {}", self.pid)));
            }
            if rc == self.pid {
                if libc::WIFSTOPPED(status) {
                    return Ok(Ended::Stopped(libc::WSTOPSIG(status)));
                }
                self.reaped = true;
                return Ok(match libc::WIFSIGNALED(status) {
                    true => Ended::Killed(libc::WTERMSIG(status)),
                    false => Ended::Exited(libc::WEXITSTATUS(status)),
                });
            }
            if start.elapsed() > PATIENCE {
                return Err(Failure::timeout(format!("the end of process {}", self.pid), PATIENCE));
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(10));
        }
    }

    /// Waits until the child ends; fails unless it exits with 0.
    pub fn finish(mut self, what: &str) -> Result<(), Failure> {
        match self.wait_change(false)? {
            Ended::Exited(0) => Ok(()),
            Ended::Exited(NOT_PINNED) => Err(Failure::Other(format!("{what}: could not pin itself"))),
            other => Err(Failure::Other(format!("{what}: {other:?}"))),
        }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        if !self.reaped {
            let _ = kill(self.pid, libc::SIGKILL);
            let _ = self.wait_change(false);
        }
    }
}

/// Sends a signal; 0 only asks whether the process is there.
pub fn kill(pid: i32, signal: i32) -> Result<(), Failure> {
    // SAFETY: no memory is involved.
    if unsafe { libc::kill(pid, signal) } == 0 {
        return Ok(());
    }
    Err(Failure::last_os(format!("sending signal {signal} to process {pid}")))
}

/// Kills the process group of a child that leads one.
pub fn kill_group(leader: u32) {
    match i32::try_from(leader) {
        Ok(pid) if pid > 1 => {
            // A group that is gone is the usual case.
            let _ = kill(-pid, libc::SIGKILL);
        }
        _ => {}
    }
}

/// This process is killed when the thread that started it ends.
pub fn die_with_parent() {
    // SAFETY: PR_SET_PDEATHSIG takes a number.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}

/// The process id of the parent.
pub fn parent() -> i32 {
    // SAFETY: no arguments.
    unsafe { libc::getppid() }
}

/// SIGUSR1s that this process has handled.
static HANDLED: AtomicU32 = AtomicU32::new(0);

extern "C" fn count_signal(_signal: i32) {
    HANDLED.fetch_add(1, Ordering::SeqCst);
}

/// From now on SIGUSR1 is counted instead of deadly.
pub fn count_sigusr1() {
    let handler: extern "C" fn(i32) = count_signal;
    // SAFETY: the handler only adds to an atomic, which is async-signal-safe.
    unsafe { libc::signal(libc::SIGUSR1, handler as libc::sighandler_t) };
}

/// How many SIGUSR1 this process has handled.
pub fn handled() -> u32 {
    HANDLED.load(Ordering::SeqCst)
}

/// Blocks SIGUSR1 for this process, so that [`take_sigusr1`] can wait for it.
pub fn block_sigusr1() -> Result<(), Failure> {
    let set = sigusr1_set();
    // SAFETY: reads the set, and writes no old set.
    if unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) } != 0 {
        return Err(Failure::last_os("blocking SIGUSR1"));
    }
    Ok(())
}

/// Waits at most [`PATIENCE`] for a blocked SIGUSR1 and returns the PID of its sender.
pub fn take_sigusr1() -> Result<i32, Failure> {
    let set = sigusr1_set();
    let limit = libc::timespec { tv_sec: i64::try_from(PATIENCE.as_secs()).unwrap_or(i64::MAX), tv_nsec: 0 };
    // SAFETY: zero bytes are a valid siginfo_t.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel reads the set and the limit and writes one siginfo_t.
    let rc = unsafe { libc::sigtimedwait(&raw const set, &raw mut info, &raw const limit) };
    if rc != libc::SIGUSR1 {
        return Err(Failure::last_os("waiting for SIGUSR1"));
    }
    // SAFETY: si_pid is filled for a signal sent by kill().
    Ok(unsafe { info.si_pid() })
}

fn sigusr1_set() -> libc::sigset_t {
    // SAFETY: sigemptyset initialises the set before sigaddset and the caller read it.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGUSR1);
        set
    }
}
