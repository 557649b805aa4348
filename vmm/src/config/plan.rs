//! From a specification to a topology: which vCPU and which range of memory starts at which member.

use super::spec::{MemberSpec, VmSpec};
use crate::layout;
use crate::topology::{MemberDesc, Topology};
use dsm::addr::{Epoch, HomeRange, MemberId};
use std::net::SocketAddr;

/// Memory shares are multiples of this, bytes: one huge page, so that no member's share splits one.
pub const GRAIN: u64 = 2 << 20;
/// SLIT distance of a member to itself (ACPI 6.5, 5.2.17).
pub const LOCAL_DISTANCE: u8 = 10;
/// SLIT distance to another member unless a measurement says more. Linux spreads new processes and wakes threads over
/// nodes up to its `node_reclaim_distance` (30, 32 on AMD EPYC; kernel/sched/topology.c, `sd_init`): members are further
/// apart than that, or every `fork` would move its page tables over the network.
pub const REMOTE_DISTANCE: u8 = 40;

/// The first topology of a VM. `hosts` has one host name and address per member.
pub fn topology(spec: &VmSpec, hosts: Vec<(String, SocketAddr)>, distances: Vec<Vec<u8>>) -> Topology {
    Topology {
        epoch: Epoch(1),
        members: (0u16..)
            .zip(hosts)
            .map(|(id, (host, addr))| MemberDesc { id: MemberId(id), host, addr })
            .collect(),
        vcpus: vcpus(&spec.members),
        memory: memory(&spec.members),
        distances,
    }
}

/// Each member's vCPUs in one block, so that neighbouring ids share a host.
fn vcpus(members: &[MemberSpec]) -> Vec<MemberId> {
    (0u16..)
        .zip(members)
        .flat_map(|(id, m)| std::iter::repeat_n(MemberId(id), usize::try_from(m.cpus).unwrap_or(0)))
        .collect()
}

/// Each member's memory in one block, cut in two where it meets the 32-bit hole.
fn memory(members: &[MemberSpec]) -> Vec<HomeRange> {
    let mut ranges = Vec::new();
    let mut at = 0u64;
    for (id, member) in (0u16..).zip(members) {
        let mut left = member.memory;
        while left > 0 {
            let room = if at < layout::LOW_RAM_END { layout::LOW_RAM_END - at } else { u64::MAX };
            let len = left.min(room);
            ranges.push(HomeRange { start: at, len, home: MemberId(id) });
            left -= len;
            at += len;
            if at == layout::LOW_RAM_END {
                at = layout::HIGH_RAM_START;
            }
        }
    }
    ranges
}

/// Distances from round-trip times in microseconds (`None` = not measured): 40 for anything up to 50 us,
/// then 10 more for every doubling, below 255, which means unreachable.
pub fn distances(round_trips: &[Vec<Option<u64>>]) -> Vec<Vec<u8>> {
    (0..)
        .zip(round_trips)
        .map(|(from, row): (usize, _)| {
            (0..)
                .zip(row)
                .map(|(to, us): (usize, _)| match us {
                    _ if from == to => LOCAL_DISTANCE,
                    None => REMOTE_DISTANCE,
                    Some(us) => {
                        let doublings = (us / 50).checked_ilog2().map_or(0, |n| n + 1);
                        u8::try_from(u32::from(REMOTE_DISTANCE) + 10 * doublings).unwrap_or(250).min(250)
                    }
                })
                .collect()
        })
        .collect()
}

/// Round-trip times between all members from those between the first and each other: nobody has measured the others, and
/// the way between two of them is taken to be as long as the longer of their ways to the first.
pub fn mesh(from_first: &[Option<u64>]) -> Vec<Vec<Option<u64>>> {
    let between = |a: &Option<u64>, b: &Option<u64>| (*a).max(*b);
    from_first.iter().map(|a| from_first.iter().map(|b| between(a, b)).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn members(shares: &[(u32, u64)]) -> Vec<MemberSpec> {
        shares.iter().map(|&(cpus, memory)| MemberSpec { host: None, cpus, memory, budget: None }).collect()
    }

    #[test]
    fn blocks_of_vcpus() {
        let all = members(&[(2, GRAIN), (1, GRAIN), (3, GRAIN)]);
        assert_eq!(vcpus(&all).iter().map(|m| m.0).collect::<Vec<_>>(), [0, 0, 1, 2, 2, 2]);
    }

    #[test]
    fn memory_goes_round_the_hole() {
        let gib = 1 << 30;
        let all = memory(&members(&[(1, 2 * gib), (1, 2 * gib)]));
        let expect = [(0, 2 * gib, 0), (2 * gib, gib, 1), (4 * gib, gib, 1)];
        assert_eq!(all.iter().map(|r| (r.start, r.len, r.home.0)).collect::<Vec<_>>(), expect);
        let all = memory(&members(&[(1, 3 * gib), (1, gib)]));
        assert_eq!(all.iter().map(|r| (r.start, r.home.0)).collect::<Vec<_>>(), [(0, 0), (4 * gib, 1)]);
    }

    #[test]
    fn distance_grows_with_the_round_trip() {
        let rtt = |us| distances(&[vec![None, Some(us)], vec![Some(us), None]]);
        assert_eq!(rtt(20), [[10, 40], [40, 10]]);
        assert_eq!(rtt(50), [[10, 50], [50, 10]]);
        assert_eq!(rtt(200)[0][1], 70);
        assert_eq!(rtt(u64::MAX)[0][1], 250);
    }

    #[test]
    fn unmeasured_pairs_are_as_far_apart_as_the_farther_of_both() {
        let mesh = mesh(&[None, Some(100), Some(400)]);
        assert_eq!(mesh[0], [None, Some(100), Some(400)]);
        assert_eq!(mesh[1][2], Some(400));
        assert_eq!(distances(&mesh)[2], [80, 80, 10]);
    }

    proptest! {
        #[test]
        fn memory_is_complete_and_disjoint(units in proptest::collection::vec(1u64..4096, 1..8)) {
            let all = members(&units.iter().map(|n| (1, n * GRAIN)).collect::<Vec<_>>());
            let ranges = memory(&all);
            prop_assert_eq!(ranges.iter().map(|r| r.len).sum::<u64>(), units.iter().sum::<u64>() * GRAIN);
            for pair in ranges.windows(2) {
                prop_assert!(pair[0].end() <= pair[1].start);
            }
            for range in &ranges {
                prop_assert!(range.len > 0 && range.len % GRAIN == 0 && range.start % GRAIN == 0);
                prop_assert!(range.end() <= layout::LOW_RAM_END || range.start >= layout::HIGH_RAM_START);
            }
        }
    }
}
