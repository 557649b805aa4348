//! Who gets an interrupt message: pure decisions over the placement table.

use super::{DeliveryMode, Destination, InterruptMessage};
use dsm::addr::MemberId;

/// Where a message goes as seen from one member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Targets {
    /// One vCPU, which lives there.
    One(u32, MemberId),
    /// All vCPUs of the VM that match, on these members; each looks at its own local APICs. May name the
    /// member that asks.
    Members(Vec<MemberId>),
    /// One of the vCPUs that match a logical destination of xAPIC, whose LDRs only their members know: try at
    /// home, then hand it on from member to member.
    OneOfMatching(u32),
    /// Nobody.
    Nobody,
}

/// Decides. `x2apic`: logical destinations are x2APIC's, which follow from APIC ids. Among several candidates
/// for a lowest-priority message one at `me` is taken, as it costs no message.
pub fn targets(message: &InterruptMessage, placement: &[MemberId], me: MemberId, x2apic: bool) -> Targets {
    let one = |id: u32| match placement.get(index(id)) {
        Some(member) => Targets::One(id, *member),
        None => Targets::Nobody,
    };
    let lowest = message.mode == DeliveryMode::LowestPriority;
    match message.destination {
        Destination::Physical(u32::MAX) | Destination::All => {
            if lowest {
                return choose((0u32..).zip(placement.iter().copied()), me);
            }
            Targets::Members(members(placement.iter().copied()))
        }
        Destination::AllButSelf => {
            let others =
                (0u32..).zip(placement.iter().copied()).filter(|(id, _)| Some(*id) != message.source);
            if lowest {
                return choose(others, me);
            }
            Targets::Members(members(others.map(|(_, m)| m)))
        }
        Destination::Physical(id) => one(id),
        Destination::Logical(mda) if x2apic && mda != u32::MAX => {
            let candidates = x2apic_cluster(mda).filter_map(|id| Some((id, *placement.get(index(id))?)));
            if lowest {
                return choose(candidates, me);
            }
            Targets::Members(members(candidates.map(|(_, m)| m)))
        }
        Destination::Logical(mda) if lowest => Targets::OneOfMatching(mda),
        Destination::Logical(_) => Targets::Members(members(placement.iter().copied())),
    }
}

fn index(id: u32) -> usize {
    usize::try_from(id).unwrap_or(usize::MAX)
}

/// The APIC ids of an x2APIC logical destination (SDM vol. 3, 11.12.10.2).
fn x2apic_cluster(mda: u32) -> impl Iterator<Item = u32> {
    (0..16).filter(move |bit| mda & (1 << bit) != 0).map(move |bit| (mda >> 16 << 4) + bit)
}

fn members(of: impl Iterator<Item = MemberId>) -> Vec<MemberId> {
    let mut members: Vec<_> = of.collect();
    members.sort_unstable();
    members.dedup();
    members
}

fn choose(mut candidates: impl Iterator<Item = (u32, MemberId)>, me: MemberId) -> Targets {
    let Some(first) = candidates.next() else { return Targets::Nobody };
    let (id, member) = if first.1 == me { first } else { candidates.find(|c| c.1 == me).unwrap_or(first) };
    Targets::One(id, member)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACEMENT: [MemberId; 4] = [MemberId(0), MemberId(0), MemberId(1), MemberId(2)];

    fn message(destination: Destination, mode: DeliveryMode) -> InterruptMessage {
        InterruptMessage {
            destination,
            mode,
            vector: 0x40,
            level_triggered: false,
            asserted: true,
            source: Some(3),
        }
    }

    #[test]
    fn destinations() {
        use Destination::{All, AllButSelf, Logical, Physical};
        let all = || Targets::Members(vec![MemberId(0), MemberId(1), MemberId(2)]);
        let fixed = DeliveryMode::Fixed;
        let lowest = DeliveryMode::LowestPriority;
        let cases = [
            (Physical(2), fixed, true, Targets::One(2, MemberId(1))),
            (Physical(4), fixed, true, Targets::Nobody),
            (Physical(u32::MAX), fixed, true, all()),
            (All, fixed, true, all()),
            (AllButSelf, fixed, true, Targets::Members(vec![MemberId(0), MemberId(1)])),
            (Logical(0b1100), fixed, true, Targets::Members(vec![MemberId(1), MemberId(2)])),
            (Logical(0b1100), fixed, false, all()),
            (Logical(0x1_0001), fixed, true, Targets::Members(vec![])),
            (Logical(u32::MAX), fixed, true, all()),
            (Logical(0b1101), lowest, true, Targets::One(2, MemberId(1))),
            (Logical(0b1001), lowest, true, Targets::One(0, MemberId(0))),
            (Logical(0b1001), lowest, false, Targets::OneOfMatching(0b1001)),
            (Physical(3), lowest, true, Targets::One(3, MemberId(2))),
            (All, lowest, true, Targets::One(2, MemberId(1))),
            (Logical(0xFFFF_0000), lowest, true, Targets::Nobody),
        ];
        for (destination, mode, x2apic, expected) in cases {
            let got = targets(&message(destination, mode), &PLACEMENT, MemberId(1), x2apic);
            assert_eq!(got, expected, "{destination:?} {mode:?}");
        }
    }
}
