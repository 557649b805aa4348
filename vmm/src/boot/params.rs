//! The structures that tell a kernel about its machine: Linux's zero page and PVH's start info.

use super::ram::{RamMap, Region};
use super::{BootError, CMDLINE_START, START_INFO};
use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::ByteValued;

/// Where the initrd is: address and length in bytes.
pub type Initrd = Option<(u64, u64)>;

fn low32(what: &str, value: u64) -> Result<u32, BootError> {
    u32::try_from(value).map_err(|_| BootError::MemoryMap(format!("{what} {value:#x} is not below 4 GiB")))
}

/// `boot_params` for the 64-bit boot protocol. `header` is the bzImage's, or all zero for an ELF kernel.
pub fn zero_page(
    header: setup_header,
    ram: &RamMap,
    initrd: Initrd,
    cmdline_len: usize,
    rsdp: u64,
) -> Result<Vec<u8>, BootError> {
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: rsdp, ..Default::default() };
    let regions = ram.regions();
    let mut table = params.e820_table;
    if regions.len() > table.len() {
        return Err(BootError::MemoryMap(format!(
            "{} ranges of RAM, e820 takes {}",
            regions.len(),
            table.len()
        )));
    }
    for (entry, Region { start, end, kind }) in table.iter_mut().zip(&regions) {
        *entry = boot_e820_entry { addr: *start, size: end - start, r#type: *kind as u32 };
    }
    params.e820_table = table;
    params.e820_entries = u8::try_from(regions.len()).unwrap_or(u8::MAX);
    params.hdr.type_of_loader = 0xFF;
    params.hdr.boot_flag = 0xAA55;
    params.hdr.header = u32::from_le_bytes(*b"HdrS");
    params.hdr.cmd_line_ptr = low32("command line", CMDLINE_START)?;
    params.hdr.cmdline_size = low32("command line length", cmdline_len as u64)?;
    if let Some((start, len)) = initrd {
        params.hdr.ramdisk_image = low32("initrd", start)?;
        params.hdr.ramdisk_size = low32("initrd length", len)?;
    }
    Ok(params.as_slice().to_vec())
}

/// `hvm_start_info` version 1 with its module list and memory map behind it, for [`START_INFO`].
pub fn start_info(ram: &RamMap, initrd: Initrd, rsdp: u64) -> Vec<u8> {
    let modlist_at = START_INFO + size_of::<hvm_start_info>() as u64;
    let memmap_at = modlist_at + size_of::<hvm_modlist_entry>() as u64;
    let regions = ram.regions();
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: if initrd.is_some() { modlist_at } else { 0 },
        cmdline_paddr: CMDLINE_START,
        rsdp_paddr: rsdp,
        memmap_paddr: memmap_at,
        memmap_entries: u32::try_from(regions.len()).unwrap_or(u32::MAX),
        ..Default::default()
    };
    let (paddr, size) = initrd.unwrap_or((0, 0));
    let module = hvm_modlist_entry { paddr, size, ..Default::default() };
    let mut bytes = info.as_slice().to_vec();
    bytes.extend_from_slice(module.as_slice());
    for Region { start, end, kind } in regions {
        let entry =
            hvm_memmap_table_entry { addr: start, size: end - start, type_: kind as u32, reserved: 0 };
        bytes.extend_from_slice(entry.as_slice());
    }
    bytes
}
