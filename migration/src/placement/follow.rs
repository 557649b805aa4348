//! *follow*: a vCPU goes to where its faults go, if that is cheaper than that the pages keep coming.
//!
//! ```text
//!  gain of v: m -> p  =  wait(v, p)  +  sum over u on p of wait(u, m)  *  faults(v, p) / sum over w on m of faults(w, p)
//!                        its own        what they wait for m, as far as it is v that has what they want
//!
//!  cost               =  downtime of a move  +  pages that follow  *  what a fault takes
//! ```
//!
//! Waits are seconds per second, measured. What a vCPU shares with others on its own member makes no faults, so it is seen
//! only once it has moved: then the [`super::planner`] finds that the move did not pay.

use super::{Candidate, Sample, VcpuLoad, Verdict};
use dsm::addr::MemberId;

/// Pages that follow a vCPU by fault, at most: those that it waited for last are asked for when it comes.
const PAGES: f64 = 128.0;
/// What a fault takes as long as nobody has seen any, seconds.
const FAULT: f64 = 1e-3;

/// What every move would gain and cost; no verdict yet.
pub fn candidates(sample: &Sample, downtime_s: f64) -> Vec<Candidate> {
    let fault = sample.waits().1.unwrap_or(FAULT);
    let mut all = Vec::new();
    for vcpu in sample.vcpus.iter().filter(|v| v.known) {
        for to in sample.members.iter().map(|m| m.id).filter(|to| *to != vcpu.on) {
            let own = vcpu.flows.get(&to).map_or(0.0, |flow| flow.wait);
            let gain = own + wanted_by(sample, vcpu, to);
            if gain > 0.0 {
                let cost_s = downtime_s + pages(sample, vcpu.on) * fault;
                let (from, to) = (vcpu.on.0, to.0);
                all.push(Candidate { vcpu: vcpu.id, from, to, gain, own, cost_s, verdict: Verdict::Looking });
            }
        }
    }
    all
}

/// Seconds per second that vCPUs on `at` wait for the vCPU's member because of it, as far as one can tell: it has its part
/// of them by its part of what goes the other way.
fn wanted_by(sample: &Sample, vcpu: &VcpuLoad, at: MemberId) -> f64 {
    let faults = |v: &VcpuLoad| v.flows.get(&at).map_or(0.0, |flow| flow.faults);
    let all: f64 = sample.on(vcpu.on).map(faults).sum();
    if all <= 0.0 {
        return 0.0;
    }
    let back: f64 = sample.on(at).filter_map(|v| v.flows.get(&vcpu.on)).map(|flow| flow.wait).sum();
    back * faults(vcpu) / all
}

fn pages(sample: &Sample, at: MemberId) -> f64 {
    let held = sample.member(at).map_or(0, |m| m.pages);
    let vcpus = u64::try_from(sample.on(at).count()).unwrap_or(1).max(1);
    // Below 2^32.
    #[allow(clippy::cast_precision_loss)]
    let each = (held / vcpus) as f64;
    each.min(PAGES)
}
