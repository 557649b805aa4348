//! Accesses to devices of other members that wait for their answer.

use dsm::addr::MemberId;
use std::collections::HashMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// No answer came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoAnswer {
    /// In time.
    TimedOut,
    /// And none will.
    Cancelled(String),
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    /// By token: who is asked, and the answer, `None` while waiting.
    answers: HashMap<u64, (MemberId, Option<u64>)>,
    cancelled: Option<String>,
}

/// The waiting requests of a member: at most one per vCPU.
#[derive(Debug, Default)]
pub struct Requests {
    state: Mutex<State>,
    changed: Condvar,
}

impl Requests {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A token for a new request to `peer`.
    pub fn open(&self, peer: MemberId) -> u64 {
        let mut state = self.lock();
        let token = state.next;
        // Never reaches the token that means "no answer wanted".
        state.next += 1;
        state.answers.insert(token, (peer, None));
        token
    }

    /// An answer came from `peer`. One that nobody waits for (too late, or a peer's nonsense) is dropped.
    pub fn complete(&self, peer: MemberId, token: u64, data: u64) {
        if let Some((_, slot)) = self.lock().answers.get_mut(&token).filter(|(asked, _)| *asked == peer) {
            *slot = Some(data);
            self.changed.notify_all();
        }
    }

    /// Waits for the answer.
    ///
    /// # Errors
    /// [`NoAnswer`].
    pub fn wait(&self, token: u64, timeout: Duration) -> Result<u64, NoAnswer> {
        let end = Instant::now() + timeout;
        let mut state = self.lock();
        loop {
            if let Some((_, Some(data))) = state.answers.get(&token).copied() {
                state.answers.remove(&token);
                return Ok(data);
            }
            let left = end.saturating_duration_since(Instant::now());
            let failure = match (&state.cancelled, left.is_zero()) {
                (Some(reason), _) => Some(NoAnswer::Cancelled(reason.clone())),
                (None, true) => Some(NoAnswer::TimedOut),
                (None, false) => None,
            };
            if let Some(failure) = failure {
                state.answers.remove(&token);
                return Err(failure);
            }
            (state, _) = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets all go that wait, and all that come.
    pub fn cancel(&self, reason: &str) {
        self.lock().cancelled.get_or_insert_with(|| reason.to_owned());
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn answers_find_their_waiter() {
        let requests = Arc::new(Requests::default());
        let (peer, stranger) = (MemberId(1), MemberId(2));
        let (a, b) = (requests.open(peer), requests.open(peer));
        let other = requests.clone();
        let waiter = std::thread::spawn(move || other.wait(a, Duration::from_secs(10)));
        requests.complete(peer, b, 2);
        requests.complete(peer, 77, 3);
        requests.complete(stranger, a, 4);
        requests.complete(peer, a, 1);
        assert_eq!(waiter.join().unwrap(), Ok(1));
        assert_eq!(requests.wait(b, Duration::ZERO), Ok(2));
    }

    #[test]
    fn nobody_waits_for_ever() {
        let requests = Requests::default();
        let token = requests.open(MemberId(1));
        assert_eq!(requests.wait(token, Duration::from_millis(1)), Err(NoAnswer::TimedOut));
        requests.cancel("member 1 died");
        let token = requests.open(MemberId(1));
        let cancelled = NoAnswer::Cancelled("member 1 died".into());
        assert_eq!(requests.wait(token, Duration::from_secs(10)), Err(cancelled));
    }
}
