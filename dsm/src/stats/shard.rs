//! Counters of one protocol core, and their sum over all.

use super::snapshot::{DsmSnapshot, FaultCounts, HotPage, Latency};
use super::waits::Waits;
use crate::addr::MemberId;
use crate::layout::{Layout, Page};
use crate::protocol::pages::Share;
use crate::protocol::{Msg, Served, Want};
use hdrhistogram::Histogram;
use std::collections::BTreeMap;

/// Longest latency that is told apart: a minute, in nanoseconds.
const LONGEST: u64 = 60_000_000_000;
/// Answered faults that wait to be counted.
const FRESH: usize = 64;
/// Pages that a snapshot names.
const TOP: usize = 32;

fn histogram() -> Histogram<u64> {
    // The bounds are constants that the crate accepts; its auto-sizing histogram is the fallback that never fails.
    Histogram::new_with_bounds(1, LONGEST, 2)
        .or_else(|_| Histogram::new(2))
        .unwrap_or_else(|_| unreachable!("two significant digits are allowed"))
}

#[derive(Clone, Debug)]
struct Latencies {
    read: Histogram<u64>,
    write: Histogram<u64>,
    upgrade: Histogram<u64>,
}

impl Default for Latencies {
    fn default() -> Self {
        Latencies { read: histogram(), write: histogram(), upgrade: histogram() }
    }
}

/// Counters of one core; the lock of the core protects them.
#[derive(Debug)]
pub struct ShardStats {
    share: Share,
    /// Answered faults, and when, that are still to be counted: that takes longer than to note them, while a thread waits.
    fresh: Vec<(Page, Served, u64)>,
    /// Remote faults and losses per page; zero memory until used.
    heat: Vec<u32>,
    faults: FaultCounts,
    latencies: Latencies,
    waits: Waits,
    pages_given: u64,
    zero_pages_given: u64,
    invalidated: u64,
    invalidations_sent: u64,
    holds: u64,
    preloaded: u64,
}

impl ShardStats {
    /// Counters for a core's share of a memory of `pages` pages.
    pub fn new(share: Share, pages: u32) -> ShardStats {
        ShardStats {
            share,
            fresh: Vec::with_capacity(FRESH),
            heat: vec![0; share.slots(pages)],
            faults: FaultCounts::default(),
            latencies: Latencies::default(),
            waits: Waits::default(),
            pages_given: 0,
            zero_pages_given: 0,
            invalidated: 0,
            invalidations_sent: 0,
            holds: 0,
            preloaded: 0,
        }
    }

    fn heat(&mut self, page: Page) {
        if let Some(heat) = self.heat.get_mut(self.share.slot(page)) {
            *heat = heat.saturating_add(1);
        }
    }

    /// A fault has been answered at time `now`.
    pub fn served(&mut self, page: Page, served: &Served, now: u64) {
        if self.fresh.len() >= FRESH {
            self.count_up();
        }
        self.fresh.push((page, *served, now));
    }

    /// A thread waits for a page that another member is asked for, since `since`.
    pub fn waits(&mut self, page: Page, thread: u32, since: u64) {
        self.waits.begin(page, thread, since);
    }

    /// Adds faults and nanoseconds that a thread waited for each member, as far as they have been
    /// [counted up](Self::count_up).
    pub fn add_waits(&self, thread: u32, all: &mut BTreeMap<MemberId, (u64, u64)>) {
        self.waits.add_to(thread, all);
    }

    /// Counts what has been noted. For when nobody waits, and before the counters are read.
    pub fn count_up(&mut self) {
        let mut fresh = std::mem::take(&mut self.fresh);
        for (page, served, now) in fresh.drain(..) {
            self.count(page, &served, now);
        }
        self.fresh = fresh;
    }

    fn count(&mut self, page: Page, served: &Served, now: u64) {
        let faults = &mut self.faults;
        if served.ahead {
            faults.ahead += 1;
            return;
        }
        let count = match (served.want, served.remote) {
            (Want::Read, false) => &mut faults.read_local,
            (Want::Write, false) => &mut faults.write_local,
            (Want::Upgrade, false) => &mut faults.upgrade_local,
            (Want::Read, true) => &mut faults.read_remote,
            (Want::Write, true) => &mut faults.write_remote,
            (Want::Upgrade, true) => &mut faults.upgrade_remote,
        };
        *count += 1;
        if served.remote {
            let histogram = match served.want {
                Want::Read => &mut self.latencies.read,
                Want::Write => &mut self.latencies.write,
                Want::Upgrade => &mut self.latencies.upgrade,
            };
            histogram.saturating_record(now.saturating_sub(served.since).max(1));
            self.waits.end(page, served.from, served.since, now);
            self.heat(page);
        }
    }

    /// A page homed here was touched for the first time, and `count - 1` neighbours came along.
    pub fn first_touch(&mut self, page: Page, count: u32, served: &Served, now: u64) {
        self.served(page, served, now);
        self.faults.first_touch += 1;
        self.faults.first_touch_pages += u64::from(count);
    }

    /// A thread waited for a page that was there.
    pub fn spurious(&mut self) {
        self.faults.spurious += 1;
    }

    /// A page was written to for the first time since it was saved.
    pub fn reopened(&mut self) {
        self.faults.reopened += 1;
    }

    /// A page went to another member.
    pub fn gave(&mut self, page: Page, zero: bool) {
        self.pages_given += 1;
        self.zero_pages_given += u64::from(zero);
        self.heat(page);
    }

    /// A copy was dropped for another member's write.
    pub fn dropped(&mut self, page: Page) {
        self.invalidated += 1;
        self.heat(page);
    }

    /// A message was sent.
    pub fn sent<D>(&mut self, msg: &Msg<D>) {
        self.invalidations_sent += u64::from(matches!(msg, Msg::Invalidate { .. }));
    }

    /// A page was kept for its hold time.
    pub fn held(&mut self) {
        self.holds += 1;
    }

    /// Pages were filled before use.
    pub fn preloaded(&mut self, pages: u32) {
        self.preloaded += u64::from(pages);
    }
}

/// The sum over all cores.
#[derive(Debug, Default)]
pub struct Totals {
    faults: FaultCounts,
    latencies: Latencies,
    hot: Vec<HotPage>,
    sums: [u64; 6],
}

impl Totals {
    /// Adds one core's counters, which have been [counted up](ShardStats::count_up).
    pub fn add(&mut self, stats: &ShardStats, layout: &Layout) {
        self.faults.add(&stats.faults);
        // All histograms have the same bounds, so adding can't fail.
        let _ = self.latencies.read.add(&stats.latencies.read);
        let _ = self.latencies.write.add(&stats.latencies.write);
        let _ = self.latencies.upgrade.add(&stats.latencies.upgrade);
        let hot = stats.heat.iter().enumerate().filter(|(_, heat)| **heat > 0);
        self.hot.extend(hot.map(|(slot, heat)| {
            let gpa = layout.gpa_of(stats.share.page(slot));
            HotPage { gpa, count: u64::from(*heat) }
        }));
        self.hot.sort_unstable_by_key(|h| (std::cmp::Reverse(h.count), h.gpa));
        self.hot.truncate(TOP);
        let values = [
            stats.pages_given,
            stats.zero_pages_given,
            stats.invalidated,
            stats.invalidations_sent,
            stats.holds,
            stats.preloaded,
        ];
        for (sum, value) in self.sums.iter_mut().zip(values) {
            *sum += value;
        }
    }

    /// Writes the sums into a snapshot.
    pub fn write_to(self, snapshot: &mut DsmSnapshot) {
        snapshot.faults = self.faults;
        snapshot.read = Latency::of(&self.latencies.read);
        snapshot.write = Latency::of(&self.latencies.write);
        snapshot.upgrade = Latency::of(&self.latencies.upgrade);
        snapshot.hot_pages = self.hot;
        [
            snapshot.pages_given,
            snapshot.zero_pages_given,
            snapshot.pages_invalidated,
            snapshot.invalidations_sent,
            snapshot.holds,
            snapshot.pages_preloaded,
        ] = self.sums;
    }
}
