//! Why the memory stopped: always with the name of whom to blame.

use crate::addr::MemberId;
use std::time::Duration;
use thiserror::Error;

/// The memory has failed and answers no more faults.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("shared memory failed: {}{cause}", peer.map(|p| format!("{p}: ")).unwrap_or_default())]
pub struct DsmFailure {
    /// The peer that died or misbehaved; `None` if this member's own kernel refused something.
    pub peer: Option<MemberId>,
    /// What happened.
    pub cause: Cause,
}

/// What happened.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Cause {
    /// The connection ended without a farewell.
    #[error("{0}")]
    Disconnected(String),
    /// The connection broke and could not be made again.
    #[error("{broke}; not connected again within {grace:?}")]
    Gone {
        /// How it broke.
        broke: String,
        /// For how long it was tried.
        grace: Duration,
    },
    /// Nothing was heard for too long.
    #[error("nothing was heard from it for {0:?}; its host may be down or cut off")]
    Silent(Duration),
    /// It took nothing for too long.
    #[error("it has read nothing for {0:?}; its host may be down or overloaded")]
    Stuck(Duration),
    /// It said farewell, but something is needed from it.
    #[error("it has left, and a page that only it can answer for is needed")]
    Left,
    /// It broke the protocol.
    #[error("{0}")]
    Violation(String),
    /// This member's kernel refused something.
    #[error("{0}")]
    Local(String),
}
