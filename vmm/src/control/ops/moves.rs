//! Moving vCPUs to another member; [`crate::member::travel`] draws the protocol.
//!
//! ```text
//!            refused: unknown, there already, paused, no CPU feature      (nothing has changed)
//!  asked ---+
//!            expected by the target --- departed ---+--- moved
//!                                                   +--- stayed: did not leave in time, or came back
//!                                                   +--- sent and not confirmed: the target has it, or died with it
//! ```

use super::{OpError, Turn, odd, pause};
use crate::control::crew::{GRACE, join_all};
use crate::member::travel::Departed;
use crate::member::{MemberReply, MemberTask};
use dsm::addr::MemberId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// One vCPU that moved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Moved {
    /// The vCPU.
    pub vcpu: u32,
    /// The member that it left.
    pub from: u16,
    /// The member where it lives now.
    pub to: u16,
    /// From its last instruction there to its first here, microseconds (of a vCPU in HLT: until it could have run).
    pub downtime_us: f64,
    /// Length of its image, bytes.
    pub state_bytes: u64,
}

/// How a move went.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MoveReport {
    /// The vCPUs.
    pub moves: Vec<Moved>,
    /// Number of the placement now.
    pub epoch: u64,
    /// From the request to the end, milliseconds.
    pub total_ms: f64,
}

/// Moves vCPUs to a member.
///
/// # Errors
/// Nothing has changed, or the text says which vCPU is where and why.
pub async fn migrate(turn: &Turn, vcpus: &[u32], to: u16, limit: Duration) -> Result<MoveReport, OpError> {
    let start = Instant::now();
    let crew = turn.crew()?;
    let to = MemberId(to);
    let sources = check(turn, vcpus, to)?;
    crew.ask(to, MemberTask::Expect { vcpus: vcpus.to_vec() }, limit + GRACE)
        .await
        .map_err(|e| OpError::Failed(format!("{e}; no vCPU was moved")))?;
    // One epoch for the move, one for a return.
    let epoch = turn.shared().ops().next_epochs(2);
    let asks = sources.iter().map(|(from, vcpus)| {
        let task = MemberTask::Depart { vcpus: vcpus.clone(), to, epoch, limit };
        async move { (*from, crew.ask(*from, task, limit + 2 * GRACE).await) }
    });
    let mut places = Vec::new();
    let mut report = MoveReport::default();
    let mut trouble = Vec::new();
    for (from, answer) in join_all(asks).await {
        let departed = match answer {
            Ok(MemberReply::Departed(departed)) => departed,
            Ok(reply) => return Err(odd(&reply)),
            Err(e) => {
                trouble.push(format!("{e}; if it does not answer soon, it is lost"));
                continue;
            }
        };
        for (vcpu, how) in departed {
            match how {
                Departed::Moved { bytes } => {
                    places.push((vcpu, to, epoch));
                    report.moves.push(Moved {
                        vcpu,
                        from: from.0,
                        to: to.0,
                        downtime_us: 0.0,
                        state_bytes: bytes,
                    });
                }
                Departed::Stayed(why) => {
                    places.push((vcpu, from, epoch + 1));
                    trouble.push(format!("vCPU {vcpu} stays on {}: {why}", crew.name(from)));
                }
                Departed::Unknown(why) => {
                    places.push((vcpu, to, epoch));
                    trouble.push(format!("vCPU {vcpu} may be on {}: {why}", crew.name(to)));
                }
            }
        }
    }
    turn.shared().moved(&places, epoch + 1);
    report.epoch = epoch + 1;
    // Who does not hear of it sends to the old place, from where messages are handed on: late, but not wrong.
    let news = crew.ask_all(&MemberTask::Placed { places }, GRACE).await;
    for reply in news.unwrap_or_default() {
        let MemberReply::Downtimes(times) = reply else { continue };
        for (vcpu, ns) in times {
            if let Some(moved) = report.moves.iter_mut().find(|m| m.vcpu == vcpu) {
                // Nanoseconds are far below 2^53.
                #[allow(clippy::cast_precision_loss)]
                let us = ns as f64 / 1e3;
                moved.downtime_us = us;
            }
        }
    }
    if !trouble.is_empty() {
        if !report.moves.is_empty() {
            let moved: Vec<_> = report.moves.iter().map(|m| m.vcpu.to_string()).collect();
            trouble.push(format!("moved: {}", moved.join(", ")));
        }
        return Err(OpError::Failed(trouble.join("; ")));
    }
    report.moves.sort_by_key(|m| m.vcpu);
    report.total_ms = start.elapsed().as_secs_f64() * 1e3;
    Ok(report)
}

/// What can be said before anything is done. Returns the vCPUs by the member on which they live.
fn check(turn: &Turn, vcpus: &[u32], to: MemberId) -> Result<BTreeMap<MemberId, Vec<u32>>, OpError> {
    let info = turn.shared().info();
    let not_found = |what: String| Err(OpError::NotFound(what));
    if vcpus.is_empty() {
        return not_found("no vCPU is named".into());
    }
    if !info.members.iter().any(|m| m.id == to.0) {
        let members: Vec<String> = info.members.iter().map(|m| m.id.to_string()).collect();
        return not_found(format!("there is no {to}; the members are {}", members.join(", ")));
    }
    let mut sources: BTreeMap<MemberId, Vec<u32>> = BTreeMap::new();
    for (n, vcpu) in vcpus.iter().enumerate() {
        let place = usize::try_from(*vcpu).ok().and_then(|i| info.vcpus.get(i));
        let Some(from) = place.copied().map(MemberId) else {
            return not_found(format!("there is no vCPU {vcpu}; the vCPUs are 0 to {}", info.cpus - 1));
        };
        if vcpus.iter().take(n).any(|other| other == vcpu) {
            return not_found(format!("vCPU {vcpu} is named twice"));
        }
        if from == to {
            return Err(OpError::Refused(format!("vCPU {vcpu} is on {to} already")));
        }
        sources.entry(from).or_default().push(*vcpu);
    }
    if pause::is_paused(turn) {
        return Err(OpError::Refused("the VM is paused; resume it first".into()));
    }
    Ok(sources)
}
