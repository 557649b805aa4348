//! Tells the page engine when no vCPU of the member runs: contended pages then go to whoever asks without a hold.

use dsm::node::DsmHandle;
use std::sync::{Mutex, PoisonError};

/// Counts the vCPUs that rest.
#[derive(Debug)]
pub struct Rest {
    vcpus: usize,
    /// Held while the engine is told, so that it hears of changes in their order; never across guest memory.
    resting: Mutex<usize>,
    dsm: Option<DsmHandle>,
}

impl Rest {
    /// A member with so many vCPUs, none of which rests.
    pub fn new(vcpus: usize, dsm: Option<DsmHandle>) -> Rest {
        Rest { vcpus, resting: Mutex::new(0), dsm }
    }

    /// A vCPU sent an interrupt to another member, and very likely waits for what is done there.
    pub fn expect_answer(&self) {
        if let Some(dsm) = &self.dsm {
            dsm.soften();
        }
    }

    /// One vCPU begins or ends to rest.
    pub fn change(&self, rests: bool) {
        let Some(dsm) = &self.dsm else { return };
        let mut resting = self.resting.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *resting == self.vcpus;
        *resting = if rests { *resting + 1 } else { resting.saturating_sub(1) };
        let after = *resting == self.vcpus;
        if before != after {
            dsm.rest(after);
        }
    }
}
