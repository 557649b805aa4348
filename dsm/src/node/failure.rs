//! Why the memory stopped: always with the name of whom to blame.

use crate::addr::MemberId;
use std::fmt;
use std::time::Duration;
use thiserror::Error;

/// The memory has failed and answers no more faults.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("shared memory failed: {}{cause}{lost}", peer.map(|p| format!("{p}: ")).unwrap_or_default())]
pub struct DsmFailure {
    /// The peer that died or misbehaved; `None` if this member's own kernel refused something.
    pub peer: Option<MemberId>,
    /// What happened.
    pub cause: Cause,
    /// What only the peer had.
    pub lost: Lost,
}

/// Pages whose newest contents only a lost peer has, as far as this member knows: of those that are homed here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// How many.
    pub pages: u64,
    /// The addresses of the first of them.
    pub first: Vec<u64>,
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.pages == 0 {
            return Ok(());
        }
        let first: Vec<String> = self.first.iter().map(|gpa| format!("{gpa:#x}")).collect();
        let more = if self.pages > self.first.len() as u64 { ", ..." } else { "" };
        write!(f, "; of the memory homed here only it has {} pages ({}{more})", self.pages, first.join(", "))
    }
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
