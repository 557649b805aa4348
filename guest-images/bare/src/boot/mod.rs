//! Start-up and the CPL-0 half of the guest, in assembly: `entry.s` from PVH or SIPI to CPL 3, `traps.s` interrupts and
//! privileged services, `tables.s` page tables and descriptors. Rust runs at CPL 3 only.

use core::cell::UnsafeCell;
use core::mem::offset_of;
use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};

/// Most CPUs a guest may have.
pub const MAX_CPUS: usize = 64;
/// GiB of guest-physical memory that the page tables map, from 0.
pub const MAPPED_GIB: u64 = 16;
/// Page (below 1 MiB) that holds the real-mode start-up code of the APs; its number is the SIPI vector.
pub const TRAMPOLINE: u64 = 0x8000;
/// The same page as a SIPI names it.
pub const TRAMPOLINE_VECTOR: u8 = 8;
/// Added to the number of a CPL-0 service in RAX, so that a UD2 of the compiler is not taken for a request.
pub const SERVICE_MAGIC: u64 = 0x5350_4100;

const BLOCK_SHIFT: u32 = 13;
const BLOCK_SIZE: usize = 1 << BLOCK_SHIFT;
const TSS_SIZE: usize = 104 + 256 + 8;
const STACK_SHIFT: u32 = 15;
const STACK_SIZE: usize = 1 << STACK_SHIFT;

/// What CPL 0 keeps per CPU, with its stack behind it up to [`BLOCK_SIZE`]; found by masking RSP.
#[repr(C, align(8192))]
#[derive(Debug)]
pub struct CpuBlock {
    /// Interrupts taken since start-up, by vector.
    pub interrupts: [AtomicU64; 256],
    gdt: UnsafeCell<[u64; 10]>,
    /// TSS, then the I/O bitmap of ports 0..0x800 and its end mark.
    tss: UnsafeCell<[u8; TSS_SIZE]>,
    index: u64,
    /// TSC at the end of the last interrupt.
    pub interrupt_tsc: AtomicU64,
    stack: UnsafeCell<[u8; BLOCK_SIZE - 2048 - 80 - TSS_SIZE - 16]>,
}

const _: () = assert!((TRAMPOLINE_VECTOR as u64) << 12 == TRAMPOLINE);
const _: () = assert!(size_of::<CpuBlock>() == BLOCK_SIZE);

// SAFETY: Rust touches only the atomics; the cells belong to the assembly of the one CPU that owns the block.
unsafe impl Sync for CpuBlock {}

/// The blocks of all CPUs, by index.
#[unsafe(no_mangle)]
pub static cpu_blocks: [CpuBlock; MAX_CPUS] = [const {
    CpuBlock {
        interrupts: [const { AtomicU64::new(0) }; 256],
        gdt: UnsafeCell::new([0; 10]),
        tss: UnsafeCell::new([0; TSS_SIZE]),
        index: 0,
        interrupt_tsc: AtomicU64::new(0),
        stack: UnsafeCell::new([0; BLOCK_SIZE - 2048 - 80 - TSS_SIZE - 16]),
    }
}; MAX_CPUS];

/// CPL-3 stacks, each on pages of its own.
#[repr(C, align(4096))]
#[derive(Debug)]
pub struct Stacks(UnsafeCell<[[u8; STACK_SIZE]; MAX_CPUS]>);

// SAFETY: never touched through this name; each CPU uses its slice as its stack.
unsafe impl Sync for Stacks {}

#[unsafe(no_mangle)]
static user_stacks: Stacks = Stacks(UnsafeCell::new([[0; STACK_SIZE]; MAX_CPUS]));

/// Address of `hvm_start_info`, as PVH handed it over.
#[unsafe(no_mangle)]
pub static start_info: AtomicU32 = AtomicU32::new(0);
/// Index for the AP that starts next.
#[unsafe(no_mangle)]
pub static ap_index: AtomicU32 = AtomicU32::new(0);
/// Not 0: interrupts are acknowledged through the xAPIC's MMIO page instead of x2APIC MSRs.
#[unsafe(no_mangle)]
pub static xapic_mode: AtomicU8 = AtomicU8::new(0);

unsafe extern "C" {
    static trampoline_start: u8;
    static trampoline_end: u8;
    static image_end: u8;
}

/// First address behind the image, its stacks included.
pub fn end_of_image() -> u64 {
    (&raw const image_end).addr() as u64
}

/// Copies the real-mode code of the APs to [`TRAMPOLINE`].
///
/// # Safety
/// Nothing else may live in that page any more (the loader's start info may have).
pub unsafe fn place_trampoline() {
    let from = &raw const trampoline_start;
    let len = (&raw const trampoline_end).addr() - from.addr();
    // SAFETY: both ranges are identity-mapped RAM; the caller vouches for the destination.
    unsafe { core::ptr::copy_nonoverlapping(from, TRAMPOLINE as *mut u8, len) };
}

core::arch::global_asm!(
    include_str!("tables.s"),
    include_str!("entry.s"),
    include_str!("traps.s"),
    gib = const MAPPED_GIB,
    trampoline = const TRAMPOLINE,
    service = const SERVICE_MAGIC,
    block_shift = const BLOCK_SHIFT,
    block_size = const BLOCK_SIZE,
    block_gdt = const offset_of!(CpuBlock, gdt),
    block_tss = const offset_of!(CpuBlock, tss),
    block_index = const offset_of!(CpuBlock, index),
    block_tsc = const offset_of!(CpuBlock, interrupt_tsc),
    stack_shift = const STACK_SHIFT,
    stack_size = const STACK_SIZE,
    options(att_syntax)
);
