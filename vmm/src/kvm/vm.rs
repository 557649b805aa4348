//! A VM without the in-kernel interrupt controllers.

use super::msr::FILTERED;
use kvm_bindings::{
    KVM_CAP_TSC_CONTROL, KVM_CAP_X86_DISABLE_EXITS, KVM_CAP_X86_USER_SPACE_MSR,
    KVM_MSR_EXIT_REASON_VALID_MASK, KVM_X86_DISABLE_EXITS_MWAIT, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};
use std::sync::Arc;

/// Where Intel's KVM keeps its own task state segment (3 pages) and page table (1 page), below the BIOS hole.
const IDENTITY_MAP_ADDR: u64 = 0xFFFB_C000;
const TSS_ADDR: usize = 0xFFFB_D000;

/// An ioctl failed, or a vCPU did.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// A KVM operation and its errno.
    #[error("KVM: {what}: {source}")]
    Ioctl {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// More CPUID leaves than KVM takes.
    #[error("{0} CPUID leaves are more than KVM takes")]
    TooManyLeaves(usize),
    /// A register of the vCPU can't be set.
    #[error("KVM refused MSR {msr:#x} = {value:#x}")]
    Msr {
        /// Its number.
        msr: u32,
        /// The value.
        value: u64,
    },
}

pub(super) fn failed(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |e| KvmError::Ioctl { what, source: std::io::Error::from_raw_os_error(e.errno()) }
}

/// A VM's descriptor.
#[derive(Debug)]
pub struct Vm {
    fd: VmFd,
    tsc_control: bool,
    msrs: Arc<[u32]>,
}

impl Vm {
    /// Makes a VM: no memory, no vCPUs. Accesses to x2APIC and filtered MSRs come to user space.
    ///
    /// # Errors
    /// /dev/kvm can't be used, or KVM is too old.
    pub fn new() -> Result<Vm, KvmError> {
        let kvm = Kvm::new().map_err(failed("open /dev/kvm"))?;
        let fd = kvm.create_vm().map_err(failed("create a VM"))?;
        fd.set_identity_map_address(IDENTITY_MAP_ADDR).map_err(failed("set the identity map address"))?;
        fd.set_tss_address(TSS_ADDR).map_err(failed("set the TSS address"))?;
        enable(&fd, KVM_CAP_X86_USER_SPACE_MSR, u64::from(KVM_MSR_EXIT_REASON_VALID_MASK))
            .map_err(failed("enable KVM_CAP_X86_USER_SPACE_MSR (Linux 5.10)"))?;
        let ranges = FILTERED.map(|msr| MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base: msr,
            msr_count: 1,
            bitmap: &[0],
        });
        fd.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges).map_err(failed("set the MSR filter"))?;
        keep_deadline_exits(&fd);
        let tsc_control = kvm.check_extension_int(kvm_ioctls::Cap::TscControl) > 0;
        debug_assert_eq!(kvm_ioctls::Cap::TscControl as u32, KVM_CAP_TSC_CONTROL);
        let msrs = migration::vcpu::msr_numbers(&kvm)
            .map_err(|e| KvmError::Ioctl { what: "list MSRs", source: std::io::Error::other(e) })?;
        Ok(Vm { fd, tsc_control, msrs: msrs.into() })
    }

    /// KVM can scale a guest's TSC.
    pub fn has_tsc_scaling(&self) -> bool {
        self.tsc_control
    }

    /// Puts host memory at a guest-physical address.
    ///
    /// # Errors
    /// Overlaps, alignment, or too many slots.
    ///
    /// # Safety
    /// `hva..hva + len` stays mapped, and nothing but guest memory is in it, while any vCPU of the VM exists.
    pub unsafe fn map(&self, slot: u32, gpa: u64, len: u64, hva: *mut u8) -> Result<(), KvmError> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: gpa,
            memory_size: len,
            userspace_addr: hva.addr() as u64,
        };
        // SAFETY: the caller vouches for the range.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(failed("map guest memory"))
    }

    /// A vCPU that nothing has been set up for: for benchmarks.
    ///
    /// # Errors
    /// KVM refused it.
    pub fn bare_vcpu(&self, id: u64) -> Result<kvm_ioctls::VcpuFd, KvmError> {
        self.fd.create_vcpu(id).map_err(failed("create a vCPU"))
    }

    pub(super) fn msrs(&self) -> Arc<[u32]> {
        self.msrs.clone()
    }

    pub(super) fn fd(&self) -> &VmFd {
        &self.fd
    }
}

fn enable(fd: &VmFd, cap: u32, argument: u64) -> Result<(), kvm_ioctls::Error> {
    let mut request = kvm_enable_cap { cap, ..Default::default() };
    request.args[0] = argument;
    fd.enable_cap(&request)
}

/// kvm_intel of Linux 5.8 to 6.16 swallows writes to IA32_TSC_DEADLINE on a fast path, before the MSR filter
/// and without looking whether there is an in-kernel APIC, if it could use the preemption timer. It takes
/// itself to be unable to when MWAIT does not exit; our guests don't see MWAIT, so that costs nothing.
/// A host where this fails must not show the TSC-deadline timer, see [`shows_tsc_deadline`].
fn keep_deadline_exits(fd: &VmFd) {
    if can_disable_mwait_exits(fd.check_extension_raw(KVM_CAP_X86_DISABLE_EXITS.into())) {
        if let Err(e) = enable(fd, KVM_CAP_X86_DISABLE_EXITS, u64::from(KVM_X86_DISABLE_EXITS_MWAIT)) {
            tracing::debug!("KVM_CAP_X86_DISABLE_EXITS: {e}");
        }
    }
}

fn can_disable_mwait_exits(extension: i32) -> bool {
    extension > 0 && extension.unsigned_abs() & KVM_X86_DISABLE_EXITS_MWAIT != 0
}

/// Do writes to IA32_TSC_DEADLINE reach us on this host? Always but on Intel without the remedy above.
pub fn shows_tsc_deadline(kvm: &Kvm, is_intel: bool) -> bool {
    !is_intel || can_disable_mwait_exits(kvm.check_extension_raw(KVM_CAP_X86_DISABLE_EXITS.into()))
}
