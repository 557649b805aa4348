//! Time slots: which member goes first for contended pages, and until when.
//!
//! Where several members need the same pages again and again, and several of them at once (page tables where walks count as
//! writes), a hold per page is not enough: each member holds some of the pages and waits for those that another holds, so
//! nobody computes until a hold ends, and that takes a page from a member that had nearly got the last one it needed.
//! So the members take turns. Time is cut into slots of one length for all; in each slot the members have an order that
//! rotates from slot to slot. A member gives a contended page at once to one that goes before it, and lets one that goes
//! after it wait for the slot in which that is the other way round. In every slot there is thus one member that waits
//! for nobody's hold, and each is that one in turn.
//!
//! The members' clocks agree to about a round trip, which is a small part of a slot. A wrong clock, or a peer that lies
//! about its own, costs time but never gives a right to anybody: slots only decide how long a request waits.

use super::message::MemberSet;
use crate::addr::MemberId;

/// Shortest slot, as a power of two of nanoseconds: about a quarter of a millisecond.
pub const MIN_SHIFT: u8 = 18;
/// Longest slot, as a power of two of nanoseconds: about an eighth of a second.
pub const MAX_SHIFT: u8 = 27;

/// The slots as one member sees them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Slots {
    /// Length of a slot, as a power of two of nanoseconds; 0 for no slots.
    pub shift: u8,
    /// What must be added to this member's time to get the time of the slots, in nanoseconds.
    pub offset: i64,
    /// All members.
    pub members: MemberSet,
}

impl Slots {
    /// The number of the slot at `now`; `None` without slots.
    pub fn number(self, now: u64) -> Option<u64> {
        (self.shift != 0).then(|| now.wrapping_add_signed(self.offset) >> self.shift)
    }

    /// A member's place in the order of a slot, 0 first.
    fn place(self, slot: u64, member: MemberId) -> u64 {
        let below = 1u64.checked_shl(u32::from(member.0)).unwrap_or(0).wrapping_sub(1);
        let index = u64::from((self.members.0 & below).count_ones());
        let count = u64::from(self.members.0.count_ones()).max(1);
        (index + count - slot % count) % count
    }

    /// The time from which `other` goes before `me`; `now` or earlier if it does already. The present slot does not count
    /// if the other has had its part of it (`is_patient`). `None` without slots.
    pub fn turn_of(self, now: u64, other: MemberId, me: MemberId, is_patient: bool) -> Option<u64> {
        let present = self.number(now)?;
        let count = u64::from(self.members.0.count_ones());
        let ahead = (u64::from(is_patient)..=count)
            .find(|n| self.place(present.wrapping_add(*n), other) < self.place(present.wrapping_add(*n), me))
            .unwrap_or(count);
        if ahead == 0 {
            return Some(now);
        }
        let begin = present.wrapping_add(ahead) << self.shift;
        Some(now.saturating_add(begin.wrapping_sub(now.wrapping_add_signed(self.offset))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots(members: u64) -> Slots {
        Slots { shift: MIN_SHIFT, offset: -5, members: MemberSet(members) }
    }

    #[test]
    fn in_every_slot_exactly_one_of_two_goes_first_and_all_members_are_first_in_turn() {
        let slots = slots(0b1011);
        let members = [0, 1, 3].map(MemberId);
        let mut firsts = Vec::new();
        for slot in 7..10u64 {
            let now = (slot << MIN_SHIFT) + 5 + 17;
            let goes = |a: MemberId, b: MemberId| slots.turn_of(now, a, b, false) == Some(now);
            for a in members {
                for b in members.into_iter().filter(|b| *b != a) {
                    assert_ne!(goes(a, b), goes(b, a));
                }
            }
            firsts.extend(members.into_iter().filter(|a| members.iter().all(|b| a == b || goes(*a, *b))));
        }
        firsts.sort();
        assert_eq!(firsts, members);
    }

    #[test]
    fn who_goes_after_waits_for_the_begin_of_its_slot() {
        let slots = slots(0b11);
        // Slot 6 is member 0's, slot 7 member 1's.
        let begin = |slot: u64| (slot << MIN_SHIFT) + 5;
        let now = begin(6) + 100;
        assert_eq!(slots.turn_of(now, MemberId(1), MemberId(0), false), Some(begin(7)));
        assert_eq!(slots.turn_of(now, MemberId(0), MemberId(1), true), Some(begin(8)));
        assert_eq!(slots.turn_of(now, MemberId(1), MemberId(0), true), Some(begin(7)));
        assert_eq!(Slots::default().turn_of(now, MemberId(1), MemberId(0), true), None);
    }

    #[test]
    fn no_clock_is_too_wrong() {
        for offset in [i64::MIN, -1, 0, i64::MAX] {
            for now in [0, 1, u64::MAX] {
                let slots = Slots { offset, ..slots(0b111) };
                assert!(slots.turn_of(now, MemberId(2), MemberId(1), true).is_some_and(|at| at >= now));
            }
        }
    }
}
