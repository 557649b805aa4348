//! The conversation that every mechanism carries.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use crate::context::{PATIENCE, repeat};
use crate::failure::Failure;

/// One end of a mechanism.
pub trait Channel {
    /// Sends one message of at most [`MAX_MESSAGE`] bytes.
    fn send(&mut self, message: &[u8]) -> Result<(), Failure>;
    /// Waits for one message, at most [`PATIENCE`].
    fn receive(&mut self) -> Result<Vec<u8>, Failure>;
}

/// Longest message in bytes: over two pages.
pub const MAX_MESSAGE: usize = 9_000;
/// Sizes in turn. The empty message ends the conversation.
const SIZES: [usize; 4] = [8, 200, 4_096, MAX_MESSAGE];
const MIN_ROUNDS: u64 = 8;
const MAX_ROUNDS: u64 = 1_000;

/// The message of a round.
fn message(round: u64) -> Vec<u8> {
    let size = SIZES.get(usize::try_from(round).unwrap_or(0) % SIZES.len()).copied().unwrap_or(8);
    let mut state = round.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..size)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56).to_le_bytes()[0]
        })
        .collect()
}

/// What is answered: the same bytes backwards and inverted, so that an echo of the sender's own bytes does not pass.
fn answer(message: &[u8]) -> Vec<u8> {
    message.iter().rev().map(|b| !b).collect()
}

/// Asks until the time is over and checks each answer. Returns the rounds.
pub fn ask(channel: &mut impl Channel, slice: Duration) -> Result<u64, Failure> {
    let rounds = repeat(slice, MIN_ROUNDS, MAX_ROUNDS, |round| {
        let question = message(round);
        channel.send(&question)?;
        let expected = answer(&question);
        let found = channel.receive()?;
        if found == expected {
            return Ok(());
        }
        let wrong = expected.iter().zip(&found).position(|(e, f)| e != f);
        Err(Failure::Mismatch {
            what: format!("answer to message {round}"),
            expected: format!("{} bytes", expected.len()),
            found: format!("{} bytes, the first wrong one at {wrong:?}", found.len()),
        })
    })?;
    channel.send(&[])?;
    Ok(rounds)
}

/// Answers until the empty message.
pub fn answer_all(channel: &mut impl Channel) -> Result<(), Failure> {
    loop {
        let question = channel.receive()?;
        if question.is_empty() {
            return Ok(());
        }
        channel.send(&answer(&question))?;
    }
}

type Shelf = Arc<(Mutex<VecDeque<Vec<u8>>>, Condvar)>;

/// A queue between threads, as both of its ends.
pub fn queue() -> (Shelf, Shelf) {
    let shelf = Shelf::default();
    (Arc::clone(&shelf), shelf)
}

/// Two threads that talk through a queue each way.
#[derive(Debug)]
pub struct Queues {
    /// Where this side puts messages.
    pub send: Shelf,
    /// Where it takes them.
    pub receive: Shelf,
}

impl Channel for Queues {
    fn send(&mut self, message: &[u8]) -> Result<(), Failure> {
        let (queue, bell) = &*self.send;
        queue.lock().unwrap_or_else(|p| p.into_inner()).push_back(message.to_vec());
        bell.notify_one();
        Ok(())
    }

    fn receive(&mut self) -> Result<Vec<u8>, Failure> {
        let (queue, bell) = &*self.receive;
        let start = Instant::now();
        let mut messages = queue.lock().unwrap_or_else(|p| p.into_inner());
        loop {
            if let Some(message) = messages.pop_front() {
                return Ok(message);
            }
            let left = PATIENCE.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Err(Failure::timeout("message from the other thread", PATIENCE));
            }
            messages = bell.wait_timeout(messages, left).unwrap_or_else(|p| p.into_inner()).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers with one bit wrong in the largest message.
    struct Broken(Vec<u8>);

    impl Channel for Broken {
        fn send(&mut self, message: &[u8]) -> Result<(), Failure> {
            self.0 = answer(message);
            if self.0.len() == MAX_MESSAGE {
                self.0[5_000] ^= 4;
            }
            Ok(())
        }

        fn receive(&mut self) -> Result<Vec<u8>, Failure> {
            Ok(self.0.clone())
        }
    }

    #[test]
    fn one_wrong_bit_is_noticed() {
        let error = ask(&mut Broken(vec![]), Duration::ZERO).expect_err("a wrong bit").to_string();
        assert!(error.contains("5000"), "{error}");
    }

    #[test]
    fn queues_carry_the_conversation() {
        let ((to_b, from_a), (to_a, from_b)) = (queue(), queue());
        let peer = std::thread::spawn(move || answer_all(&mut Queues { send: to_a, receive: from_a }));
        let rounds = ask(&mut Queues { send: to_b, receive: from_b }, Duration::ZERO);
        assert_eq!(rounds.ok(), Some(MIN_ROUNDS));
        assert!(peer.join().is_ok_and(|r| r.is_ok()));
    }
}
