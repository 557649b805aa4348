//! Random numbers that are the same on every machine and with every version of every library.

use std::cell::Cell;

/// SplitMix64. Shared by everything in one run: the order of the questions is part of the run.
#[derive(Debug)]
pub(super) struct Rng(Cell<u64>);

impl Rng {
    pub(super) fn new(seed: u64) -> Rng {
        // Neighbouring seeds must not give shifted copies of one stream.
        Rng(Cell::new(seed.wrapping_mul(0xD134_2543_DE82_EF95) ^ 0x5DEE_CE66_D5DE_ECE6))
    }

    pub(super) fn next(&self) -> u64 {
        let state = self.0.get().wrapping_add(0x9E37_79B9_7F4A_7C15);
        self.0.set(state);
        let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `n`; 0 if `n` is 0.
    pub(super) fn below(&self, n: u64) -> u64 {
        let wide = u128::from(self.next()) * u128::from(n);
        u64::try_from(wide >> 64).unwrap_or(0)
    }

    /// A number from `low` to `high`, both included.
    pub(super) fn range(&self, low: u64, high: u64) -> u64 {
        low + self.below(high.saturating_sub(low) + 1)
    }

    /// An index into something of length `n`.
    pub(super) fn index(&self, n: usize) -> usize {
        usize::try_from(self.below(n as u64)).unwrap_or(0)
    }

    /// Yes, `per_mille` times out of a thousand.
    pub(super) fn chance(&self, per_mille: u64) -> bool {
        self.below(1000) < per_mille
    }

    /// A member's number below `n`.
    pub(super) fn member(&self, n: u16) -> u16 {
        u16::try_from(self.below(u64::from(n))).unwrap_or(0)
    }

    /// A time that is mostly short and sometimes up to `longest`.
    pub(super) fn skewed(&self, longest: u64) -> u64 {
        let shift = self.below(8);
        self.below((longest >> shift) + 1)
    }
}
