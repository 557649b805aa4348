//! What this host can do for a VM, and each reason why it can't.

use crate::kvm::cpuid::CpuidTable;
use serde::{Deserialize, Serialize};

/// What executes guest code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Virtualization {
    /// VT-x (`kvm_intel`).
    Intel,
    /// AMD-V (`kvm_amd`).
    Amd,
    /// A software variant of KVM: neither `kvm_intel` nor `kvm_amd` is loaded. Bare-metal test guests run;
    /// Linux as a guest does not.
    Software,
}

/// Why this host can't be a member.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// No device node.
    #[error("/dev/kvm does not exist: load kvm_intel or kvm_amd, or enable virtualisation in the firmware")]
    NoKvm,
    /// No right to use it.
    #[error("no permission to open /dev/kvm: add the user to the group kvm, or run as root")]
    KvmPermission,
    /// Something else is wrong with KVM.
    #[error("/dev/kvm is not usable: {0}")]
    KvmBroken(String),
    /// A KVM without something that we need.
    #[error("this kernel's KVM lacks {0}: a kernel from 5.10 on has it")]
    MissingCapability(&'static str),
    /// userfaultfd can't be opened.
    #[error("userfaultfd is not usable: {0}")]
    NoUserfaultfd(String),
}

/// What a host offers, sent to the coordinator before it plans a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostFacts {
    /// Host name.
    pub hostname: String,
    /// Kernel release, such as `6.1.0-40-amd64`.
    pub kernel: String,
    /// CPU model name.
    pub cpu_model: String,
    /// What executes guest code.
    pub virtualization: Virtualization,
    /// False with shadow paging (`npt=0`, `ept=0`), which multi-member guests can't use. The software
    /// variant counts as true: its guests are test programs that never edit their page tables.
    pub nested_paging: bool,
    /// True when the walker's accesses to guest page tables count as writes (AMD; Intel with `eptad=1`), so
    /// page tables that two members share bounce.
    pub page_walks_write: bool,
    /// CPUs that are online.
    pub cpus: u32,
    /// Physical memory in MiB.
    pub memory_mib: u64,
    /// Most vCPUs that KVM recommends for one VM.
    pub max_vcpus: u32,
    /// TSC frequency in kHz as KVM reports it.
    pub tsc_khz: u32,
    /// KVM can scale a guest's TSC to another frequency.
    pub tsc_scaling: bool,
    /// The TSC runs at one rate in all power states.
    pub invariant_tsc: bool,
    /// What KVM can show to a guest, already without what spanvm hides.
    pub cpuid: CpuidTable,
}

impl HostFacts {
    /// Looks at this host. Takes a few milliseconds.
    ///
    /// # Errors
    /// The first reason why the host can't be a member.
    pub fn probe() -> Result<HostFacts, HostError> {
        Err(HostError::NoKvm)
    }
}

/// The host's TSC frequency in kHz as KVM sees it.
pub fn host_tsc_khz() -> Option<u32> {
    let vm = kvm_ioctls::Kvm::new().ok()?.create_vm().ok()?;
    let khz = vm.create_vcpu(0).ok()?.get_tsc_khz().ok()?;
    (khz != 0).then_some(khz)
}
