//! Latencies in TSC ticks: a fixed-size log-linear histogram (8 steps per power of two, error below 13 %).

use crate::cast::index;

const STEPS: usize = 8;
const BUCKETS: usize = 64 * STEPS;

/// Histogram of 64-bit samples.
#[derive(Debug)]
pub struct Histogram {
    buckets: [u32; BUCKETS],
    count: u64,
    min: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

impl Histogram {
    /// No samples.
    pub const fn new() -> Self {
        Self { buckets: [0; BUCKETS], count: 0, min: u64::MAX, max: 0 }
    }

    fn bucket(value: u64) -> usize {
        let v = value.max(STEPS as u64);
        let log = v.ilog2();
        log as usize * STEPS + index(v >> (log - 3)) % STEPS
    }

    fn upper(bucket: usize) -> u64 {
        let (log, step) = (bucket / STEPS, (bucket % STEPS) as u64);
        let low = (STEPS as u64 + step) << (log - 3);
        low.saturating_add((1u64 << (log - 3)) - 1)
    }

    /// Adds a sample.
    pub fn add(&mut self, value: u64) {
        self.count += 1;
        self.min = self.min.min(value);
        self.max = self.max.max(value);
        if let Some(b) = self.buckets.get_mut(Self::bucket(value)) {
            *b = b.saturating_add(1);
        }
    }

    /// Number of samples.
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// Smallest sample, 0 if none.
    pub const fn min(&self) -> u64 {
        if self.count == 0 { 0 } else { self.min }
    }

    /// Largest sample, 0 if none.
    pub const fn max(&self) -> u64 {
        self.max
    }

    /// Upper bound of the bucket in which `percent` (0..=100) of the samples are reached, 0 if none.
    pub fn percentile(&self, percent: u64) -> u64 {
        let want = (self.count * percent).div_ceil(100).max(1);
        let mut seen = 0;
        for (i, n) in self.buckets.iter().enumerate() {
            seen += u64::from(*n);
            if seen >= want {
                return Self::upper(i).clamp(self.min(), self.max);
            }
        }
        self.max
    }
}

#[cfg(test)]
mod tests {
    use super::Histogram;

    #[test]
    fn percentiles_are_within_a_step() {
        let mut h = Histogram::new();
        (1..=1000).for_each(|v| h.add(v));
        assert_eq!((h.count(), h.min(), h.max()), (1000, 1, 1000));
        for p in [10u64, 50, 90, 99] {
            let (got, want) = (h.percentile(p), p * 10);
            assert!(got >= want && got <= want + want / 7, "p{p}: {got} for {want}");
        }
    }

    #[test]
    fn ends_of_the_range() {
        let mut h = Histogram::new();
        assert_eq!((h.min(), h.max(), h.percentile(50)), (0, 0, 0));
        h.add(0);
        h.add(u64::MAX);
        assert_eq!((h.min(), h.max(), h.percentile(100)), (0, u64::MAX, u64::MAX));
    }
}
