//! The loop of a vCPU thread.
//!
//! ```text
//!        +--> mail: stop, orders, clock, INIT, start-up -> timer -> HLT? --+
//!        |                                                     |           |
//!        |                     inject NMI, vector, or ask for a window     |
//!        |                                                     |           |
//!        +---- exit: port, memory, MSR, HLT, ... <---- KVM_RUN +           |
//!        +-----------------------------------------------------------------+
//! ```

mod orders;

use crate::interrupts::InterruptMessage;
use crate::interrupts::lapic::registers::{X2APIC_MSR_FIRST, X2APIC_MSR_LAST};
use crate::interrupts::lapic::{ApicAction, BASE_BSP, GeneralProtection};
use crate::kvm::handle::{VcpuHandle, count, mail};
use crate::kvm::image::Ticket;
use crate::kvm::signal::Attention;
use crate::kvm::vcpu::Vcpu;
use crate::kvm::vm::KvmError;
use crate::kvm::{msr, sys};
use crate::layout::{LAPIC_SIZE, LAPIC_START};
use crate::member::event::VmExit;
use crate::time::tsc::GuestClock;
use dsm::addr::MemberId;
use kvm_bindings::{
    KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO,
    KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MMIO, KVM_EXIT_SET_TPR, KVM_EXIT_SHUTDOWN, KVM_EXIT_X86_RDMSR,
    KVM_EXIT_X86_WRMSR,
};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// What the vCPU sees around it. Called on vCPU threads; what waits for a peer has a deadline.
pub trait Machine: Send + Sync {
    /// IN of 1, 2 or 4 bytes.
    ///
    /// # Errors
    /// The device's member does not answer; ends the VM.
    fn port_read(&self, vcpu: &VcpuHandle, port: u16, data: &mut [u8]) -> Result<(), String>;
    /// OUT of 1, 2 or 4 bytes.
    ///
    /// # Errors
    /// As for reads.
    fn port_write(&self, vcpu: &VcpuHandle, port: u16, data: &[u8]) -> Result<(), String>;
    /// Read of 1 to 8 bytes where no memory is.
    ///
    /// # Errors
    /// As for reads of ports.
    fn memory_read(&self, vcpu: &VcpuHandle, addr: u64, data: &mut [u8]) -> Result<(), String>;
    /// Write of 1 to 8 bytes where no memory is.
    ///
    /// # Errors
    /// As for reads of ports.
    fn memory_write(&self, vcpu: &VcpuHandle, addr: u64, data: &[u8]) -> Result<(), String>;
    /// Delivers an inter-processor interrupt. `x2apic`: the sender is in x2APIC mode, so a logical
    /// destination is one of x2APIC's.
    fn send_ipi(&self, from: &VcpuHandle, x2apic: bool, message: &InterruptMessage);
    /// A level-triggered vector was serviced.
    fn end_of_interrupt(&self, vector: u8);
    /// The vCPU stops using memory for a while (HLT, waiting for a start-up IPI), or goes on. The calls alternate.
    fn rest(&self, _resting: bool) {}
    /// The vCPU of the ticket leaves for `to`: from now on what is meant for it goes there, after these bytes. Called
    /// with its local APIC locked; must not wait.
    fn send_vcpu(&self, _to: MemberId, _ticket: &Ticket, _image: &[u8]) {}
    /// The vCPU of the ticket is set up here.
    fn confirm(&self, _ticket: &Ticket) {}
    /// One vCPU more (`true`) or fewer lives here.
    fn population(&self, _more: bool) {}
    /// The pages on which the vCPU waited last, by address, and whether it wrote.
    fn recent_pages(&self, _vcpu: &VcpuHandle) -> Vec<(u64, bool)> {
        Vec::new()
    }
    /// For tests: a reason not to set up a vCPU that came.
    fn refuses_arrival(&self) -> Option<String> {
        None
    }
}

/// How a vCPU thread ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VcpuEnd {
    /// It was told to stop.
    Stopped,
    /// The guest is over.
    Exit(VmExit),
    /// It can't go on.
    Failed(String),
}

/// After this long in HLT without a deadline the thread looks around anyway, as a safety net.
const IDLE_WAIT: Duration = Duration::from_secs(1);

/// A vCPU with all that its loop needs.
pub struct Runner<M: Machine> {
    pub(in crate::kvm) vcpu: Vcpu,
    pub(in crate::kvm) handle: Arc<VcpuHandle>,
    pub(in crate::kvm) clock: Arc<GuestClock>,
    pub(in crate::kvm) machine: Arc<M>,
    /// Between INIT and start-up IPI.
    pub(in crate::kvm) waits_for_startup: bool,
    pub(in crate::kvm) halted: bool,
    pub(in crate::kvm) nmi: bool,
    /// The clock is still to be followed: a backward correction took more than the vCPU was away.
    clock_behind: bool,
    /// Scaled host TSC of the last return from the guest.
    pub(in crate::kvm) left_at: u64,
    /// The last exit must be completed by another KVM_RUN before registers mean anything.
    unfinished: bool,
    /// Out of the guest until an order says otherwise.
    pub(in crate::kvm) parked: bool,
    /// The vCPU is not here: another member has it, or will send it.
    pub(in crate::kvm) absent: bool,
    /// Common clock at which it left the guest at another member, until it is in the guest here.
    arrived: Option<u64>,
    /// Mail that came while it was parked or absent.
    pub(in crate::kvm) held: u32,
    /// CR8 as the guest was entered with it.
    cr8: u8,
    /// Guest TSC for which the timer signal is armed.
    armed: Option<u64>,
}

impl<M: Machine> std::fmt::Debug for Runner<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runner").field("vcpu", &self.vcpu).finish_non_exhaustive()
    }
}

impl<M: Machine> Runner<M> {
    /// vCPU 0 starts where its registers say, all others wait for a start-up IPI.
    pub fn new(vcpu: Vcpu, handle: Arc<VcpuHandle>, clock: Arc<GuestClock>, machine: Arc<M>) -> Runner<M> {
        let waits_for_startup = vcpu.id() != 0;
        let left_at = clock.scaled_now();
        Runner {
            vcpu,
            handle,
            clock,
            machine,
            waits_for_startup,
            halted: false,
            nmi: false,
            clock_behind: false,
            left_at,
            unfinished: false,
            parked: false,
            absent: false,
            arrived: None,
            held: 0,
            cr8: 0,
            armed: None,
        }
    }

    /// A thread for a vCPU that may come from another member.
    pub fn absent(vcpu: Vcpu, handle: Arc<VcpuHandle>, clock: Arc<GuestClock>, machine: Arc<M>) -> Runner<M> {
        Runner { absent: true, ..Runner::new(vcpu, handle, clock, machine) }
    }

    /// Runs on the calling thread until the end.
    pub fn run(mut self) -> VcpuEnd {
        // SAFETY: `self.vcpu` outlives `attention`, which is dropped before this function returns.
        let attention = match unsafe { Attention::new(self.vcpu.run.immediate_exit()) } {
            Ok(attention) => attention,
            Err(e) => return self.failed(&format!("no timer: {e}")),
        };
        self.handle.register_thread();
        let end = loop {
            match self.step(&attention) {
                Ok(None) => {}
                Ok(Some(end)) => break end,
                Err(e) => break self.failed(&e.to_string()),
            }
        };
        self.handle.unregister_thread();
        end
    }

    fn failed(&self, why: &str) -> VcpuEnd {
        VcpuEnd::Failed(format!("vCPU {}: {why}\n{}", self.vcpu.id(), self.vcpu.dump()))
    }

    /// Once around.
    fn step(&mut self, attention: &Attention) -> Result<Option<VcpuEnd>, KvmError> {
        self.vcpu.run.set_immediate_exit(0);
        let mail = self.handle.take_mail() | std::mem::take(&mut self.held);
        if mail & mail::STOP != 0 {
            return Ok(Some(VcpuEnd::Stopped));
        }
        if mail & mail::ORDER != 0 || self.absent {
            self.held = mail & !mail::ORDER;
            return self.obey();
        }
        if mail & mail::CLOCK != 0 || self.clock_behind {
            self.follow_clock()?;
        }
        if mail & mail::INIT != 0 {
            if let Some(end) = self.complete()? {
                return Ok(Some(end));
            }
            self.init()?;
        }
        if mail & mail::STARTUP != 0 && self.waits_for_startup {
            self.vcpu.start_at(self.handle.startup_vector())?;
            self.waits_for_startup = false;
        }
        self.nmi |= mail & mail::NMI != 0;
        if self.waits_for_startup {
            self.rest(IDLE_WAIT);
            return Ok(None);
        }

        let (vector, deadline, tpr) = self.service_apic();
        if self.halted {
            let interrupt = vector.is_some() && self.vcpu.run.interrupts_enabled();
            if !(self.nmi || interrupt) {
                self.halt(deadline);
                return Ok(None);
            }
            self.halted = false;
        }
        self.inject(vector)?;
        self.cr8 = tpr >> 4;
        self.vcpu.run.set_cr8(self.cr8);
        self.arm_timer(attention, deadline);

        if !self.handle.enter_guest() {
            self.handle.pass_gate();
            return Ok(None);
        }
        if self.arrived.is_some() {
            self.note_downtime();
            self.arrived = None;
        }
        let result = self.vcpu.fd.run().map(|_| ());
        self.handle.leave_guest();
        self.left_at = self.clock.scaled_now();
        count(&self.handle.counters.exits);
        self.handle_exit(result.err().map(|e| e.errno()))
    }

    /// Brings timer and priorities up to date: what to inject, when to look again, and the TPR.
    fn service_apic(&self) -> (Option<u8>, Option<u64>, u8) {
        let mut apic = self.handle.apic();
        if let Some(deadline) = apic.timer_deadline() {
            let now = self.now();
            if deadline <= now && apic.timer_expire(now) {
                count(&self.handle.counters.timer_fires);
            }
        }
        (apic.pending_vector(), apic.timer_deadline(), apic.tpr())
    }

    /// The guest's TSC as this vCPU reads it.
    fn now(&self) -> u64 {
        self.vcpu.clock.at(self.clock.scaled_now())
    }

    fn halt(&self, deadline: Option<u64>) {
        let timeout = match deadline {
            Some(deadline) => {
                let ticks = deadline.saturating_sub(self.now());
                IDLE_WAIT.min(Duration::from_nanos(self.clock.ticks_to_ns(ticks)))
            }
            None => IDLE_WAIT,
        };
        self.rest(timeout);
    }

    fn rest(&self, timeout: Duration) {
        let start = Instant::now();
        self.machine.rest(true);
        self.handle.wait(Some(timeout));
        self.machine.rest(false);
        let slept = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.handle.counters.halted_us.fetch_add(slept, Ordering::Relaxed);
    }

    fn inject(&mut self, vector: Option<u8>) -> Result<(), KvmError> {
        if std::mem::take(&mut self.nmi) {
            self.vcpu.fd.nmi().map_err(crate::kvm::vm::failed("inject an NMI"))?;
            count(&self.handle.counters.nmis);
        }
        let Some(vector) = vector else {
            self.vcpu.run.request_window(false);
            return Ok(());
        };
        if !self.vcpu.run.ready_for_injection() {
            self.vcpu.run.request_window(true);
            return Ok(());
        }
        sys::interrupt(&self.vcpu.fd, vector)
            .map_err(|source| KvmError::Ioctl { what: "inject an interrupt", source })?;
        // Mail may send us around once more before KVM_RUN: not with a second interrupt on top of this one.
        self.vcpu.run.injected();
        count(&self.handle.counters.injections);
        let mut apic = self.handle.apic();
        apic.start_service(vector);
        // Only one can be queued: if another is to interrupt it, come back as soon as that is possible.
        let more = apic.pending_vector().is_some();
        drop(apic);
        self.vcpu.run.request_window(more);
        Ok(())
    }

    /// Keeps a timer signal ready for the next expiry, so that it ends KVM_RUN.
    fn arm_timer(&mut self, attention: &Attention, deadline: Option<u64>) {
        let Some(deadline) = deadline else { return };
        if self.armed != Some(deadline) || attention.fired() {
            let ticks = deadline.saturating_sub(self.now());
            attention.arm(self.clock.ticks_to_ns(ticks));
            self.armed = Some(deadline);
        }
    }

    fn follow_clock(&mut self) -> Result<(), KvmError> {
        let target = self.clock.offset();
        let away = self.clock.scaled_now().wrapping_sub(self.left_at);
        if let Some(offset) = self.vcpu.clock.follow(target, away) {
            self.vcpu.set_tsc_offset(offset, &self.clock)?;
            self.armed = None;
        }
        self.clock_behind = self.vcpu.clock.applied() != target;
        Ok(())
    }

    fn init(&mut self) -> Result<(), KvmError> {
        let base = {
            let mut apic = self.handle.apic();
            apic.init();
            apic.base()
        };
        self.vcpu.init(base)?;
        // SDM vol. 3, 9.4.2: the bootstrap processor does not wait, it goes to the reset vector.
        (self.waits_for_startup, self.halted, self.nmi) = (base & BASE_BSP == 0, false, false);
        Ok(())
    }

    fn handle_exit(&mut self, errno: Option<i32>) -> Result<Option<VcpuEnd>, KvmError> {
        self.unfinished = false;
        let cr8 = self.vcpu.run.cr8();
        let counters = &self.handle.counters;
        if cr8 != self.cr8 {
            self.cr8 = cr8;
            self.handle.apic().set_cr8(cr8);
        }
        match errno {
            None => {}
            Some(libc::EINTR | libc::EAGAIN) => {
                count(&counters.interrupted);
                return Ok(None);
            }
            Some(libc::EFAULT) => {
                return Ok(Some(
                    self.failed(
                        "guest memory could not be read or written (EFAULT): a page was not answered",
                    ),
                ));
            }
            Some(errno) => {
                let e = std::io::Error::from_raw_os_error(errno);
                return Ok(Some(self.failed(&format!("KVM_RUN: {e}"))));
            }
        }
        let done = match self.vcpu.run.exit_reason() {
            KVM_EXIT_IO => self.port(),
            KVM_EXIT_MMIO => self.memory(),
            KVM_EXIT_X86_RDMSR => {
                self.rdmsr();
                Ok(())
            }
            KVM_EXIT_X86_WRMSR => {
                self.wrmsr();
                Ok(())
            }
            KVM_EXIT_HLT => {
                count(&counters.hlt);
                self.halted = true;
                Ok(())
            }
            KVM_EXIT_IRQ_WINDOW_OPEN => {
                count(&counters.irq_window);
                Ok(())
            }
            KVM_EXIT_INTR | KVM_EXIT_SET_TPR => {
                count(&counters.interrupted);
                Ok(())
            }
            KVM_EXIT_SHUTDOWN => {
                let (vcpu, registers) = (self.vcpu.id(), self.vcpu.dump());
                return Ok(Some(VcpuEnd::Exit(VmExit::TripleFault { vcpu, registers })));
            }
            KVM_EXIT_FAIL_ENTRY => {
                let reason = self.vcpu.run.fail_entry();
                Err(format!("the processor refused to enter the guest, reason {reason:#x}"))
            }
            KVM_EXIT_INTERNAL_ERROR => {
                let (suberror, data) = self.vcpu.run.internal_error();
                Err(format!("KVM could not go on, sub-error {suberror}, data {data:x?}"))
            }
            other => Err(format!("unexpected exit {other}")),
        };
        Ok(done.err().map(|why| self.failed(&why)))
    }

    fn port(&mut self) -> Result<(), String> {
        count(&self.handle.counters.pio);
        self.unfinished = true;
        let access = self.vcpu.run.port();
        for item in access.data.chunks_mut(access.size) {
            if access.is_read {
                self.machine.port_read(&self.handle, access.port, item)?;
            } else {
                self.machine.port_write(&self.handle, access.port, item)?;
            }
        }
        Ok(())
    }

    fn memory(&mut self) -> Result<(), String> {
        count(&self.handle.counters.mmio);
        self.unfinished = true;
        let now = self.now();
        let access = self.vcpu.run.mmio();
        let offset = access.addr.wrapping_sub(LAPIC_START);
        if offset < LAPIC_SIZE {
            let mut apic = self.handle.apic();
            if apic.is_xapic() {
                if access.is_write {
                    let action = apic.mmio_write(offset, access.data, now);
                    drop(apic);
                    act(&*self.machine, &self.handle, false, action);
                } else {
                    apic.mmio_read(offset, access.data, now);
                }
                return Ok(());
            }
        }
        if access.is_write {
            self.machine.memory_write(&self.handle, access.addr, access.data)
        } else {
            self.machine.memory_read(&self.handle, access.addr, access.data)
        }
    }

    fn rdmsr(&mut self) {
        count(&self.handle.counters.msr);
        self.unfinished = true;
        let now = self.now();
        let access = self.vcpu.run.msr();
        let value = match access.index {
            X2APIC_MSR_FIRST..=X2APIC_MSR_LAST => self.handle.apic().msr_read(access.index, now).ok(),
            msr::IA32_TSC_DEADLINE => Some(self.handle.apic().tsc_deadline()),
            msr::IA32_APIC_BASE => Some(self.handle.apic().base()),
            msr::HWCR => Some(msr::HWCR_VALUE),
            other => {
                tracing::debug!("vCPU {}: RDMSR {other:#x} is unknown", self.handle.id());
                msr::unknown_read(other)
            }
        };
        *access.error = u8::from(value.is_none());
        *access.data = value.unwrap_or(0);
    }

    fn wrmsr(&mut self) {
        count(&self.handle.counters.msr);
        self.unfinished = true;
        let now = self.now();
        let access = self.vcpu.run.msr();
        let (index, value) = (access.index, *access.data);
        let mut apic = self.handle.apic();
        let x2apic = apic.is_x2apic();
        let result = match index {
            X2APIC_MSR_FIRST..=X2APIC_MSR_LAST => apic.msr_write(index, value, now),
            msr::IA32_TSC_DEADLINE => Ok(apic.set_tsc_deadline(value)),
            msr::IA32_APIC_BASE => apic.set_base(value),
            msr::HWCR => Ok(ApicAction::None),
            other => {
                tracing::debug!("vCPU {}: WRMSR {other:#x} = {value:#x} is unknown", self.handle.id());
                if msr::unknown_write_is_ignored(other) {
                    Ok(ApicAction::None)
                } else {
                    Err(GeneralProtection)
                }
            }
        };
        drop(apic);
        *access.error = u8::from(result.is_err());
        let Ok(action) = result else { return };
        if index == msr::IA32_APIC_BASE {
            // KVM derives CPUID.1:EDX.APIC from it.
            if let Err(e) = self.vcpu.set_msr(index, value) {
                tracing::debug!("vCPU {}: {e}", self.handle.id());
            }
        }
        act(&*self.machine, &self.handle, x2apic, action);
    }
}

/// Carries out what an access to the local APIC asks for. The APIC's lock is not held here.
fn act<M: Machine>(machine: &M, handle: &VcpuHandle, x2apic: bool, action: ApicAction) {
    match action {
        ApicAction::Send(message) => machine.send_ipi(handle, x2apic, &message),
        ApicAction::Eoi(vector) => machine.end_of_interrupt(vector),
        // The loop looks at the timer before it enters the guest again.
        ApicAction::None | ApicAction::TimerChanged => {}
    }
}
