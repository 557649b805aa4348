//! Conversions that lose nothing on the only machine there is: 64-bit x86.

const _: () = assert!(size_of::<usize>() == 8);

/// A number as an index or a length.
#[expect(clippy::cast_possible_truncation, reason = "usize has 64 bits, see above")]
pub const fn index(value: u64) -> usize {
    value as usize
}

/// The low half of a number.
pub const fn low32(value: u64) -> u32 {
    (value & 0xFFFF_FFFF) as u32
}

/// A CPU's index as its APIC id.
pub const fn apic_id(cpu: usize) -> u32 {
    low32(cpu as u64)
}
