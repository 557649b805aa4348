//! The page protocol as a pure core: events in, commands out; no I/O, no thread, no clock.
//!
//! Home-based directory, single writer or many readers. One transaction per page at a time, serialised by
//! the page's home; everything else about the page waits there in FIFO order.
//!
//! ```text
//!  read, page modified elsewhere         write, page shared               write with a copy (upgrade)
//!  R        H        O                   R        H        O        S      R        H        S
//!  |--Get-->|        |                   |--Get-->|        |        |      |--Get-->|        |
//!  |        |--Fwd-->| protect, read     |        |--Fwd-->| drop   |      |<-Grant-| (keep) |
//!  |<-----Grant------|                   |        |--Inv------------|      |        |--Inv-->| drop
//!  | install         |                   |<-----Grant------|        |      |<----InvAck------|
//!  |--Done->|        |                   |<---------InvAck----------|      | unprotect       |
//!                                        |--Done->|                        |--Done->|
//! ```
//!
//! - Acknowledgements go straight to the requester; the grant says whose it has to wait for. So k sharers
//!   cost one round, and no path is longer than three hops.
//! - When the home answers alone (it is the owner, or nobody has the page), `Done` is not sent: messages from the home to
//!   the requester arrive in order, so whatever the home says next about the page meets an installed copy.
//! - Hence the one thing the transport owes: messages from one member to another about a page stay in order.
//!   Between different senders there is no order, and none is needed: the home does not start a page's next
//!   transaction until the requester has everything.
//! - A sharer that lost its copy while its upgrade waits at the home is served with data: the home looks at its
//!   own directory, not at what the requester had when it asked.
//!
//! [`Core`] holds both sides of a member: [`cache`] for the pages it has, [`directory`] for the pages it is home of.
//! Messages of a member to itself go round inside the core.

pub mod cache;
mod core;
pub mod cut;
pub mod directory;
pub mod hold;
pub mod homes;
pub mod message;
mod page_map;
pub mod pages;
pub mod slots;

pub use self::core::{Command, Core, CoreConfig, Event};
pub use message::{Contents, MemberSet, Msg, Right, Served, Terms, Token, Want};

use crate::addr::MemberId;
use crate::layout::Page;
use thiserror::Error;

/// A peer broke the protocol; its memory can no longer be trusted to be coherent.
#[derive(Clone, Debug, Error, PartialEq, Eq, Hash)]
#[error("{from} broke the page protocol on page {}: {what}", page.0)]
pub struct Violation {
    /// The peer.
    pub from: MemberId,
    /// The page.
    pub page: Page,
    /// The rule it broke.
    pub what: &'static str,
}

#[cfg(test)]
mod cluster;
#[cfg(test)]
mod model;
#[cfg(all(test, feature = "seeded-faults"))]
pub(crate) use model::seeded::find as find_by_model;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
