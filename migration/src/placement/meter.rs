//! From counters that only grow to what happened lately.

use super::{Flow, MemberLoad, Sample, VcpuLoad};
use dsm::addr::MemberId;
use std::collections::BTreeMap;

/// Counters that are closer together say little, seconds.
const SHORTEST: f64 = 0.1;

/// Counters of a vCPU, since it came to where it lives or before.
#[derive(Clone, Debug, PartialEq)]
pub struct VcpuCounts {
    /// Its id.
    pub id: u32,
    /// Where it lives.
    pub on: MemberId,
    /// When its member counted, seconds; `None` if it has not.
    pub at_s: Option<f64>,
    /// Microseconds halted there.
    pub halted_us: u64,
    /// Faults there, and microseconds waited, by the member that answered.
    pub waits: Vec<(MemberId, u64, u64)>,
}

/// The last counters of each vCPU.
#[derive(Clone, Debug, Default)]
pub struct Meter {
    last: BTreeMap<u32, VcpuCounts>,
}

impl Meter {
    /// What happened since the last call, in which vCPUs that have come or were not counted anew are not known.
    pub fn read(&mut self, at_s: f64, members: Vec<MemberLoad>, counts: Vec<VcpuCounts>) -> Sample {
        let vcpus = counts.into_iter().map(|now| self.vcpu(now)).collect();
        Sample { at_s, members, vcpus }
    }

    fn vcpu(&mut self, now: VcpuCounts) -> VcpuLoad {
        let unknown = VcpuLoad { id: now.id, on: now.on, busy: 0.0, flows: BTreeMap::new(), known: false };
        let Some(at) = now.at_s else { return unknown };
        match self
            .last
            .get(&now.id)
            .filter(|last| last.on == now.on)
            .and_then(|last| Some((last, last.at_s?)))
        {
            // It waits for newer ones.
            Some((_, before)) if at >= before && at - before < SHORTEST => unknown,
            Some((last, before)) if at > before => {
                let load = between(last, &now, at - before);
                self.last.insert(now.id, now);
                load
            }
            _ => {
                self.last.insert(now.id, now);
                unknown
            }
        }
    }
}

/// Microseconds and counts are far below 2^53.
#[allow(clippy::cast_precision_loss)]
fn grown(from: u64, to: u64) -> f64 {
    to.saturating_sub(from) as f64
}

fn between(last: &VcpuCounts, now: &VcpuCounts, seconds: f64) -> VcpuLoad {
    let mut flows = BTreeMap::new();
    for (peer, faults, us) in &now.waits {
        let before = last.waits.iter().find(|(p, ..)| p == peer).map_or((0, 0), |(_, f, us)| (*f, *us));
        let flow = Flow {
            faults: grown(before.0, *faults) / seconds,
            wait: (grown(before.1, *us) / 1e6 / seconds).min(1.0),
        };
        if flow.faults > 0.0 {
            flows.insert(*peer, flow);
        }
    }
    let waited: f64 = flows.values().map(|flow| flow.wait).sum();
    let halted = grown(last.halted_us, now.halted_us) / 1e6 / seconds;
    VcpuLoad { id: now.id, on: now.on, busy: (1.0 - halted - waited).clamp(0.0, 1.0), flows, known: true }
}
