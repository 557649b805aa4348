//! When and how far to correct this member's guest clock.

use super::filter::{ClockFilter, Sample};
use super::tsc::GuestClock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

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
    /// Samples have come since the last correction.
    is_new: AtomicBool,
    bound_ns: AtomicU64,
}

/// How a clock is to be set.
struct Correction {
    /// Offset of the members' common clock.
    offset: u64,
    /// For so long no vCPU may run, so that none sees it go back.
    hold: Duration,
}

impl Discipline {
    /// For a member that is not the coordinator.
    pub fn new(clock: Arc<GuestClock>) -> Discipline {
        Discipline {
            clock,
            filter: Mutex::default(),
            settled: AtomicBool::new(false),
            running: AtomicBool::new(false),
            is_new: AtomicBool::new(false),
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

    /// Another member's clock is followed from now on. The two were kept together, so it goes on from where it is.
    pub fn forget(&self) {
        *self.filter.lock().unwrap_or_else(PoisonError::into_inner) = ClockFilter::default();
        self.is_new.store(false, Ordering::SeqCst);
    }

    /// How far off the clock may be, in nanoseconds.
    pub fn bound_ns(&self) -> u64 {
        self.bound_ns.load(Ordering::Relaxed)
    }

    /// Takes a sample in. Until the start the clock follows at once, then in [`Discipline::steer`].
    pub fn sample(&self, sample: Sample) {
        let mut filter = self.filter.lock().unwrap_or_else(PoisonError::into_inner);
        if !filter.add(sample) || filter.windows() < SETTLED_WINDOWS {
            return;
        }
        drop(filter);
        if self.running.load(Ordering::SeqCst) {
            self.is_new.store(true, Ordering::SeqCst);
        } else if let Some(correction) = self.correction(sample.received) {
            self.clock.set_common_offset(correction.offset);
        }
        self.settled.store(true, Ordering::SeqCst);
    }

    /// Corrects a running clock, at scaled host TSC `now`, if samples have come and say that it is off. `together` is to
    /// carry out what it is given at a moment when no vCPU here runs, and to keep them out for so long: else one could
    /// read the new clock, tell another, and that one read the old.
    pub fn steer(&self, now: u64, together: impl FnOnce(Duration, &dyn Fn())) {
        if !self.is_new.swap(false, Ordering::SeqCst) {
            return;
        }
        if let Some(Correction { offset, hold }) = self.correction(now) {
            together(hold, &|| self.clock.set_common_offset(offset));
        }
    }

    /// What is to be corrected at scaled host TSC `now`.
    fn correction(&self, now: u64) -> Option<Correction> {
        let estimate = self.filter.lock().unwrap_or_else(PoisonError::into_inner).estimate(now)?;
        let current = self.clock.common_offset();
        let error = estimate.offset.wrapping_sub(current);
        let backward = error > u64::MAX / 2;
        let size = if backward { error.wrapping_neg() } else { error };
        let running = self.running.load(Ordering::SeqCst);
        let step = if running { size.min(self.clock.ns_to_ticks(STEP_NS)) } else { size };
        let bound = self.clock.ticks_to_ns(estimate.bound.saturating_add(size - step));
        self.bound_ns.store(bound, Ordering::Relaxed);
        if step == 0 || (running && size <= self.clock.ns_to_ticks(TOLERANCE_NS)) {
            return None;
        }
        let offset = if backward { current.wrapping_sub(step) } else { current.wrapping_add(step) };
        let hold = if backward { Duration::from_nanos(self.clock.ticks_to_ns(step)) } else { Duration::ZERO };
        Some(Correction { offset, hold })
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
            let mut corrected = 0;
            for _ in 0..count {
                at += 100_000_000;
                discipline.sample(sample(at, offset));
                discipline.steer(at, |hold, apply| {
                    assert!(hold <= Duration::from_nanos(STEP_NS), "{hold:?}");
                    apply();
                    corrected += 1;
                });
            }
            corrected
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
            discipline.steer(at + 40_000, |hold, apply| {
                assert_eq!(hold, Duration::ZERO, "forward nobody has to wait");
                apply();
            });
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
