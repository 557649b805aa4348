//! Clock agreement by round trips: a pure filter. A sample is a ping that left at `sent` and whose answer came
//! at `received` (this host's scaled TSC), and the coordinator's guest TSC in between. The true offset lies
//! within half the round trip of the sample's midpoint, so the sample with the shortest round trip of a window
//! is the best; a line through the best samples of successive windows gives the drift.

use std::collections::VecDeque;

/// Samples per window: one best sample comes out of each.
const WINDOW: usize = 8;
/// Best samples kept; with a sample every 100 ms this looks back about 25 s.
const KEPT: usize = 32;

/// One answered ping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Scaled host TSC when the ping left.
    pub sent: u64,
    /// The coordinator's guest TSC when the ping came.
    pub remote_received: u64,
    /// The coordinator's guest TSC when the answer left.
    pub remote_sent: u64,
    /// Scaled host TSC when the answer came.
    pub received: u64,
}

/// A sample, reduced to a point.
#[derive(Clone, Copy, Debug)]
struct Point {
    /// Scaled host TSC of the midpoint.
    at: u64,
    /// guest - host, modulo 2^64.
    offset: u64,
    /// Half of the time on the wire: the offset is known to within this.
    error: u64,
}

/// What the filter believes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// To add to the scaled host TSC now.
    pub offset: u64,
    /// The estimate is at most this far off, in ticks.
    pub bound: u64,
    /// How much the offset grows per tick of this host.
    pub drift: f64,
}

/// The filter.
#[derive(Debug, Default)]
pub struct ClockFilter {
    window: Vec<Point>,
    best: VecDeque<Point>,
}

impl ClockFilter {
    /// Takes a sample. One that contradicts itself (negative times) is ignored: false.
    pub fn add(&mut self, sample: Sample) -> bool {
        let (Some(total), Some(held)) = (
            sample.received.checked_sub(sample.sent),
            sample.remote_sent.checked_sub(sample.remote_received),
        ) else {
            return false;
        };
        let Some(wire) = total.checked_sub(held) else { return false };
        let at = sample.sent + total / 2;
        let offset = (sample.remote_received + held / 2).wrapping_sub(at);
        self.window.push(Point { at, offset, error: wire.div_ceil(2) });
        if self.window.len() >= WINDOW {
            if let Some(best) = self.window.drain(..).min_by_key(|p| p.error) {
                self.best.push_back(best);
            }
            if self.best.len() > KEPT {
                self.best.pop_front();
            }
        }
        true
    }

    /// Number of full windows so far.
    pub fn windows(&self) -> usize {
        self.best.len()
    }

    /// The estimate at scaled host TSC `now`, once a window is full.
    pub fn estimate(&self, now: u64) -> Option<Estimate> {
        let newest = self.best.back()?;
        let drift = self.drift();
        let project = |p: &Point| {
            let age = signed(now.wrapping_sub(p.at));
            p.offset.wrapping_add_signed(round(drift * age))
        };
        // Among recent points the one of smallest error, made worse by its age: 1 ppm of doubt in the drift.
        let doubt = |p: &Point| p.error + now.saturating_sub(p.at) / 1_000_000;
        let point = self.best.iter().min_by_key(|p| doubt(p)).unwrap_or(newest);
        Some(Estimate { offset: project(point), bound: doubt(point).max(1), drift })
    }

    /// Slope of the least-squares line through the best points, each weighted by how well it is known.
    fn drift(&self) -> f64 {
        let (Some(first), true) = (self.best.front(), self.best.len() >= 4) else { return 0.0 };
        let points = self.best.iter().map(|p| {
            let weight = 1.0 / (unsigned(p.error) + 1.0).powi(2);
            (signed(p.at.wrapping_sub(first.at)), signed(p.offset.wrapping_sub(first.offset)), weight)
        });
        let (mut w, mut x, mut y, mut xx, mut xy) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for (px, py, weight) in points {
            w += weight;
            x += weight * px;
            y += weight * py;
            xx += weight * px * px;
            xy += weight * px * py;
        }
        let divisor = w * xx - x * x;
        if divisor > 0.0 { (w * xy - x * y) / divisor } else { 0.0 }
    }
}

/// A difference modulo 2^64 as a signed number.
#[allow(clippy::cast_precision_loss)]
fn signed(difference: u64) -> f64 {
    i64::from_ne_bytes(difference.to_ne_bytes()) as f64
}

#[allow(clippy::cast_precision_loss)]
fn unsigned(value: u64) -> f64 {
    value as f64
}

/// Rounds; beyond the range of i64 it saturates, which only a peer's nonsense can reach.
#[allow(clippy::cast_possible_truncation)]
fn round(value: f64) -> i64 {
    value.round() as i64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A coordinator whose clock is `host * (1 + drift) + offset`, and a network with the given delays.
    fn sample(host: u64, offset: u64, drift: f64, there: u64, back: u64) -> Sample {
        let remote = |t: u64| {
            let shifted = t + offset;
            shifted.wrapping_add_signed(round(drift * unsigned(t)))
        };
        Sample {
            sent: host,
            remote_received: remote(host + there),
            remote_sent: remote(host + there + 50),
            received: host + there + 50 + back,
        }
    }

    #[test]
    fn needs_a_window_and_ignores_nonsense() {
        let mut filter = ClockFilter::default();
        for n in 0..7u64 {
            assert!(filter.add(sample(n * 1000, 5, 0.0, 10, 10)));
        }
        assert_eq!(filter.estimate(8000), None);
        assert!(!filter.add(Sample { sent: 10, remote_received: 0, remote_sent: 0, received: 9 }));
        assert!(!filter.add(Sample { sent: 10, remote_received: 0, remote_sent: 100, received: 20 }));
        filter.add(sample(7000, 5, 0.0, 10, 10));
        assert_eq!(filter.estimate(8000).map(|e| e.offset), Some(5));
    }

    proptest! {
        /// The true offset is within the bound, whatever the delays, for drifts of real oscillators.
        #[test]
        fn the_truth_is_within_the_bound(
            offset in 0u64..1 << 60,
            ppm in -80i32..80,
            delays in proptest::collection::vec((1_000u64..400_000, 1_000u64..400_000), 400),
        ) {
            let drift = f64::from(ppm) * 1e-6;
            let mut filter = ClockFilter::default();
            let mut host = 1 << 20;
            for (there, back) in delays {
                filter.add(sample(host, offset, drift, there, back));
                host += 200_000_000;
            }
            let estimate = filter.estimate(host).unwrap();
            let truth = offset.wrapping_add_signed(round(drift * unsigned(host)));
            let off = signed(estimate.offset.wrapping_sub(truth)).abs();
            prop_assert!(off <= 3.0 * unsigned(estimate.bound), "off {off}, bound {}", estimate.bound);
            prop_assert!(estimate.bound < 100_000, "bound {}", estimate.bound);
        }
    }
}
