//! Frames that a peer has perhaps not received: kept until it says so, and sent again on the next stream.
//!
//! Frames are numbered from 1 by their order; the number is not on the wire. Every frame says how many its sender has
//! received so far (the low 32 bits of it), and a new stream begins with both sides saying so in full.

use super::frame::{HEADER_LEN, Header};
use std::collections::VecDeque;
use thiserror::Error;
use zerocopy::FromBytes;

/// Buffers that are kept for reuse.
const SPARE: usize = 8;
/// A buffer of more bytes is not worth to be kept for reuse.
const LARGE: usize = 1 << 20;

/// A peer says that it has received what can't be.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("it says that it has received {got} frames, of {from} to {to} that it may have")]
pub struct Gap {
    /// Its number.
    pub got: u64,
    /// Frames that it had said to have received before.
    pub from: u64,
    /// Frames that were sent.
    pub to: u64,
}

/// Sent frames, in the buffers in which they were sent.
#[derive(Debug, Default)]
pub struct Kept {
    /// Frames that the peer has.
    acked: u64,
    /// Frames in the buffers.
    frames: u64,
    buffers: VecDeque<(Vec<u8>, u64)>,
    spare: Vec<Vec<u8>>,
}

impl Kept {
    /// An empty buffer.
    pub fn spare(&mut self) -> Vec<u8> {
        self.spare.pop().unwrap_or_default()
    }

    /// A buffer of so many frames has been sent.
    pub fn keep(&mut self, buffer: Vec<u8>, frames: u64) {
        self.frames += frames;
        self.buffers.push_back((buffer, frames));
    }

    /// The peer has received `got` frames; `more` have been taken by the socket, at least in part, since the last that were
    /// kept. Drops the buffers that are not needed any more.
    pub fn acknowledge(&mut self, got: u64, more: u64) -> Result<(), Gap> {
        let to = self.acked + self.frames + more;
        if got > to {
            return Err(Gap { got, from: self.acked, to });
        }
        while let Some((_, frames)) = self.buffers.front() {
            if self.acked + frames > got {
                break;
            }
            self.acked += frames;
            self.frames -= frames;
            if let Some((mut buffer, _)) = self.buffers.pop_front()
                && self.spare.len() < SPARE
                && buffer.capacity() <= LARGE
            {
                buffer.clear();
                self.spare.push(buffer);
            }
        }
        Ok(())
    }

    /// The stream broke when `buffer`, of so many frames, was being sent, and the peer has received `got` frames in all.
    /// Returns what is to be sent again, and how many frames that is.
    pub fn again(&mut self, buffer: &[u8], frames: u64, got: u64) -> Result<(Vec<u8>, u64), Gap> {
        let to = self.acked + self.frames + frames;
        let gap = Gap { got, from: self.acked, to };
        if got < self.acked || got > to {
            return Err(gap);
        }
        let mut all = self.spare();
        for (kept, _) in self.buffers.drain(..) {
            all.extend_from_slice(&kept);
        }
        all.extend_from_slice(buffer);
        let mut at = 0;
        for _ in self.acked..got {
            at += all.get(at..).and_then(frame_len).ok_or(gap)?;
        }
        all.drain(..at);
        (self.acked, self.frames) = (got, 0);
        Ok((all, to - got))
    }
}

/// Length of the frame that these bytes begin with.
fn frame_len(bytes: &[u8]) -> Option<usize> {
    let header = Header::read_from_bytes(bytes.get(..HEADER_LEN)?).ok()?;
    Some(HEADER_LEN + header.payload_len().ok()?)
}

#[cfg(test)]
mod model;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{Epoch, MemberId};
    use zerocopy::IntoBytes;

    fn frames(count: usize) -> Vec<u8> {
        Header::ping(MemberId(1), Epoch(1)).as_bytes().repeat(count)
    }

    #[test]
    fn what_is_acknowledged_is_forgotten_and_the_rest_is_sent_again() {
        let mut kept = Kept::default();
        kept.keep(frames(3), 3);
        kept.keep(frames(2), 2);
        kept.acknowledge(4, 0).unwrap();
        assert_eq!((kept.acked, kept.buffers.len()), (3, 1), "whole buffers only");
        assert_eq!(kept.acknowledge(9, 3), Err(Gap { got: 9, from: 3, to: 8 }));
        // Five are gone, two more on their way when the stream breaks; the peer has the first four.
        let (again, count) = kept.again(&frames(2), 2, 4).unwrap();
        assert_eq!((again.len(), count), (3 * HEADER_LEN, 3));
        assert!(kept.again(&again, 3, 3).is_err(), "it had four already");
        assert!(kept.again(&again, 3, 8).is_err(), "there are seven");
        assert_eq!(kept.again(&again, 3, 7).unwrap(), (vec![], 0));
    }
}
