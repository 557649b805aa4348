//! Who decides where the vCPUs live, and what the policy sees. [`migration::placement`] has the policies;
//! [`crate::control::coordinator::placer`] carries out what they decide.

use super::{OpError, Ops, Turn};
use crate::control::shared::Shared;
use crate::control::view::{VmInfo, VmStatus};
use dsm::addr::MemberId;
use migration::placement::meter::{Meter, VcpuCounts};
use migration::placement::planner::{Planner, Round, Tuning};
use migration::placement::{MemberLoad, Policy, Sample};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Between two samples.
pub const INTERVAL: Duration = Duration::from_secs(1);
/// What the moves of a policy are called while one is under way.
pub const MOVE: &str = "a move by the placement policy";
/// Counters that are older say nothing, seconds.
const STALE: f64 = 10.0;
/// Longest wait for a move of the policy to be over.
const PATIENCE: Duration = Duration::from_secs(15);

/// The policy of a VM, and what it has seen.
#[derive(Debug)]
pub struct Placement {
    planner: Planner,
    meter: Meter,
    since: Instant,
    /// vCPUs with which each member started.
    shares: BTreeMap<u16, u32>,
    /// Grows when the policy is changed.
    generation: u64,
}

impl Default for Placement {
    fn default() -> Placement {
        Placement {
            planner: Planner::new(Policy::Static, Tuning::default()),
            meter: Meter::default(),
            since: Instant::now(),
            shares: BTreeMap::new(),
            generation: 0,
        }
    }
}

/// What a policy was set to, or would do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlaceReport {
    /// The policy that was asked for.
    pub policy: Policy,
    /// The one that decides now.
    pub active: Policy,
    /// What it sees and would do; of a dry run only.
    pub round: Option<Round>,
}

impl Placement {
    /// Where the vCPUs live at the start.
    pub fn begin(&mut self, policy: Policy, shares: impl IntoIterator<Item = (u16, u32)>) {
        self.shares = shares.into_iter().collect();
        self.set(policy);
    }

    /// A member has left; one that comes later and has its number is another.
    pub fn left(&mut self, member: u16) {
        self.shares.remove(&member);
    }

    /// The policy that decides.
    pub fn policy(&self) -> Policy {
        self.planner.policy()
    }

    /// Changes whenever the policy does.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// From now on this one decides; returns the one before.
    pub fn set(&mut self, policy: Policy) -> Policy {
        let before = self.policy();
        if before != policy {
            self.planner = Planner::new(policy, Tuning::default());
            self.meter = Meter::default();
            self.generation += 1;
        }
        before
    }

    /// Something else is done to the VM.
    pub fn disturbed(&mut self) {
        self.planner.disturbed();
    }

    /// The policy looks at fresh counters.
    pub fn look(&mut self, info: &VmInfo) -> Round {
        let sample = sample(&mut self.meter, info, self.since, &self.shares);
        self.planner.look(sample)
    }

    /// What was decided has been done: for so long the guest was without the vCPU.
    pub fn moved(&mut self, round: &Round, downtime_s: Option<f64>) {
        self.planner.moved(round, self.since.elapsed().as_secs_f64(), downtime_s);
    }

    /// What was decided could not be done.
    pub fn refused(&mut self, round: &Round) {
        self.planner.refused(round, self.since.elapsed().as_secs_f64());
    }
}

fn sample(meter: &mut Meter, info: &VmInfo, since: Instant, shares: &BTreeMap<u16, u32>) -> Sample {
    let now = since.elapsed().as_secs_f64();
    let fresh = |age: Option<f64>| age.filter(|age| *age < STALE);
    let members = info.members.iter().map(|m| MemberLoad {
        id: MemberId(m.id),
        host: m.host.clone(),
        cpus: m.stats.host_cpus,
        share: shares.get(&m.id).copied().unwrap_or(0),
        open: fresh(m.age_s).is_some(),
        pages: m.memory_held / dsm::addr::PAGE_SIZE,
    });
    let counts = (0u32..).zip(&info.vcpus).map(|(id, on)| {
        let member = info.members.iter().find(|m| m.id == *on);
        let stats = member.and_then(|m| m.stats.vcpus.iter().find(|v| v.vcpu == id));
        let age = member.and_then(|m| fresh(m.age_s)).filter(|_| stats.is_some());
        VcpuCounts {
            id,
            on: MemberId(*on),
            at_s: age.map(|age| now - age),
            halted_us: stats.map_or(0, |v| v.halted_us),
            waits: stats
                .map_or_else(Vec::new, |v| v.waits.iter().map(|w| (w.peer, w.faults, w.wait_us)).collect()),
        }
    });
    let (members, counts) = (members.collect(), counts.collect());
    meter.read(now, members, counts)
}

impl Ops {
    /// The placement policy.
    pub fn placement(&self) -> MutexGuard<'_, Placement> {
        self.placement.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Turn {
    /// As [`Turn::take`], but waits until a move of the policy is over: its moves are short, and nobody asked for them.
    ///
    /// # Errors
    /// [`OpError::Refused`].
    pub async fn take_soon(shared: &Arc<Shared>, what: impl Into<String>) -> Result<Turn, OpError> {
        let what = what.into();
        let end = Instant::now() + PATIENCE;
        while shared.ops().under_way().is_some_and(|other| other == MOVE) && Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Turn::take(shared, what)
    }
}

/// Why there is nothing to place now.
fn check(shared: &Shared) -> Result<(), OpError> {
    let refused = |what: &str| Err(OpError::Refused(what.into()));
    if let Some(reason) = shared.loss() {
        return Err(OpError::Refused(reason));
    }
    let info = shared.info();
    match info.status {
        VmStatus::Running | VmStatus::Paused if info.members.len() == 1 => {
            refused("the VM has one member: there is nothing to place (spanvm member add brings another)")
        }
        VmStatus::Running | VmStatus::Paused => Ok(()),
        VmStatus::Starting => refused("the VM is still starting"),
        VmStatus::Ending => refused("the VM is ending"),
    }
}

/// Sets the policy.
///
/// # Errors
/// The VM has one member, or does not run.
pub fn place(shared: &Shared, policy: Policy) -> Result<PlaceReport, OpError> {
    check(shared)?;
    let before = shared.ops().placement().set(policy);
    shared.set_policy(policy);
    if before != policy {
        shared.events().note("policy", format!("{policy}, was {before}"), &policy);
    }
    Ok(PlaceReport { policy, active: policy, round: None })
}

/// What a policy would do: it looks for a few seconds, and moves nothing. The policy that decides goes on meanwhile.
///
/// # Errors
/// The VM has one member, is paused, or does not run.
pub async fn explain(shared: &Shared, policy: Policy) -> Result<PlaceReport, OpError> {
    check(shared)?;
    let (active, mut planner, since, shares) = {
        let placement = shared.ops().placement();
        let active = placement.policy();
        let known = (active == policy).then(|| placement.planner.clone());
        let planner = known.unwrap_or_else(|| Planner::new(policy, Tuning::default()));
        (active, planner, placement.since, placement.shares.clone())
    };
    planner.disturbed();
    let mut meter = Meter::default();
    let mut round = Round::default();
    for number in 0..=planner.window() {
        if shared.info().status != VmStatus::Running {
            return Err(OpError::Refused("the VM is paused: there is nothing to see".into()));
        }
        let sample = sample(&mut meter, &shared.fresh_info().await, since, &shares);
        if number == 0 {
            // Only the second shows what happened since the first.
            tokio::time::sleep(INTERVAL).await;
            continue;
        }
        round = planner.look(sample);
        if number < planner.window() {
            tokio::time::sleep(INTERVAL).await;
        }
    }
    Ok(PlaceReport { policy, active, round: Some(round) })
}
