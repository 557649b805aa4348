//! What a member is to be: everything that [`crate::member::Member::join`] needs, sent by the coordinator.

use super::runtime::MemberError;
use crate::devices::DeviceSpec;
use crate::kvm::cpuid::CpuidTable;
use crate::topology::Topology;
use dsm::addr::{Epoch, MemberId};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Knobs of the page engine; `None` takes its default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageTuning {
    /// Longest time a page is kept after it was installed before an invalidation is honoured, microseconds.
    pub hold_us: Option<u64>,
    /// Number of userfaultfds, each with its thread, that guest memory is spread over.
    pub shards: Option<u16>,
    /// Whether its threads may look for what a quick peer says next instead of sleeping until it comes.
    #[serde(default)]
    pub busy_poll: Option<bool>,
    /// Run the page engine in a VM of one member, too: its checkpoints can then be incremental.
    #[serde(default)]
    pub always: bool,
    /// For so many seconds a connection to a peer that broke is made again; 0: it is the peer's end.
    #[serde(default)]
    pub reconnect_s: u64,
    /// Bytes of guest memory that this member keeps at most; `None` for no limit.
    #[serde(default)]
    pub budget: Option<u64>,
}

/// Where the guest comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Origin {
    /// A kernel is loaded.
    #[default]
    Boot,
    /// A checkpoint, in which the guest's TSC stood at this value; `None` where it can't be set.
    Checkpoint {
        /// Guest ticks.
        tsc: Option<u64>,
    },
}

/// How the VM stands that a member joins while the guest runs. The topology of its plan is that of the start (its number,
/// which names the mesh, and the placement, from which CPUID follows), but for the members and the homes, which are those of
/// now, with the one that joins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// Number of the table of members and homes that holds.
    pub table: Epoch,
    /// Where each vCPU lives.
    pub vcpus: Vec<MemberId>,
    /// Number of that placement.
    pub placement: u64,
    /// Whose clock the others follow.
    pub leader: MemberId,
}

/// One member's orders.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemberPlan {
    /// Name of the VM.
    pub vm: String,
    /// Which member of the topology this is.
    pub me: MemberId,
    /// All members, homes, vCPU placement, at one epoch.
    pub topology: Topology,
    /// Shared secret that peers must prove to have; `None` only while all are on loopback.
    pub secret: Option<Vec<u8>>,
    /// What CPUID shows before topology leaves are filled in per vCPU: the intersection over all members
    /// ([`CpuidTable::intersect`] of their [`crate::member::HostFacts::cpuid`]).
    pub cpuid: CpuidTable,
    /// TSC frequency that the guest sees, in kHz; the coordinator's.
    pub tsc_khz: u32,
    /// All devices of the VM, on whatever member; the same list in every member's plan.
    pub devices: Vec<DeviceSpec>,
    /// Page engine knobs.
    pub pages: PageTuning,
    /// Where the guest comes from.
    #[serde(default)]
    pub origin: Origin,
    /// `None` for those that start the VM.
    #[serde(default)]
    pub standing: Option<Standing>,
    /// Longest wait for any one answer of a peer, at start and while running.
    pub deadline: Duration,
}

impl MemberPlan {
    /// Whether it fits together.
    ///
    /// # Errors
    /// [`MemberError::Plan`].
    pub(super) fn check(&self) -> Result<(), MemberError> {
        let Topology { members, vcpus, memory, .. } = &self.topology;
        let bad = |text: String| Err(MemberError::Plan(text));
        if let Some(pair) = members.windows(2).find(|pair| matches!(pair, [a, b] if a.id >= b.id)) {
            return bad(format!("members are named twice, or out of order: {pair:?}"));
        }
        let exists = |m: &MemberId| members.iter().any(|desc| desc.id == *m);
        if !exists(&self.me) {
            return bad(format!("there is no {}", self.me));
        }
        let (first, lives) = match &self.standing {
            None => (vcpus.first(), vcpus),
            // vCPU 0 may have moved, and who lived where at the start may have left.
            Some(standing) if standing.vcpus.len() == vcpus.len() => (Some(&MemberId(0)), &standing.vcpus),
            Some(_) => (None, vcpus),
        };
        if first != Some(&MemberId(0)) {
            return bad("vCPU 0 must live on member 0".into());
        }
        if let Some(stray) = lives.iter().chain(memory.iter().map(|r| &r.home)).find(|m| !exists(m)) {
            return bad(format!("vCPUs or memory on {stray}, which does not exist"));
        }
        if self.cpuid.0.is_empty() {
            return bad("no CPUID".into());
        }
        if self.tsc_khz == 0 {
            return bad("no TSC frequency".into());
        }
        Ok(())
    }
}

/// What [`crate::member::Member::load`] puts into guest memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BootImages {
    /// bzImage, ELF vmlinux with a PVH note, or a plain ELF64 image.
    pub kernel: Vec<u8>,
    /// Initial RAM disk.
    pub initrd: Option<Vec<u8>>,
    /// Kernel command line as the user gave it.
    pub cmdline: String,
}
