//! Pausing the whole VM, and letting it go on.
//!
//! ```text
//! coordinator                         every member
//!   | Pause                              |
//!   |----------------------------------->|  vCPUs out of the guest, devices quiet
//!   |<-----------------------------------|  Paused(common clock)
//!   | Traffic, until nothing is under way between members
//!   |<---------------------------------->|
//!   |                 ... paused ...     |
//!   | Clock (whose clock all follow)     |
//!   |<---------------------------------->|
//!   | Resume(ticks that the guest does not see)
//!   |----------------------------------->|
//! ```
//!
//! A member that fails to pause, or does not answer, is named in the error, and all others go on at once.

use super::{OpError, Turn, odd};
use crate::control::crew::GRACE;
use crate::member::{MemberReply, MemberTask};
use dsm::addr::MemberId;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// Longest time that a pause may take unless the user says otherwise.
pub const LIMIT: Duration = Duration::from_secs(5);
/// Between two looks at the traffic.
const LOOK: Duration = Duration::from_millis(1);

/// What is known of pauses; the state of the guest's clock.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pauses {
    now: Option<Paused>,
    /// Ticks of all pauses so far, this one not.
    stopped: u64,
    /// The members were told to keep their pages where they are, and perhaps not all have heard that it is over.
    is_quiet: bool,
}

/// A VM that is paused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paused {
    /// The members' common clock when it stopped; `None` where the guest's time can't be stopped.
    clock: Option<u64>,
    /// What `Resume` says, once one has begun: a second try must say the same.
    resumes_with: Option<u64>,
}

/// How a pause went.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PauseReport {
    /// From the request until nothing moved, milliseconds.
    pub pause_ms: f64,
    /// The guest's clock stands still.
    pub time_stopped: bool,
}

/// Pauses the VM and says so in its status.
///
/// # Errors
/// It is paused already, or a member could not be paused; then the VM runs on.
pub async fn pause(turn: &Turn, by: &str, limit: Duration) -> Result<PauseReport, OpError> {
    if is_paused(turn) {
        return Err(OpError::Refused("the VM is paused already".into()));
    }
    let start = Instant::now();
    let time_stopped = quiesce(turn, limit).await?;
    turn.shared().paused(Some(format!("paused by {by}")));
    Ok(PauseReport { pause_ms: start.elapsed().as_secs_f64() * 1e3, time_stopped })
}

/// Lets a paused VM go on.
///
/// # Errors
/// It is not paused, or a member did not answer.
pub async fn resume(turn: &Turn, limit: Duration) -> Result<(), OpError> {
    if !is_paused(turn) {
        return Err(OpError::Refused("the VM is not paused".into()));
    }
    release(turn, limit).await?;
    turn.shared().paused(None);
    Ok(())
}

/// Is the VM paused right now?
pub fn is_paused(turn: &Turn) -> bool {
    turn.shared().ops().pauses().now.is_some()
}

/// Stops everything that can change the guest, for an operation that goes on with [`release`]: vCPUs, devices, messages
/// between members. Returns whether the guest's clock stands still.
///
/// # Errors
/// A member failed, and is named; the VM runs on.
pub async fn quiesce(turn: &Turn, limit: Duration) -> Result<bool, OpError> {
    let crew = turn.crew()?;
    let stopped = match stop(turn, limit).await {
        Ok(clock) => clock,
        Err(e) => {
            let stopped = turn.shared().ops().pauses().stopped;
            // Who does not answer now either is lost, which its silence will show.
            let gone = crew.ask_all(&MemberTask::Resume { stopped }, GRACE).await.err();
            if let Some(reason) = turn.shared().loss() {
                return Err(OpError::Failed(reason));
            }
            let note = gone.map_or(String::new(), |e| format!("; and to go on: {e}"));
            return Err(OpError::Failed(format!("{e}: the VM runs on{note}")));
        }
    };
    turn.shared().ops().pauses().now = Some(Paused { clock: stopped, resumes_with: None });
    Ok(stopped.is_some())
}

async fn stop(turn: &Turn, limit: Duration) -> Result<Option<u64>, OpError> {
    let crew = turn.crew()?;
    let end = Instant::now() + limit + GRACE;
    let mut clock = None;
    for reply in crew.ask_all(&MemberTask::Pause { limit }, limit + GRACE).await? {
        let MemberReply::Paused { clock: at } = reply else { return Err(odd(&reply)) };
        // The last one to stop has seen the latest time.
        clock = clock.max(at);
    }
    let mut carried_out = None;
    loop {
        let (mut sent, mut done) = (0u64, 0u64);
        for reply in crew.ask_all(&MemberTask::Traffic, GRACE).await? {
            let MemberReply::Traffic { sent: s, done: d } = reply else { return Err(odd(&reply)) };
            sent += s;
            done += d;
        }
        if carried_out == Some(sent) {
            return Ok(clock);
        }
        carried_out = Some(done);
        if Instant::now() > end {
            return Err(OpError::Failed(format!(
                "{} messages between members are still under way after {:.1} s",
                sent.saturating_sub(done),
                limit.as_secs_f32()
            )));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Lets the VM go on after [`quiesce`]. What failed can be tried again.
///
/// # Errors
/// A member did not answer, and is named; the others go on.
pub async fn release(turn: &Turn, limit: Duration) -> Result<(), OpError> {
    let crew = turn.crew()?;
    let ops = turn.shared().ops();
    let Pauses { now: Some(paused), stopped, is_quiet } = ops.pauses().clone() else { return Ok(()) };
    if is_quiet {
        free_memory(turn, limit).await?;
    }
    let total = match (paused.resumes_with, paused.clock) {
        (Some(total), _) => total,
        (None, None) => stopped,
        (None, Some(since)) => {
            let leader = ops.roster().map_or(MemberId(0), |roster| roster.leader);
            let reply = crew.ask(leader, MemberTask::Clock, limit).await?;
            let MemberReply::Clock(now) = reply else { return Err(odd(&reply)) };
            stopped.wrapping_add(now.saturating_sub(since))
        }
    };
    ops.pauses().now = Some(Paused { resumes_with: Some(total), ..paused });
    crew.ask_all(&MemberTask::Resume { stopped: total }, limit).await?;
    *ops.pauses() = Pauses { now: None, stopped: total, is_quiet: false };
    Ok(())
}

/// As [`release`], at the end of an operation: if a member does not go on, the VM is paused, and says so.
///
/// # Errors
/// A member did not answer, and is named.
pub async fn go_on(turn: &Turn, limit: Duration, operation: &str) -> Result<(), OpError> {
    let Err(e) = release(turn, limit).await else { return Ok(()) };
    if let Some(reason) = turn.shared().loss() {
        return Err(OpError::Failed(reason));
    }
    turn.shared().paused(Some(format!("after {operation} it did not go on: {e}")));
    Err(OpError::Failed(format!("{e}: the VM is paused, try `spanvm resume`")))
}

/// While the VM is paused: no page moves any more, until [`free_memory`] or [`release`].
///
/// # Errors
/// A member could not do it.
pub async fn quiet_memory(turn: &Turn, limit: Duration) -> Result<(), OpError> {
    turn.shared().ops().pauses().is_quiet = true;
    turn.crew()?.ask_all(&MemberTask::QuietMemory { limit }, limit + GRACE).await?;
    Ok(())
}

/// Ends [`quiet_memory`]. What failed can be tried again, and [`release`] does.
///
/// # Errors
/// A member did not answer, and is named.
pub async fn free_memory(turn: &Turn, limit: Duration) -> Result<(), OpError> {
    turn.crew()?.ask_all(&MemberTask::ReleaseMemory, limit).await?;
    turn.shared().ops().pauses().is_quiet = false;
    Ok(())
}

/// The guest's TSC where it stands still; `None` where it can't be stopped, or the VM runs.
pub fn guest_time(turn: &Turn) -> Option<u64> {
    let pauses = turn.shared().ops().pauses().clone();
    Some(pauses.now?.clock?.wrapping_sub(pauses.stopped))
}

/// A VM that was restored begins as a paused one whose clock stands at `tsc`.
pub fn begin_paused(ops: &super::Ops, tsc: Option<u64>) {
    let now = Some(Paused { clock: tsc, resumes_with: None });
    *ops.pauses() = Pauses { now, ..Pauses::default() };
}
