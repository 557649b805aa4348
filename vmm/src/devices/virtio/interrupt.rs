//! A device's interrupt: the reason registers and the line.

use crate::interrupts::IrqLines;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};

/// Interrupt status (virtio 1.2, 4.2.2) and the device's error state. Without locks: the worker raises, vCPUs
/// read and acknowledge.
pub struct Interrupt {
    status: AtomicU32,
    needs_reset: AtomicBool,
    irq: Arc<dyn IrqLines>,
    gsi: u32,
}

impl fmt::Debug for Interrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = self.status();
        f.debug_struct("Interrupt").field("status", &status).field("gsi", &self.gsi).finish_non_exhaustive()
    }
}

impl Interrupt {
    /// Nothing pending.
    pub fn new(irq: Arc<dyn IrqLines>, gsi: u32) -> Interrupt {
        Interrupt { status: AtomicU32::new(0), needs_reset: AtomicBool::new(false), irq, gsi }
    }

    /// Tells the driver that buffers were used.
    pub fn used(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// The device cannot go on until the driver resets it (2.1, DEVICE_NEEDS_RESET).
    pub fn fail(&self) {
        if !self.needs_reset.swap(true, Ordering::SeqCst) {
            self.raise(VIRTIO_MMIO_INT_CONFIG);
        }
    }

    /// True after [`Interrupt::fail`] until the reset.
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// The reason bits.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// The driver has seen these reasons.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// As after power-on.
    pub fn reset(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
    }

    /// The reason bits, and whether the device has failed.
    pub fn save(&self) -> (u32, bool) {
        (self.status(), self.needs_reset())
    }

    /// As [`Interrupt::save`] said. The line is the IOAPIC's to remember.
    pub fn restore(&self, (status, needs_reset): (u32, bool)) {
        self.status.store(status, Ordering::SeqCst);
        self.needs_reset.store(needs_reset, Ordering::SeqCst);
    }

    /// The reason first, then the edge: a driver that the edge wakes finds the reason. A reason that is
    /// still set gets an edge too, for the driver may be between reading the status and acknowledging it.
    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::SeqCst);
        self.irq.pulse(self.gsi);
    }
}
