//! The guest's TSC as this host computes it: `scale(host TSC) + offset`, the same formula as KVM's, so that
//! user space knows without a system call what a vCPU would read.

use std::sync::atomic::{AtomicU64, Ordering};

/// Below this difference KVM does not scale (its `tsc_tolerance_ppm`).
const KVM_TOLERANCE_PPM: u64 = 250;

/// The host's TSC.
pub fn host_tsc() -> u64 {
    // SAFETY: every CPU with KVM has RDTSC, and Linux never sets CR4.TSD for us.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// A fixed-point factor, exactly as KVM programs it into the hardware.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscScale {
    ratio: u64,
    fraction_bits: u32,
}

impl TscScale {
    /// The guest's TSC runs as the host's.
    pub const IDENTITY: TscScale = TscScale { ratio: 1, fraction_bits: 0 };

    /// What KVM_SET_TSC_KHZ to `guest_khz` makes of a host with `host_khz`. `fraction_bits` is 48 for VMX and
    /// 32 for SVM.
    pub fn new(guest_khz: u32, host_khz: u32, fraction_bits: u32) -> TscScale {
        let (guest, host) = (u64::from(guest_khz), u64::from(host_khz));
        if host == 0 || !needs_scaling(guest_khz, host_khz) {
            return TscScale::IDENTITY;
        }
        let ratio = (u128::from(guest) << fraction_bits) / u128::from(host);
        match u64::try_from(ratio) {
            Ok(ratio) => TscScale { ratio, fraction_bits },
            Err(_) => TscScale::IDENTITY,
        }
    }

    /// Host TSC to guest TSC, before the offset.
    pub fn apply(self, host: u64) -> u64 {
        let scaled = (u128::from(host) * u128::from(self.ratio)) >> self.fraction_bits;
        // KVM keeps the low 64 bits as well.
        u64::try_from(scaled & u128::from(u64::MAX)).unwrap_or(u64::MAX)
    }
}

/// Would KVM scale, rather than call the frequencies equal?
pub fn needs_scaling(guest_khz: u32, host_khz: u32) -> bool {
    u64::from(guest_khz.abs_diff(host_khz)) * 1_000_000 > u64::from(host_khz) * KVM_TOLERANCE_PPM
}

/// The guest's clock on this host: what its vCPUs should be set to. It is the clock that the members agree on, which
/// never stops, less the time that the VM was paused, which all members are told the same.
#[derive(Debug)]
pub struct GuestClock {
    scale: TscScale,
    khz: u32,
    /// Of the members' common clock.
    offset: AtomicU64,
    /// Ticks that the guest does not see.
    stopped: AtomicU64,
}

impl GuestClock {
    /// A clock that reads `scale(host) + offset` at `khz`.
    pub fn new(scale: TscScale, khz: u32, offset: u64) -> GuestClock {
        GuestClock { scale, khz: khz.max(1), offset: AtomicU64::new(offset), stopped: AtomicU64::new(0) }
    }

    /// Host TSC in the guest's units, without the offset.
    pub fn scaled_now(&self) -> u64 {
        self.scale.apply(host_tsc())
    }

    /// The guest's TSC now.
    pub fn now(&self) -> u64 {
        self.scaled_now().wrapping_add(self.offset())
    }

    /// Guest ticks per millisecond.
    pub fn khz(&self) -> u32 {
        self.khz
    }

    /// The members' common clock now: the guest's, had it never been paused.
    pub fn common_now(&self) -> u64 {
        self.scaled_now().wrapping_add(self.common_offset())
    }

    /// What vCPUs' offsets should be.
    pub fn offset(&self) -> u64 {
        self.common_offset().wrapping_sub(self.stopped.load(Ordering::SeqCst))
    }

    /// Offset of the members' common clock.
    pub fn common_offset(&self) -> u64 {
        self.offset.load(Ordering::SeqCst)
    }

    /// Sets it; vCPUs follow when they next look ([`VcpuClock::follow`]).
    pub fn set_common_offset(&self, offset: u64) {
        self.offset.store(offset, Ordering::SeqCst);
    }

    /// Sets for how many ticks in all the VM has been paused.
    pub fn set_stopped(&self, ticks: u64) {
        self.stopped.store(ticks, Ordering::SeqCst);
    }

    /// Guest ticks as nanoseconds, rounded up.
    pub fn ticks_to_ns(&self, ticks: u64) -> u64 {
        let ns = (u128::from(ticks) * 1_000_000).div_ceil(u128::from(self.khz));
        u64::try_from(ns).unwrap_or(u64::MAX)
    }

    /// Nanoseconds as guest ticks.
    pub fn ns_to_ticks(&self, ns: u64) -> u64 {
        u64::try_from(u128::from(ns) * u128::from(self.khz) / 1_000_000).unwrap_or(u64::MAX)
    }
}

/// The offset one vCPU really has, which follows [`GuestClock::offset`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuClock {
    applied: u64,
}

impl VcpuClock {
    /// A vCPU whose offset was just set.
    pub fn new(applied: u64) -> VcpuClock {
        VcpuClock { applied }
    }

    /// The guest's TSC as this vCPU would read it at scaled host time `scaled`.
    pub fn at(&self, scaled: u64) -> u64 {
        scaled.wrapping_add(self.applied)
    }

    /// The offset that the vCPU has.
    pub fn applied(&self) -> u64 {
        self.applied
    }

    /// Moves towards `target`. Forward at once; backward at most by `away`, the scaled ticks since the vCPU
    /// left the guest, so that it never reads a smaller value than before. Returns the new offset if it changed.
    pub fn follow(&mut self, target: u64, away: u64) -> Option<u64> {
        // Two's complement: offsets are modulo 2^64, differences are small.
        let forward = target.wrapping_sub(self.applied);
        let backward = self.applied.wrapping_sub(target);
        let new = if forward <= backward { target } else { self.applied.wrapping_sub(backward.min(away)) };
        (new != self.applied).then(|| {
            self.applied = new;
            new
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn scaling_is_kvms() {
        // kvm_set_tsc_khz: ratio = 2^frac * guest / host, result = host * ratio >> frac.
        let scale = TscScale::new(2_000_000, 3_000_000, 48);
        assert_eq!(scale.ratio, (1u64 << 48) / 3 * 2);
        assert_eq!(TscScale::new(2_000_000, 2_000_499, 32), TscScale::IDENTITY, "within 250 ppm");
        assert_eq!(TscScale::new(2_000_000, 0, 32), TscScale::IDENTITY);
        assert!(TscScale::new(3_000_000, 2_000_000, 32).apply(1 << 40).abs_diff(3 << 39) < 1 << 12);
    }

    #[test]
    fn units() {
        let clock = GuestClock::new(TscScale::IDENTITY, 3_000_000, 0);
        assert_eq!((clock.ticks_to_ns(3), clock.ticks_to_ns(4), clock.ns_to_ticks(1000)), (1, 2, 3000));
        assert_eq!(clock.ticks_to_ns(u64::MAX), u64::MAX / 3);
    }

    #[test]
    fn a_pause_stops_the_guest_and_not_the_members() {
        let clock = GuestClock::new(TscScale::IDENTITY, 1_000_000, 500);
        clock.set_stopped(200);
        assert_eq!((clock.offset(), clock.common_offset()), (300, 500));
        clock.set_common_offset(510);
        assert_eq!((clock.offset(), clock.common_offset()), (310, 510));
        // A vCPU that has been out of the guest for the whole pause goes back by all of it.
        let mut vcpu = VcpuClock::new(500);
        assert_eq!(vcpu.follow(clock.offset(), 200), Some(310));
    }

    proptest! {
        /// Whatever corrections come, a vCPU that looks at its TSC whenever it is in the guest sees it grow.
        #[test]
        fn a_vcpu_never_sees_its_tsc_go_back(
            start: u64,
            steps in proptest::collection::vec((1u64..10_000, 0u64..10_000, -20_000i64..20_000), 1..100),
        ) {
            let (mut host, mut target) = (start, start.wrapping_neg());
            let mut clock = VcpuClock::new(target);
            let mut seen = clock.at(host);
            for (inside, away, correction) in steps {
                host = host.wrapping_add(inside);
                let last = clock.at(host);
                prop_assert!(last >= seen);
                target = target.wrapping_add_signed(correction);
                host = host.wrapping_add(away);
                let _ = clock.follow(target, away);
                seen = clock.at(host);
                prop_assert!(seen >= last, "{seen} after {last}");
            }
            let _ = clock.follow(target, u64::MAX >> 1);
            prop_assert_eq!(clock.applied(), target);
        }
    }
}
