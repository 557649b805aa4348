//! ELF64 kernels of a few instructions.

/// Where they are entered, in 64-bit mode with the low 4 GiB mapped one to one.
const ENTRY: u64 = 1 << 20;
/// Longest code, bytes.
const LONGEST: usize = 256;

/// What a loop over pages does with each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Touch {
    /// Write its address to it.
    Write,
    /// Add one to its first word.
    Count,
}

/// Adds a loop over so many pages from `start` on, at least one; 35 bytes.
pub(super) fn over_pages(code: &mut Vec<u8>, start: u64, pages: u64, touch: Touch) {
    // mov rdi, start; mov rcx, pages
    code.extend([0x48, 0xBF]);
    code.extend(start.to_le_bytes());
    code.extend([0x48, 0xB9]);
    code.extend(pages.max(1).to_le_bytes());
    code.extend(match touch {
        // mov [rdi], rdi
        Touch::Write => [0x48, 0x89, 0x3F],
        // inc qword [rdi]
        Touch::Count => [0x48, 0xFF, 0x07],
    });
    // add rdi, 4096; dec rcx; jnz
    code.extend([0x48, 0x81, 0xC7, 0, 0x10, 0, 0, 0x48, 0xFF, 0xC9, 0x75, 0xF1]);
}

/// A kernel that is this code, of at most 256 bytes.
pub(super) fn elf(code: &[u8]) -> Vec<u8> {
    let mut elf = vec![0u8; 0x1000];
    let mut put = |at: usize, bytes: &[u8]| {
        elf.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
    };
    // 64 bits, little-endian, executable for x86-64, one program header right behind the file header.
    put(0, b"\x7FELF\x02\x01\x01");
    for (at, value) in [(16, 2u16), (18, 62), (52, 64), (54, 56), (56, 1), (58, 64)] {
        put(at, &value.to_le_bytes());
    }
    put(20, &1u32.to_le_bytes());
    put(24, &ENTRY.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    // PT_LOAD, readable and executable: one page, of which the last 256 bytes of the file are the start.
    put(64, &1u32.to_le_bytes());
    put(68, &5u32.to_le_bytes());
    for (at, value) in [(72, 0xF00u64), (80, ENTRY), (88, ENTRY), (96, 0x100), (104, 0x1000), (112, 0x1000)] {
        put(at, &value.to_le_bytes());
    }
    put(0xF00, code.get(..LONGEST).unwrap_or(code));
    elf
}
