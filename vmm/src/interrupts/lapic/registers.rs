//! The guest's view of a local APIC: a 4 KiB MMIO window in xAPIC mode (11.4.1), MSRs 800H-8FFH in x2APIC mode
//! (11.12.1.2). Both come down to a register number: MMIO offset / 16 = MSR - 800H.

use super::{ApicAction, GeneralProtection, LVT_MASKED, LocalApic, SVR_ENABLE, esr, lvt, x2apic_ldr};
use crate::interrupts::{DeliveryMode, Destination, InterruptMessage};

/// First MSR of x2APIC mode.
pub const X2APIC_MSR_FIRST: u32 = 0x800;
/// Last MSR of x2APIC mode.
pub const X2APIC_MSR_LAST: u32 = 0x8FF;
/// MSR of the interrupt command register in x2APIC mode.
pub const X2APIC_MSR_ICR: u32 = 0x830;

/// Register numbers (Table 11-1, Table 11-6).
mod reg {
    pub const ID: u8 = 0x02;
    pub const VERSION: u8 = 0x03;
    pub const TPR: u8 = 0x08;
    pub const APR: u8 = 0x09;
    pub const PPR: u8 = 0x0A;
    pub const EOI: u8 = 0x0B;
    pub const RRD: u8 = 0x0C;
    pub const LDR: u8 = 0x0D;
    pub const DFR: u8 = 0x0E;
    pub const SVR: u8 = 0x0F;
    pub const ISR: u8 = 0x10;
    pub const TMR: u8 = 0x18;
    pub const IRR: u8 = 0x20;
    pub const ESR: u8 = 0x28;
    pub const ICR: u8 = 0x30;
    pub const ICR_HIGH: u8 = 0x31;
    pub const LVT: u8 = 0x32;
    pub const LVT_LAST: u8 = 0x37;
    pub const INITIAL_COUNT: u8 = 0x38;
    pub const CURRENT_COUNT: u8 = 0x39;
    pub const DIVIDE: u8 = 0x3E;
    pub const SELF_IPI: u8 = 0x3F;
}

/// Version register (11.4.8): an integrated APIC with six LVT entries, without EOI-broadcast suppression.
const VERSION: u32 = 0x14 | (5 << 16);

/// Bits that a guest can write in each LVT entry; LINT0/1 have polarity, remote IRR (read-only) and trigger.
const LVT_WRITABLE: [u32; lvt::COUNT] = [0x7_00FF, 0x1_07FF, 0x1_07FF, 0x1_A7FF, 0x1_A7FF, 0x1_00FF];
/// ICR bits 31:0 that may be set in x2APIC mode; bit 12 (delivery status) is tolerated and reads as 0.
const ICR_LOW_VALID: u64 = 0x000C_DFFF;
const ICR_DELIVERY_STATUS: u64 = 1 << 12;

impl LocalApic {
    /// Reads the xAPIC window. `offset` is within the 4 KiB; what is between the registers reads as zero.
    /// `now` is the guest's TSC. Call it only while [`LocalApic::is_xapic`].
    pub fn mmio_read(&mut self, offset: u64, data: &mut [u8], now: u64) {
        data.fill(0);
        let Ok(number) = u8::try_from(offset >> 4) else { return };
        let value = match self.read_register(number, now) {
            Some(value) => value.to_le_bytes(),
            None => {
                self.error(esr::ILLEGAL_REGISTER);
                return;
            }
        };
        for (at, byte) in (offset & 0xF..).zip(data.iter_mut()) {
            *byte = usize::try_from(at).ok().and_then(|at| value.get(at)).copied().unwrap_or(0);
        }
    }

    /// Writes the xAPIC window. Only aligned 32-bit writes count (11.4.1), others are ignored.
    pub fn mmio_write(&mut self, offset: u64, data: &[u8], now: u64) -> ApicAction {
        let Ok(number) = u8::try_from(offset >> 4) else { return ApicAction::None };
        let (0, Some(Ok(bytes))) = (offset & 0xF, data.get(..4).map(<[u8; 4]>::try_from)) else {
            return ApicAction::None;
        };
        let value = u32::from_le_bytes(bytes);
        match number {
            reg::EOI => self.end_of_interrupt(),
            reg::LDR => {
                self.ldr = value & 0xFF00_0000;
                ApicAction::None
            }
            reg::DFR => {
                self.dfr = value | 0x0FFF_FFFF;
                ApicAction::None
            }
            reg::ICR => {
                self.icr = self.icr & 0xFFFF_FFFF_0000_0000 | u64::from(value) & !ICR_DELIVERY_STATUS;
                self.send_ipi(self.icr)
            }
            reg::ICR_HIGH => {
                self.icr = self.icr & 0xFFFF_FFFF | u64::from(value & 0xFF00_0000) << 32;
                ApicAction::None
            }
            reg::ID | reg::RRD => ApicAction::None,
            _ => self.write_common(number, value, now).unwrap_or_else(|| {
                self.error(esr::ILLEGAL_REGISTER);
                ApicAction::None
            }),
        }
    }

    /// RDMSR 800H-8FFH.
    ///
    /// # Errors
    /// Not in x2APIC mode, or no such register to read.
    pub fn msr_read(&mut self, msr: u32, now: u64) -> Result<u64, GeneralProtection> {
        let number = self.msr_number(msr)?;
        match number {
            reg::DFR | reg::APR | reg::RRD | reg::ICR_HIGH | reg::EOI | reg::SELF_IPI => {
                Err(GeneralProtection)
            }
            reg::ICR => Ok(self.icr),
            _ => self.read_register(number, now).map(u64::from).ok_or(GeneralProtection),
        }
    }

    /// WRMSR 800H-8FFH.
    ///
    /// # Errors
    /// Not in x2APIC mode, no such register to write, or a reserved bit is set.
    pub fn msr_write(&mut self, msr: u32, value: u64, now: u64) -> Result<ApicAction, GeneralProtection> {
        let number = self.msr_number(msr)?;
        if number == reg::ICR {
            if value & 0xFFFF_FFFF & !ICR_LOW_VALID != 0 {
                return Err(GeneralProtection);
            }
            self.icr = value & !ICR_DELIVERY_STATUS;
            return Ok(self.send_ipi(self.icr));
        }
        let low = u32::try_from(value).map_err(|_| GeneralProtection)?;
        let valid = match number {
            reg::EOI | reg::ESR => 0,
            reg::TPR | reg::SELF_IPI => 0xFF,
            reg::SVR => 0x3FF,
            reg::DIVIDE => 0xB,
            reg::LVT..=reg::LVT_LAST => {
                LVT_WRITABLE.get(usize::from(number - reg::LVT)).copied().unwrap_or(0) | 0x5000
            }
            _ => u32::MAX,
        };
        if low & !valid != 0 {
            return Err(GeneralProtection);
        }
        match number {
            reg::EOI => Ok(self.end_of_interrupt()),
            reg::SELF_IPI => {
                // 11.12.11: same as a Fixed IPI with shorthand self; ICR keeps its value.
                Ok(self.send_ipi(value | 1 << 18))
            }
            _ => self.write_common(number, low, now).ok_or(GeneralProtection),
        }
    }

    fn msr_number(&self, msr: u32) -> Result<u8, GeneralProtection> {
        if !self.is_x2apic() {
            return Err(GeneralProtection);
        }
        let number = msr.checked_sub(X2APIC_MSR_FIRST).ok_or(GeneralProtection)?;
        u8::try_from(number).map_err(|_| GeneralProtection)
    }

    /// What both views read alike; `None` for a register that does not exist.
    fn read_register(&self, number: u8, now: u64) -> Option<u32> {
        let word = |first: u8| usize::from(number - first);
        let icr = self.icr.to_le_bytes();
        Some(match number {
            reg::ID if self.is_x2apic() => self.id,
            reg::ID => self.id << 24,
            reg::VERSION => VERSION,
            reg::TPR => u32::from(self.tpr),
            reg::APR | reg::EOI | reg::RRD => 0,
            reg::PPR => u32::from(self.ppr()),
            reg::LDR if self.is_x2apic() => x2apic_ldr(self.id),
            reg::LDR => self.ldr,
            reg::DFR => self.dfr,
            reg::SVR => self.svr,
            reg::ISR..reg::TMR => self.isr.word(word(reg::ISR)),
            reg::TMR..reg::IRR => self.tmr.word(word(reg::TMR)),
            reg::IRR..reg::ESR => self.irr.word(word(reg::IRR)),
            reg::ESR => self.esr,
            reg::ICR => u32::from_le_bytes([icr[0], icr[1], icr[2], icr[3]]),
            reg::ICR_HIGH => u32::from_le_bytes([icr[4], icr[5], icr[6], icr[7]]),
            reg::LVT..=reg::LVT_LAST => self.lvt.get(word(reg::LVT)).copied()?,
            reg::INITIAL_COUNT => self.initial_count(),
            reg::CURRENT_COUNT => self.current_count(now),
            reg::DIVIDE => self.divide(),
            _ => return None,
        })
    }

    /// What both views write alike; `None` for a register that does not exist or can't be written.
    fn write_common(&mut self, number: u8, value: u32, now: u64) -> Option<ApicAction> {
        match number {
            reg::TPR => {
                let [tpr, ..] = value.to_le_bytes();
                self.tpr = tpr;
            }
            reg::SVR => {
                self.svr = value & 0x3FF;
                if self.svr & SVR_ENABLE == 0 {
                    // 11.4.7.2: a software-disabled APIC has all LVT entries masked.
                    self.lvt.iter_mut().for_each(|entry| *entry |= LVT_MASKED);
                    return Some(ApicAction::TimerChanged);
                }
            }
            reg::ESR => self.esr = std::mem::take(&mut self.esr_pending),
            reg::LVT..=reg::LVT_LAST => {
                let entry = usize::from(number - reg::LVT);
                let forced = if self.svr & SVR_ENABLE == 0 { LVT_MASKED } else { 0 };
                let value = value & LVT_WRITABLE.get(entry)? | forced;
                if entry == lvt::TIMER {
                    return Some(self.write_timer_lvt(value, now));
                }
                *self.lvt.get_mut(entry)? = value;
            }
            reg::INITIAL_COUNT => return Some(self.write_initial_count(value, now)),
            reg::DIVIDE => return Some(self.write_divide(value, now)),
            _ => return None,
        }
        Some(ApicAction::None)
    }

    /// Carries out a command in the layout of ICR (11.6.1).
    fn send_ipi(&mut self, icr: u64) -> ApicAction {
        let [vector, flags, shorthand, _, field @ ..] = icr.to_le_bytes();
        let field = u32::from_le_bytes(field);
        let mode = match flags & 7 {
            0 => DeliveryMode::Fixed,
            1 => DeliveryMode::LowestPriority,
            2 => DeliveryMode::Smi,
            4 => DeliveryMode::Nmi,
            5 => DeliveryMode::Init,
            6 => DeliveryMode::Startup,
            _ => return ApicAction::None,
        };
        if vector < 16 && matches!(mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority) {
            self.error(esr::SEND_ILLEGAL_VECTOR);
            return ApicAction::None;
        }
        let logical = flags & 8 != 0;
        let destination = match shorthand >> 2 & 3 {
            1 => Destination::Physical(self.id),
            2 => Destination::All,
            3 => Destination::AllButSelf,
            _ if self.is_x2apic() && logical => Destination::Logical(field),
            _ if self.is_x2apic() => Destination::Physical(field),
            _ if logical => Destination::Logical(field >> 24),
            _ if field >> 24 == 0xFF => Destination::Physical(u32::MAX),
            _ => Destination::Physical(field >> 24),
        };
        ApicAction::Send(InterruptMessage {
            destination,
            mode,
            vector,
            // 11.6.1: an IPI is edge-triggered, but for the INIT level de-assert.
            level_triggered: false,
            asserted: !(mode == DeliveryMode::Init && flags & 0xC0 == 0x80),
            source: Some(self.id),
        })
    }
}
