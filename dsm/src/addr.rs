//! The words every layer shares: members, epochs, pages and ranges of guest-physical addresses.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Size of a page, the unit of coherence, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// Most members one memory can have: the width of the directory's sharer bitmap.
pub const MAX_MEMBERS: usize = 64;

/// Number of a member, `0..MAX_MEMBERS`; the coordinator is member 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MemberId(pub u16);

impl fmt::Display for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "member {}", self.0)
    }
}

/// Number of a topology (members, homes, vCPU placement). Grows at every change; part of every message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Epoch(pub u64);

/// A page-aligned range of guest-physical addresses whose pages have their home at one member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HomeRange {
    /// First guest-physical address, a multiple of [`PAGE_SIZE`].
    pub start: u64,
    /// Length in bytes, a multiple of [`PAGE_SIZE`], not zero.
    pub len: u64,
    /// The member that serialises all transactions of these pages.
    pub home: MemberId,
}

impl HomeRange {
    /// First address behind the range.
    pub fn end(&self) -> u64 {
        self.start + self.len
    }
}
