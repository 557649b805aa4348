//! The sending half of a link. Sending never waits: what the socket does not take at once goes into a queue that
//! the link's writer thread empties, so a vCPU thread is never held up by a slow peer, and receive threads
//! can answer without a chance of waiting for each other in a circle.
//!
//! A link that keeps what it has sent until the peer says that it has it outlives its stream: [`Link::resume`] goes on with
//! the next one where the peer is. Bytes are counted, not messages, so a message that came half way is completed.

use dsm::addr::MemberId;
use std::collections::VecDeque;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A peer for which this many bytes wait does not listen any more.
const QUEUE_LIMIT: usize = 4 << 20;
/// The same where sent bytes are kept, too, perhaps for a whole grace time.
const KEPT_LIMIT: usize = 32 << 20;

#[derive(Debug)]
struct Outgoing {
    stream: Arc<TcpStream>,
    /// What the socket has not taken; of a link that keeps, before that what the peer has not acknowledged.
    bytes: VecDeque<u8>,
    /// So many of `bytes` the socket has taken.
    sent: usize,
    /// Bytes of the link before `bytes`.
    base: u64,
    /// There is no stream at the moment.
    broken: bool,
    /// The link is of no more use; sending does nothing.
    closed: bool,
    /// The peer said that it ends, so silence and the end of the stream are no failure.
    leaving: bool,
}

impl Outgoing {
    fn has_unsent(&self) -> bool {
        self.sent < self.bytes.len()
    }

    /// Some of what is to be sent next.
    fn next(&self) -> &[u8] {
        let (front, back) = self.bytes.as_slices();
        let rest = front.get(self.sent..).filter(|rest| !rest.is_empty());
        rest.or_else(|| back.get(self.sent.saturating_sub(front.len())..)).unwrap_or(&[])
    }

    /// The peer has `got` bytes of all that were sent. Returns whether that can be.
    fn acknowledge(&mut self, got: u64) -> bool {
        match got.checked_sub(self.base).map(usize::try_from) {
            Some(Ok(more)) if more <= self.sent => {
                self.bytes.drain(..more);
                self.sent -= more;
                self.base = got;
                true
            }
            _ => false,
        }
    }
}

/// One peer's link.
#[derive(Debug)]
pub(super) struct Link {
    pub peer: MemberId,
    /// Sent bytes are kept until they are acknowledged.
    keeps: bool,
    /// Held across non-blocking system calls only.
    outgoing: Mutex<Outgoing>,
    waiting: Condvar,
    /// Milliseconds since the fabric's start when the peer was last heard.
    pub heard_ms: AtomicU64,
    /// Bytes that came, over all streams.
    received: AtomicU64,
    /// How many of them the peer has been told of.
    told: AtomicU64,
    resumed: AtomicU64,
    /// This host's clock at the last resumption.
    pub since: AtomicU64,
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_write_timeout(None)?;
    stream.set_read_timeout(None)
}

impl Link {
    pub fn new(peer: MemberId, stream: TcpStream, keeps: bool) -> io::Result<Link> {
        prepare(&stream)?;
        Ok(Link {
            peer,
            keeps,
            outgoing: Mutex::new(Outgoing {
                stream: Arc::new(stream),
                bytes: VecDeque::new(),
                sent: 0,
                base: 0,
                broken: false,
                closed: false,
                leaving: false,
            }),
            waiting: Condvar::new(),
            heard_ms: AtomicU64::new(0),
            received: AtomicU64::new(0),
            told: AtomicU64::new(0),
            resumed: AtomicU64::new(0),
            since: AtomicU64::new(0),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Outgoing> {
        self.outgoing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends, or leaves it to the writer.
    ///
    /// # Errors
    /// The link is of no more use; why.
    pub fn send(&self, bytes: &[u8]) -> Result<(), String> {
        self.put(bytes, true)
    }

    /// Leaves it to the writer: for a thread that has something more urgent to do than to take bytes through the network stack.
    ///
    /// # Errors
    /// As [`Link::send`].
    pub fn send_later(&self, bytes: &[u8]) -> Result<(), String> {
        self.put(bytes, false)
    }

    fn put(&self, bytes: &[u8], at_once: bool) -> Result<(), String> {
        let mut out = self.lock();
        if out.closed {
            return Ok(());
        }
        let limit = if self.keeps { KEPT_LIMIT } else { QUEUE_LIMIT };
        if out.bytes.len() > limit {
            return Err(format!("it has stopped reading; {limit} bytes wait for it"));
        }
        let mut sent = 0;
        if at_once && !out.broken && !out.has_unsent() {
            match try_send(&out.stream, bytes) {
                Ok(n) => sent = n,
                Err(why) => self.broke(&mut out, why)?,
            }
        }
        if self.keeps {
            out.bytes.extend(bytes);
            out.sent += sent;
        } else {
            out.bytes.extend(bytes.get(sent..).unwrap_or(&[]));
        }
        if out.has_unsent() {
            self.waiting.notify_one();
        }
        Ok(())
    }

    /// The stream is of no more use. If nothing is kept, nor is the link.
    fn broke(&self, out: &mut Outgoing, why: String) -> Result<(), String> {
        if !self.keeps {
            return Err(why);
        }
        out.broken = true;
        // Whoever reads from it wakes. It may have ended already.
        let _ = out.stream.shutdown(Shutdown::Both);
        Ok(())
    }

    /// Gives the stream up, so that another one is looked for; does nothing if that is being done already.
    pub fn give_up(&self) {
        let mut out = self.lock();
        if self.keeps && !out.broken {
            // It can't fail where bytes are kept.
            let _ = self.broke(&mut out, String::new());
        }
    }

    /// The writer thread: until the link is closed.
    ///
    /// # Errors
    /// The link is of no more use; why.
    pub fn drain(&self, deadline: Duration) -> Result<(), String> {
        loop {
            let mut out = self.lock();
            while (out.broken || !out.has_unsent()) && !out.closed {
                out = self.waiting.wait(out).unwrap_or_else(PoisonError::into_inner);
            }
            if out.closed {
                return Ok(());
            }
            let stream = out.stream.clone();
            drop(out);
            let mut started = Instant::now();
            loop {
                wait_writable(&stream, deadline);
                let mut out = self.lock();
                if out.closed || out.broken || !out.has_unsent() || !Arc::ptr_eq(&stream, &out.stream) {
                    break;
                }
                match try_send(&out.stream, out.next()) {
                    Ok(0) if started.elapsed() > deadline => {
                        self.broke(&mut out, format!("it has read nothing for {deadline:?}"))?;
                    }
                    Ok(0) => {}
                    Ok(n) => {
                        started = Instant::now();
                        out.sent += n;
                        if !self.keeps {
                            let sent = std::mem::take(&mut out.sent);
                            out.bytes.drain(..sent);
                        }
                    }
                    Err(why) => self.broke(&mut out, why)?,
                }
            }
        }
    }

    /// The stream to read from; ends when the link is closed.
    pub fn stream(&self) -> Arc<TcpStream> {
        self.lock().stream.clone()
    }

    /// Goes on with another stream from the byte that the peer waits for.
    ///
    /// # Errors
    /// The peer can't be there, the socket refuses an option, or the link was closed.
    pub fn resume(&self, stream: TcpStream, got: u64, now_ms: u64) -> io::Result<()> {
        prepare(&stream)?;
        let mut out = self.lock();
        if out.closed {
            return Err(io::Error::other("the link was closed"));
        }
        if !out.acknowledge(got) {
            let (from, to) = (out.base, out.base + out.sent as u64);
            return Err(io::Error::other(format!("it says that it has {got} bytes, of {from} to {to}")));
        }
        out.sent = 0;
        out.stream = Arc::new(stream);
        out.broken = false;
        self.resumed.fetch_add(1, Ordering::Relaxed);
        self.heard(now_ms);
        self.waiting.notify_one();
        Ok(())
    }

    /// The peer says how many bytes it has received.
    ///
    /// # Errors
    /// That can't be.
    pub fn acknowledged(&self, got: u64) -> Result<(), String> {
        let mut out = self.lock();
        // Said before something that was acknowledged since: a resumption tells first.
        if !self.keeps || got <= out.base || out.acknowledge(got) {
            return Ok(());
        }
        Err(format!("it says that it has received {got} bytes, more than were sent"))
    }

    /// Whether sent bytes are kept until they are acknowledged.
    pub fn keeps(&self) -> bool {
        self.keeps
    }

    /// Whether there is no stream at the moment.
    pub fn is_broken(&self) -> bool {
        self.lock().broken
    }

    /// How often it went on with another stream.
    pub fn resumed(&self) -> u64 {
        self.resumed.load(Ordering::Relaxed)
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
        let mut out = self.lock();
        out.closed = true;
        self.waiting.notify_all();
        // The peer may have been faster.
        let _ = out.stream.shutdown(Shutdown::Both);
    }

    /// Notes that something came.
    pub fn heard(&self, now_ms: u64) {
        self.heard_ms.store(now_ms, Ordering::Relaxed);
    }

    /// Counts what came. Returns how much of it the peer has not been told of.
    pub fn count(&self, bytes: usize) -> u64 {
        let received = self.received.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        received.saturating_sub(self.told.load(Ordering::Relaxed))
    }

    /// Bytes that came, over all streams; the peer is being told.
    pub fn tell_received(&self) -> u64 {
        let received = self.received.load(Ordering::Relaxed);
        self.told.store(received, Ordering::Relaxed);
        received
    }
}

/// How much the socket takes right now.
fn try_send(stream: &TcpStream, bytes: &[u8]) -> Result<usize, String> {
    // SAFETY: an open socket and a valid slice.
    let sent = unsafe {
        libc::send(
            stream.as_raw_fd(),
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

fn wait_writable(stream: &TcpStream, deadline: Duration) {
    let mut poll = libc::pollfd { fd: stream.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    let timeout = libc::c_int::try_from(deadline.as_millis()).unwrap_or(libc::c_int::MAX);
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&mut poll, 1, timeout) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::TcpListener;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (a, listener.accept().unwrap().0)
    }

    #[test]
    fn what_the_peer_does_not_have_is_sent_again_from_the_byte_that_it_waits_for() {
        let (a, b) = pair();
        let link = Link::new(MemberId(1), a, true).unwrap();
        link.send(b"abcdef").unwrap();
        link.acknowledged(2).unwrap();
        assert!(link.acknowledged(7).is_err(), "there are six");
        link.give_up();
        drop(b);
        link.send(b"gh").unwrap();
        assert!(link.is_broken());
        for got in [1, 7] {
            assert!(link.resume(pair().0, got, 0).is_err(), "{got}");
        }
        let (a, mut b) = pair();
        link.resume(a, 4, 0).unwrap();
        assert!(!link.is_broken());
        std::thread::scope(|scope| {
            scope.spawn(|| link.drain(Duration::from_secs(10)));
            let mut got = [0; 4];
            b.read_exact(&mut got).unwrap();
            assert_eq!(&got, b"efgh");
            link.close();
        });
    }

    #[test]
    fn what_is_sent_later_keeps_its_place() {
        for keeps in [false, true] {
            let (a, mut b) = pair();
            let link = Link::new(MemberId(1), a, keeps).unwrap();
            link.send(b"ab").unwrap();
            link.send_later(b"cd").unwrap();
            link.send(b"ef").unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| link.drain(Duration::from_secs(10)));
                let mut got = [0; 6];
                b.read_exact(&mut got).unwrap();
                assert_eq!(&got, b"abcdef");
                link.close();
            });
        }
    }
}
