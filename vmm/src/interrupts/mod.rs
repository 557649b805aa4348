//! The interrupt fabric: local APICs and the IOAPIC, in user space, so that an IPI can cross hosts and a vCPU
//! can move with all of its state. Pure models here; the threads that run them are in [`crate::kvm`] and
//! [`crate::fabric`].

pub mod bits;
pub mod ioapic;
pub mod lapic;
pub mod routing;

use serde::{Deserialize, Serialize};

/// Delivery mode of an interrupt message (SDM vol. 3, 11.6.1, ICR bits 10:8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeliveryMode {
    /// The vector is delivered to every target.
    Fixed,
    /// The vector is delivered to one of the targets.
    LowestPriority,
    /// System-management interrupt; there is no SMM: ignored.
    Smi,
    /// Non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up; the vector is bits 19:12 of the start address.
    Startup,
    /// 8259 interrupt; there is no 8259: ignored.
    ExtInt,
}

/// To whom an interrupt message goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Destination {
    /// The local APIC with this id; `0xFFFF_FFFF` (or `0xFF` from an xAPIC, widened by the sender) is all.
    Physical(u32),
    /// Every local APIC that matches this message destination address with its LDR and DFR.
    Logical(u32),
    /// All but the sender.
    AllButSelf,
    /// All.
    All,
}

/// One interrupt message on the (virtual) APIC bus: an IPI, an MSI or an IOAPIC pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterruptMessage {
    /// To whom.
    pub destination: Destination,
    /// How.
    pub mode: DeliveryMode,
    /// Vector, `0x10..=0xFF` for Fixed and LowestPriority.
    pub vector: u8,
    /// Level-triggered: the target's EOI goes back to the IOAPIC.
    pub level_triggered: bool,
    /// False only for the INIT level de-assert, which is ignored.
    pub asserted: bool,
    /// The vCPU that sent it, or `None` for a device.
    pub source: Option<u32>,
}

/// The interrupt input lines of the VM as devices see them. Never blocks for long; callable from any thread.
/// On a member without the IOAPIC it sends a message to the member that has it.
pub trait IrqLines: Send + Sync {
    /// Sets the level of a global system interrupt. An edge-triggered pin fires on low-to-high.
    fn set_level(&self, gsi: u32, high: bool);

    /// One edge: high, then low.
    fn pulse(&self, gsi: u32) {
        self.set_level(gsi, true);
        self.set_level(gsi, false);
    }
}
