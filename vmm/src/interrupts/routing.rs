//! Who gets an interrupt message: pure decisions over the placement table.

use super::{DeliveryMode, Destination, InterruptMessage};
use dsm::addr::MemberId;

/// Whom a message is for, as seen from one member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Targets {
    /// One vCPU.
    One(u32),
    /// Each of these vCPUs, if its local APIC finds that the destination means it.
    Each(Vec<u32>),
    /// One of the vCPUs that match a logical destination of xAPIC, whose LDRs only their members know: try at
    /// home, then hand it on from member to member.
    OneOfMatching,
    /// Nobody.
    Nobody,
}

/// Decides, for a VM with `count` vCPUs that live `at` these members. `x2apic`: logical destinations are x2APIC's, which
/// follow from APIC ids. Among several candidates for a lowest-priority message one at `me` is taken, as it costs no
/// message.
pub fn targets(
    message: &InterruptMessage,
    count: u32,
    at: impl Fn(u32) -> Option<MemberId>,
    me: MemberId,
    x2apic: bool,
) -> Targets {
    let lowest = message.mode == DeliveryMode::LowestPriority;
    let many = |ids: &mut dyn Iterator<Item = u32>| {
        if lowest { choose(ids, &at, me) } else { Targets::Each(ids.collect()) }
    };
    match message.destination {
        Destination::Physical(u32::MAX) | Destination::All => many(&mut (0..count)),
        Destination::AllButSelf => many(&mut (0..count).filter(|id| Some(*id) != message.source)),
        Destination::Physical(id) if id < count => Targets::One(id),
        Destination::Physical(_) => Targets::Nobody,
        Destination::Logical(mda) if x2apic && mda != u32::MAX => {
            many(&mut x2apic_cluster(mda).filter(|id| *id < count))
        }
        Destination::Logical(_) if lowest => Targets::OneOfMatching,
        Destination::Logical(_) => Targets::Each((0..count).collect()),
    }
}

/// The APIC ids of an x2APIC logical destination (SDM vol. 3, 11.12.10.2).
fn x2apic_cluster(mda: u32) -> impl Iterator<Item = u32> {
    (0..16).filter(move |bit| mda & (1 << bit) != 0).map(move |bit| (mda >> 16 << 4) + bit)
}

fn choose(
    mut candidates: &mut dyn Iterator<Item = u32>,
    at: impl Fn(u32) -> Option<MemberId>,
    me: MemberId,
) -> Targets {
    let Some(first) = candidates.next() else { return Targets::Nobody };
    let local = |id: &u32| at(*id) == Some(me);
    if local(&first) {
        return Targets::One(first);
    }
    Targets::One(Iterator::find(&mut candidates, local).unwrap_or(first))
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
        let all = || Targets::Each(vec![0, 1, 2, 3]);
        let fixed = DeliveryMode::Fixed;
        let lowest = DeliveryMode::LowestPriority;
        let cases = [
            (Physical(2), fixed, true, Targets::One(2)),
            (Physical(4), fixed, true, Targets::Nobody),
            (Physical(u32::MAX), fixed, true, all()),
            (All, fixed, true, all()),
            (AllButSelf, fixed, true, Targets::Each(vec![0, 1, 2])),
            (Logical(0b1100), fixed, true, Targets::Each(vec![2, 3])),
            (Logical(0b1100), fixed, false, all()),
            (Logical(0x1_0001), fixed, true, Targets::Each(vec![])),
            (Logical(u32::MAX), fixed, true, all()),
            (Logical(0b1101), lowest, true, Targets::One(2)),
            (Logical(0b1001), lowest, true, Targets::One(0)),
            (Logical(0b1001), lowest, false, Targets::OneOfMatching),
            (Physical(3), lowest, true, Targets::One(3)),
            (All, lowest, true, Targets::One(2)),
            (Logical(0xFFFF_0000), lowest, true, Targets::Nobody),
        ];
        for (destination, mode, x2apic, expected) in cases {
            let at = |id: u32| PLACEMENT.get(usize::try_from(id).unwrap()).copied();
            let got = targets(&message(destination, mode), 4, at, MemberId(1), x2apic);
            assert_eq!(got, expected, "{destination:?} {mode:?}");
        }
    }
}
