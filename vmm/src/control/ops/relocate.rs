//! The whole VM goes to other hosts while the guest runs: members are added there, vCPUs and homes go to them, and the
//! members that are not wanted any more are drained.
//!
//! What stays is the coordinator: its process goes on where the VM was launched, without anything of the guest.

use super::drain::{step, wanted};
use super::table::{self, Roster};
use super::{OpError, Turn, add, devices, drain, moves, pause};
use crate::config::HostPort;
use dsm::addr::MemberId;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// How a migration went.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RelocateReport {
    /// Members that were added.
    pub added: Vec<add::AddReport>,
    /// vCPUs that moved before others left, and where to.
    pub vcpus: Vec<(u32, u16)>,
    /// Devices that went to other members, and where to.
    #[serde(default)]
    pub devices: Vec<(String, u16)>,
    /// Members that left.
    pub drained: Vec<drain::DrainReport>,
    /// The coordinator's host is not among those named: its process stays there, and has nothing of the guest.
    pub stays: bool,
    /// All of it, milliseconds.
    pub total_ms: f64,
}

/// Brings the VM to these hosts; `None` is the coordinator's own. Hosts that have a member keep it.
///
/// # Errors
/// What failed. Each step is done or undone as a whole: what was done before stays, and the text says what that is.
pub async fn relocate(
    turn: &Turn,
    hosts: &[Option<HostPort>],
    limit: Duration,
) -> Result<RelocateReport, OpError> {
    let start = Instant::now();
    let mut report = RelocateReport::default();
    match steps(turn, hosts, limit, &mut report).await {
        Ok(()) => {
            report.total_ms = start.elapsed().as_secs_f64() * 1e3;
            Ok(report)
        }
        Err(OpError::Refused(why)) if report.added.is_empty() => Err(OpError::Refused(why)),
        Err(OpError::NotFound(why)) if report.added.is_empty() => Err(OpError::NotFound(why)),
        Err(e) => {
            let names = |ids: Vec<u16>| ids.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
            let mut text = e.to_string();
            if !report.added.is_empty() {
                text += &format!("; added: {}", names(report.added.iter().map(|a| a.member).collect()));
            }
            if !report.vcpus.is_empty() {
                text += &format!("; {} vCPUs have moved", report.vcpus.len());
            }
            if !report.devices.is_empty() {
                let names: Vec<_> = report.devices.iter().map(|(name, _)| name.as_str()).collect();
                text += &format!("; {} have gone elsewhere", names.join(", "));
            }
            if !report.drained.is_empty() {
                text += &format!("; left: {}", names(report.drained.iter().map(|d| d.member).collect()));
            }
            Err(OpError::Failed(text))
        }
    }
}

/// The coordinator's host has two names: this one is `None`.
fn name(roster: &Roster, host: &Option<HostPort>) -> Option<HostPort> {
    host.clone().filter(|host| Some(host) != roster.home.as_ref())
}

/// Which of the members stay, and which hosts need one.
fn plan(roster: &Roster, hosts: &[Option<HostPort>]) -> (Vec<MemberId>, Vec<Option<HostPort>>) {
    let name = |host: &Option<HostPort>| name(roster, host);
    let (mut stay, mut missing) = (Vec::new(), Vec::new());
    for host in hosts.iter().map(name) {
        match roster.hosts.iter().find(|(id, at)| name(at) == host && !stay.contains(id)) {
            Some((id, _)) => stay.push(*id),
            None => missing.push(host),
        }
    }
    (stay, missing)
}

async fn steps(
    turn: &Turn,
    hosts: &[Option<HostPort>],
    limit: Duration,
    report: &mut RelocateReport,
) -> Result<(), OpError> {
    let ending = || OpError::Refused("the VM is still starting, or is ending".into());
    if hosts.is_empty() {
        return Err(OpError::NotFound("no host is named".into()));
    }
    if pause::is_paused(turn) {
        return Err(OpError::Refused("the VM is paused; resume it first".into()));
    }
    let ops = turn.shared().ops();
    let before = ops.roster().ok_or_else(ending)?;
    let (mut stay, missing) = plan(&before, hosts);
    report.stays = !hosts.iter().any(|host| name(&before, host).is_none());
    let unwanted: Vec<MemberId> =
        before.table.members.iter().copied().filter(|member| !stay.contains(member)).collect();
    for host in &missing {
        let added = add::add_member(turn, host.as_ref()).await?;
        stay.push(MemberId(added.member));
        report.added.push(added);
    }
    if unwanted.is_empty() {
        return Ok(());
    }
    ops.begin_progress("the migration".into());
    let moved = clear(turn, &stay, &unwanted, limit, report).await;
    ops.end_progress();
    moved?;
    for member in unwanted {
        report.drained.push(drain::drain(turn, member.0, Some(&stay), limit).await?);
    }
    Ok(())
}

/// vCPUs and homes go to those that stay.
async fn clear(
    turn: &Turn,
    stay: &[MemberId],
    unwanted: &[MemberId],
    limit: Duration,
    report: &mut RelocateReport,
) -> Result<(), OpError> {
    let roster = turn.shared().ops().roster().ok_or_else(|| OpError::Refused("the VM is ending".into()))?;
    step(turn, "who can have the devices");
    let mut goal = roster.clone();
    for member in unwanted {
        goal.devices = devices::arrange(turn, &goal, *member, stay).await?;
    }
    step(turn, "vCPUs move");
    let places = turn.shared().info().vcpus;
    let mut load: Vec<(usize, u16)> =
        stay.iter().map(|m| (places.iter().filter(|place| **place == m.0).count(), m.0)).collect();
    for (vcpu, _) in (0u32..).zip(&places).filter(|(_, place)| unwanted.contains(&MemberId(**place))) {
        wanted(turn)?;
        let Some((count, to)) = load.iter_mut().min() else { continue };
        *count += 1;
        moves::migrate(turn, &[vcpu], *to, limit).await?;
        report.vcpus.push((vcpu, *to));
    }
    wanted(turn)?;
    step(turn, "homes and devices move");
    let next = table::Next { memory: roster.without_homes_at(unwanted), ..goal.as_next() };
    if next != roster.as_next() {
        let gone = devices::report(&roster.devices, &next.devices);
        table::change(turn, next).await?;
        report.devices = gone;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use dsm::addr::Epoch;
    use dsm::node::Table;

    #[test]
    fn hosts_that_have_a_member_keep_it() {
        let host = |name: &str| Some(HostPort { host: name.into(), port: 7 });
        let hosts = vec![(MemberId(0), host("a")), (MemberId(1), host("b")), (MemberId(3), None)];
        let members = hosts.iter().map(|(id, _)| *id).collect();
        let table = Table { epoch: Epoch(1), memory: Vec::new(), members };
        let (devices, home, leader) = (Vec::new(), host("a"), MemberId(0));
        let roster = Roster { table, devices, hosts, home, leader };
        let (stay, missing) = plan(&roster, &[host("b"), host("c"), None, host("b")]);
        assert_eq!(stay, [MemberId(1), MemberId(0)]);
        assert_eq!(missing, [host("c"), host("b")]);
        // `a` is the coordinator's host.
        let (stay, missing) = plan(&roster, &[None, host("a"), host("a")]);
        assert_eq!(stay, [MemberId(0), MemberId(3)]);
        assert_eq!(missing, [None]);
    }
}
