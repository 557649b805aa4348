//! The sending half of a link. Sending never waits: what the socket does not take at once goes into a queue that
//! the link's writer thread empties, so a vCPU thread is never held up by a slow peer, and receive threads
//! can answer without a chance of waiting for each other in a circle.

use dsm::addr::MemberId;
use std::collections::VecDeque;
use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A peer for which this many bytes wait does not listen any more.
const QUEUE_LIMIT: usize = 4 << 20;

#[derive(Debug, Default)]
struct Outgoing {
    queue: VecDeque<u8>,
    /// The link is of no more use; sending does nothing.
    closed: bool,
    /// The peer said that it ends, so silence and the end of the stream are no failure.
    leaving: bool,
}

/// One peer's link.
#[derive(Debug)]
pub(super) struct Link {
    pub peer: MemberId,
    stream: TcpStream,
    /// Held across non-blocking system calls only.
    outgoing: Mutex<Outgoing>,
    waiting: Condvar,
    /// Milliseconds since the fabric's start when the peer was last heard.
    pub heard_ms: AtomicU64,
}

impl Link {
    pub fn new(peer: MemberId, stream: TcpStream) -> io::Result<Link> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(None)?;
        Ok(Link {
            peer,
            stream,
            outgoing: Mutex::default(),
            waiting: Condvar::new(),
            heard_ms: AtomicU64::new(0),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Outgoing> {
        self.outgoing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends, or leaves it to the writer.
    ///
    /// # Errors
    /// The link is broken; why.
    pub fn send(&self, bytes: &[u8]) -> Result<(), String> {
        let mut out = self.lock();
        if out.closed {
            return Ok(());
        }
        let sent = if out.queue.is_empty() { self.try_send(bytes)? } else { 0 };
        if let Some(rest) = bytes.get(sent..).filter(|rest| !rest.is_empty()) {
            if out.queue.len() > QUEUE_LIMIT {
                return Err("it has stopped reading".into());
            }
            out.queue.extend(rest);
            self.waiting.notify_one();
        }
        Ok(())
    }

    /// How much the socket takes right now.
    fn try_send(&self, bytes: &[u8]) -> Result<usize, String> {
        // SAFETY: an open socket and a valid slice.
        let sent = unsafe {
            libc::send(
                self.stream.as_raw_fd(),
                bytes.as_ptr().cast(),
                bytes.len(),
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            )
        };
        match usize::try_from(sent) {
            Ok(sent) => Ok(sent),
            Err(_) => match io::Error::last_os_error() {
                e if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(0),
                e => Err(format!("connection lost: {e}")),
            },
        }
    }

    /// The writer thread: until the link is closed.
    ///
    /// # Errors
    /// The link is broken; why.
    pub fn drain(&self, deadline: Duration) -> Result<(), String> {
        loop {
            let mut out = self.lock();
            while out.queue.is_empty() && !out.closed {
                out = self.waiting.wait(out).unwrap_or_else(PoisonError::into_inner);
            }
            if out.closed {
                return Ok(());
            }
            drop(out);
            let started = Instant::now();
            loop {
                self.wait_writable(deadline);
                let mut out = self.lock();
                let (front, _) = out.queue.as_slices();
                let sent = self.try_send(front)?;
                out.queue.drain(..sent);
                if out.queue.is_empty() || out.closed {
                    break;
                }
                drop(out);
                if sent == 0 && started.elapsed() > deadline {
                    return Err(format!("it has read nothing for {deadline:?}"));
                }
            }
        }
    }

    fn wait_writable(&self, deadline: Duration) {
        let mut poll = libc::pollfd { fd: self.stream.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
        let timeout = libc::c_int::try_from(deadline.as_millis()).unwrap_or(libc::c_int::MAX);
        // SAFETY: one valid pollfd.
        unsafe { libc::poll(&mut poll, 1, timeout) };
    }

    /// The receiving half; ends when the link is closed.
    pub fn reader(&self) -> &TcpStream {
        &self.stream
    }

    /// The peer announced its end.
    pub fn set_leaving(&self) {
        self.lock().leaving = true;
    }

    /// Is the peer's end expected?
    pub fn is_leaving(&self) -> bool {
        let out = self.lock();
        out.leaving || out.closed
    }

    /// Ends both halves; threads on them return.
    pub fn close(&self) {
        self.lock().closed = true;
        self.waiting.notify_all();
        // The peer may have been faster.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }

    /// Notes that something came.
    pub fn heard(&self, now_ms: u64) {
        self.heard_ms.store(now_ms, Ordering::Relaxed);
    }
}
