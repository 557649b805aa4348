//! The process behind `spanvm member-process`: takes its orders from the socket that is its standard input.

use super::codec;
use super::coordinator::{self, Processes, Surroundings};
use super::host::{Host, RealHost};
use super::member_task::{self, Slot};
use super::rundir;
use super::wire::{Inherit, Role};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::signal::unix::{SignalKind, signal};

/// Longest wait for the first message from whoever spawned this process.
const FIRST: Duration = Duration::from_secs(10);

/// Runs a child process to its end and returns its exit code.
pub async fn main() -> u8 {
    let stream = match stdin_socket() {
        Ok(stream) => stream,
        Err(e) => {
            eprintln!(
                "spanvm member-process is started by spanvm itself, with a socket as its standard input: {e}"
            );
            return 2;
        }
    };
    leave_terminal();
    serve(stream).await
}

async fn serve(mut stream: UnixStream) -> u8 {
    let inherit: Inherit = match codec::within(FIRST, codec::recv(&mut stream)).await {
        Ok(inherit) => inherit,
        Err(e) => {
            eprintln!("spanvm member-process: no orders: {e}");
            return 1;
        }
    };
    if inherit.die_with_parent {
        die_with_parent();
    }
    let host: Arc<dyn Host> = Arc::new(RealHost);
    match inherit.role {
        Role::Member => {
            member_task::serve(stream, host, inherit, Slot::default()).await;
            0
        }
        Role::Coordinator => {
            let around =
                Surroundings { host, spawner: Arc::new(Processes), root: rundir::root(), redirect_log: true };
            coordinator::run(Box::new(stream), inherit, around).await.exit_code()
        }
    }
}

/// Takes the socket out of descriptor 0 and leaves `/dev/null` there.
fn stdin_socket() -> io::Result<UnixStream> {
    use std::os::fd::AsFd;
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    let stream = std::os::unix::net::UnixStream::from(socket);
    stream.local_addr()?;
    stream.set_nonblocking(true)?;
    replace(&File::open("/dev/null")?, 0)?;
    UnixStream::from_std(stream)
}

/// Makes descriptor `number` the same as `file`.
fn replace(file: &File, number: i32) -> io::Result<()> {
    // SAFETY: dup2 closes and replaces a standard descriptor, which nothing in this process owns as an
    // `OwnedFd`; `file` is open for the call (dup2(2)).
    match unsafe { libc::dup2(file.as_raw_fd(), number) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Sends standard error to a file.
///
/// # Errors
/// The file can't be written.
pub fn log_to(path: &Path) -> io::Result<()> {
    replace(&File::options().create(true).append(true).mode(0o600).open(path)?, 2)
}

/// A session of its own: Ctrl-C at the launcher's terminal is the launcher's, and so is its hang-up.
fn leave_terminal() {
    // SAFETY: setsid has no preconditions; it fails for a group leader, which is as good (setsid(2)).
    unsafe { libc::setsid() };
}

/// Killed with the thread that spawned this process (prctl(2), PR_SET_PDEATHSIG). If that is gone already, the
/// socket is closed and says so.
fn die_with_parent() {
    // SAFETY: PR_SET_PDEATHSIG takes a signal number and touches no memory.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}

/// Calls `then` at the first SIGTERM or SIGINT.
pub fn on_termination(then: impl FnOnce() + Send + 'static) {
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return;
    };
    tokio::spawn(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        then();
    });
}
