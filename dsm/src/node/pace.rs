//! Agreement on the [slots](crate::protocol::slots): the lowest member decides how long they are and beats time, the others
//! follow its clock.

use crate::addr::MemberId;
use crate::protocol::MemberSet;
use crate::protocol::hold::HoldConfig;
use crate::protocol::slots::{MAX_SHIFT, MIN_SHIFT, Slots};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Clocks drift apart by up to so many parts of a million; a late beat is believed only after it.
const DRIFT_PPM: u64 = 200;

#[derive(Clone, Copy, Debug, Default)]
struct State {
    slots: Slots,
    /// The best estimate of the offset, and when it was made.
    estimate: Option<(i64, u64)>,
}

/// What this member knows of the slots.
#[derive(Debug)]
pub(super) struct Pace {
    me: MemberId,
    members: MemberSet,
    transfers: u64,
    max: u64,
    state: Mutex<State>,
}

impl Pace {
    pub(super) fn new(me: MemberId, members: MemberSet, hold: &HoldConfig) -> Pace {
        let max = u64::try_from(hold.max.as_nanos()).unwrap_or(u64::MAX);
        Pace { me, members, transfers: u64::from(hold.transfers), max, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether `member` is the one that beats time.
    pub(super) fn is_led_by(&self, member: MemberId) -> bool {
        self.members.iter().next() == Some(member)
    }

    /// Time for the next beat of the leader: how long slots are from now on (0 while nothing is known), and the slots if
    /// they have changed. `transfer` is what a remote fault costs here.
    pub(super) fn lead(&self, transfer: u64) -> (u8, Option<Slots>) {
        if !self.is_led_by(self.me) || self.transfers == 0 || transfer == 0 {
            return (0, None);
        }
        let wanted = transfer.saturating_mul(self.transfers).min(self.max).max(1);
        let mut state = self.state();
        let shift = u64::from(state.slots.shift);
        // A slot lasts until the wanted length is well beyond it.
        let fits = shift != 0 && wanted >= (1 << shift) / 8 * 5 && wanted <= (1 << shift) / 4 * 7;
        if fits {
            return (state.slots.shift, None);
        }
        let nearest = u8::try_from((wanted / 3 * 4).max(1).ilog2()).unwrap_or(MAX_SHIFT);
        let slots = Slots { shift: nearest.clamp(MIN_SHIFT, MAX_SHIFT), offset: 0, members: self.members };
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
        state.slots = Slots { shift, offset, members: self.members };
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
        assert_eq!(leader.lead(0), (0, None));
        let (shift, slots) = leader.lead(25_000);
        assert_eq!((shift, slots.map(|s| s.shift)), (21, Some(21)));
        assert_eq!(leader.lead(30_000), (21, None));
        assert_eq!(leader.lead(21_000), (21, None));
        assert_eq!(leader.lead(200_000).0, 24);
        assert_eq!(leader.lead(u64::MAX).0, 27);
        assert_eq!(leader.lead(1).0, MIN_SHIFT);
        assert_eq!(pace(1).lead(25_000), (0, None));
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
