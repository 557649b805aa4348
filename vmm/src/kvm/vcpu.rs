//! One vCPU's descriptor and its registers at the moments when we set them: power-up, INIT, start-up IPI.

use super::cpuid::CpuidTable;
use super::run_page::RunPage;
use super::vm::{KvmError, Vm, failed};
use super::{msr, sys};
use crate::time::tsc::{GuestClock, VcpuClock, needs_scaling};
use kvm_bindings::{Msrs, kvm_debugregs, kvm_msr_entry, kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;
use std::fmt::Write;

/// A vCPU as its own thread has it.
#[derive(Debug)]
pub struct Vcpu {
    pub(super) fd: VcpuFd,
    pub(super) run: RunPage,
    pub(super) clock: VcpuClock,
    id: u32,
    /// Registers after reset.
    reset: (kvm_regs, kvm_sregs),
    /// Numbers of the MSRs that belong to its state.
    msrs: Vec<u32>,
}

// SAFETY: `run` points into the mapping that `fd` owns and moves with it; nothing in a Vcpu is tied to a thread.
unsafe impl Send for Vcpu {}

impl Vcpu {
    /// Makes the vCPU `id` in its power-up state. `cpuid` is what it shall see; its TSC is set to `clock`.
    ///
    /// # Errors
    /// KVM refused something.
    pub fn new(
        vm: &Vm,
        id: u32,
        apic_base: u64,
        cpuid: &CpuidTable,
        clock: &GuestClock,
    ) -> Result<Vcpu, KvmError> {
        let mut fd = vm.fd().create_vcpu(u64::from(id)).map_err(failed("create a vCPU"))?;
        let leaves = cpuid.to_kvm().ok_or(KvmError::TooManyLeaves(cpuid.0.len()))?;
        fd.set_cpuid2(&leaves).map_err(failed("set CPUID"))?;
        let mut sregs = fd.get_sregs().map_err(failed("get special registers"))?;
        sregs.apic_base = apic_base;
        fd.set_sregs(&sregs).map_err(failed("set special registers"))?;
        let regs = fd.get_regs().map_err(failed("get registers"))?;
        let msrs = migration::vcpu::present(&fd, &vm.msrs())
            .map_err(|e| KvmError::Ioctl { what: "read MSRs", source: std::io::Error::other(e) })?;
        let run = RunPage::of(&mut fd);
        let mut vcpu =
            Vcpu { fd, run, clock: VcpuClock::new(clock.offset()), id, reset: (regs, sregs), msrs };
        for (index, value) in msr::AT_RESET {
            // Not every KVM has every one of them; what is missing the guest can't see either.
            if let Err(e) = vcpu.set_msr(index, value) {
                tracing::debug!("vCPU {id}: {e}");
            }
        }
        vcpu.set_tsc(vm, clock)?;
        Ok(vcpu)
    }

    /// The id.
    pub fn id(&self) -> u32 {
        self.id
    }

    pub(super) fn msrs(&self) -> &[u32] {
        &self.msrs
    }

    /// Special registers after reset, to be changed into those that an entry point wants.
    pub fn reset_sregs(&self) -> kvm_sregs {
        self.reset.1
    }

    /// Where the guest shall start.
    ///
    /// # Errors
    /// KVM refused a value.
    pub fn set_state(&self, regs: &kvm_regs, sregs: &kvm_sregs) -> Result<(), KvmError> {
        self.fd.set_sregs(sregs).map_err(failed("set special registers"))?;
        self.fd.set_regs(regs).map_err(failed("set registers"))
    }

    fn set_tsc(&mut self, vm: &Vm, clock: &GuestClock) -> Result<(), KvmError> {
        let host_khz = self.fd.get_tsc_khz().unwrap_or(clock.khz());
        if vm.has_tsc_scaling() && needs_scaling(clock.khz(), host_khz) {
            self.fd.set_tsc_khz(clock.khz()).map_err(failed("set the TSC frequency"))?;
        }
        self.set_tsc_offset(clock.offset(), clock)
    }

    /// Sets the TSC offset. KVMs before Linux 5.16 can only be told a TSC value, which is less exact.
    pub(super) fn set_tsc_offset(&mut self, offset: u64, clock: &GuestClock) -> Result<(), KvmError> {
        self.clock = VcpuClock::new(offset);
        match sys::set_tsc_offset(&self.fd, offset) {
            Ok(()) => Ok(()),
            Err(e) => {
                tracing::debug!("vCPU {}: no KVM_VCPU_TSC_OFFSET ({e}), writing IA32_TSC", self.id);
                self.set_msr(msr::IA32_TSC, clock.scaled_now().wrapping_add(offset))
            }
        }
    }

    /// Sets a register as the host, past the filter.
    pub(super) fn set_msr(&self, index: u32, value: u64) -> Result<(), KvmError> {
        let refused = KvmError::Msr { msr: index, value };
        let entry = kvm_msr_entry { index, data: value, ..Default::default() };
        let Ok(msrs) = Msrs::from_entries(&[entry]) else { return Err(refused) };
        match self.fd.set_msrs(&msrs) {
            Ok(1) => Ok(()),
            _ => Err(refused),
        }
    }

    /// INIT: registers as after reset, but IA32_APIC_BASE (SDM vol. 3, table 10-1).
    pub(super) fn init(&mut self, apic_base: u64) -> Result<(), KvmError> {
        let (regs, mut sregs) = self.reset;
        sregs.apic_base = apic_base;
        // The reset vector's alias below 1 MiB: there is no ROM below 4 GiB.
        sregs.cs.base = 0xF_0000;
        self.set_state(&regs, &sregs)?;
        let debug = kvm_debugregs { dr6: 0xFFFF_0FF0, dr7: 0x400, ..Default::default() };
        self.fd.set_debug_regs(&debug).map_err(failed("set debug registers"))
    }

    /// Start-up IPI: real mode at `vector << 12` (SDM vol. 3, 9.4.4).
    pub(super) fn start_at(&mut self, vector: u32) -> Result<(), KvmError> {
        let (mut regs, mut sregs) = self.reset;
        sregs.apic_base = self.fd.get_sregs().map_err(failed("get special registers"))?.apic_base;
        let [page, ..] = vector.to_le_bytes();
        sregs.cs.selector = u16::from(page) << 8;
        sregs.cs.base = u64::from(page) << 12;
        regs.rip = 0;
        self.set_state(&regs, &sregs)
    }

    /// All that helps to see why a guest died, in a few lines.
    pub(super) fn dump(&self) -> String {
        let (Ok(r), Ok(s)) = (self.fd.get_regs(), self.fd.get_sregs()) else {
            return "registers can't be read".into();
        };
        let mut text = String::new();
        let rows = [
            [("rip", r.rip), ("rflags", r.rflags), ("rsp", r.rsp), ("rbp", r.rbp)],
            [("rax", r.rax), ("rbx", r.rbx), ("rcx", r.rcx), ("rdx", r.rdx)],
            [("rsi", r.rsi), ("rdi", r.rdi), ("r8", r.r8), ("r9", r.r9)],
            [("r10", r.r10), ("r11", r.r11), ("r12", r.r12), ("r13", r.r13)],
            [("r14", r.r14), ("r15", r.r15), ("cr0", s.cr0), ("cr2", s.cr2)],
            [("cr3", s.cr3), ("cr4", s.cr4), ("efer", s.efer), ("cs", s.cs.base)],
            [("gdt", s.gdt.base), ("idt", s.idt.base), ("tr", s.tr.base), ("gs", s.gs.base)],
        ];
        for row in rows {
            for (name, value) in row {
                // Writing to a String does not fail.
                let _ = write!(text, "{name:>6} {value:016x}");
            }
            text.push('\n');
        }
        text
    }
}
