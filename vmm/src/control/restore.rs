//! What a checkpoint has of a VM besides its memory, and how it becomes a VM again, on whatever members.

use super::end::End;
use super::fit::Common;
use crate::config::spec::{HostPort, MemberSpec};
use crate::config::{VmSpec, plan, shares};
use crate::kvm::cpuid::CpuidTable;
use crate::member::MemberState;
use crate::topology::Topology;
use dsm::addr::MemberId;
use migration::checkpoint::{self, Id, Image, Manifest};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The `machine` of a manifest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// The VM as it was running.
    pub spec: VmSpec,
    /// What CPUID shows.
    pub cpuid: CpuidTable,
    /// TSC frequency that the guest sees, kHz.
    pub tsc_khz: u32,
    /// The guest's TSC at the cut; `None` where it could not be stopped.
    pub tsc: Option<u64>,
    /// State of each member.
    pub members: Vec<MemberState>,
}

/// What the user says about a restore; all else comes from the checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreOrder {
    /// Folder of checkpoints, or of one of them, on the coordinator's host; `None` for the newest that is known there of a
    /// VM of this name that lost a member.
    pub dir: Option<PathBuf>,
    /// Hosts of the members; `None` for a member that the launcher starts itself.
    pub hosts: Vec<Option<HostPort>>,
}

/// An opened checkpoint.
#[derive(Debug)]
pub struct Opened {
    /// As it was asked for: a folder of checkpoints, or of one of them.
    pub dir: PathBuf,
    /// Its folder.
    pub folder: PathBuf,
    /// What it says.
    pub manifest: Manifest<Machine>,
    /// Runs of pages with contents.
    pub runs: Vec<(u64, u32)>,
}

/// Finds and opens the newest checkpoint. Reads all indexes, but no page.
///
/// # Errors
/// [`End::BadInput`], naming the file.
pub fn open(dir: &Path) -> Result<Opened, End> {
    let input = |e: checkpoint::CheckpointError| End::BadInput(e.to_string());
    let folder = checkpoint::newest(dir).map_err(input)?;
    let (manifest, image) = Image::open(&folder).map_err(input)?;
    Ok(Opened { dir: dir.to_path_buf(), folder, manifest, runs: image.runs() })
}

/// The VM of a checkpoint on these members, under the name, and with the secret and patience, of `wish`.
///
/// # Errors
/// More members than vCPUs, or than shares of memory.
pub fn respecify(saved: &VmSpec, wish: &VmSpec, hosts: &[Option<HostPort>]) -> Result<VmSpec, End> {
    let bad = |what: String| End::BadInput(what);
    let open = vec![None; hosts.len()];
    let cpus = shares::split(u64::from(saved.cpus), 1, &open).map_err(|_| {
        bad(format!("the checkpoint has {} vCPUs: too few for {} members", saved.cpus, hosts.len()))
    })?;
    let memory = shares::split(saved.memory, plan::GRAIN, &open)
        .map_err(|_| bad(format!("the checkpoint has too little memory for {} members", hosts.len())))?;
    let members = hosts.iter().zip(cpus.into_iter().zip(memory)).map(|(host, (cpus, memory))| MemberSpec {
        host: host.clone(),
        cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
        memory,
        // Of other hosts, perhaps.
        budget: None,
    });
    // A device whose member is no more moves to the first.
    let place = |member: u16| if usize::from(member) < hosts.len() { member } else { 0 };
    let mut spec = VmSpec {
        name: wish.name.clone(),
        members: members.collect(),
        secret_file: wish.secret_file.clone(),
        start_timeout: wish.start_timeout,
        rng: saved.rng.map(place),
        console: saved.console.map(place),
        ..saved.clone()
    };
    spec.disks.iter_mut().for_each(|disk| disk.member = place(disk.member));
    Ok(spec)
}

/// Whether these hosts can go on with a guest that has seen that CPU.
///
/// # Errors
/// [`End::HostRefused`].
pub fn check_cpu(machine: &Machine, common: &Common, hosts: &str) -> Result<(), End> {
    if CpuidTable::intersect(&[machine.cpuid.clone(), common.cpuid.clone()]) == machine.cpuid {
        return Ok(());
    }
    Err(End::HostRefused {
        host: hosts.to_string(),
        reason: "the guest of the checkpoint has seen CPU features that are missing here: restore it on CPUs that \
                 have all that the first ones had"
            .into(),
    })
}

/// What each member becomes: its vCPUs by the new placement, the IOAPIC at member 0, all devices for everybody.
pub fn deal(machine: &Machine, topology: &Topology) -> Vec<MemberState> {
    let all = &machine.members;
    let devices: Vec<_> = all.iter().flat_map(|m| m.devices.clone()).collect();
    (0u16..)
        .map(MemberId)
        .take(topology.members.len())
        .map(|member| MemberState {
            vcpus: topology
                .vcpus_of(member)
                .filter_map(|id| all.iter().flat_map(|m| &m.vcpus).find(|v| v.id == id).cloned())
                .collect(),
            ioapic: all.iter().find_map(|m| m.ioapic.clone()).filter(|_| member == MemberId(0)),
            devices: devices.clone(),
        })
        .collect()
}

/// The guest that runs, and its last complete checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The guest.
    pub guest: Id,
    /// The checkpoint on which an incremental one may build: id, folder. `None` when changes are not noted.
    pub base: Option<(Id, PathBuf)>,
}

impl Default for Identity {
    fn default() -> Identity {
        Identity { guest: Id::random(), base: None }
    }
}
