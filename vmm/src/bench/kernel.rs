//! ELF64 kernels of a few instructions.

/// Where they are entered, in 64-bit mode with the low 4 GiB mapped one to one.
const ENTRY: u64 = 1 << 20;
/// Longest code, bytes.
const LONGEST: usize = 256;

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
