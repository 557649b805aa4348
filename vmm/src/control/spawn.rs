//! Child processes of the control plane: `spanvm member-process` with a socket as its standard input.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// How often a child's thread looks whether it has ended.
const POLL: Duration = Duration::from_millis(20);

/// A child that is reaped when it ends and killed when this is dropped.
#[derive(Debug)]
pub struct ChildProcess {
    child: Arc<Mutex<Child>>,
    pid: u32,
    ended: watch::Receiver<Option<ExitStatus>>,
    released: bool,
}

impl ChildProcess {
    /// Starts `spanvm member-process`; returns it with our end of its socket. Its standard error is ours.
    ///
    /// The thread that spawns the child also waits for it: PR_SET_PDEATHSIG is about the parent's *thread*
    /// (prctl(2)), so that thread must live as long as the child.
    ///
    /// # Errors
    /// No process, no thread, no socket.
    pub fn spawn() -> io::Result<(ChildProcess, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        let (report, spawned) = std::sync::mpsc::sync_channel(1);
        let (end, ended) = watch::channel(None);
        std::thread::Builder::new().name("child".into()).spawn(move || {
            let child = Command::new("/proc/self/exe")
                .arg0("spanvm")
                .arg("member-process")
                .stdin(Stdio::from(OwnedFd::from(theirs)))
                .stdout(Stdio::null())
                .spawn();
            let child = match child {
                Ok(child) => Arc::new(Mutex::new(child)),
                Err(e) => {
                    let _ = report.send(Err(e));
                    return;
                }
            };
            let pid = child.lock().unwrap_or_else(PoisonError::into_inner).id();
            let _ = report.send(Ok((child.clone(), pid)));
            loop {
                let state = child.lock().unwrap_or_else(PoisonError::into_inner).try_wait();
                match state {
                    Ok(None) => std::thread::sleep(POLL),
                    Ok(Some(status)) => {
                        end.send_replace(Some(status));
                        return;
                    }
                    Err(_) => return,
                }
            }
        })?;
        let (child, pid) = spawned.recv().map_err(|_| io::Error::other("the spawning thread died"))??;
        Ok((ChildProcess { child, pid, ended, released: false }, ours))
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits until it has ended and been reaped.
    pub async fn ended(&self) -> Option<ExitStatus> {
        let mut ended = self.ended.clone();
        ended.wait_for(Option::is_some).await.ok().and_then(|status| *status)
    }

    /// Gives it some time to end by itself, then kills it, and waits until it is reaped.
    pub async fn finish(&self, grace: Duration) {
        if tokio::time::timeout(grace, self.ended()).await.is_err() {
            self.kill();
            let _ = tokio::time::timeout(Duration::from_secs(5), self.ended()).await;
        }
    }

    /// How it ended, if it has: `killed by signal 9`, `exit status: 101`.
    pub async fn epitaph(&self) -> Option<String> {
        let status = tokio::time::timeout(Duration::from_millis(500), self.ended()).await.ok()??;
        use std::os::unix::process::ExitStatusExt;
        Some(match status.signal() {
            Some(signal) => format!("process {} was killed by signal {signal}", self.pid),
            None => format!("process {} ended with code {}", self.pid, status.code().unwrap_or(-1)),
        })
    }

    /// Lets it live on when this is dropped and this process ends.
    pub fn release(mut self) {
        self.released = true;
    }

    /// Kills it at once.
    pub fn kill(&self) {
        let _ = self.child.lock().unwrap_or_else(PoisonError::into_inner).kill();
    }
}

impl Drop for ChildProcess {
    fn drop(&mut self) {
        if !self.released {
            self.kill();
        }
    }
}
