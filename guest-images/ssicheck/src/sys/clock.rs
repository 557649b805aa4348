//! Clocks.

use crate::failure::Failure;

/// A clock that must never step back, whichever CPU reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// CLOCK_MONOTONIC, in ns.
    Monotonic,
    /// CLOCK_MONOTONIC_RAW, in ns.
    MonotonicRaw,
    /// The time-stamp counter, in cycles.
    Tsc,
}

impl Clock {
    /// All of them.
    pub const ALL: [Clock; 3] = [Clock::Monotonic, Clock::MonotonicRaw, Clock::Tsc];

    /// The name in results.
    pub fn name(self) -> &'static str {
        match self {
            Clock::Monotonic => "monotonic",
            Clock::MonotonicRaw => "monotonic_raw",
            Clock::Tsc => "tsc",
        }
    }

    /// Reads the clock, after all earlier loads of this thread and before all later ones.
    pub fn read(self) -> Result<u64, Failure> {
        match self {
            Clock::Monotonic => gettime(libc::CLOCK_MONOTONIC),
            Clock::MonotonicRaw => gettime(libc::CLOCK_MONOTONIC_RAW),
            Clock::Tsc => Ok(tsc()),
        }
    }
}

/// RDTSC between two LFENCEs: the SDM lets it execute early or late otherwise.
pub fn tsc() -> u64 {
    // SAFETY: SSE2 (LFENCE) and RDTSC are part of every x86-64 CPU.
    unsafe {
        core::arch::x86_64::_mm_lfence();
        let now = core::arch::x86_64::_rdtsc();
        core::arch::x86_64::_mm_lfence();
        now
    }
}

fn gettime(id: libc::clockid_t) -> Result<u64, Failure> {
    let mut spec = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel (or the vDSO) writes one timespec.
    if unsafe { libc::clock_gettime(id, &raw mut spec) } != 0 {
        return Err(Failure::last_os(format!("clock_gettime({id})")));
    }
    let (s, ns) = (u64::try_from(spec.tv_sec), u64::try_from(spec.tv_nsec));
    match (s, ns) {
        (Ok(s), Ok(ns)) if ns < 1_000_000_000 => Ok(s.wrapping_mul(1_000_000_000).wrapping_add(ns)),
        _ => Err(Failure::Other(format!("clock {id} reads {} s {} ns", spec.tv_sec, spec.tv_nsec))),
    }
}
