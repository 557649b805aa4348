//! The state of a vCPU that is out of the guest, as KVM has it: what moves to another host or into a checkpoint.
//! About 2 KiB on the wire. The local APIC is not KVM's here; the caller adds it, and sets the TSC by
//! the clock of the VM rather than by a register.

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

/// IA32_TSC, IA32_TSC_ADJUST and IA32_TSC_DEADLINE: the VM's clock and the local APIC set these.
const TIME_MSRS: [u32; 3] = [0x10, 0x3B, 0x6E0];
/// IA32_APIC_BASE travels in the special registers.
const APIC_BASE_MSR: u32 = 0x1B;

/// MSRs of KVM itself, which our guests can't see: kvmclock (old numbers), everything at 4B564D00H, and what KVM has for
/// guests that know Hyper-V.
fn is_paravirtual(msr: u32) -> bool {
    matches!(msr, 0x11 | 0x12 | 0x4000_0000..=0x4000_FFFF | 0x4B56_4D00..=0x4B56_4DFF)
}

/// An ioctl failed.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A part of the state could not be read or written.
    #[error("vCPU state: {what}: {source}")]
    Ioctl {
        /// The part.
        what: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// A register that the source had can't be set here.
    #[error("vCPU state: this host's KVM refuses MSR {msr:#x} = {value:#x}")]
    Msr {
        /// Its number.
        msr: u32,
        /// Its value at the source.
        value: u64,
    },
}

fn failed(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> StateError {
    move |e| StateError::Ioctl { what, source: std::io::Error::from_raw_os_error(e.errno()) }
}

/// The numbers of the MSRs that belong to a vCPU's state on this host.
///
/// # Errors
/// KVM does not say.
pub fn msr_numbers(kvm: &Kvm) -> Result<Vec<u32>, StateError> {
    let list = kvm.get_msr_index_list().map_err(failed("MSR list"))?;
    let belongs = |msr: &u32| !TIME_MSRS.contains(msr) && *msr != APIC_BASE_MSR && !is_paravirtual(*msr);
    Ok(list.as_slice().iter().copied().filter(belongs).collect())
}

/// Those of `numbers` that this vCPU, whose CPUID is set, has: reading only these costs one ioctl.
///
/// # Errors
/// KVM does not say.
pub fn present(fd: &VcpuFd, numbers: &[u32]) -> Result<Vec<u32>, StateError> {
    Ok(read_msrs(fd, numbers)?.into_iter().map(|(msr, _)| msr).collect())
}

/// Registers, FPU and pending events of a vCPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VcpuState {
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, control registers, EFER, IA32_APIC_BASE.
    pub sregs: kvm_sregs,
    /// FPU, SSE, AVX and what else XSAVE knows: the 4 KiB of KVM_GET_XSAVE without the zeros at its end.
    pub xsave: Vec<u32>,
    /// XCR0.
    pub xcrs: kvm_xcrs,
    /// DR0 to DR7.
    pub debugregs: kvm_debugregs,
    /// Exceptions, interrupts and NMIs under way.
    pub events: kvm_vcpu_events,
    /// Number and value.
    pub msrs: Vec<(u32, u64)>,
}

impl VcpuState {
    /// Reads the state. The last exit must have been completed (KVM_RUN with `immediate_exit`). `msrs` is from
    /// [`msr_numbers`]; those that this vCPU does not have are left out.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn capture(fd: &VcpuFd, msrs: &[u32]) -> Result<VcpuState, StateError> {
        Ok(VcpuState {
            events: fd.get_vcpu_events().map_err(failed("events"))?,
            regs: fd.get_regs().map_err(failed("registers"))?,
            sregs: fd.get_sregs().map_err(failed("special registers"))?,
            xsave: without_zeros(&fd.get_xsave().map_err(failed("FPU"))?.region),
            xcrs: fd.get_xcrs().map_err(failed("XCR0"))?,
            debugregs: fd.get_debug_regs().map_err(failed("debug registers"))?,
            msrs: read_msrs(fd, msrs)?,
        })
    }

    /// Writes the state to a vCPU whose CPUID is already set.
    ///
    /// # Errors
    /// [`StateError`]; the vCPU must not run then.
    pub fn restore(&self, fd: &VcpuFd) -> Result<(), StateError> {
        fd.set_sregs(&self.sregs).map_err(failed("special registers"))?;
        fd.set_regs(&self.regs).map_err(failed("registers"))?;
        // A host without XSAVE has none, and refuses even that.
        if self.xcrs.nr_xcrs > 0 {
            fd.set_xcrs(&self.xcrs).map_err(failed("XCR0"))?;
        }
        let mut xsave = kvm_xsave::default();
        xsave.region.iter_mut().zip(&self.xsave).for_each(|(to, from)| *to = *from);
        // SAFETY: a plain kvm_xsave is what KVM_SET_XSAVE reads as long as no dynamic XSAVE feature (AMX) is enabled
        // with arch_prctl, which this program never does.
        unsafe { fd.set_xsave(&xsave) }.map_err(failed("FPU"))?;
        fd.set_debug_regs(&self.debugregs).map_err(failed("debug registers"))?;
        write_msrs(fd, &self.msrs)?;
        fd.set_vcpu_events(&self.events).map_err(failed("events"))
    }
}

/// Most of the area is room for what the CPU or the guest does not use, and every byte costs time while the guest waits.
fn without_zeros(region: &[u32]) -> Vec<u32> {
    let len = region.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1);
    region.iter().take(len).copied().collect()
}

/// Reads in bulk; KVM stops at the first register that it does not have, which is skipped.
fn read_msrs(fd: &VcpuFd, mut numbers: &[u32]) -> Result<Vec<(u32, u64)>, StateError> {
    let mut values = Vec::with_capacity(numbers.len());
    while !numbers.is_empty() {
        let entries: Vec<_> =
            numbers.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let too_many = |_| failed("MSRs")(kvm_ioctls::Error::new(libc::E2BIG));
        let mut msrs = Msrs::from_entries(&entries).map_err(too_many)?;
        let count = fd.get_msrs(&mut msrs).map_err(failed("MSRs"))?;
        values.extend(msrs.as_slice().iter().take(count).map(|e| (e.index, e.data)));
        numbers = numbers.get(count + 1..).unwrap_or(&[]);
    }
    Ok(values)
}

/// Writes in bulk; KVM stops at the first register that it refuses. One that holds 0 is passed over: it belongs to a
/// feature that the source's CPUID hid and that is off there, so nothing is lost.
fn write_msrs(fd: &VcpuFd, mut values: &[(u32, u64)]) -> Result<(), StateError> {
    while !values.is_empty() {
        let entries: Vec<_> =
            values.iter().map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
        let too_many = |_| failed("MSRs")(kvm_ioctls::Error::new(libc::E2BIG));
        let msrs = Msrs::from_entries(&entries).map_err(too_many)?;
        let count = fd.set_msrs(&msrs).map_err(failed("MSRs"))?;
        match values.get(count) {
            Some(&(msr, value)) if value != 0 => return Err(StateError::Msr { msr, value }),
            _ => values = values.get(count + 1..).unwrap_or(&[]),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two vCPUs of one VM: what is captured from one and restored into the other is captured again.
    #[test]
    fn a_state_survives_the_trip() {
        let Ok(kvm) = Kvm::new() else {
            eprintln!("skipped: /dev/kvm can't be opened");
            return;
        };
        let numbers = msr_numbers(&kvm).unwrap();
        let vm = kvm.create_vm().unwrap();
        let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap();
        let vcpus = [vm.create_vcpu(0).unwrap(), vm.create_vcpu(1).unwrap()];
        vcpus.iter().for_each(|v| v.set_cpuid2(&cpuid).unwrap());
        let mut state = VcpuState::capture(&vcpus[0], &numbers).unwrap();
        (state.regs.rax, state.regs.r15, state.regs.rip) = (0x1234_5678_9ABC_DEF0, 42, 0x1000);
        state.debugregs.db[1] = 0xDEAD_0000;
        state.restore(&vcpus[1]).unwrap();
        let again = VcpuState::capture(&vcpus[1], &numbers).unwrap();
        assert_eq!(again.regs, state.regs);
        assert_eq!(again.sregs, state.sregs);
        assert_eq!(again.debugregs, state.debugregs);
        assert_eq!(again.msrs, state.msrs);
        assert_eq!(again.xsave, state.xsave);
        assert!(!state.msrs.is_empty());
        assert_ne!(state.xsave.last(), Some(&0));
    }
}
