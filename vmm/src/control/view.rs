//! What people and tools see of a VM: the JSON of the API, and the rows of the tables.

use crate::member::MemberStats;
use dsm::stats::FaultCounts;
use migration::placement::Policy;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// Where a VM is in its life.
///
/// ```text
/// starting -> running <-> paused
///     \          |          |
///      +---------+----------+--> ending -> (gone)
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmStatus {
    /// Members come together.
    Starting,
    /// The guest runs.
    Running,
    /// The guest stands still; the reason says why.
    Paused,
    /// It is being ended; the reason says why.
    Ending,
}

impl std::fmt::Display for VmStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            VmStatus::Starting => "starting",
            VmStatus::Running => "running",
            VmStatus::Paused => "paused",
            VmStatus::Ending => "ending",
        })
    }
}

/// One line of `spanvm ps`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmSummary {
    /// Name.
    pub name: String,
    /// Where it is in its life.
    pub status: VmStatus,
    /// Why, when it is neither starting nor running.
    pub reason: Option<String>,
    /// vCPUs.
    pub cpus: u32,
    /// Guest memory, bytes.
    pub memory: u64,
    /// Names of the members' hosts.
    pub hosts: Vec<String>,
    /// Process of the coordinator.
    pub pid: u32,
    /// Seconds since the guest started to run.
    pub uptime_s: f64,
}

/// `GET /vm` and `spanvm info --json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmInfo {
    /// Name.
    pub name: String,
    /// Where it is in its life.
    pub status: VmStatus,
    /// Why, when it is neither starting nor running.
    pub reason: Option<String>,
    /// vCPUs.
    pub cpus: u32,
    /// Guest memory, bytes.
    pub memory: u64,
    /// Number of the topology; 0 before there is one.
    pub epoch: u64,
    /// Seconds since the guest started to run.
    pub uptime_s: f64,
    /// Kernel command line as given.
    pub cmdline: String,
    /// Path of the kernel on the launcher's host.
    pub kernel: String,
    /// Member of each vCPU, by vCPU id.
    pub vcpus: Vec<u16>,
    /// Who decides where they live.
    #[serde(default)]
    pub policy: Policy,
    /// SLIT distances between members.
    pub distances: Vec<Vec<u8>>,
    /// The members.
    pub members: Vec<MemberInfo>,
}

/// One member in [`VmInfo`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemberInfo {
    /// Its number.
    pub id: u16,
    /// Name of its host.
    pub host: String,
    /// Process id there; 0 until it is known.
    pub pid: u32,
    /// Where its peers connect.
    pub addr: Option<SocketAddr>,
    /// vCPUs that live there.
    pub vcpus: Vec<u32>,
    /// Guest memory whose home is there, bytes.
    pub memory_home: u64,
    /// Guest memory that it holds a copy of right now, bytes.
    pub memory_held: u64,
    /// Guest memory that it may hold, bytes, if there is a limit.
    #[serde(default)]
    pub memory_budget: Option<u64>,
    /// Inter-processor interrupts that its vCPUs sent to vCPUs of the same member.
    pub ipis_local: u64,
    /// Inter-processor interrupts that its vCPUs sent to other members.
    pub ipis_remote: u64,
    /// Returns of KVM_RUN of its vCPUs.
    pub exits: u64,
    /// Page faults by kind.
    pub faults: FaultCounts,
    /// Seconds since these counters were read; absent when the member has not reported yet.
    pub age_s: Option<f64>,
    /// All its counters.
    pub stats: MemberStats,
}

impl MemberInfo {
    /// A member of which nothing is counted yet, without vCPUs.
    pub fn new(id: u16, host: String, pid: u32, addr: SocketAddr, memory_home: u64) -> MemberInfo {
        MemberInfo {
            id,
            host,
            pid,
            addr: Some(addr),
            vcpus: Vec::new(),
            memory_home,
            memory_held: 0,
            memory_budget: None,
            ipis_local: 0,
            ipis_remote: 0,
            exits: 0,
            faults: FaultCounts::default(),
            age_s: None,
            stats: MemberStats::default(),
        }
    }

    /// Fills in what comes from a member's counters.
    pub fn count(&mut self, stats: MemberStats) {
        let sum = |field| super::shared::total(&stats, field);
        self.ipis_local = sum(|v| v.ipis_local);
        self.ipis_remote = sum(|v| v.ipis_remote);
        self.exits = sum(|v| v.exits);
        self.memory_held = stats.memory.resident_bytes;
        self.memory_budget = stats.memory.budget_bytes;
        self.faults = stats.memory.faults;
        self.stats = stats;
    }
}
