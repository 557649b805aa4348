//! Sending to one peer without ever blocking.
//!
//! Two members whose receive threads both wait for room in each other's socket would wait for ever. So a send appends to
//! a queue, and whoever appended tries to empty it with non-blocking writes; what the socket does not take stays for
//! the keeper thread, which waits for room and watches the deadline.
//!
//! A link that keeps its frames outlives its stream: what the peer has not said to have received is sent again on the next
//! one, see [`super::kept`].

use super::ear::Ear;
use super::frame::{HEADER_LEN, Header, MAX_FRAME};
use super::kept::{Gap, Kept};
use crate::addr::MemberId;
use crate::seeded::{SeededFault, is_on};
use rustix::net::SendFlags;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use zerocopy::{FromBytes, IntoBytes};

/// Whether everything is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// It is, or another thread sees to it.
    Done,
    /// The socket is full: wait until it is writable, then flush again.
    Full,
}

/// Frames that wait for the writer.
#[derive(Debug, Default)]
pub struct Queue {
    bytes: Vec<u8>,
    frames: u64,
    /// What the frames say to have come.
    received: u64,
}

impl Queue {
    /// Begins a frame: leaves room for its header. Returns where, for [`Queue::finish`].
    pub fn begin(&mut self) -> usize {
        let at = self.bytes.len();
        self.bytes.extend_from_slice(&[0; HEADER_LEN]);
        at
    }

    /// What has been queued so far, to append what follows the header.
    pub fn bytes(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// Ends the frame that began at `at`.
    pub fn finish(&mut self, at: usize, mut header: Header) {
        header.set_received(self.received);
        debug_assert!(self.bytes.len() <= at + MAX_FRAME);
        if let Some(room) = self.bytes.get_mut(at..at + HEADER_LEN) {
            room.copy_from_slice(header.as_bytes());
        }
        self.frames += 1;
    }

    /// The headers of the frames from `at` on, where one begins.
    pub(crate) fn headers(&self, at: usize) -> impl Iterator<Item = Header> {
        let mut rest = self.bytes.get(at..).unwrap_or(&[]);
        std::iter::from_fn(move || {
            let header = Header::read_from_bytes(rest.get(..HEADER_LEN)?).ok()?;
            rest = rest.get(HEADER_LEN + header.payload_len().ok()?..)?;
            Some(header)
        })
    }
}

#[derive(Debug)]
struct Writer<S> {
    stream: Arc<S>,
    buf: Vec<u8>,
    at: usize,
    /// Frames in `buf`.
    frames: u64,
    kept: Kept,
}

/// A stream that takes what it has room for and never waits.
pub trait Socket {
    /// Takes some of the bytes; an error of kind `WouldBlock` if it has no room for any.
    fn send(&self, bytes: &[u8]) -> io::Result<usize>;

    /// Ends the stream both ways: who reads from it notices.
    fn abort(&self);
}

impl Socket for TcpStream {
    fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::net::send(self, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?)
    }

    fn abort(&self) {
        // It may have ended already.
        let _ = self.shutdown(Shutdown::Both);
    }
}

/// The sending side of the stream to one peer. Lock order: `writer`, then `queue`.
#[derive(Debug)]
pub struct Link<S = TcpStream> {
    peer: MemberId,
    /// Whether sent frames are kept until they are acknowledged.
    keeps: bool,
    /// The stream is gone and there is no new one yet.
    broken: AtomicBool,
    /// It is gone because of the peer's silence.
    given_up: AtomicBool,
    stream: Mutex<Arc<S>>,
    queue: Mutex<Queue>,
    writer: Mutex<Writer<S>>,
    acked: AtomicU64,
    full_since: AtomicU64,
    heard: AtomicU64,
    spoke: AtomicU64,
    left: AtomicBool,
    ended: AtomicBool,
    sent_messages: AtomicU64,
    sent_bytes: AtomicU64,
    got_messages: AtomicU64,
    got_bytes: AtomicU64,
    resumed: AtomicU64,
    ear: Ear,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<S: Socket> Link<S> {
    /// The stream to `peer`, at time `now` (nanoseconds of the node's clock).
    pub fn new(peer: MemberId, stream: S, now: u64) -> Link<S> {
        Link::make(peer, stream, now, false)
    }

    /// The same, and sent frames are kept until they are acknowledged, for [`Link::resume`].
    pub fn keeping(peer: MemberId, stream: S, now: u64) -> Link<S> {
        Link::make(peer, stream, now, true)
    }

    fn make(peer: MemberId, stream: S, now: u64, keeps: bool) -> Link<S> {
        let stream = Arc::new(stream);
        Link {
            peer,
            keeps,
            broken: AtomicBool::new(false),
            given_up: AtomicBool::new(false),
            writer: Mutex::new(Writer {
                stream: stream.clone(),
                buf: Vec::new(),
                at: 0,
                frames: 0,
                kept: Kept::default(),
            }),
            stream: Mutex::new(stream),
            queue: Mutex::default(),
            acked: AtomicU64::new(0),
            full_since: AtomicU64::new(0),
            heard: AtomicU64::new(now),
            spoke: AtomicU64::new(now),
            left: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            sent_messages: AtomicU64::new(0),
            sent_bytes: AtomicU64::new(0),
            got_messages: AtomicU64::new(0),
            got_bytes: AtomicU64::new(0),
            resumed: AtomicU64::new(0),
            ear: Ear::default(),
        }
    }

    /// The member at the other end.
    pub fn peer(&self) -> MemberId {
        self.peer
    }

    /// The stream, to read from or to wait for room.
    pub fn stream(&self) -> Arc<S> {
        lock(&self.stream).clone()
    }

    /// Queues a frame without a page.
    pub fn push(&self, header: &Header) {
        let mut header = *header;
        header.set_received(self.received());
        let mut queue = lock(&self.queue);
        if is_on(SeededFault::BrokenFifo) {
            queue.bytes.splice(0..0, header.as_bytes().iter().copied());
        } else {
            queue.bytes.extend_from_slice(header.as_bytes());
        }
        queue.frames += 1;
        drop(queue);
        self.sent_messages.fetch_add(1, Ordering::Relaxed);
    }

    /// Queues the frames that `fill` appends. On an error none of them is queued.
    pub fn push_with<E>(&self, fill: impl FnOnce(&mut Queue) -> Result<(), E>) -> Result<(), E> {
        let mut queue = lock(&self.queue);
        queue.received = self.received();
        let (at, before) = (queue.bytes.len(), queue.frames);
        let result = fill(&mut queue);
        if result.is_err() {
            queue.bytes.truncate(at);
            queue.frames = before;
        }
        self.sent_messages.fetch_add(queue.frames - before, Ordering::Relaxed);
        result
    }

    /// Writes as much of the queue as the socket takes now.
    pub fn flush(&self, now: u64) -> io::Result<Flush> {
        loop {
            let mut writer = match self.writer.try_lock() {
                Ok(writer) => writer,
                // Whoever holds the lock looks at the queue again after letting go of it.
                Err(TryLockError::WouldBlock) => return Ok(Flush::Done),
                Err(TryLockError::Poisoned(e)) => e.into_inner(),
            };
            let result = self.drain(&mut writer, now);
            drop(writer);
            match result? {
                Flush::Full => return Ok(Flush::Full),
                Flush::Done if self.is_broken() => return Ok(Flush::Done),
                Flush::Done if lock(&self.queue).bytes.is_empty() => return Ok(Flush::Done),
                Flush::Done => {}
            }
        }
    }

    fn drain(&self, writer: &mut Writer<S>, now: u64) -> io::Result<Flush> {
        if self.keeps {
            let got = self.acked.load(Ordering::Relaxed);
            writer.kept.acknowledge(got, writer.frames).map_err(io::Error::other)?;
        }
        while !self.is_broken() {
            let rest = writer.buf.get(writer.at..).unwrap_or(&[]);
            if rest.is_empty() {
                if self.keeps && writer.frames > 0 {
                    let empty = writer.kept.spare();
                    let sent = std::mem::replace(&mut writer.buf, empty);
                    writer.kept.keep(sent, writer.frames);
                }
                writer.buf.clear();
                (writer.at, writer.frames) = (0, 0);
                let mut queue = lock(&self.queue);
                if queue.bytes.is_empty() {
                    self.full_since.store(0, Ordering::Relaxed);
                    return Ok(Flush::Done);
                }
                std::mem::swap(&mut queue.bytes, &mut writer.buf);
                writer.frames = std::mem::take(&mut queue.frames);
                continue;
            }
            match writer.stream.send(rest) {
                Ok(n) => {
                    writer.at += n;
                    self.sent_bytes.fetch_add(n as u64, Ordering::Relaxed);
                    self.spoke.store(now, Ordering::Relaxed);
                    self.full_since.store(0, Ordering::Relaxed);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let _ =
                        self.full_since.compare_exchange(0, now.max(1), Ordering::Relaxed, Ordering::Relaxed);
                    return Ok(Flush::Full);
                }
                Err(_) if self.keeps => {
                    self.set_broken();
                    writer.stream.abort();
                }
                Err(e) => return Err(e),
            }
        }
        Ok(Flush::Done)
    }

    /// Frames that have come from the peer, on all streams.
    pub fn received(&self) -> u64 {
        self.got_messages.load(Ordering::Relaxed)
    }

    /// Whether frames are kept until they are acknowledged.
    pub fn keeps(&self) -> bool {
        self.keeps
    }

    /// Whether there is no stream at the moment.
    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// There is no stream any more; nothing is sent until [`Link::resume`].
    pub fn set_broken(&self) {
        self.broken.store(true, Ordering::Release);
        self.full_since.store(0, Ordering::Relaxed);
    }

    /// The peer has been silent for too long: the same, and its receive thread is to look for it again.
    pub fn give_up(&self) {
        self.given_up.store(true, Ordering::Release);
        self.set_broken();
        self.stream().abort();
    }

    /// Whether the stream was given up; asking ends that.
    pub fn was_given_up(&self) -> bool {
        self.given_up.swap(false, Ordering::AcqRel)
    }

    /// The peer has said, in a frame, how many it has received: the low 32 bits.
    pub fn acknowledged(&self, low: u32) {
        if self.keeps {
            let before = self.acked.load(Ordering::Relaxed);
            let since = low.wrapping_sub(u32::try_from(before & u64::from(u32::MAX)).unwrap_or(0));
            // Only the one thread that reads from the peer comes here. A frame that was sent again says what was true when
            // it was made.
            if since < 1 << 31 {
                self.acked.store(before + u64::from(since), Ordering::Relaxed);
            }
        }
    }

    /// Goes on with another stream. The peer has received `got` frames on those before: the others are sent again, and
    /// then what has been queued meanwhile.
    pub fn resume(&self, stream: S, got: u64, now: u64) -> Result<(), Gap> {
        let stream = Arc::new(stream);
        let mut writer = lock(&self.writer);
        let Writer { buf, frames, kept, .. } = &mut *writer;
        let (again, count) = kept.again(buf, *frames, got)?;
        (writer.buf, writer.frames, writer.at) = (again, count, 0);
        writer.stream = stream.clone();
        self.acked.store(got, Ordering::Relaxed);
        *lock(&self.stream) = stream;
        self.full_since.store(0, Ordering::Relaxed);
        self.heard.store(now, Ordering::Relaxed);
        self.resumed.fetch_add(1, Ordering::Relaxed);
        self.broken.store(false, Ordering::Release);
        Ok(())
    }

    /// How often it went on with another stream.
    pub fn resumed(&self) -> u64 {
        self.resumed.load(Ordering::Relaxed)
    }

    /// Since when the socket has taken nothing; 0 if it is not full.
    pub fn full_since(&self) -> u64 {
        self.full_since.load(Ordering::Relaxed)
    }

    /// Notes that bytes arrived.
    pub fn note_read(&self, now: u64, bytes: usize) {
        self.heard.store(now, Ordering::Relaxed);
        self.ear.heard(now);
        self.got_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Notes that a message arrived.
    pub fn note_message(&self) {
        self.got_messages.fetch_add(1, Ordering::Relaxed);
    }

    /// How answers are waited for.
    pub fn ear(&self) -> &Ear {
        &self.ear
    }

    /// When bytes arrived last.
    pub fn heard(&self) -> u64 {
        self.heard.load(Ordering::Relaxed)
    }

    /// Forgives silence until `now`: for when this process itself was stopped.
    pub fn forgive(&self, now: u64) {
        self.heard.store(now, Ordering::Relaxed);
        if self.full_since() != 0 {
            self.full_since.store(now.max(1), Ordering::Relaxed);
        }
    }

    /// When bytes were sent last.
    pub fn spoke(&self) -> u64 {
        self.spoke.load(Ordering::Relaxed)
    }

    /// Notes that the peer said farewell.
    pub fn set_left(&self) {
        self.left.store(true, Ordering::Release);
    }

    /// Whether the peer said farewell.
    pub fn has_left(&self) -> bool {
        self.left.load(Ordering::Acquire)
    }

    /// Messages and bytes sent, messages and bytes received.
    pub fn traffic(&self) -> [u64; 4] {
        [&self.sent_messages, &self.sent_bytes, &self.got_messages, &self.got_bytes]
            .map(|n| n.load(Ordering::Relaxed))
    }
}

impl Link {
    /// Says farewell and ends the sending direction. The other end has all of it before it sees the end.
    pub fn finish(&self, farewell: &Header, now: u64) {
        self.push(farewell);
        let mut writer = lock(&self.writer);
        // What the socket does not take now never goes; the peer then sees a broken connection, which is the truth.
        let _ = self.drain(&mut writer, now);
        // It may be closed already.
        let _ = self.stream().shutdown(Shutdown::Write);
    }

    /// Ends the sending direction towards a peer that has said farewell: it waits for that.
    pub fn answer_farewell(&self) {
        let _ = self.stream().shutdown(Shutdown::Write);
    }

    /// Ends the stream in both directions; a thread that reads from it wakes.
    pub fn close(&self) {
        // It may be closed already.
        self.stream().abort();
    }

    /// Notes that nobody reads from the stream any more.
    pub fn set_ended(&self) {
        self.ended.store(true, Ordering::Release);
    }

    /// Whether nobody reads from the stream any more.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Epoch;
    use std::io::Read;
    use std::net::TcpListener;

    #[test]
    fn a_full_socket_blocks_nobody_and_loses_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let out = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        let link = Link::new(MemberId(1), out, 0);
        let header = Header::ping(MemberId(0), Epoch(1));
        let mut frames = 0usize;
        while link.flush(5).unwrap() == Flush::Done {
            for _ in 0..1000 {
                link.push(&header);
            }
            frames += 1000;
        }
        assert_eq!(link.full_since(), 5);
        let mut got = vec![0; frames * size_of::<Header>()];
        let mut at = 0;
        while at < got.len() {
            at += peer.read(&mut got[at..]).unwrap();
            link.flush(6).unwrap();
        }
        assert!(got.chunks(size_of::<Header>()).all(|c| c == header.as_bytes()));
        assert_eq!(link.flush(7).unwrap(), Flush::Done);
        assert_eq!(link.full_since(), 0);
    }
}
