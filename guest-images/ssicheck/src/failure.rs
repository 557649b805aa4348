//! Why a sub-check failed.

use std::fmt::Display;
use std::io;
use std::time::Duration;

/// One way for a sub-check to fail; its text is what the table and the JSON show.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The kernel refused something.
    #[error("{what}: {source}")]
    Sys {
        /// What was attempted, with the path, PID or CPU.
        what: String,
        /// The errno.
        source: io::Error,
    },
    /// Something did not happen in time.
    #[error("nothing after {seconds} s: {waiting_for}")]
    Timeout {
        /// What was waited for, and from whom.
        waiting_for: String,
        /// How long was waited, in seconds.
        seconds: u64,
    },
    /// The machine answered, and wrongly.
    #[error("{what}: expected {expected}, found {found}")]
    Mismatch {
        /// What was compared.
        what: String,
        /// What one machine would show.
        expected: String,
        /// What this one shows.
        found: String,
    },
    /// Anything else, in words.
    #[error("{0}")]
    Other(String),
}

impl Failure {
    /// A wait for `waiting_for` that lasted `limit` without an answer.
    pub fn timeout(waiting_for: impl Into<String>, limit: Duration) -> Failure {
        Failure::Timeout { waiting_for: waiting_for.into(), seconds: limit.as_secs() }
    }

    /// The last errno, as the failure of `what`.
    pub fn last_os(what: impl Into<String>) -> Failure {
        Failure::Sys { what: what.into(), source: io::Error::last_os_error() }
    }
}

/// Names what was attempted when an I/O call fails.
pub trait During<T> {
    /// Turns an I/O error into a [`Failure`] that names `what`.
    fn during(self, what: impl Display) -> Result<T, Failure>;
}

impl<T> During<T> for io::Result<T> {
    fn during(self, what: impl Display) -> Result<T, Failure> {
        self.map_err(|source| Failure::Sys { what: what.to_string(), source })
    }
}

/// Fails unless both sides are equal.
pub fn expect_eq<T: PartialEq + std::fmt::Debug>(
    what: impl Display,
    expected: T,
    found: T,
) -> Result<(), Failure> {
    if expected == found {
        return Ok(());
    }
    Err(Failure::Mismatch {
        what: what.to_string(),
        expected: format!("{expected:?}"),
        found: format!("{found:?}"),
    })
}
