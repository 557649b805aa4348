//! A vCPU that stands still, whole: what a checkpoint has of it.

use super::desk::Order;
use super::exec::{Machine, Runner};
use super::handle::{VcpuHandle, mail};
use super::vcpu::Vcpu;
use crate::interrupts::lapic::LocalApic;
use crate::time::tsc::GuestClock;
use migration::vcpu::{StateError, VcpuState};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// All of a parked vCPU but its TSC, which is the VM's clock.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VcpuStill {
    /// Its id.
    pub id: u32,
    /// KVM's part.
    pub state: VcpuState,
    /// Its local APIC.
    pub apic: LocalApic,
    /// Interrupts, NMI, INIT and start-up IPI that it has not seen, as bits of the mailbox.
    pub mail: u32,
    /// Vector of the start-up IPI.
    pub startup: u32,
    /// In HLT.
    pub halted: bool,
    /// Waits for a start-up IPI.
    pub waits_for_startup: bool,
    /// An NMI that has not been handed to KVM.
    pub nmi: bool,
}

/// Answer to [`Order::Capture`]; `None` from a vCPU that does not live here.
pub type Captured = Result<Option<Box<VcpuStill>>, String>;

/// What a vCPU keeps; all else in its mailbox is about its thread here.
const KEPT: u32 = mail::IRQ | mail::NMI | mail::INIT | mail::STARTUP;

impl<M: Machine> Runner<M> {
    /// Reads the state of a vCPU that is parked.
    pub(super) fn still(&self) -> Captured {
        if !self.parked && !self.absent {
            return Err(format!("vCPU {} is not parked", self.handle.id()));
        }
        if self.absent {
            return Ok(None);
        }
        let words = |e: StateError| e.to_string();
        let state = VcpuState::capture(&self.vcpu.fd, self.vcpu.msrs()).map_err(words)?;
        let pending = self.handle.pending();
        Ok(Some(Box::new(VcpuStill {
            id: self.handle.id(),
            state,
            apic: self.handle.apic().clone(),
            mail: (self.held | pending.0) & KEPT,
            startup: pending.1,
            halted: self.halted,
            waits_for_startup: self.waits_for_startup,
            nmi: self.nmi,
        })))
    }

    /// A vCPU that goes on where a checkpoint left it, once it is told to ([`Order::Resume`]).
    ///
    /// # Errors
    /// This host's KVM refuses its state.
    pub fn restored(
        vcpu: Vcpu,
        handle: Arc<VcpuHandle>,
        clock: Arc<GuestClock>,
        machine: Arc<M>,
        still: &VcpuStill,
    ) -> Result<Runner<M>, StateError> {
        still.state.restore(&vcpu.fd)?;
        let mut runner = Runner::new(vcpu, handle, clock, machine);
        runner.vcpu.run.entered_anew(still.state.regs.rflags);
        *runner.handle.apic() = still.apic.clone();
        runner.handle.set_startup(still.startup);
        runner.halted = still.halted;
        runner.waits_for_startup = still.waits_for_startup;
        runner.nmi = still.nmi;
        // It has never been in the guest here, so its clock may go back to where the checkpoint's stood.
        runner.left_at = runner.clock.scaled_now().wrapping_sub(u64::MAX / 2);
        // As if it had been told to park here.
        runner.held = (still.mail & KEPT) | mail::ORDER;
        runner.parked = true;
        runner.machine.rest(true);
        Ok(runner)
    }
}

/// Asks a parked vCPU for its state.
pub fn order() -> (Order, std::sync::mpsc::Receiver<Captured>) {
    let (answer, wait) = super::desk::answer();
    (Order::Capture(answer), wait)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::KVM_MAX_CPUID_ENTRIES;

    /// The manifest is JSON, the way to a member is bincode.
    #[test]
    fn a_vcpu_survives_both_formats() {
        let Ok(kvm) = kvm_ioctls::Kvm::new() else {
            eprintln!("skipped: /dev/kvm can't be opened");
            return;
        };
        let vcpu = kvm.create_vm().unwrap().create_vcpu(0).unwrap();
        vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap()).unwrap();
        let numbers = migration::vcpu::msr_numbers(&kvm).unwrap();
        let mut apic = LocalApic::new(3, false);
        apic.accept(0x40, false);
        let still = VcpuStill {
            id: 3,
            state: VcpuState::capture(&vcpu, &numbers).unwrap(),
            apic,
            mail: 1,
            startup: 9,
            halted: true,
            waits_for_startup: false,
            nmi: true,
        };
        let json = serde_json::to_string(&still).unwrap();
        assert_eq!(serde_json::from_str::<VcpuStill>(&json).unwrap(), still);
        let bytes = crate::control::codec::encode(&still, 1 << 20).unwrap();
        assert_eq!(crate::control::codec::decode::<VcpuStill>(&bytes[4..]).unwrap(), still);
        eprintln!("{} bytes of JSON, {} of bincode", json.len(), bytes.len());
    }
}
