//! What a fresh VM finds in its memory and in the registers of vCPU 0.
//!
//! [`load_kernel`] takes a kernel ([`bzimage`] or [`elf`]), an initrd, a command line and the ACPI tables, and
//! decides where each goes ([`plan`], pure: bytes in, list of writes out). The writes then go through one
//! closure, so that the caller can fill pages at their home without a fault per page. [`ram`] is the memory
//! map that the guest is told, [`params`] the structures that tell it, [`entry`] the first vCPU's registers,
//! [`firmware`] the way to reset.
//!
//! Two protocols: Linux's 64-bit boot protocol (Documentation/arch/x86/boot.rst) for a bzImage and for an ELF
//! without a note, and PVH (xen/docs/misc/pvh.pandoc) for an ELF with a `XEN_ELFNOTE_PHYS32_ENTRY` note.

pub mod bzimage;
pub mod elf;
pub mod entry;
pub mod firmware;
pub mod params;
pub mod plan;
pub mod ram;
#[cfg(test)]
mod tests;

pub use entry::{BootEntry, BootProtocol};
pub use plan::{BootPlan, BootRequest, plan};

/// The GDT of the first vCPU.
pub const GDT_START: u64 = 0x1000;
/// `hvm_start_info`, its module list and its memory map (PVH).
pub const START_INFO: u64 = 0x2000;
/// `boot_params`, the "zero page" (Linux boot protocol).
pub const ZERO_PAGE: u64 = 0x7000;
/// First of six page-table pages: PML4, PDPT, four page directories.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel's command line, at most [`CMDLINE_MAX`] bytes and a NUL.
pub const CMDLINE_START: u64 = 0x2_0000;
/// Longest command line in bytes without the NUL; a bzImage may say less.
pub const CMDLINE_MAX: usize = 4095;
/// Longest command line of an ELF kernel, whose header does not say: Linux's COMMAND_LINE_SIZE on x86 less one.
pub const ELF_CMDLINE_MAX: usize = 2047;
/// End of the RAM below 1 MiB that the guest may use; above are the EBDA of old and the firmware's tables.
pub const LOW_MEMORY_END: u64 = 0x9_FC00;
/// First address for kernels and initrds: what is below is for the structures above.
pub const KERNEL_START: u64 = 0x10_0000;
/// Why a VM cannot be booted from the given images.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The file or buffer has no bytes.
    #[error("{0} is empty")]
    Empty(&'static str),
    /// Neither a bzImage nor an ELF file.
    #[error(
        "kernel is neither a bzImage nor an ELF file (it starts with {0:02x?}): give an x86-64 vmlinuz or vmlinux"
    )]
    NotAKernel(Vec<u8>),
    /// The file ends before what its own header promises.
    #[error("kernel is truncated: {what} needs {need} bytes, the file has {have}")]
    Truncated {
        /// The part that is cut.
        what: &'static str,
        /// Bytes needed.
        need: u64,
        /// Bytes there.
        have: u64,
    },
    /// The file contradicts itself.
    #[error("kernel is damaged: {0}")]
    Damaged(String),
    /// The kernel cannot be entered in a way that is supported.
    #[error("kernel is not supported: {0}")]
    Unsupported(String),
    /// The kernel does not fit.
    #[error("kernel needs RAM from {start:#x} to {end:#x}, which the VM does not have: give it more memory")]
    KernelTooLarge {
        /// First address needed.
        start: u64,
        /// First address behind.
        end: u64,
    },
    /// The initrd does not fit.
    #[error(
        "initrd of {size} bytes does not fit between the kernel's end ({kernel_end:#x}) and {limit:#x}: give the VM more memory"
    )]
    InitrdTooLarge {
        /// Bytes of the initrd.
        size: u64,
        /// Where the kernel ends.
        kernel_end: u64,
        /// First address that the initrd must not reach.
        limit: u64,
    },
    /// The command line is too long for this kernel.
    #[error("command line has {len} bytes, the kernel takes {max}")]
    CmdlineTooLong {
        /// Its length in bytes.
        len: usize,
        /// What the kernel takes.
        max: usize,
    },
    /// The command line has a control character.
    #[error("command line has the control character {0:?} at byte {1}")]
    CmdlineInvalid(char, usize),
    /// The VM's RAM cannot be described.
    #[error("memory map: {0}")]
    MemoryMap(String),
    /// Writing guest memory failed.
    #[error("cannot write guest memory at {gpa:#x}: {source}")]
    Write {
        /// Where.
        gpa: u64,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Writes a piece of guest memory; never called twice for one page, never across a home range's end.
pub type Preload<'a> = dyn FnMut(u64, &[u8]) -> Result<(), Box<dyn std::error::Error + Send + Sync>> + 'a;

/// Plans the boot and writes everything through `preload`. RAM that is not written must read as zero.
///
/// # Errors
/// See [`BootError`]; nothing is written unless the whole plan holds.
pub fn load_kernel(request: &BootRequest<'_>, preload: &mut Preload<'_>) -> Result<BootEntry, BootError> {
    let plan = plan(request)?;
    plan.write(request.memory, preload)?;
    Ok(plan.entry)
}
