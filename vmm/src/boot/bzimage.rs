//! A Linux bzImage: what its setup header says (Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header").

use super::{BootError, CMDLINE_MAX, KERNEL_START};
use linux_loader::bootparam::setup_header;
use vm_memory::ByteValued;

const HEADER_OFFSET: usize = 0x1F1;
/// Where `HdrS` is.
const MAGIC_OFFSET: usize = 0x202;
const MAGIC: &[u8] = b"HdrS";
/// Boot protocol 2.12 (Linux 3.8): the first with `xloadflags`.
const MIN_VERSION: u16 = 0x020C;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
const SECTOR: usize = 512;
/// The 64-bit entry point's distance from the start of the protected-mode code.
const ENTRY_64: u64 = 0x200;

/// A bzImage that has been checked.
#[derive(Debug)]
pub struct BzImage<'a> {
    /// The setup header, to be passed on in the zero page.
    pub header: setup_header,
    /// The protected-mode code.
    pub payload: &'a [u8],
    /// Where the payload goes.
    pub load: u64,
    /// First address behind what the kernel uses before it knows the memory map.
    pub end: u64,
    /// Longest command line in bytes, without NUL.
    pub cmdline_max: usize,
    /// Last address that the initrd may occupy.
    pub initrd_addr_max: u64,
}

/// True if the file says it is a Linux kernel with a setup header.
pub fn probe(file: &[u8]) -> bool {
    file.get(MAGIC_OFFSET..MAGIC_OFFSET + MAGIC.len()) == Some(MAGIC)
}

impl<'a> BzImage<'a> {
    /// The address of the first 64-bit instruction.
    pub fn entry(&self) -> u64 {
        self.load + ENTRY_64
    }

    /// Reads and checks the header. The caller has seen [`probe`] succeed.
    ///
    /// # Errors
    /// Truncated, damaged, or without a 64-bit entry point.
    pub fn parse(file: &'a [u8]) -> Result<BzImage<'a>, BootError> {
        let have = file.len() as u64;
        let truncated = |what, need: usize| BootError::Truncated { what, need: need as u64, have };
        // The jump at 0x200 skips the header: its displacement says how long this kernel's header is.
        let jump = *file.get(0x201).ok_or(truncated("setup header", MAGIC_OFFSET))?;
        let end = MAGIC_OFFSET + usize::from(jump);
        let bytes = file.get(HEADER_OFFSET..end).ok_or(truncated("setup header", end))?;
        let mut padded = vec![0; size_of::<setup_header>()];
        let len = bytes.len().min(padded.len());
        padded[..len].copy_from_slice(&bytes[..len]);
        let mut header = setup_header::read_exact_from(&padded[..])
            .map_err(|e| BootError::Damaged(format!("setup header: {e}")))?;

        let version = header.version;
        if version < MIN_VERSION {
            let (major, minor) = (version >> 8, version & 0xFF);
            return Err(BootError::Unsupported(format!(
                "boot protocol {major}.{minor:02}, needs 2.12 (Linux 3.8)"
            )));
        }
        if header.xloadflags & XLF_KERNEL_64 == 0 || header.loadflags & LOADED_HIGH == 0 {
            return Err(BootError::Unsupported("no 64-bit entry point: give an x86-64 bzImage".into()));
        }
        let setup_sectors = if header.setup_sects == 0 { 4 } else { usize::from(header.setup_sects) };
        let start = (setup_sectors + 1) * SECTOR;
        // In units of 16 bytes; what follows (a signature, say) is not the kernel's.
        let code_len = u64::from(header.syssize) * 16;
        if code_len <= ENTRY_64 {
            return Err(BootError::Damaged(format!("its code has {code_len} bytes")));
        }
        let need = start as u64 + code_len;
        let payload = usize::try_from(need)
            .ok()
            .and_then(|end| file.get(start..end))
            .ok_or(BootError::Truncated { what: "protected-mode code", need, have })?;

        let pref = header.pref_address;
        let relocatable = header.relocatable_kernel != 0;
        let load = if relocatable { KERNEL_START } else { pref };
        let alignment = u64::from(header.kernel_alignment);
        if !alignment.is_power_of_two() || !(KERNEL_START..1 << 32).contains(&load) || pref >= 1 << 32 {
            return Err(BootError::Damaged(format!("alignment {alignment:#x}, preferred address {pref:#x}")));
        }
        // The decompressor moves itself to the end of `init_size` bytes from the higher of both.
        let run = load.next_multiple_of(alignment).max(pref);
        let end = (run + u64::from(header.init_size)).max(load + code_len);

        let mut cmdline_max = usize::try_from(header.cmdline_size).unwrap_or(CMDLINE_MAX).min(CMDLINE_MAX);
        if cmdline_max == 0 {
            cmdline_max = 255;
        }
        header.type_of_loader = 0xFF;
        let initrd_addr_max = u64::from(header.initrd_addr_max);
        Ok(BzImage { header, payload, load, end, cmdline_max, initrd_addr_max })
    }
}
