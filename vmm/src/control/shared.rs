//! What the coordinator's tasks and the HTTP API share: the picture of the VM, "stop" and "count now", and
//! the operations on it.

use super::end::End;
use super::events::Events;
use super::member_task::Slot;
use super::ops::Ops;
use super::view::{MemberInfo, VmInfo, VmStatus, VmSummary};
use crate::config::VmSpec;
use crate::devices::ConsoleHandle;
use crate::member::{MemberStats, VcpuStats};
use crate::topology::Topology;
use migration::placement::Policy;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};

/// Longest wait for fresh counters; then those at hand are shown with their age.
const FRESH: Duration = Duration::from_secs(2);

/// Shared state of one VM at its coordinator. The lock is held for copying only.
#[derive(Debug)]
pub struct Shared {
    picture: Mutex<Picture>,
    stops: mpsc::Sender<End>,
    counts: mpsc::Sender<oneshot::Sender<()>>,
    slot: OpaqueSlot,
    ops: Ops,
    events: Events,
}

struct OpaqueSlot(Slot);

impl std::fmt::Debug for OpaqueSlot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Slot")
    }
}

#[derive(Debug)]
struct Picture {
    info: VmInfo,
    running_since: Option<Instant>,
    /// Epoch of the topology at the start.
    first_epoch: u64,
    counted: Vec<Option<Instant>>,
    /// A member is lost, and the VM stays paused: with this it ends when it makes way.
    lost: Option<End>,
}

impl Shared {
    /// A VM that is about to start.
    pub fn new(
        spec: &VmSpec,
        host: &str,
        slot: Slot,
        stops: mpsc::Sender<End>,
        counts: mpsc::Sender<oneshot::Sender<()>>,
    ) -> Shared {
        let mut vcpu = 0u32..;
        let members: Vec<_> = (0u16..)
            .zip(&spec.members)
            .map(|(id, member)| MemberInfo {
                id,
                host: member.host.as_ref().map_or_else(|| host.to_string(), ToString::to_string),
                pid: if id == 0 { std::process::id() } else { 0 },
                addr: None,
                vcpus: vcpu.by_ref().take(usize::try_from(member.cpus).unwrap_or(0)).collect(),
                memory_home: member.memory,
                memory_held: 0,
                memory_budget: None,
                ipis_local: 0,
                ipis_remote: 0,
                exits: 0,
                faults: Default::default(),
                age_s: None,
                stats: MemberStats::default(),
            })
            .collect();
        let info = VmInfo {
            name: spec.name.clone(),
            status: VmStatus::Starting,
            reason: None,
            cpus: spec.cpus,
            memory: spec.memory,
            epoch: 0,
            uptime_s: 0.0,
            cmdline: spec.cmdline.clone(),
            kernel: spec.kernel.display().to_string(),
            vcpus: Vec::new(),
            policy: spec.policy,
            distances: Vec::new(),
            members,
        };
        let counted = vec![None; info.members.len()];
        let picture = Mutex::new(Picture { info, running_since: None, first_epoch: 0, counted, lost: None });
        Shared {
            picture,
            stops,
            counts,
            slot: OpaqueSlot(slot),
            ops: Ops::default(),
            events: Events::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Picture> {
        self.picture.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A member told who it is.
    pub fn member_ready(&self, id: u16, host: &str, pid: u32, addr: std::net::SocketAddr) {
        if let Some(member) = self.lock().info.members.get_mut(usize::from(id)) {
            (member.host, member.pid, member.addr) = (host.to_string(), pid, Some(addr));
        }
    }

    /// There is a (new) topology.
    pub fn placed(&self, topology: &Topology) {
        let mut picture = self.lock();
        picture.first_epoch = topology.epoch.0;
        let info = &mut picture.info;
        info.epoch = topology.epoch.0;
        info.vcpus = topology.vcpus.iter().map(|m| m.0).collect();
        info.distances = topology.distances.clone();
        for (member, desc) in info.members.iter_mut().zip(&topology.members) {
            member.vcpus = topology.vcpus_of(desc.id).collect();
            member.memory_home = topology.memory.iter().filter(|r| r.home == desc.id).map(|r| r.len).sum();
        }
    }

    /// True when a vCPU lives on a member.
    pub fn has_vcpu(&self, member: dsm::addr::MemberId, vcpu: u32) -> bool {
        let index = usize::try_from(vcpu).unwrap_or(usize::MAX);
        self.lock().info.vcpus.get(index) == Some(&member.0)
    }

    /// vCPUs live elsewhere since `epoch` (of the placement; the topology's is added).
    pub fn moved(&self, places: &[(u32, dsm::addr::MemberId, u64)], epoch: u64) {
        let mut picture = self.lock();
        let base = picture.first_epoch;
        let info = &mut picture.info;
        for (vcpu, member, _) in places {
            if let Some(place) = usize::try_from(*vcpu).ok().and_then(|i| info.vcpus.get_mut(i)) {
                *place = member.0;
            }
        }
        info.epoch = base + epoch;
        for member in &mut info.members {
            member.vcpus =
                (0u32..).zip(&info.vcpus).filter(|(_, m)| **m == member.id).map(|(id, _)| id).collect();
        }
    }

    /// Another table of members, homes and devices holds.
    pub fn tabled(&self, roster: &super::ops::table::Roster) {
        self.ops.set_roster(roster.clone());
        let table = &roster.table;
        let mut picture = self.lock();
        let grown = table.epoch.0.saturating_sub(picture.first_epoch);
        picture.first_epoch = table.epoch.0;
        let info = &mut picture.info;
        info.epoch += grown;
        for member in &mut info.members {
            member.memory_home = table.memory.iter().filter(|r| r.home.0 == member.id).map(|r| r.len).sum();
        }
    }

    /// There is one member more.
    pub fn joined(&self, member: MemberInfo) {
        let mut picture = self.lock();
        let at = picture.info.members.partition_point(|m| m.id < member.id);
        picture.info.members.insert(at, member);
        picture.counted.insert(at, None);
    }

    /// A member has left.
    pub fn left(&self, member: dsm::addr::MemberId) {
        let mut picture = self.lock();
        if let Some(at) = picture.info.members.iter().position(|m| m.id == member.0) {
            picture.info.members.remove(at);
            picture.counted.remove(at);
        }
        drop(picture);
        self.ops.placement().left(member.0);
    }

    /// The guest runs. A VM that is ending, or paused for good, by then is no longer starting.
    pub fn running(&self) {
        let mut picture = self.lock();
        if picture.info.status != VmStatus::Starting {
            return;
        }
        picture.info.status = VmStatus::Running;
        picture.running_since = Some(Instant::now());
        drop(picture);
        self.events.note("state", "the guest runs", &());
    }

    /// What happened to the VM.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// This policy decides where vCPUs live.
    pub fn set_policy(&self, policy: Policy) {
        self.lock().info.policy = policy;
    }

    /// What is done to the running VM as a whole.
    pub fn ops(&self) -> &Ops {
        &self.ops
    }

    /// The VM is paused, for this reason, or (`None`) no longer.
    pub fn paused(&self, reason: Option<String>) {
        let mut picture = self.lock();
        let is_lost = picture.lost.is_some();
        let info = &mut picture.info;
        if matches!(info.status, VmStatus::Running | VmStatus::Paused) && !is_lost {
            info.status = if reason.is_some() { VmStatus::Paused } else { VmStatus::Running };
            info.reason = reason;
        }
    }

    /// A member is lost: the VM is paused for good.
    pub fn lost(&self, end: End) {
        let mut picture = self.lock();
        picture.info.status = VmStatus::Paused;
        picture.info.reason = Some(end.to_string());
        let text = end.to_string();
        picture.lost = Some(end);
        drop(picture);
        self.events.note("state", format!("paused for good: {text}"), &());
    }

    /// If a member is lost: which, why, and what can be done.
    pub fn loss(&self) -> Option<String> {
        self.lock().lost.as_ref().map(ToString::to_string)
    }

    /// A VM that has lost a member ends, for one that takes its place. False for all others.
    pub fn make_way(&self) -> bool {
        let Some(end) = self.lock().lost.clone() else { return false };
        self.ending(&end);
        self.stop(end);
        true
    }

    /// The VM is being ended.
    pub fn ending(&self, end: &End) {
        let mut picture = self.lock();
        picture.info.status = VmStatus::Ending;
        picture.info.reason = Some(end.to_string());
        drop(picture);
        self.events.note("state", format!("ending: {end}"), &());
    }

    /// A member's counters.
    pub fn counted(&self, id: u16, stats: MemberStats) {
        let mut picture = self.lock();
        let Some(at) = picture.info.members.iter().position(|m| m.id == id) else { return };
        if let Some(member) = picture.info.members.get_mut(at) {
            member.count(stats);
        }
        if let Some(when) = picture.counted.get_mut(at) {
            *when = Some(Instant::now());
        }
    }

    /// How long ago the guest started to run.
    pub fn uptime(&self) -> Option<Duration> {
        self.lock().running_since.map(|since| since.elapsed())
    }

    /// The picture as it is.
    pub fn info(&self) -> VmInfo {
        let picture = self.lock();
        let mut info = picture.info.clone();
        info.uptime_s = picture.running_since.map_or(0.0, |since| since.elapsed().as_secs_f64());
        for (member, when) in info.members.iter_mut().zip(&picture.counted) {
            member.age_s = when.map(|when| when.elapsed().as_secs_f64());
        }
        info
    }

    /// The picture with counters as fresh as the members can give them within two seconds.
    pub async fn fresh_info(&self) -> VmInfo {
        let (done, wait) = oneshot::channel();
        let runs =
            matches!(self.lock().info.status, VmStatus::Running | VmStatus::Paused) && self.loss().is_none();
        if runs && self.counts.try_send(done).is_ok() {
            let _ = tokio::time::timeout(FRESH, wait).await;
        }
        self.info()
    }

    /// One line of it.
    pub fn summary(&self) -> VmSummary {
        let info = self.info();
        VmSummary {
            name: info.name,
            status: info.status,
            reason: info.reason,
            cpus: info.cpus,
            memory: info.memory,
            hosts: info.members.into_iter().map(|m| m.host).collect(),
            pid: std::process::id(),
            uptime_s: info.uptime_s,
        }
    }

    /// The serial console, once the first member has one.
    pub fn console(&self) -> Option<ConsoleHandle> {
        self.slot.0.get()?.console()
    }

    /// Asks for the end of the VM; the first one to ask is heard.
    pub fn stop(&self, end: End) {
        let _ = self.stops.try_send(end);
    }
}

/// Sum of a counter over vCPUs.
pub fn total(stats: &MemberStats, field: fn(&VcpuStats) -> u64) -> u64 {
    stats.vcpus.iter().map(field).sum()
}
