//! Cuts a byte stream into frames, with as few reads as the stream allows.

use super::frame::{FrameError, HEADER_LEN, Header, PAGE_LEN};
use std::io::{self, Read};
use thiserror::Error;
use zerocopy::FromBytes;

/// Bytes of one read; more wait in the socket. The first frame that is longer makes room for one of its length behind them.
const CAPACITY: usize = 16 * (HEADER_LEN + PAGE_LEN);

/// No further frame comes out of a stream.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The other end closed the stream between two frames.
    #[error("it closed its connection")]
    Closed,
    /// The other end closed the stream in the middle of a frame.
    #[error("its connection ended in the middle of a message")]
    Truncated,
    /// The stream broke.
    #[error("its connection broke: {0}")]
    Io(io::Error),
    /// The stream holds something that is not a frame.
    #[error("it sent a malformed message: {0}")]
    Frame(#[from] FrameError),
}

/// A buffered stream of frames.
#[derive(Debug)]
pub struct FrameReader<R> {
    stream: R,
    capacity: usize,
    buf: Vec<u8>,
    start: usize,
    end: usize,
}

impl<R: Read> FrameReader<R> {
    /// Reads frames from a stream.
    pub fn new(stream: R) -> FrameReader<R> {
        FrameReader::with_capacity(stream, CAPACITY)
    }

    /// Reads frames from a stream, at most `capacity` bytes at a time; there is room for one frame at least.
    pub fn with_capacity(stream: R, capacity: usize) -> FrameReader<R> {
        let capacity = capacity.max(HEADER_LEN + PAGE_LEN);
        FrameReader { stream, capacity, buf: vec![0; capacity], start: 0, end: 0 }
    }

    /// What the frames are read from.
    pub fn source(&mut self) -> &mut R {
        &mut self.stream
    }

    /// Makes sure that `need` bytes (at most one frame) are in the buffer; `Ok(false)` at the end of the stream
    /// with nothing in the buffer.
    fn fill(&mut self, need: usize, on_read: &mut impl FnMut(usize)) -> Result<bool, ReadError> {
        if self.buf.len() < need {
            self.buf.resize(self.capacity + need, 0);
        }
        while self.end - self.start < need {
            let have = self.end - self.start;
            if have < HEADER_LEN || self.buf.len() - self.start < need {
                self.buf.copy_within(self.start..self.end, 0);
                self.end = have;
                self.start = 0;
            }
            // No more than its end of a long frame: the beginning of the next one would have to be moved to the front.
            let most = if need > self.capacity { need - have } else { self.capacity };
            let end = self.buf.len().min(self.end + most);
            let room = self.buf.get_mut(self.end..end).unwrap_or(&mut []);
            match self.stream.read(room) {
                Ok(0) if self.start == self.end => return Ok(false),
                Ok(0) => return Err(ReadError::Truncated),
                Ok(n) => {
                    self.end += n;
                    on_read(n);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(ReadError::Io(e)),
            }
        }
        Ok(true)
    }

    /// Whether the next frame is here already, so that [`FrameReader::next`] will not wait. A frame that is no frame counts.
    pub fn has_next(&self) -> bool {
        let Some(bytes) = self.buf.get(self.start..self.end) else { return false };
        let Some(header) = bytes.get(..HEADER_LEN).and_then(|b| Header::read_from_bytes(b).ok()) else {
            return false;
        };
        header.payload_len().map_or(true, |len| bytes.len() >= HEADER_LEN + len)
    }

    /// Waits for the next frame and hands out its header and payload. `on_read` is told of every read's bytes.
    pub fn next(&mut self, mut on_read: impl FnMut(usize)) -> Result<(Header, &[u8]), ReadError> {
        if !self.fill(HEADER_LEN, &mut on_read)? {
            return Err(ReadError::Closed);
        }
        let bytes = self.buf.get(self.start..self.start + HEADER_LEN).unwrap_or(&[]);
        let header = Header::read_from_bytes(bytes).map_err(|_| ReadError::Truncated)?;
        let len = HEADER_LEN + header.payload_len()?;
        if !self.fill(len, &mut on_read)? {
            return Err(ReadError::Truncated);
        }
        let at = self.start;
        self.start += len;
        Ok((header, self.buf.get(at + HEADER_LEN..at + len).unwrap_or(&[])))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{Epoch, MemberId};
    use crate::protocol::{Contents, MemberSet, Msg, Right, Terms, Token};
    use zerocopy::IntoBytes;

    /// Hands out a few bytes at a time.
    struct Drip<'a>(&'a [u8], usize);

    impl Read for Drip<'_> {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            let n = self.1.min(buf.len()).min(self.0.len());
            buf[..n].copy_from_slice(&self.0[..n]);
            self.0 = &self.0[n..];
            Ok(n)
        }
    }

    fn stream(frames: usize) -> Vec<u8> {
        let terms = Terms { token: Token(1), right: Right::Shared, acks: MemberSet::EMPTY, done: false };
        let mut bytes = Vec::new();
        for n in 0..frames {
            bytes.extend_from_slice(Header::ping(MemberId(0), Epoch(0)).as_bytes());
            let msg = Msg::Grant { terms, contents: Contents::Bytes(()) };
            bytes.extend_from_slice(Header::message(MemberId(0), Epoch(0), 0, &msg).as_bytes());
            bytes.extend_from_slice(&[u8::try_from(n % 251).unwrap(); PAGE_LEN]);
        }
        bytes
    }

    #[test]
    fn frames_come_out_whole_however_they_arrive() {
        let bytes = stream(40);
        for step in [1, 7, 47, 48, 49, 4143, 4144, 5000, 1 << 20] {
            let mut reader = FrameReader::new(Drip(&bytes, step));
            for n in 0..40 {
                assert_eq!(reader.next(|_| ()).unwrap().1.len(), 0);
                let (_, page) = reader.next(|_| ()).unwrap();
                assert_eq!(page, [u8::try_from(n % 251).unwrap(); PAGE_LEN]);
            }
            assert!(matches!(reader.next(|_| ()), Err(ReadError::Closed)));
        }
    }

    #[test]
    fn long_frames_come_out_whole_between_short_ones() {
        const RUN: u8 = 64;
        let terms = Terms { token: Token(1), right: Right::Shared, acks: MemberSet::EMPTY, done: false };
        let msg = Msg::Grant { terms, contents: Contents::Bytes(()) };
        let ping = Header::ping(MemberId(0), Epoch(0));
        let mut bytes = Vec::new();
        for _ in 0..8 {
            bytes.extend_from_slice(ping.as_bytes());
            bytes.extend_from_slice(Header::run(MemberId(0), Epoch(0), 0, &msg, RUN.into()).as_bytes());
            (0..RUN).for_each(|n| bytes.extend_from_slice(&[n; PAGE_LEN + 8]));
        }
        for step in [4144, 65_536, 70_001, 1 << 20, 1 << 30] {
            let mut reader = FrameReader::new(Drip(&bytes, step));
            for _ in 0..8 {
                assert_eq!(reader.next(|_| ()).unwrap().1.len(), 0);
                let (_, pages) = reader.next(|_| ()).unwrap();
                assert_eq!(pages.len(), usize::from(RUN) * (PAGE_LEN + 8));
                assert!(
                    (0..RUN).zip(pages.chunks(PAGE_LEN + 8)).all(|(n, page)| page.iter().all(|b| *b == n))
                );
            }
            assert!(matches!(reader.next(|_| ()), Err(ReadError::Closed)));
        }
    }

    #[test]
    fn a_cut_stream_is_an_error() {
        let bytes = stream(1);
        for cut in [1, 47, 49, 100, bytes.len() - 1] {
            let mut reader = FrameReader::new(Drip(&bytes[..cut], 64));
            let mut result = Ok(());
            while result.is_ok() {
                result = reader.next(|_| ()).map(|_| ());
            }
            assert!(matches!(result, Err(ReadError::Truncated)), "{cut}: {result:?}");
        }
    }
}
