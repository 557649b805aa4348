//! A member joins while the guest runs.
//!
//! ```text
//! coordinator              newcomer                     all members
//!   | Prepare                  |                            |
//!   |------------------------->|  looks at its host, listens; compared with the others
//!   | Join(plan)               | Meet                       |
//!   |------------------------->|                            |
//!   |----------------------------------------------------- >|
//!   |                          |<-------- streams --------->|  so far it is a stranger to them
//!   | Run                      |                            |
//!   |------------------------->|  its clock runs; it has no vCPU
//!   | the table with it, in a short pause (see [`super::table`]): first to the newcomer, then to all
//!   |------------------------->|                            |
//!   |------------------------------------------------------>|
//! ```
//!
//! Until the last step nobody depends on the newcomer: whatever happens to it, the VM is as it was.

use super::drain::{step, wanted};
use super::recruit::{Ready, Recruit, Recruiter};
use super::table::{self, ask_each};
use super::{OpError, Turn, pause};
use crate::config::HostPort;
use crate::control::codec::Json;
use crate::control::crew::GRACE;
use crate::control::view::{MemberInfo, VmStatus};
use crate::control::wire::{FromMember, ToMember};
use crate::member::table::TableTask;
use crate::member::{MemberPlan, Origin, PageTuning, Standing};
use crate::topology::{MemberDesc, Topology};
use dsm::addr::{MAX_MEMBERS, MemberId};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Longest wait of the members for the newcomer's connections.
const MEET: Duration = Duration::from_secs(20);
/// Between two looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(50);

/// How an addition went.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AddReport {
    /// Number of the new member.
    pub member: u16,
    /// Its host.
    pub host: String,
    /// Its process there.
    pub pid: u32,
    /// Guest memory whose home it is, bytes.
    pub memory_home: u64,
    /// For how long the guest stood still, milliseconds.
    pub pause_ms: f64,
    /// All of it, milliseconds.
    pub total_ms: f64,
}

/// Adds a member on a host that has none, or one more on the coordinator's own.
///
/// # Errors
/// Nothing has changed, and why; or the text says how things stand.
pub async fn add(turn: &Turn, host: Option<&HostPort>) -> Result<AddReport, OpError> {
    let roster = turn.shared().ops().roster();
    let there =
        roster.iter().flat_map(|roster| &roster.hosts).find(|(_, at)| at.is_some() && at.as_ref() == host);
    if let (Some((member, _)), Some(host)) = (there, host) {
        return Err(OpError::Refused(format!("{host} has {member} already")));
    }
    add_member(turn, host).await
}

/// As [`add`], on whatever host.
///
/// # Errors
/// As [`add`].
pub(super) async fn add_member(turn: &Turn, host: Option<&HostPort>) -> Result<AddReport, OpError> {
    let start = Instant::now();
    let shared = turn.shared();
    let id = check(turn, host)?;
    let place = host.map_or_else(|| "this host".to_string(), ToString::to_string);
    shared.ops().begin_progress(format!("the addition of {place}"));
    let added = attempt(turn, id, host).await;
    shared.ops().end_progress();
    let undone = |why: String| format!("{place} was not added: {why}; the VM is as it was");
    let mut report = added.map_err(|e| match e {
        _ if shared.loss().is_some() => OpError::Failed(shared.loss().unwrap_or_default()),
        // It was added and did not go on, or the VM ends: the text says so itself.
        e if members(turn).contains(&id) || shared.info().status == VmStatus::Ending => e,
        OpError::Refused(why) => OpError::Refused(undone(why)),
        OpError::NotFound(why) => OpError::NotFound(undone(why)),
        OpError::Failed(why) => OpError::Failed(undone(why)),
    })?;
    report.total_ms = start.elapsed().as_secs_f64() * 1e3;
    Ok(report)
}

/// What can be said before anything is done. Returns the new member's number.
fn check(turn: &Turn, host: Option<&HostPort>) -> Result<MemberId, OpError> {
    let refused = |what: &str| Err(OpError::Refused(what.into()));
    let ops = turn.shared().ops();
    let (Some(roster), Some(recruiter)) = (ops.roster(), ops.recruiter()) else {
        return refused("the VM is still starting");
    };
    if pause::is_paused(turn) {
        return refused("the VM is paused; resume it first");
    }
    if !recruiter.has_engine {
        return refused(
            "the VM was started as one member, whose memory is not shared: start it with two (--members 2), or restore a \
             checkpoint of it",
        );
    }
    if host.is_some() && recruiter.is_private {
        return refused(
            "the VM was started without node daemons, and its members have a key that only they know: start it with --on, \
             or add members here (local)",
        );
    }
    let free = (1u16..).map(MemberId).take(MAX_MEMBERS - 1).find(|id| !roster.table.members.contains(id));
    free.ok_or_else(|| OpError::Refused(format!("a VM has at most {MAX_MEMBERS} members")))
}

async fn attempt(turn: &Turn, id: MemberId, host: Option<&HostPort>) -> Result<AddReport, OpError> {
    let recruiter = turn.shared().ops().recruiter().ok_or_else(ending)?;
    step(turn, "its process starts");
    let mut recruit = unless_cancelled(turn, Recruit::hire(turn, recruiter, id, host)).await?;
    let joined = match invite(turn, recruiter, &mut recruit, host.is_none()).await {
        Ok(ready) => induct(turn, &recruit, ready, host).await,
        Err(e) => Err(e),
    };
    if members(turn).contains(&id) {
        // Also if what came after that failed.
        recruit.admit(turn, recruiter).await;
        return joined;
    }
    let end = recruit.end().await;
    forget(turn, recruit).await;
    joined.map_err(|e| match end {
        Some(end) => OpError::Failed(format!("{e}; {end}")),
        None => e,
    })
}

fn ending() -> OpError {
    OpError::Refused("the VM is ending".into())
}

fn members(turn: &Turn) -> Vec<MemberId> {
    turn.shared().ops().roster().map_or_else(Vec::new, |roster| roster.table.members)
}

/// Does what can be given up at any time, until somebody wants that.
async fn unless_cancelled<T>(
    turn: &Turn,
    work: impl Future<Output = Result<T, OpError>>,
) -> Result<T, OpError> {
    let cancelled = async {
        loop {
            if let Err(e) = wanted(turn) {
                return e;
            }
            tokio::time::sleep(LOOK).await;
        }
    };
    tokio::select! {
        done = work => done,
        e = cancelled => Err(e),
    }
}

/// All steps until it could be a member: it fits, is connected with all others, and has the time.
async fn invite(
    turn: &Turn,
    recruiter: &Recruiter,
    recruit: &mut Recruit,
    is_local: bool,
) -> Result<Ready, OpError> {
    let id = recruit.id;
    let others: Vec<SocketAddr> = turn.shared().info().members.iter().filter_map(|m| m.addr).collect();
    let bind = others.first().map(SocketAddr::ip).filter(|_| is_local);
    let ready = unless_cancelled(turn, recruit.prepare(recruiter, bind, &others)).await?;
    step(turn, "it connects with the others");
    let plan = plan(turn, recruiter, id, &ready)?;
    recruit.link.order(ToMember::Join(Json(Box::new(plan))));
    let meet = TableTask::Meet { member: id, addr: ready.addr, limit: MEET.min(recruiter.limit) };
    let asks = members(turn).into_iter().map(|member| (member, meet.clone())).collect();
    // Its own deadline is `limit`, and its error says more than ours would.
    let joined = recruit
        .hear("join", recruiter.limit + GRACE, |word| matches!(word, FromMember::Joined).then_some(()));
    unless_cancelled(turn, async { tokio::try_join!(joined, ask_each(turn, asks)) }).await?;
    recruit.link.order(ToMember::Run);
    let started =
        recruit.hear("start", recruiter.limit, |word| matches!(word, FromMember::Started).then_some(()));
    unless_cancelled(turn, started).await?;
    Ok(ready)
}

/// Makes it a member.
async fn induct(
    turn: &Turn,
    recruit: &Recruit,
    ready: Ready,
    at: Option<&HostPort>,
) -> Result<AddReport, OpError> {
    let Recruit { id, link, .. } = recruit;
    let shared = turn.shared();
    step(turn, "it becomes a member");
    let roster = shared.ops().roster().ok_or_else(ending)?;
    let mut all = roster.table.members.clone();
    all.push(*id);
    all.sort_unstable();
    let Ready { host, pid, addr, .. } = ready;
    turn.crew()?.admit(*id, host.clone(), link.orders());
    let next = table::Next { memory: roster.with_homes_at(*id), members: all, ..roster.as_next() };
    let changed = table::change(turn, next).await;
    let now = shared.ops().roster().filter(|now| now.table.members.contains(id));
    let Some(mut now) = now else {
        return Err(changed.err().unwrap_or_else(ending));
    };
    let memory_home = now.table.memory.iter().filter(|r| r.home == *id).map(|r| r.len).sum();
    now.hosts.push((*id, at.cloned()));
    shared.ops().set_roster(now);
    shared.joined(MemberInfo::new(id.0, host.clone(), pid, addr, memory_home));
    let pause_ms = changed?.as_secs_f64() * 1e3;
    Ok(AddReport { member: id.0, host, pid, memory_home, pause_ms, total_ms: 0.0 })
}

fn plan(turn: &Turn, recruiter: &Recruiter, id: MemberId, ready: &Ready) -> Result<MemberPlan, OpError> {
    let ops = turn.shared().ops();
    let roster = ops.roster().ok_or_else(ending)?;
    let info = turn.shared().info();
    let known = info
        .members
        .iter()
        .filter_map(|m| Some(MemberDesc { id: MemberId(m.id), host: m.host.clone(), addr: m.addr? }));
    let mut members: Vec<MemberDesc> = known.collect();
    members.push(MemberDesc { id, host: ready.host.clone(), addr: ready.addr });
    members.sort_by_key(|m| m.id);
    Ok(MemberPlan {
        vm: recruiter.vm.clone(),
        me: id,
        topology: Topology { members, memory: roster.table.memory.clone(), ..recruiter.topology.clone() },
        secret: None,
        cpuid: recruiter.common.cpuid.clone(),
        tsc_khz: recruiter.common.tsc_khz,
        devices: roster.devices.clone(),
        pages: PageTuning { budget: None, ..recruiter.pages.clone() },
        origin: Origin::Boot,
        standing: Some(Standing {
            table: roster.table.epoch,
            vcpus: info.vcpus.iter().copied().map(MemberId).collect(),
            placement: ops.last_epoch(),
            leader: roster.leader,
        }),
        deadline: recruiter.limit,
    })
}

/// Everybody forgets it.
async fn forget(turn: &Turn, recruit: Recruit) {
    let id = recruit.id;
    if let Ok(crew) = turn.crew() {
        crew.dismiss(id);
    }
    recruit.send_away().await;
    let parts = members(turn).into_iter().map(|member| (member, TableTask::Part { members: vec![id] }));
    if let Err(e) = ask_each(turn, parts.collect()).await {
        tracing::warn!("{id} has not become a member, and a link to it is left behind: {e}");
    }
}
