//! What one call tells about a member's memory.

use crate::addr::{MemberId, PAGE_SIZE};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// Faults by kind. Remote: another member had to answer. Local: this member is the page's home and answered alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultCounts {
    /// Reads answered here.
    pub read_local: u64,
    /// Writes answered here.
    pub write_local: u64,
    /// Writes to a copy, answered here.
    pub upgrade_local: u64,
    /// Reads answered elsewhere.
    pub read_remote: u64,
    /// Writes answered elsewhere.
    pub write_remote: u64,
    /// Writes to a copy, answered elsewhere.
    pub upgrade_remote: u64,
    /// Faults on a page homed here that nobody had touched; counted above as local too.
    pub first_touch: u64,
    /// Pages that these brought.
    pub first_touch_pages: u64,
    /// Contended pages that came along with one of their gang before a thread touched them.
    #[serde(default)]
    pub ahead: u64,
    /// First writes to pages since they were saved by a checkpoint.
    #[serde(default)]
    pub reopened: u64,
    /// Threads that waited for a page that had come in the meantime.
    pub spurious: u64,
}

impl FaultCounts {
    /// Faults that another member had to answer.
    pub fn remote(&self) -> u64 {
        self.read_remote + self.write_remote + self.upgrade_remote
    }

    /// Faults that this member answered alone.
    pub fn local(&self) -> u64 {
        self.read_local + self.write_local + self.upgrade_local
    }

    pub(super) fn add(&mut self, other: &FaultCounts) {
        self.read_local += other.read_local;
        self.write_local += other.write_local;
        self.upgrade_local += other.upgrade_local;
        self.read_remote += other.read_remote;
        self.write_remote += other.write_remote;
        self.upgrade_remote += other.upgrade_remote;
        self.first_touch += other.first_touch;
        self.first_touch_pages += other.first_touch_pages;
        self.ahead += other.ahead;
        self.reopened += other.reopened;
        self.spurious += other.spurious;
    }
}

/// Time from reading a remote fault to waking its thread, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// Number of faults.
    pub count: u64,
    /// Median.
    pub p50_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
    /// Longest.
    pub max_us: f64,
}

impl Latency {
    pub(super) fn of(histogram: &Histogram<u64>) -> Latency {
        // Nanoseconds below a minute are exact in an f64.
        #[allow(clippy::cast_precision_loss)]
        let us = |ns: u64| ns as f64 / 1000.0;
        if histogram.is_empty() {
            return Latency::default();
        }
        Latency {
            count: histogram.len(),
            p50_us: us(histogram.value_at_quantile(0.5)),
            p99_us: us(histogram.value_at_quantile(0.99)),
            max_us: us(histogram.max()),
        }
    }
}

/// A page that moved often.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HotPage {
    /// Its address.
    pub gpa: u64,
    /// How often it came to this member or was given up by it.
    pub count: u64,
}

/// Traffic with one peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerTraffic {
    /// The peer.
    pub peer: MemberId,
    /// Messages to it.
    pub messages_sent: u64,
    /// Bytes to it.
    pub bytes_sent: u64,
    /// Messages from it.
    pub messages_received: u64,
    /// Bytes from it.
    pub bytes_received: u64,
    /// How often a connection to it that broke was made again.
    #[serde(default)]
    pub reconnects: u64,
}

/// A member's memory at one moment; counters since its start.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DsmSnapshot {
    /// Faults by kind.
    pub faults: FaultCounts,
    /// Latency of remote read faults.
    pub read: Latency,
    /// Latency of remote write faults.
    pub write: Latency,
    /// Latency of remote upgrades.
    pub upgrade: Latency,
    /// Pages in the whole memory.
    pub pages_total: u64,
    /// Pages here as read-only copies.
    pub pages_shared: u64,
    /// Pages that only this member has.
    pub pages_modified: u64,
    /// Bytes of both.
    pub resident_bytes: u64,
    /// Most bytes that were ever here.
    #[serde(default)]
    pub peak_bytes: u64,
    /// Bytes that this member may keep, if there is a limit.
    #[serde(default)]
    pub budget_bytes: Option<u64>,
    /// How often a page was asked to go because of it.
    #[serde(default)]
    pub evictions: u64,
    /// Pages sent to other members, zero pages included.
    pub pages_given: u64,
    /// Zero pages among them; they moved no data.
    pub zero_pages_given: u64,
    /// Copies dropped for other members' writes.
    pub pages_invalidated: u64,
    /// Invalidations sent to other members.
    pub invalidations_sent: u64,
    /// How often a page was kept for its hold time although another member wanted it.
    pub holds: u64,
    /// Pages filled before the guest ran.
    pub pages_preloaded: u64,
    /// How often a page was found where none should have been; not zero means that something other than this crate
    /// changes the mapping.
    pub replaced: u64,
    /// Messages sent to all peers.
    pub messages_sent: u64,
    /// Bytes sent to all peers.
    pub bytes_sent: u64,
    /// Messages from all peers.
    pub messages_received: u64,
    /// Bytes from all peers.
    pub bytes_received: u64,
    /// The same by peer.
    pub peers: Vec<PeerTraffic>,
    /// The pages that moved most, hottest first.
    pub hot_pages: Vec<HotPage>,
}

impl DsmSnapshot {
    pub(crate) fn finish(&mut self, pages: u32) {
        self.pages_total = u64::from(pages);
        self.resident_bytes = (self.pages_shared + self.pages_modified) * PAGE_SIZE;
        self.messages_sent = self.peers.iter().map(|p| p.messages_sent).sum();
        self.bytes_sent = self.peers.iter().map(|p| p.bytes_sent).sum();
        self.messages_received = self.peers.iter().map(|p| p.messages_received).sum();
        self.bytes_received = self.peers.iter().map(|p| p.bytes_received).sum();
    }
}
