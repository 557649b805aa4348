//! The last faults one by one, to find out where they come from.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// One fault as it was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultRecord {
    /// When, in nanoseconds since the member started.
    pub at_ns: u64,
    /// The page.
    pub gpa: u64,
    /// Whether the thread wanted to write.
    pub write: bool,
    /// Whether it had to wait for another member.
    pub remote: bool,
    /// Kernel's id of the thread that waits; a vCPU's, if KVM took the fault.
    pub thread: u32,
}

/// A ring of records.
#[derive(Debug)]
pub struct FaultLog {
    records: VecDeque<FaultRecord>,
    limit: usize,
}

impl FaultLog {
    /// Room for `limit` records.
    pub fn new(limit: usize) -> FaultLog {
        FaultLog { records: VecDeque::new(), limit }
    }

    /// Adds a record; the oldest goes if there is no room.
    pub fn push(&mut self, record: FaultRecord) {
        if self.records.len() >= self.limit {
            self.records.pop_front();
        }
        self.records.push_back(record);
    }

    /// Empties the ring; oldest first.
    pub fn take(&mut self) -> Vec<FaultRecord> {
        self.records.drain(..).collect()
    }
}
