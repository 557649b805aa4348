//! How long a member keeps a page before it honours a request to give it up.
//!
//! Without a hold two writers can steal a page from each other so fast that neither completes an instruction. The
//! hold of a page adapts: a page that is asked for right after it came is contended and is kept longer each time, up
//! to a multiple of what a transfer costs here (kept as a slowly rising minimum of the measured ones); a page
//! asked for long after it came falls back. The longest hold is several transfers, because one instruction may need
//! several pages (code, data, page tables) and they come one after the other: the first must stay until the last has come.

use crate::clock::nanos;
use std::time::Duration;

/// Number of steps between the shortest and the longest hold.
const LEVELS: u8 = 7;
/// From this level on a page counts as contended.
const CONTENDED: u8 = 3;

/// Limits of the hold time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HoldConfig {
    /// Hold of a page that is not contended.
    pub min: Duration,
    /// No page is held longer than this.
    pub max: Duration,
    /// The longest hold of a contended page, in transfer times; 0 holds every page for `min`.
    pub transfers: u32,
}

impl Default for HoldConfig {
    fn default() -> Self {
        HoldConfig { min: Duration::from_micros(20), max: Duration::from_millis(250), transfers: 64 }
    }
}

impl HoldConfig {
    /// No hold at all: for tests and for measuring its worth.
    pub const NONE: HoldConfig = HoldConfig { min: Duration::ZERO, max: Duration::ZERO, transfers: 0 };
}

/// The policy of one core: turns levels into times.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Hold {
    min: u64,
    max: u64,
    transfers: u64,
    transfer: u64,
}

impl Hold {
    /// A policy that has seen no transfer yet.
    pub fn new(cfg: &HoldConfig) -> Hold {
        Hold { min: nanos(cfg.min), max: nanos(cfg.max), transfers: u64::from(cfg.transfers), transfer: 0 }
    }

    /// Learns what a remote fault cost, in nanoseconds.
    pub fn learn(&mut self, cost: u64) {
        if self.transfers == 0 {
            return;
        }
        // Up slowly and down fast: about the tenth percentile, as the slow ones waited for something else.
        self.transfer = if self.transfer == 0 {
            cost
        } else if cost < self.transfer {
            self.transfer - (self.transfer - cost) / 4
        } else {
            self.transfer + self.transfer / 64
        };
    }

    /// How long holds are short after a thread began to wait for another member: time for the other to be interrupted,
    /// to miss its pages and to ask for them.
    pub fn soft(&self) -> u64 {
        self.transfer.saturating_mul(6).min(self.max)
    }

    /// Is a page of this level asked for again and again right after it came?
    pub fn is_contended(&self, level: u8) -> bool {
        level >= CONTENDED
    }

    /// What a remote fault costs here, in nanoseconds; 0 if nobody knows yet.
    pub fn transfer(&self) -> u64 {
        self.transfer
    }

    /// Hold time at `level`, in nanoseconds.
    pub fn time(&self, level: u8) -> u64 {
        let longest = self.transfer.saturating_mul(self.transfers).min(self.max);
        let step = longest >> (LEVELS - level.min(LEVELS));
        if level == 0 { self.min.min(self.max) } else { step.max(self.min).min(self.max) }
    }

    /// The level after the page was asked for `age` nanoseconds after it came.
    pub fn next_level(&self, level: u8, age: u64) -> u8 {
        if self.transfers == 0 {
            return 0;
        }
        // Against the longest hold, not the present one: pages that are needed together come one after the other, so each
        // of them is asked for only when the others have come, many transfers later.
        let longest = self.time(LEVELS);
        if age < longest {
            (level + 1).min(LEVELS)
        } else if age > longest.saturating_mul(4) {
            level.saturating_sub(1)
        } else {
            level
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contended_pages_are_held_longer_and_recover() {
        let mut hold = Hold::new(&HoldConfig::default());
        hold.learn(50_000);
        let mut level = 0;
        let mut last = hold.time(level);
        for _ in 0..20 {
            level = hold.next_level(level, 1000);
            assert!(hold.time(level) >= last);
            last = hold.time(level);
        }
        assert_eq!(last, 3_200_000);
        for _ in 0..20 {
            level = hold.next_level(level, 1_000_000_000);
        }
        assert_eq!(hold.time(level), 20_000);
    }

    #[test]
    fn no_hold_means_none() {
        let mut hold = Hold::new(&HoldConfig::NONE);
        hold.learn(50_000);
        assert_eq!(hold.next_level(0, 0), 0);
        assert_eq!(hold.time(8), 0);
    }
}
