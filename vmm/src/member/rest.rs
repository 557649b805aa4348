//! Tells the page engine when no vCPU of the member runs: contended pages then go to whoever asks without a hold.

use dsm::node::DsmHandle;
use dsm::stats::PeerWaits;
use std::sync::{Mutex, PoisonError};

/// Counts the vCPUs that rest.
#[derive(Debug)]
pub struct Rest {
    /// Held while the engine is told, so that it hears of changes in their order; never across guest memory.
    count: Mutex<Count>,
    dsm: Option<DsmHandle>,
}

#[derive(Clone, Copy, Debug)]
struct Count {
    vcpus: usize,
    resting: usize,
}

impl Count {
    fn all_rest(self) -> bool {
        self.resting >= self.vcpus
    }
}

impl Rest {
    /// A member with so many vCPUs, none of which rests.
    pub fn new(vcpus: usize, dsm: Option<DsmHandle>) -> Rest {
        Rest { count: Mutex::new(Count { vcpus, resting: 0 }), dsm }
    }

    /// A vCPU sent an interrupt to another member, and very likely waits for what is done there.
    pub fn expect_answer(&self) {
        if let Some(dsm) = &self.dsm {
            dsm.soften();
        }
    }

    /// The pages on which a thread waited last, and whether it wrote.
    pub fn recent_pages(&self, thread: u32) -> Vec<(u64, bool)> {
        self.dsm.as_ref().map(|dsm| dsm.recent(thread)).unwrap_or_default()
    }

    /// For which members a thread waited.
    pub fn waits(&self, thread: u32) -> Vec<PeerWaits> {
        self.dsm.as_ref().map(|dsm| dsm.waits(thread)).unwrap_or_default()
    }

    /// A vCPU that comes will use these pages.
    pub fn want(&self, pages: &[(u64, bool)]) {
        if let Some(dsm) = &self.dsm {
            dsm.want(pages);
        }
    }

    /// One vCPU begins or ends to rest.
    pub fn change(&self, rests: bool) {
        self.update(|count| {
            count.resting = if rests { count.resting + 1 } else { count.resting.saturating_sub(1) };
        });
    }

    /// One vCPU, which does not rest, comes to this member or leaves it.
    pub fn population(&self, more: bool) {
        self.update(|count| {
            count.vcpus = if more { count.vcpus + 1 } else { count.vcpus.saturating_sub(1) };
        });
    }

    fn update(&self, change: impl FnOnce(&mut Count)) {
        let Some(dsm) = &self.dsm else { return };
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        let before = count.all_rest();
        change(&mut count);
        let after = count.all_rest();
        if before != after {
            dsm.rest(after);
        }
    }
}
