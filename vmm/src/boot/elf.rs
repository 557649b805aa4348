//! An ELF64 kernel: its loadable segments by physical address, and the entry point of its PVH note if it has one.

use super::{BootError, KERNEL_START};
use linux_loader::elf::{ELFDATA2LSB, ELFMAG, Elf64_Ehdr, Elf64_Phdr, PT_LOAD, PT_NOTE};
use vm_memory::ByteValued;

const CLASS_64: u8 = 2;
const MACHINE_X86_64: u16 = 62;
/// `XEN_ELFNOTE_PHYS32_ENTRY` of note owner `Xen`.
const NOTE_PHYS32_ENTRY: u32 = 18;
/// More than any kernel has; bounds the work on a hostile file.
const MAX_SEGMENTS: u16 = 128;

/// One loadable segment.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// Guest-physical address.
    pub start: u64,
    /// First address behind, the zero-filled tail included.
    pub end: u64,
    /// The bytes from the file; the rest is zero.
    pub data: &'a [u8],
}

/// An ELF kernel that has been checked.
#[derive(Debug)]
pub struct ElfKernel<'a> {
    /// Segments in ascending order, disjoint.
    pub segments: Vec<Segment<'a>>,
    /// 64-bit entry point as a guest-physical address.
    pub entry: u64,
    /// 32-bit entry point of the PVH note.
    pub pvh_entry: Option<u64>,
}

/// True if the file says it is an ELF file.
pub fn probe(file: &[u8]) -> bool {
    file.starts_with(&ELFMAG[..4])
}

fn damaged(why: impl Into<String>) -> BootError {
    BootError::Damaged(why.into())
}

/// `file[offset..][..len]`, or an error that says what is cut.
fn slice<'a>(file: &'a [u8], what: &'static str, offset: u64, len: u64) -> Result<&'a [u8], BootError> {
    let end = offset.checked_add(len).ok_or_else(|| damaged(format!("{what} at {offset:#x} overflows")))?;
    let range = usize::try_from(offset).ok().zip(usize::try_from(end).ok());
    range.and_then(|(start, end)| file.get(start..end)).ok_or(BootError::Truncated {
        what,
        need: end,
        have: file.len() as u64,
    })
}

impl<'a> ElfKernel<'a> {
    /// First address behind the kernel.
    pub fn end(&self) -> u64 {
        self.segments.iter().map(|s| s.end).max().unwrap_or(KERNEL_START)
    }

    /// Reads and checks the headers. The caller has seen [`probe`] succeed.
    ///
    /// # Errors
    /// Truncated, damaged, not for x86-64, or without a usable entry point.
    pub fn parse(file: &'a [u8]) -> Result<ElfKernel<'a>, BootError> {
        let header_len = size_of::<Elf64_Ehdr>() as u64;
        let header = Elf64_Ehdr::read_exact_from(slice(file, "ELF header", 0, header_len)?)
            .map_err(|e| damaged(format!("ELF header: {e}")))?;
        if header.e_ident[4] != CLASS_64
            || u32::from(header.e_ident[5]) != u32::from(ELFDATA2LSB)
            || header.e_machine != MACHINE_X86_64
        {
            return Err(BootError::Unsupported("the ELF file is not for x86-64".into()));
        }
        let entry_len = size_of::<Elf64_Phdr>();
        if usize::from(header.e_phentsize) != entry_len
            || header.e_phnum == 0
            || header.e_phnum > MAX_SEGMENTS
        {
            return Err(damaged("no or impossible program headers"));
        }
        let table_len = u64::from(header.e_phnum) * entry_len as u64;
        let table = slice(file, "program headers", header.e_phoff, table_len)?;

        let mut segments: Vec<Segment<'a>> = Vec::new();
        let mut entry = None;
        let mut pvh_entry = None;
        for bytes in table.chunks_exact(entry_len) {
            let ph =
                Elf64_Phdr::read_exact_from(bytes).map_err(|e| damaged(format!("program header: {e}")))?;
            if ph.p_type == PT_NOTE {
                let notes = slice(file, "notes", ph.p_offset, ph.p_filesz)?;
                // Notes are padded to 4 bytes, whatever the segment's alignment says; some linkers pad to 8.
                pvh_entry = pvh_entry.or_else(|| find_pvh_note(notes, 4)).or_else(|| find_pvh_note(notes, 8));
            }
            if ph.p_type != PT_LOAD || ph.p_memsz == 0 {
                continue;
            }
            let data = slice(file, "segment", ph.p_offset, ph.p_filesz)?;
            let start = ph.p_paddr;
            if ph.p_filesz > ph.p_memsz {
                return Err(damaged(format!("segment at {start:#x} is larger in the file than in memory")));
            }
            let end = start.checked_add(ph.p_memsz).ok_or_else(|| damaged("a segment overflows"))?;
            if start < KERNEL_START {
                return Err(BootError::Unsupported(format!(
                    "a segment at {start:#x}: kernels are loaded from {KERNEL_START:#x} up"
                )));
            }
            if (start..end).contains(&header.e_entry) {
                entry = Some(header.e_entry);
            } else if let Some(offset) = header.e_entry.checked_sub(ph.p_vaddr).filter(|o| *o < ph.p_memsz) {
                entry = entry.or(Some(start + offset));
            }
            segments.push(Segment { start, end, data });
        }
        segments.sort_by_key(|s| s.start);
        if segments.is_empty() {
            return Err(damaged("no loadable segment"));
        }
        if let Some(pair) = segments.windows(2).find(|w| w[0].end > w[1].start) {
            return Err(damaged(format!("segments overlap at {:#x}", pair[1].start)));
        }
        let entry = entry.ok_or_else(|| damaged(format!("entry {:#x} is in no segment", header.e_entry)))?;
        if let Some(pvh) = pvh_entry {
            if !segments.iter().any(|s| (s.start..s.end).contains(&pvh)) {
                return Err(damaged(format!("the PVH note's entry {pvh:#x} is in no segment")));
            }
        }
        Ok(ElfKernel { segments, entry, pvh_entry })
    }
}

/// The descriptor of a `XEN_ELFNOTE_PHYS32_ENTRY` note of 4 or 8 bytes.
fn find_pvh_note(mut notes: &[u8], align: usize) -> Option<u64> {
    let word = |at: usize, from: &[u8]| Some(u32::from_le_bytes(from.get(at..at + 4)?.try_into().ok()?));
    while notes.len() >= 12 {
        let name_len = usize::try_from(word(0, notes)?).ok()?;
        let desc_len = usize::try_from(word(4, notes)?).ok()?;
        let kind = word(8, notes)?;
        let desc_start = 12usize.checked_add(name_len)?.checked_next_multiple_of(align)?;
        let desc_end = desc_start.checked_add(desc_len)?;
        let desc = notes.get(desc_start..desc_end)?;
        if kind == NOTE_PHYS32_ENTRY && notes.get(12..12 + name_len) == Some(b"Xen\0") {
            return match *desc {
                [a, b, c, d] => Some(u64::from(u32::from_le_bytes([a, b, c, d]))),
                [a, b, c, d, 0, 0, 0, 0] => Some(u64::from(u32::from_le_bytes([a, b, c, d]))),
                _ => None,
            };
        }
        notes = notes.get(desc_end.checked_next_multiple_of(align)?..)?;
    }
    None
}
