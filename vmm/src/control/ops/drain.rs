//! A member leaves while the guest runs.
//!
//! ```text
//!  vCPUs move to the others --> its homes and devices   --> its pages go home --> it leaves
//!     live, one by one          go to the others              live, with progress    a short pause
//!            |                  in a short pause                   |
//!            +--------------------------+--------------------------+--- cancelled, or failed: homes, devices and vCPUs
//!                                                                       come back, the VM is as it was
//! ```
//!
//! From the moment at which it has nothing any more, whatever happens to its process harms nobody.

use super::office::Notice;
use super::table::{self, Next, Roster, ask, ask_each};
use super::{OpError, Turn, devices, moves, pause};
use crate::devices::DeviceSpec;
use crate::member::table::{TableReply, TableTask};
use dsm::addr::MemberId;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// Between two looks at the progress.
const STEP: Duration = Duration::from_millis(250);
/// A member whose pages do not go for so long is not drained.
const STALL: Duration = Duration::from_secs(30);
/// Longest wait for the process of a member that has left.
const FAREWELL: Duration = Duration::from_secs(15);

/// How far an operation on members is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// What is under way; nothing if empty.
    pub what: String,
    /// What it is at.
    pub step: String,
    /// Pages that the member still has.
    pub pages_left: u64,
    /// Pages that it had.
    pub pages: u64,
    /// Pages per second, lately.
    pub rate: f64,
    /// Seconds until they have gone, at this rate.
    pub seconds_left: Option<f64>,
}

/// How a drain went.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DrainReport {
    /// The member that left.
    pub member: u16,
    /// vCPUs that moved, and where to.
    pub vcpus: Vec<(u32, u16)>,
    /// Devices that went with it, and where to.
    #[serde(default)]
    pub devices: Vec<(String, u16)>,
    /// Pages that it had when its homes had gone.
    pub pages: u64,
    /// For how long they went, milliseconds.
    pub evict_ms: f64,
    /// The two short pauses, milliseconds.
    pub pauses_ms: [f64; 2],
    /// All of it, milliseconds.
    pub total_ms: f64,
}

/// Takes a member out of the VM; its devices go to `heirs`, or to whatever member can have them.
///
/// # Errors
/// The VM is as it was; or the text says what is not.
pub async fn drain(
    turn: &Turn,
    member: u16,
    heirs: Option<&[MemberId]>,
    limit: Duration,
) -> Result<DrainReport, OpError> {
    let member = MemberId(member);
    check(turn, member)?;
    let ending = || OpError::Refused("the VM is ending".into());
    let before = turn.shared().ops().roster().ok_or_else(ending)?;
    let goal = devices::arrange(turn, &before, member, heirs.unwrap_or(&before.table.members)).await?;
    turn.shared().ops().begin_progress(format!("the drain of {member}"));
    let start = Instant::now();
    let mut report = DrainReport { member: member.0, ..DrainReport::default() };
    let drained = attempt(turn, member, &before, goal, limit, &mut report).await;
    turn.shared().ops().end_progress();
    drained?;
    report.total_ms = ms(start.elapsed());
    Ok(report)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// What can be said before anything is done.
pub(super) fn check(turn: &Turn, member: MemberId) -> Result<(), OpError> {
    let refused = |what: String| Err(OpError::Refused(what));
    let Some(roster) = turn.shared().ops().roster() else {
        return refused("the VM is still starting".into());
    };
    if !roster.table.members.contains(&member) {
        let members: Vec<String> = roster.table.members.iter().map(|m| m.0.to_string()).collect();
        return Err(OpError::NotFound(format!(
            "there is no {member}; the members are {}",
            members.join(", ")
        )));
    }
    if roster.table.members.len() == 1 {
        return refused(format!("{member} is the only one"));
    }
    if pause::is_paused(turn) {
        return refused("the VM is paused; resume it first".into());
    }
    Ok(())
}

async fn attempt(
    turn: &Turn,
    member: MemberId,
    roster: &Roster,
    devices: Vec<DeviceSpec>,
    limit: Duration,
    report: &mut DrainReport,
) -> Result<(), OpError> {
    let old = roster.as_next();
    let members = roster.table.members.clone();
    let result = async {
        send_vcpus(turn, member, limit, report).await?;
        wanted(turn)?;
        step(turn, "its homes and devices go to the others");
        let next = Next { memory: roster.without_homes_at(&[member]), devices, ..old.clone() };
        if next != old {
            report.devices = devices::report(&old.devices, &next.devices);
            report.pauses_ms[0] = ms(table::change(turn, next).await?);
        }
        wanted(turn)?;
        evict(turn, member, report).await?;
        wanted(turn)?;
        step(turn, "it leaves");
        let now = turn.shared().ops().roster().ok_or_else(|| OpError::Refused("the VM is ending".into()))?;
        let rest = members.iter().copied().filter(|m| *m != member).collect();
        report.pauses_ms[1] = ms(table::change(turn, Next { members: rest, ..now.as_next() }).await?);
        Ok(())
    }
    .await;
    if let Err(e) = result {
        return Err(undo(turn, member, old, report, limit, e).await);
    }
    farewell(turn, member, &members).await
}

pub(super) fn step(turn: &Turn, what: &str) {
    turn.shared().ops().progress(|p| p.step = what.into());
}

/// Nobody has cancelled it.
pub(super) fn wanted(turn: &Turn) -> Result<(), OpError> {
    if turn.shared().ops().is_cancelled() { Err(OpError::Refused("cancelled".into())) } else { Ok(()) }
}

/// Spreads the member's vCPUs over the others: each goes to who has fewest.
async fn send_vcpus(
    turn: &Turn,
    member: MemberId,
    limit: Duration,
    report: &mut DrainReport,
) -> Result<(), OpError> {
    step(turn, "its vCPUs move");
    let info = turn.shared().info();
    let mut load: Vec<(usize, u16)> = info
        .members
        .iter()
        .filter(|m| m.id != member.0)
        .map(|m| (info.vcpus.iter().filter(|place| **place == m.id).count(), m.id))
        .collect();
    for (vcpu, _) in (0u32..).zip(&info.vcpus).filter(|(_, place)| **place == member.0) {
        wanted(turn)?;
        let Some((count, to)) = load.iter_mut().min() else { continue };
        *count += 1;
        moves::migrate(turn, &[vcpu], *to, limit).await?;
        report.vcpus.push((vcpu, *to));
    }
    Ok(())
}

/// Its pages go home, until it has none.
async fn evict(turn: &Turn, member: MemberId, report: &mut DrainReport) -> Result<(), OpError> {
    step(turn, "its pages go home");
    let start = Instant::now();
    let (mut last, mut moved) = (u64::MAX, Instant::now());
    loop {
        let since = Instant::now();
        let TableReply::Evicted(now) = ask(turn, member, TableTask::Evict { limit: STEP }).await? else {
            return Err(OpError::Failed(format!("{member} does not say how many pages it has")));
        };
        if last == u64::MAX {
            last = now.before.max(now.left);
            report.pages = last;
        }
        let gone = last.saturating_sub(now.left);
        turn.shared().ops().progress(|p| {
            // Pages are far below 2^53.
            #[allow(clippy::cast_precision_loss)]
            let (gone, left) = (gone as f64, now.left as f64);
            p.pages = report.pages;
            p.pages_left = now.left;
            let rate = gone / since.elapsed().as_secs_f64().max(1e-6);
            p.rate = if p.rate == 0.0 { rate } else { (p.rate + rate) / 2.0 };
            p.seconds_left = (p.rate > 0.0).then(|| left / p.rate);
        });
        if now.is_empty {
            report.evict_ms = ms(start.elapsed());
            return Ok(());
        }
        if gone > 0 {
            moved = Instant::now();
        }
        if moved.elapsed() > STALL {
            return Err(OpError::Failed(format!(
                "{} pages of {member} have not gone for {} s",
                now.left,
                STALL.as_secs()
            )));
        }
        last = now.left;
        wanted(turn)?;
    }
}

/// Back to how it was. Returns what to say.
async fn undo(
    turn: &Turn,
    member: MemberId,
    old: Next,
    report: &DrainReport,
    limit: Duration,
    why: OpError,
) -> OpError {
    step(turn, "back to how it was");
    let mut trouble = Vec::new();
    let now = turn.shared().ops().roster().map(|roster| roster.as_next());
    if now.is_some_and(|now| now != old) {
        if let Err(e) = table::change(turn, old).await {
            trouble.push(format!("its homes and devices did not come back: {e}"));
        }
    }
    let away: Vec<u32> = report.vcpus.iter().map(|(vcpu, _)| *vcpu).collect();
    if !away.is_empty() {
        if let Err(e) = moves::migrate(turn, &away, member.0, limit).await {
            trouble.push(format!("its vCPUs did not come back: {e}"));
        }
    }
    let name = turn.crew().map_or_else(|_| member.to_string(), |crew| crew.name(member));
    match (why, trouble.is_empty()) {
        (OpError::Refused(why), true) => {
            OpError::Refused(format!("{name} was not drained: {why}; the VM is as it was"))
        }
        (why, true) => OpError::Failed(format!("{name} was not drained: {why}; the VM is as it was")),
        (why, false) => OpError::Failed(format!("{name} was not drained: {why}; {}", trouble.join("; "))),
    }
}

/// It has nothing any more and is no member: it is let go.
async fn farewell(turn: &Turn, member: MemberId, members: &[MemberId]) -> Result<(), OpError> {
    let ops = turn.shared().ops();
    ops.tell_office(Notice::Excuse(member)).await;
    let rest: Vec<MemberId> = members.iter().copied().filter(|m| *m != member).collect();
    // Who does not do this keeps a link that leads nowhere: no harm in that. The one that leaves may be gone already.
    let mut parts: Vec<_> =
        rest.iter().map(|other| (*other, TableTask::Part { members: vec![member] })).collect();
    parts.push((member, TableTask::Part { members: rest }));
    if let Err(e) = ask_each(turn, parts).await {
        tracing::warn!("{member} has left, and a link of it is left behind: {e}");
    }
    turn.crew()?.dismiss(member);
    turn.shared().left(member);
    if let Some(mut roster) = ops.roster() {
        roster.hosts.retain(|(id, _)| *id != member);
        ops.set_roster(roster);
    }
    let (done, wait) = oneshot::channel();
    ops.tell_office(Notice::Dismiss(member, done)).await;
    if tokio::time::timeout(FAREWELL, wait).await.is_err() {
        tracing::warn!("the process of {member} has not ended in time");
    }
    Ok(())
}
