//! Decides what goes where in the memory of a fresh VM. Pure: bytes in, writes out.

use super::bzimage::{self, BzImage};
use super::elf::{self, ElfKernel};
use super::entry::{BootEntry, BootProtocol, page_tables};
use super::firmware;
use super::ram::RamMap;
use super::{
    BootError, CMDLINE_START, ELF_CMDLINE_MAX, GDT_START, KERNEL_START, PAGE_TABLES, Preload, START_INFO,
    ZERO_PAGE, params,
};
use crate::acpi::AcpiTables;
use dsm::addr::{HomeRange, MemberId, PAGE_SIZE};
use linux_loader::bootparam::setup_header;
use std::borrow::Cow;

/// What to boot.
#[derive(Debug)]
pub struct BootRequest<'a> {
    /// A bzImage or an ELF file.
    pub kernel: &'a [u8],
    /// Initial RAM disk.
    pub initrd: Option<&'a [u8]>,
    /// Command line without NUL.
    pub cmdline: &'a str,
    /// All RAM, as in the topology.
    pub memory: &'a [HomeRange],
    /// The member that loads: the initrd goes into RAM whose home it is, where that is possible.
    pub loader: MemberId,
    /// The firmware's tables.
    pub acpi: &'a AcpiTables,
}

/// Bytes for one range of guest memory.
#[derive(Debug)]
pub struct GuestWrite<'a> {
    /// First address, a multiple of a page.
    pub gpa: u64,
    /// What goes there; the rest of the last page is zero.
    pub data: Cow<'a, [u8]>,
}

/// Everything that is written before the VM runs, and how it starts. No page is in two writes.
#[derive(Debug)]
pub struct BootPlan<'a> {
    /// The writes, ascending.
    pub writes: Vec<GuestWrite<'a>>,
    /// How vCPU 0 starts.
    pub entry: BootEntry,
}

/// A kernel of either kind, reduced to what placement needs.
struct Kernel<'a> {
    writes: Vec<GuestWrite<'a>>,
    /// RAM that the kernel needs: `[start, end)` each.
    needs: Vec<(u64, u64)>,
    entry: BootEntry,
    header: setup_header,
    cmdline_max: usize,
    initrd_addr_max: u64,
}

/// Plans the boot.
///
/// # Errors
/// See [`BootError`].
pub fn plan<'a>(request: &BootRequest<'a>) -> Result<BootPlan<'a>, BootError> {
    let ram = RamMap::new(request.memory)?;
    let kernel = read_kernel(request.kernel)?;
    for &(start, end) in &kernel.needs {
        if !ram.contains(start, end) {
            return Err(BootError::KernelTooLarge { start, end });
        }
    }
    check_cmdline(request.cmdline, kernel.cmdline_max)?;
    let kernel_end = kernel.needs.iter().map(|n| n.1).max().unwrap_or(KERNEL_START);

    let mut writes = kernel.writes;
    let mut initrd_at = None;
    if let Some(initrd) = request.initrd {
        if initrd.is_empty() {
            return Err(BootError::Empty("initrd"));
        }
        let gpa = place_initrd(request, &ram, initrd.len() as u64, kernel_end, kernel.initrd_addr_max)?;
        initrd_at = Some((gpa, initrd.len() as u64));
        writes.push(GuestWrite { gpa, data: Cow::Borrowed(initrd) });
    }

    let mut cmdline = request.cmdline.as_bytes().to_vec();
    cmdline.push(0);
    let mut add = |gpa, data: Vec<u8>| writes.push(GuestWrite { gpa, data: Cow::Owned(data) });
    let rsdp = request.acpi.rsdp;
    match kernel.entry.protocol {
        BootProtocol::Linux64 => {
            let page = params::zero_page(kernel.header, &ram, initrd_at, request.cmdline.len(), rsdp)?;
            add(ZERO_PAGE, page);
            add(PAGE_TABLES, page_tables());
        }
        BootProtocol::Pvh => add(START_INFO, params::start_info(&ram, initrd_at, rsdp)),
    }
    add(GDT_START, kernel.entry.gdt());
    add(CMDLINE_START, cmdline);
    add(firmware::FIRMWARE_START, firmware::page());
    if !request.acpi.bytes.is_empty() {
        add(request.acpi.gpa, request.acpi.bytes.clone());
    }
    writes.sort_by_key(|w| w.gpa);
    for pair in writes.windows(2) {
        if (pair[0].gpa + pair[0].data.len() as u64).next_multiple_of(PAGE_SIZE) > pair[1].gpa {
            return Err(BootError::MemoryMap(format!("two things want the page at {:#x}", pair[1].gpa)));
        }
    }
    Ok(BootPlan { writes, entry: kernel.entry })
}

fn read_kernel(file: &[u8]) -> Result<Kernel<'_>, BootError> {
    if file.is_empty() {
        return Err(BootError::Empty("kernel"));
    }
    if elf::probe(file) {
        let kernel = ElfKernel::parse(file)?;
        let entry = match kernel.pvh_entry {
            Some(rip) => BootEntry { protocol: BootProtocol::Pvh, rip },
            None => BootEntry { protocol: BootProtocol::Linux64, rip: kernel.entry },
        };
        return Ok(Kernel {
            writes: merge_segments(&kernel),
            needs: kernel.segments.iter().map(|s| (s.start, s.end)).collect(),
            entry,
            header: setup_header::default(),
            cmdline_max: ELF_CMDLINE_MAX,
            initrd_addr_max: u64::from(u32::MAX),
        });
    }
    if bzimage::probe(file) {
        let image = BzImage::parse(file)?;
        return Ok(Kernel {
            writes: vec![GuestWrite { gpa: image.load, data: Cow::Borrowed(image.payload) }],
            needs: vec![(image.load, image.end)],
            entry: BootEntry { protocol: BootProtocol::Linux64, rip: image.entry() },
            header: image.header,
            cmdline_max: image.cmdline_max,
            initrd_addr_max: image.initrd_addr_max,
        });
    }
    Err(BootError::NotAKernel(file.iter().copied().take(8).collect()))
}

/// One write per group of segments that share pages, page-aligned, without the zero tails.
fn merge_segments<'a>(kernel: &ElfKernel<'a>) -> Vec<GuestWrite<'a>> {
    let mut writes: Vec<GuestWrite<'a>> = Vec::new();
    for segment in kernel.segments.iter().filter(|s| !s.data.is_empty()) {
        let page = segment.start - segment.start % PAGE_SIZE;
        // In a slice's length, so it fits usize.
        let gap = |from: u64| usize::try_from(segment.start - from).unwrap_or(usize::MAX);
        match writes.last_mut() {
            Some(last) if (last.gpa + last.data.len() as u64).next_multiple_of(PAGE_SIZE) > page => {
                let bytes = last.data.to_mut();
                bytes.resize(gap(last.gpa), 0);
                bytes.extend_from_slice(segment.data);
            }
            _ if page == segment.start => {
                writes.push(GuestWrite { gpa: page, data: Cow::Borrowed(segment.data) });
            }
            _ => {
                let mut bytes = vec![0; gap(page)];
                bytes.extend_from_slice(segment.data);
                writes.push(GuestWrite { gpa: page, data: Cow::Owned(bytes) });
            }
        }
    }
    writes
}

fn check_cmdline(cmdline: &str, max: usize) -> Result<(), BootError> {
    if cmdline.len() > max {
        return Err(BootError::CmdlineTooLong { len: cmdline.len(), max });
    }
    match cmdline.char_indices().find(|(_, c)| c.is_control()) {
        Some((at, c)) => Err(BootError::CmdlineInvalid(c, at)),
        None => Ok(()),
    }
}

/// As high as possible below the kernel's limit, out of the way of its early allocations; first in RAM whose
/// home is the loading member, so that filling it crosses no network.
fn place_initrd(
    request: &BootRequest<'_>,
    ram: &RamMap,
    size: u64,
    kernel_end: u64,
    addr_max: u64,
) -> Result<u64, BootError> {
    let limit = addr_max.saturating_add(1).min(ram.low_end());
    let floor = kernel_end.next_multiple_of(PAGE_SIZE);
    let try_range = |start: u64, end: u64| {
        let gpa = end.min(limit).checked_sub(size)? / PAGE_SIZE * PAGE_SIZE;
        (gpa >= start.max(floor)).then_some(gpa)
    };
    let home = request.memory.iter().rev().filter(|r| r.home == request.loader);
    home.filter_map(|r| try_range(r.start, r.end()))
        .next()
        .or_else(|| try_range(0, limit))
        .ok_or(BootError::InitrdTooLarge { size, kernel_end, limit })
}

impl BootPlan<'_> {
    /// Hands every write to `preload`, cut at the ends of home ranges.
    ///
    /// # Errors
    /// [`BootError::Write`] if `preload` fails, [`BootError::MemoryMap`] for a write outside RAM.
    pub fn write(&self, memory: &[HomeRange], preload: &mut Preload<'_>) -> Result<(), BootError> {
        for write in &self.writes {
            let (mut gpa, mut rest) = (write.gpa, &write.data[..]);
            while !rest.is_empty() {
                let range = memory
                    .iter()
                    .find(|r| (r.start..r.end()).contains(&gpa))
                    .ok_or_else(|| BootError::MemoryMap(format!("no RAM at {gpa:#x}")))?;
                let room = usize::try_from(range.end() - gpa).unwrap_or(usize::MAX);
                let (now, later) = rest.split_at(rest.len().min(room));
                preload(gpa, now).map_err(|source| BootError::Write { gpa, source })?;
                gpa += now.len() as u64;
                rest = later;
            }
        }
        Ok(())
    }
}
