//! The local APIC of one vCPU: a pure model (SDM vol. 3, chapter 11). No clock, no threads, no I/O: whoever
//! owns it passes guest TSC values in and carries out the [`ApicAction`]s that come back.
//!
//! [`registers`] is the view of the guest (xAPIC by MMIO, x2APIC by MSR, over one state), [`timer`] the
//! three timer modes. Here: modes, acceptance and priority of interrupts.
//!
//! The timer's input clock is the guest's TSC, so the whole state is in one time base, which moves with the
//! vCPU from host to host.

pub mod registers;
#[cfg(test)]
mod tests;
pub mod timer;

use super::InterruptMessage;
use super::bits::VectorSet;
use crate::layout::LAPIC_START;
use serde::{Deserialize, Serialize};
use timer::Timer;

/// IA32_APIC_BASE (MSR 1BH), bit 8: this is the bootstrap processor.
pub const BASE_BSP: u64 = 1 << 8;
/// IA32_APIC_BASE bit 10, EXTD: x2APIC mode.
pub const BASE_X2APIC: u64 = 1 << 10;
/// IA32_APIC_BASE bit 11, EN: the local APIC is there at all.
pub const BASE_ENABLE: u64 = 1 << 11;

/// SVR bit 8: software enable (11.9).
const SVR_ENABLE: u32 = 1 << 8;
/// Mask bit of every LVT entry.
const LVT_MASKED: u32 = 1 << 16;

/// ESR bits (11.5.3).
mod esr {
    /// An IPI with a vector below 16 was to be sent.
    pub const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
    /// A message with a vector below 16 came in, or an LVT entry has one.
    pub const RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
    /// Access to a register that does not exist.
    pub const ILLEGAL_REGISTER: u32 = 1 << 7;
}

/// Index of an entry of the local vector table in [`LocalApic::lvt`]; the register order of 11.5.1.
mod lvt {
    pub const TIMER: usize = 0;
    pub const ERROR: usize = 5;
    pub const COUNT: usize = 6;
}

/// What the owner of the model must do after an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum ApicAction {
    /// Nothing outside the model changed.
    None,
    /// Deliver this message.
    Send(InterruptMessage),
    /// Tell the IOAPIC that a level-triggered vector was serviced.
    Eoi(u8),
    /// [`LocalApic::timer_deadline`] may have changed.
    TimerChanged,
}

/// The access is a general-protection fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("#GP(0)")]
pub struct GeneralProtection;

/// The state of one local APIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalApic {
    id: u32,
    base: u64,
    tpr: u8,
    /// LDR as xAPIC mode has it; x2APIC mode derives its own from the id.
    ldr: u32,
    dfr: u32,
    svr: u32,
    isr: VectorSet,
    irr: VectorSet,
    tmr: VectorSet,
    /// ESR as the guest reads it.
    esr: u32,
    /// Errors since the last write to ESR.
    esr_pending: u32,
    icr: u64,
    lvt: [u32; lvt::COUNT],
    timer: Timer,
}

impl LocalApic {
    /// A local APIC after power-up (11.4.7.1), in xAPIC mode.
    pub fn new(id: u32, bootstrap: bool) -> LocalApic {
        LocalApic {
            id,
            base: LAPIC_START | BASE_ENABLE | if bootstrap { BASE_BSP } else { 0 },
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: 0xFF,
            isr: VectorSet::default(),
            irr: VectorSet::default(),
            tmr: VectorSet::default(),
            esr: 0,
            esr_pending: 0,
            icr: 0,
            lvt: [LVT_MASKED; lvt::COUNT],
            timer: Timer::default(),
        }
    }

    /// INIT (11.4.7.3): as after power-up, but the id and IA32_APIC_BASE stay.
    pub fn init(&mut self) {
        let fresh = LocalApic::new(self.id, false);
        *self = LocalApic { base: self.base, ..fresh };
    }

    /// The APIC id; equals the vCPU's id.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// The mode is x2APIC.
    pub fn is_x2apic(&self) -> bool {
        self.base & (BASE_ENABLE | BASE_X2APIC) == BASE_ENABLE | BASE_X2APIC
    }

    /// The mode is xAPIC, so the MMIO window answers.
    pub fn is_xapic(&self) -> bool {
        self.base & (BASE_ENABLE | BASE_X2APIC) == BASE_ENABLE
    }

    fn is_software_enabled(&self) -> bool {
        self.base & BASE_ENABLE != 0 && self.svr & SVR_ENABLE != 0
    }

    /// Writes IA32_APIC_BASE. The window can't be moved: all vCPUs' windows are at the default address.
    ///
    /// # Errors
    /// Reserved bits, a moved window, and the transitions that 11.12.5 forbids.
    pub fn set_base(&mut self, value: u64) -> Result<ApicAction, GeneralProtection> {
        const MODE: u64 = BASE_ENABLE | BASE_X2APIC;
        if value & !(MODE | BASE_BSP) != LAPIC_START {
            return Err(GeneralProtection);
        }
        match (self.base & MODE, value & MODE) {
            (_, BASE_X2APIC) | (0, MODE) | (MODE, BASE_ENABLE) => return Err(GeneralProtection),
            (old, new) if old == new => {}
            (_, 0) => {
                self.init();
                self.base = value;
                return Ok(ApicAction::TimerChanged);
            }
            (_, MODE) => self.icr &= u64::from(u32::MAX),
            _ => {}
        }
        self.base = value;
        Ok(ApicAction::None)
    }

    /// Task priority, bits 7:4 of which are CR8 (11.8.6).
    pub fn tpr(&self) -> u8 {
        self.tpr
    }

    /// MOV to CR8.
    pub fn set_cr8(&mut self, cr8: u8) {
        if self.tpr >> 4 != cr8 & 0xF {
            self.tpr = (cr8 & 0xF) << 4;
        }
    }

    /// Processor priority (11.8.3.1).
    pub fn ppr(&self) -> u8 {
        let in_service = self.isr.highest().unwrap_or(0);
        if self.tpr >> 4 >= in_service >> 4 { self.tpr } else { in_service & 0xF0 }
    }

    /// The vector to hand to the processor now, or `None`.
    pub fn pending_vector(&self) -> Option<u8> {
        if !self.is_software_enabled() {
            return None;
        }
        self.irr.highest().filter(|v| v >> 4 > self.ppr() >> 4)
    }

    /// The processor took `vector`: it moves from IRR to ISR (11.8.4).
    pub fn start_service(&mut self, vector: u8) {
        self.irr.remove(vector);
        self.isr.insert(vector);
    }

    /// Takes a Fixed or LowestPriority interrupt in (11.8.4). True when it is now in IRR.
    pub fn accept(&mut self, vector: u8, level_triggered: bool) -> bool {
        if !self.is_software_enabled() {
            return false;
        }
        if vector < 16 {
            self.error(esr::RECEIVE_ILLEGAL_VECTOR);
            return false;
        }
        self.irr.insert(vector);
        self.tmr.set(vector, level_triggered);
        true
    }

    /// Does a logical destination mean this APIC? (11.6.2.2 for xAPIC, 11.12.10 for x2APIC)
    pub fn matches_logical(&self, mda: u32) -> bool {
        if self.is_x2apic() {
            let ldr = x2apic_ldr(self.id);
            return mda == u32::MAX || (mda >> 16 == ldr >> 16 && mda & ldr & 0xFFFF != 0);
        }
        if !self.is_xapic() || mda > 0xFF {
            return self.is_xapic() && mda == u32::MAX;
        }
        let ldr = self.ldr >> 24;
        if self.dfr >> 28 == 0xF {
            return ldr & mda != 0;
        }
        (mda >> 4 == 0xF || mda >> 4 == ldr >> 4) && mda & ldr & 0xF != 0
    }

    /// The guest finished the interrupt of highest priority (11.8.5).
    fn end_of_interrupt(&mut self) -> ApicAction {
        let Some(vector) = self.isr.highest() else { return ApicAction::None };
        self.isr.remove(vector);
        if self.tmr.contains(vector) { ApicAction::Eoi(vector) } else { ApicAction::None }
    }

    /// Records an error; the LVT error entry may turn it into an interrupt (11.5.3).
    fn error(&mut self, bit: u32) {
        let new = self.esr_pending & bit == 0;
        self.esr_pending |= bit;
        if new {
            self.fire_local(lvt::ERROR);
        }
    }

    /// Delivers a local vector table entry, unless it is masked. LVT interrupts are edge-triggered.
    fn fire_local(&mut self, entry: usize) {
        let Some(value) = self.lvt.get(entry).copied().filter(|v| v & LVT_MASKED == 0) else { return };
        let [vector, ..] = value.to_le_bytes();
        if vector >= 16 || entry != lvt::ERROR {
            self.accept(vector, false);
        }
    }
}

/// LDR in x2APIC mode (11.12.10.2): cluster in bits 31:16, one of 16 bits below.
pub fn x2apic_ldr(id: u32) -> u32 {
    (id >> 4) << 16 | 1 << (id & 0xF)
}
