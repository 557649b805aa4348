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
use std::collections::BTreeMap;
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
    let members: Vec<MemberSpec> = if hosts.len() == saved.members.len() {
        let again =
            |(member, host): (&MemberSpec, &Option<_>)| MemberSpec { host: host.clone(), ..member.clone() };
        saved.members.iter().zip(hosts).map(again).collect()
    } else {
        let anew = |(host, (cpus, memory)): (&Option<_>, (u64, u64))| MemberSpec {
            host: host.clone(),
            cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
            memory,
            budget: budget(saved, memory).filter(|_| hosts.len() > 1),
        };
        hosts.iter().zip(cpus.into_iter().zip(memory)).map(anew).collect()
    };
    // A device whose member is no more moves to the first.
    let place = |member: u16| if usize::from(member) < hosts.len() { member } else { 0 };
    let mut spec = VmSpec {
        name: wish.name.clone(),
        members,
        secret_file: wish.secret_file.clone(),
        start_timeout: wish.start_timeout,
        rng: saved.rng.map(place),
        console: saved.console.map(place),
        ..saved.clone()
    };
    spec.disks.iter_mut().for_each(|disk| disk.member = place(disk.member));
    Ok(spec)
}

/// Where all members had one, the budget that stands to this share of the memory as they all did to all of it.
fn budget(saved: &VmSpec, share: u64) -> Option<u64> {
    let all: u64 = saved.members.iter().map(|m| m.budget).sum::<Option<u64>>()?;
    let part = u128::from(all) * u128::from(share) / u128::from(saved.memory.max(1));
    u64::try_from(part).ok()?.checked_next_multiple_of(plan::GRAIN)
}

/// Whether the members' hosts have room for the pages of the checkpoint that will live there. `hosts` has the name and
/// the memory and swap space of each member's host, bytes.
///
/// # Errors
/// [`End::HostRefused`]: one that has less.
pub fn check_memory(
    runs: &[(u64, u32)],
    topology: &Topology,
    spec: &VmSpec,
    hosts: &[(String, u64)],
) -> Result<(), End> {
    let mut needs: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for (member, (host, memory)) in (0u16..).zip(hosts) {
        let homes = topology.memory.iter().filter(|range| range.home == MemberId(member));
        let pages: u64 = homes.map(|range| overlap(runs, range.start, range.start + range.len)).sum();
        let budget = spec.members.get(usize::from(member)).and_then(|m| m.budget);
        let need = needs.entry(host).or_insert((0, *memory));
        need.0 += pages.min(budget.unwrap_or(u64::MAX));
    }
    for (host, (need, memory)) in needs {
        if need > memory {
            return Err(End::HostRefused {
                host: host.into(),
                reason: format!(
                    "{} MiB of the checkpoint's pages would live there, and it has {} MiB of memory: restore it on more \
                     hosts, or on larger ones (--on)",
                    need >> 20,
                    memory >> 20
                ),
            });
        }
    }
    Ok(())
}

/// Bytes of the runs within an address range.
fn overlap(runs: &[(u64, u32)], start: u64, end: u64) -> u64 {
    let part = |(gpa, pages): &(u64, u32)| {
        let run_end = gpa.saturating_add(u64::from(*pages) << 12);
        run_end.min(end).saturating_sub((*gpa).max(start))
    };
    runs.iter().map(part).sum()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::coordinator::tests::spec;
    use crate::topology::MemberDesc;
    use dsm::addr::{Epoch, HomeRange};

    const MIB: u64 = 1 << 20;

    #[test]
    fn members_keep_their_shares_and_budgets() {
        let mut saved = spec(2);
        (saved.members[0].memory, saved.members[1].memory) = (48 * MIB, 16 * MIB);
        let wish = VmSpec { name: "other".into(), ..spec(2) };
        let budgets = |saved: &VmSpec, members: usize| {
            let spec = respecify(saved, &wish, &vec![None; members]).unwrap();
            assert_eq!(spec.members.iter().map(|m| m.memory).sum::<u64>(), saved.memory);
            spec.members.iter().map(|m| m.budget.map(|b| b / MIB)).collect::<Vec<_>>()
        };
        assert_eq!(budgets(&saved, 2), [None, None]);
        saved.members[0].budget = Some(56 * MIB);
        assert_eq!(budgets(&saved, 2), [Some(56), None]);
        // Who had none had all it wanted.
        assert_eq!(budgets(&saved, 4), [None; 4]);
        saved.members[1].budget = Some(40 * MIB);
        assert_eq!(budgets(&saved, 2), [Some(56), Some(40)]);
        assert_eq!(respecify(&saved, &wish, &[None, None]).unwrap().members[0].memory, 48 * MIB);
        // Half as much again as the share, as before.
        assert_eq!(budgets(&saved, 4), [Some(24); 4]);
        assert_eq!(budgets(&saved, 1), [None]);
        assert!(respecify(&saved, &wish, &vec![None; 5]).unwrap_err().to_string().contains("4 vCPUs"));
    }

    #[test]
    fn a_host_that_is_too_small_is_named() {
        let addr = "127.0.0.1:1".parse().unwrap();
        let member = |id| MemberDesc { id: MemberId(id), host: String::new(), addr };
        let topology = Topology {
            epoch: Epoch(1),
            members: (0..2).map(member).collect(),
            vcpus: Vec::new(),
            memory: (0..2)
                .map(|n| HomeRange { start: u64::from(n) * 32 * MIB, len: 32 * MIB, home: MemberId(n) })
                .collect(),
            distances: Vec::new(),
        };
        // 24 MiB of member 0, 8 MiB of member 1.
        let runs = [(8 * MIB, 8192)];
        let mut spec = spec(2);
        let check = |spec: &VmSpec, a: &str, b: &str, memory: [u64; 2]| {
            let hosts = [(a.to_string(), memory[0] * MIB), (b.to_string(), memory[1] * MIB)];
            check_memory(&runs, &topology, spec, &hosts).map_err(|e| e.to_string())
        };
        assert_eq!(check(&spec, "a", "b", [24, 8]), Ok(()));
        assert!(check(&spec, "a", "b", [23, 8]).unwrap_err().contains("a can't be a member: 24 MiB"));
        assert!(check(&spec, "a", "b", [24, 7]).unwrap_err().contains("it has 7 MiB"));
        assert!(check(&spec, "a", "a", [31, 31]).unwrap_err().contains("32 MiB"));
        spec.members[0].budget = Some(16 * MIB);
        assert_eq!(check(&spec, "a", "b", [23, 8]), Ok(()));
    }
}
