//! When and how far to correct this member's guest clock.

use super::filter::{ClockFilter, Sample};
use super::tsc::GuestClock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Windows of the filter before the clock counts as known.
const SETTLED_WINDOWS: usize = 4;
/// A clock that is off by less is left alone.
const TOLERANCE_NS: u64 = 1_000;
/// Most that one correction of a running clock moves. At ten samples a second this follows 100 ppm, twice
/// what oscillators differ by, and stays below the time that a message takes between two hosts.
const STEP_NS: u64 = 10_000;

/// Host TSC frequencies this close are taken for the same one, measured differently.
pub const SAME_FREQUENCY_PPM: u64 = 5_000;

/// Keeps one member's [`GuestClock`] at the coordinator's.
#[derive(Debug)]
pub struct Discipline {
    clock: Arc<GuestClock>,
    filter: Mutex<ClockFilter>,
    settled: AtomicBool,
    /// vCPUs run: no more jumps.
    running: AtomicBool,
    bound_ns: AtomicU64,
}

impl Discipline {
    /// For a member that is not the coordinator.
    pub fn new(clock: Arc<GuestClock>) -> Discipline {
        Discipline {
            clock,
            filter: Mutex::default(),
            settled: AtomicBool::new(false),
            running: AtomicBool::new(false),
            bound_ns: AtomicU64::new(0),
        }
    }

    /// The clock is known.
    pub fn is_settled(&self) -> bool {
        self.settled.load(Ordering::SeqCst)
    }

    /// From now on corrections are small.
    pub fn start(&self) {
        self.running.store(true, Ordering::SeqCst);
    }

    /// How far off the clock may be, in nanoseconds.
    pub fn bound_ns(&self) -> u64 {
        self.bound_ns.load(Ordering::Relaxed)
    }

    /// Takes a sample in. True when the clock was corrected, so vCPUs must follow.
    pub fn sample(&self, sample: Sample) -> bool {
        let mut filter = self.filter.lock().unwrap_or_else(PoisonError::into_inner);
        if !filter.add(sample) || filter.windows() < SETTLED_WINDOWS {
            return false;
        }
        let Some(estimate) = filter.estimate(sample.received) else { return false };
        drop(filter);
        let current = self.clock.common_offset();
        let error = estimate.offset.wrapping_sub(current);
        let backward = error > u64::MAX / 2;
        let size = if backward { error.wrapping_neg() } else { error };
        let running = self.running.load(Ordering::SeqCst);
        let step = if running { size.min(self.clock.ns_to_ticks(STEP_NS)) } else { size };
        let left = size - step;
        let bound = self.clock.ticks_to_ns(estimate.bound.saturating_add(left));
        self.bound_ns.store(bound, Ordering::Relaxed);
        let due = !running || size > self.clock.ns_to_ticks(TOLERANCE_NS);
        if due && step != 0 {
            let new = if backward { current.wrapping_sub(step) } else { current.wrapping_add(step) };
            self.clock.set_common_offset(new);
        }
        self.settled.store(true, Ordering::SeqCst);
        due && step != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::tsc::TscScale;

    /// 1 GHz, so ticks are nanoseconds.
    fn discipline() -> (Arc<GuestClock>, Discipline) {
        let clock = Arc::new(GuestClock::new(TscScale::IDENTITY, 1_000_000, 0));
        (clock.clone(), Discipline::new(clock))
    }

    fn sample(at: u64, offset: u64) -> Sample {
        let remote = at.wrapping_add(20_000).wrapping_add(offset);
        Sample { sent: at, remote_received: remote, remote_sent: remote, received: at + 40_000 }
    }

    #[test]
    fn jumps_before_the_start_and_steps_afterwards() {
        let (clock, discipline) = discipline();
        let mut at = 0;
        let mut feed = |offset: u64, count: usize| {
            (0..count)
                .filter(|_| {
                    at += 100_000_000;
                    discipline.sample(sample(at, offset))
                })
                .count()
        };
        feed(1 << 40, 40);
        assert!(discipline.is_settled());
        assert_eq!(clock.common_offset(), 1 << 40);
        discipline.start();
        assert_eq!(feed(1 << 40, 20), 0, "nothing to correct");
        feed((1 << 40) - 500_000, 300);
        assert!(clock.common_offset().abs_diff((1 << 40) - 500_000) <= 2_000, "{:#x}", clock.common_offset());
        assert!(discipline.bound_ns() < 60_000);
    }

    #[test]
    fn follows_a_drift_with_small_steps() {
        let (clock, discipline) = discipline();
        let (mut worst, mut last) = (0, None);
        for n in 0..2_000u64 {
            let (at, offset) = (n * 100_000_000, n * 5_000);
            if n == 100 {
                discipline.start();
            }
            discipline.sample(sample(at, offset));
            if n > 400 {
                worst = worst.max(clock.common_offset().abs_diff(offset));
                let step = clock.common_offset().abs_diff(last.unwrap_or(clock.common_offset()));
                assert!(step <= STEP_NS, "step of {step} ns");
            }
            last = Some(clock.common_offset());
        }
        assert!(worst < 15_000, "{worst} ns off at 50 ppm");
    }
}
