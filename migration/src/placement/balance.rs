//! *balance*: vCPUs go from crowded hosts to others.
//!
//! A host's load is what its vCPUs compute, in processors, over the processors that it has. The burden of the VM is the sum
//! over its hosts of processors times load squared, which is least when all loads are equal. So
//!
//! ```text
//!  gain of v: A -> B  =  2 busy(v) (load A - load B)  -  busy(v)^2 (1 / processors A + 1 / processors B)
//! ```
//!
//! Nothing leaves a host with a load below 0.8: there a vCPU has a processor to itself, and elsewhere it would have to
//! fetch its pages. Members of one host share its processors: nothing moves between them.

use super::{Candidate, MemberLoad, Sample, Verdict};

/// A host with less load is not crowded.
const CROWDED: f64 = 0.8;

/// Computing vCPUs per processor.
fn load(sample: &Sample, member: &MemberLoad) -> f64 {
    sample.of_host(&member.host, |m| sample.on(m.id).map(|v| v.busy).sum::<f64>()) / processors(member)
}

fn processors(member: &MemberLoad) -> f64 {
    f64::from(member.cpus.max(1))
}

/// Sum over the hosts of processors times load squared.
pub fn burden(sample: &Sample) -> f64 {
    let mut hosts: Vec<&MemberLoad> = sample.members.iter().collect();
    hosts.sort_by(|a, b| a.host.cmp(&b.host));
    hosts.dedup_by(|a, b| a.host == b.host);
    hosts.into_iter().map(|m| processors(m) * load(sample, m).powi(2)).sum()
}

/// What every move would gain and cost; no verdict yet.
pub fn candidates(sample: &Sample, downtime_s: f64) -> Vec<Candidate> {
    let mut all = Vec::new();
    for vcpu in sample.vcpus.iter().filter(|v| v.known) {
        let Some(from) = sample.member(vcpu.on) else { continue };
        let here = load(sample, from);
        if here < CROWDED {
            continue;
        }
        for to in sample.members.iter().filter(|to| to.host != from.host) {
            let apart = 1.0 / processors(from) + 1.0 / processors(to);
            let gain = 2.0 * vcpu.busy * (here - load(sample, to)) - vcpu.busy.powi(2) * apart;
            if gain > 0.0 {
                all.push(Candidate {
                    vcpu: vcpu.id,
                    from: from.id.0,
                    to: to.id.0,
                    gain,
                    own: vcpu.busy,
                    cost_s: downtime_s,
                    verdict: Verdict::Looking,
                });
            }
        }
    }
    all
}
