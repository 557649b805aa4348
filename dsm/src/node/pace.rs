//! Agreement on the [slots](crate::protocol::slots): the lowest member decides how long they are and beats time, the others
//! follow its clock.

use crate::addr::MemberId;
use crate::clock::nanos;
use crate::protocol::MemberSet;
use crate::protocol::hold::HoldConfig;
use crate::protocol::slots::{MAX_SHIFT, MIN_SHIFT, Slots};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Clocks drift apart by up to so many parts of a million; a late beat is believed only after it.
const DRIFT_PPM: u64 = 200;

#[derive(Clone, Copy, Debug, Default)]
struct State {
    members: MemberSet,
    slots: Slots,
    /// The best estimate of the offset, and when it was made.
    estimate: Option<(i64, u64)>,
    /// How many contended pages change hands per round of slots, in sixteenths.
    gang: u64,
    /// When the leader's last beat was.
    beaten: u64,
}

/// What this member knows of the slots.
#[derive(Debug)]
pub(super) struct Pace {
    me: MemberId,
    transfers: u64,
    max: u64,
    state: Mutex<State>,
}

impl Pace {
    pub(super) fn new(me: MemberId, members: MemberSet, hold: &HoldConfig) -> Pace {
        let max = nanos(hold.max);
        let state = Mutex::new(State { members, ..State::default() });
        Pace { me, transfers: u64::from(hold.transfers), max, state }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether `member` is the one that beats time.
    pub(super) fn is_led_by(&self, member: MemberId) -> bool {
        self.state().members.iter().next() == Some(member)
    }

    /// There are other members; returns the slots that they have now.
    pub(super) fn set_members(&self, members: MemberSet) -> Slots {
        let mut state = self.state();
        state.members = members;
        state.slots.members = members;
        state.slots
    }

    /// Time for the next beat of the leader: how long slots are from now on (0 while nothing is known), and the slots if
    /// they have changed. `transfer` is what a remote fault costs here; `losses` contended pages were given away since the
    /// last beat.
    ///
    /// A slot is several times as long as it takes to move the pages that change hands: 6 transfers for one page, which
    /// two threads that talk through it should not wait for longer, and up to all of [`HoldConfig::transfers`] for a
    /// kernel's page tables, run queues and locks.
    pub(super) fn lead(&self, now: u64, transfer: u64, losses: u32) -> (u8, Option<Slots>) {
        if !self.is_led_by(self.me) || self.transfers == 0 || transfer == 0 {
            return (0, None);
        }
        let mut state = self.state();
        let since = now.saturating_sub(state.beaten).max(1);
        state.beaten = now;
        let shift = u64::from(state.slots.shift);
        if shift != 0 {
            let round = (1 << shift) * u64::from(state.members.0.count_ones());
            let gang = u64::from(losses).saturating_mul(16).saturating_mul(round) / since;
            state.gang = (state.gang * 3 + gang.min(16 * 256)) / 4;
        }
        let transfers = (6 + state.gang * 5 / 128).min(self.transfers);
        let wanted = transfer.saturating_mul(transfers).min(self.max).max(1);
        // A slot lasts until the wanted length is well beyond it.
        let fits = shift != 0 && wanted >= (1 << shift) / 8 * 5 && wanted <= (1 << shift) / 4 * 7;
        if fits {
            return (state.slots.shift, None);
        }
        let nearest = u8::try_from((wanted / 3 * 4).max(1).ilog2()).unwrap_or(MAX_SHIFT);
        let slots = Slots { shift: nearest.clamp(MIN_SHIFT, MAX_SHIFT), offset: 0, members: state.members };
        let is_new = slots != state.slots;
        state.slots = slots;
        (slots.shift, is_new.then_some(slots))
    }

    /// The leader's beat came at `now`; it was sent at `clock` in the leader's time. Returns the slots if they have changed.
    pub(super) fn follow(&self, now: u64, clock: u64, shift: u8) -> Option<Slots> {
        if !(MIN_SHIFT..=MAX_SHIFT).contains(&shift) {
            return None;
        }
        let mut state = self.state();
        let sample = i64::try_from(i128::from(clock) - i128::from(now)).unwrap_or(0);
        // A beat that was late on its way makes the sample too small, nothing makes it too large.
        let offset = match state.estimate {
            Some((old, at)) => {
                let drift = now.saturating_sub(at) / 1_000_000 * DRIFT_PPM;
                sample.max(old.saturating_sub(i64::try_from(drift).unwrap_or(i64::MAX)))
            }
            None => sample,
        };
        state.estimate = Some((offset, now));
        let is_near = state.slots.offset.abs_diff(offset) < (1 << shift) / 64;
        if state.slots.shift == shift && is_near {
            return None;
        }
        state.slots = Slots { shift, offset, members: state.members };
        Some(state.slots)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(me: u16) -> Pace {
        Pace::new(MemberId(me), MemberSet(0b111), &HoldConfig::default())
    }

    #[test]
    fn the_leader_fits_the_slots_to_what_a_transfer_costs_and_keeps_them_a_while() {
        let leader = pace(0);
        let lead = |transfer| leader.lead(0, transfer, 0);
        assert_eq!(lead(0), (0, None));
        let (shift, slots) = lead(300_000);
        assert_eq!((shift, slots.map(|s| s.shift)), (21, Some(21)));
        assert_eq!(lead(350_000), (21, None));
        assert_eq!(lead(250_000), (21, None));
        assert_eq!(lead(2_100_000).0, 24);
        assert_eq!(lead(u64::MAX).0, 27);
        assert_eq!(lead(1).0, MIN_SHIFT);
        assert_eq!(pace(1).lead(0, 25_000, 0), (0, None));
    }

    #[test]
    fn slots_grow_with_the_pages_that_change_hands() {
        let leader = pace(0);
        let mut now = 0;
        let mut shift = leader.lead(now, 1_000_000, 0).0;
        assert_eq!(shift, 22);
        for _ in 0..20 {
            now += 250_000_000;
            // 64 pages per round of three slots.
            let losses = u32::try_from(64 * 250_000_000u64 / (3 << shift)).unwrap();
            shift = leader.lead(now, 1_000_000, losses).0;
        }
        assert_eq!(shift, 25);
        for _ in 0..20 {
            now += 250_000_000;
            shift = leader.lead(now, 1_000_000, 250_000_000 / (3 << shift)).0;
        }
        assert!((22..=23).contains(&shift), "{shift}");
    }

    #[test]
    fn a_follower_believes_the_fastest_beat() {
        let follower = pace(2);
        assert_eq!(follower.follow(5, 5, 0), None);
        assert_eq!(follower.follow(5, 5, 60), None);
        let slots = follower.follow(1_000_000, 500_000, 20).unwrap();
        assert_eq!((slots.shift, slots.offset), (20, -500_000));
        assert_eq!(follower.follow(2_000_000, 1_100_000, 20), None, "late by 0.4 ms");
        assert_eq!(follower.follow(3_000_000, 2_600_000, 20).unwrap().offset, -400_000);
    }
}
