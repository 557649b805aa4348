//! The guest-physical memory map and the port map: one place for every fixed address.

/// RAM below this address is contiguous; what does not fit continues at [`HIGH_RAM_START`].
pub const LOW_RAM_END: u64 = 0xC000_0000;
/// First address of RAM above the 32-bit hole.
pub const HIGH_RAM_START: u64 = 1 << 32;

/// First virtio-mmio window; window `n` starts at `VIRTIO_MMIO_START + n * VIRTIO_MMIO_SIZE`.
pub const VIRTIO_MMIO_START: u64 = 0xD000_0000;
/// Size of one virtio-mmio window in bytes.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// Base of the IOAPIC's register window (82093AA; MADT type 1).
pub const IOAPIC_START: u64 = 0xFEC0_0000;
/// Size of the IOAPIC's register window in bytes.
pub const IOAPIC_SIZE: u64 = 0x1000;
/// Number of redirection entries of the IOAPIC; GSI `n` is pin `n`.
pub const IOAPIC_PINS: u32 = 24;
/// Base of every local APIC in xAPIC mode (SDM vol. 3, 11.4.1).
pub const LAPIC_START: u64 = 0xFEE0_0000;
/// Size of the local APIC's register window in bytes.
pub const LAPIC_SIZE: u64 = 0x1000;

/// COM1: first port and number of ports.
pub const COM1_PORT: u16 = 0x3F8;
/// Number of ports of a 16550.
pub const COM1_PORTS: u16 = 8;
/// GSI of COM1.
pub const COM1_GSI: u32 = 4;
/// GSI of virtio-mmio window 0; window `n` uses `VIRTIO_GSI_BASE + n`, below [`IOAPIC_PINS`].
pub const VIRTIO_GSI_BASE: u32 = 5;

/// ACPI 6.5, 4.8.3.7: sleep control register (hardware-reduced), one byte of port space.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI 6.5, 4.8.3.7: sleep status register, one byte of port space.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI 6.5, 4.8.3.6: reset register, one byte of port space; [`RESET_VALUE`] resets.
pub const RESET_PORT: u16 = 0x602;
/// The value that the FADT tells the guest to write to [`RESET_PORT`].
pub const RESET_VALUE: u8 = 0x01;
/// SLP_TYP of S5 as the DSDT's `\_S5` reports it.
pub const S5_SLEEP_TYPE: u8 = 5;
