//! Who waits for whom: per thread and per member that answered, how many faults and for how long. For whoever decides where
//! a vCPU should live.

use crate::addr::MemberId;
use crate::layout::Page;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Threads that are known to wait at a time; the one that began first is forgotten.
const OPEN: usize = 256;
/// Pairs of thread and member that are counted; later ones are not.
const PAIRS: usize = 4096;

/// Faults of one thread that one member answered, since the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerWaits {
    /// The member that had the page, or gave up its copy.
    pub peer: MemberId,
    /// Faults.
    pub faults: u64,
    /// From reading the fault to waking the thread, microseconds, all together.
    pub wait_us: u64,
}

/// Counters of one core.
#[derive(Debug, Default)]
pub(super) struct Waits {
    /// Page, thread, and when it began to wait.
    open: Vec<(Page, u32, u64)>,
    /// Faults and nanoseconds.
    sums: BTreeMap<(u32, MemberId), (u64, u64)>,
}

impl Waits {
    /// A thread waits for a page since `since`.
    pub(super) fn begin(&mut self, page: Page, thread: u32, since: u64) {
        if self.open.iter().any(|(p, t, _)| *p == page && *t == thread) {
            return;
        }
        if self.open.len() >= OPEN {
            self.open.remove(0);
        }
        self.open.push((page, thread, since));
    }

    /// A request of the time `since` has been answered by `peer` at `now`.
    pub(super) fn end(&mut self, page: Page, peer: MemberId, since: u64, now: u64) {
        let sums = &mut self.sums;
        self.open.retain(|(p, thread, began)| {
            if *p != page {
                return true;
            }
            // One that began before was noted when its answer had been counted already.
            if *began >= since && (sums.len() < PAIRS || sums.contains_key(&(*thread, peer))) {
                let (faults, ns) = sums.entry((*thread, peer)).or_default();
                *faults += 1;
                *ns = ns.saturating_add(now.saturating_sub(*began));
            }
            false
        });
    }

    /// Adds what a thread waited.
    pub(super) fn add_to(&self, thread: u32, all: &mut BTreeMap<MemberId, (u64, u64)>) {
        for ((_, peer), (faults, ns)) in self.sums.range((thread, MemberId(0))..=(thread, MemberId(u16::MAX)))
        {
            let sum = all.entry(*peer).or_default();
            *sum = (sum.0 + faults, sum.1.saturating_add(*ns));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(waits: &Waits, thread: u32) -> Vec<(u16, u64, u64)> {
        let mut all = BTreeMap::new();
        waits.add_to(thread, &mut all);
        all.into_iter().map(|(peer, (faults, ns))| (peer.0, faults, ns)).collect()
    }

    #[test]
    fn each_thread_by_who_answered() {
        let (mut waits, page) = (Waits::default(), Page(7));
        waits.begin(page, 1, 100);
        waits.begin(page, 1, 120);
        waits.begin(page, 2, 150);
        waits.begin(Page(8), 1, 100);
        waits.end(page, MemberId(3), 100, 400);
        assert_eq!((of(&waits, 1), of(&waits, 2)), (vec![(3, 1, 300)], vec![(3, 1, 250)]));
        waits.end(page, MemberId(3), 100, 900);
        waits.end(Page(8), MemberId(0), 100, 200);
        assert_eq!(of(&waits, 1), [(0, 1, 100), (3, 1, 300)]);
        // Noted too late: the next request for the page is not that one.
        waits.begin(page, 1, 500);
        waits.end(page, MemberId(3), 5000, 6000);
        assert_eq!(of(&waits, 1), [(0, 1, 100), (3, 1, 300)]);
        assert!(waits.open.is_empty());
    }

    #[test]
    fn bounded() {
        let mut waits = Waits::default();
        for n in 0..10_000 {
            waits.begin(Page(n), n, 1);
            assert!(waits.open.len() <= OPEN);
            waits.end(Page(n), MemberId(1), 1, 2);
        }
        assert_eq!(waits.sums.len(), PAIRS);
        for n in 0..10_000 {
            waits.begin(Page(n), n, 1);
        }
        assert_eq!(waits.open.len(), OPEN);
    }
}
