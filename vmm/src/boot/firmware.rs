//! All there is of a BIOS: code at the reset vector that resets the VM.
//!
//! Linux leaves through it: on a hardware-reduced machine it prefers EFI's reset to the ACPI register, and where
//! there is no EFI it jumps to `FFFF:0000` in real mode (`machine_real_restart`). So does old software.

use crate::layout::{RESET_PORT, RESET_VALUE};

/// The last page below 1 MiB.
pub const FIRMWARE_START: u64 = 0xF_F000;
/// Offset of the reset vector in that page.
const RESET_VECTOR: usize = 0xFF0;

/// The page at [`FIRMWARE_START`].
pub fn page() -> Vec<u8> {
    let [low, high] = RESET_PORT.to_le_bytes();
    let mut page = vec![0; RESET_VECTOR];
    page.extend([0xBA, low, high]); // mov dx, RESET_PORT
    page.extend([0xB0, RESET_VALUE]); // mov al, RESET_VALUE
    page.extend([0xEE]); // out dx, al
    page.extend([0xFA, 0xF4]); // cli; hlt
    page.extend([0xEB, 0xFC]); // jmp to the cli
    page
}
