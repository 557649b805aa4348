//! Single x86 instructions, so that what is executed is what the litmus test names and no compiler reorders it.

use std::arch::asm;
use std::sync::atomic::AtomicU32;

/// How the accesses of a litmus thread are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// Plain MOVs.
    Plain,
    /// An MFENCE between the two accesses (or after a lone store).
    Mfence,
    /// Stores by XCHG; in threads that only load, loads by LOCK XADD of zero.
    Locked,
}

impl Flavour {
    /// All of them.
    pub const ALL: [Flavour; 3] = [Flavour::Plain, Flavour::Mfence, Flavour::Locked];

    /// The name in results.
    pub fn name(self) -> &'static str {
        match self {
            Flavour::Plain => "plain",
            Flavour::Mfence => "mfence",
            Flavour::Locked => "locked",
        }
    }
}

/// One instruction sequence per flavour over the operands `a`, `b` (addresses) and `v`, `w` (values).
macro_rules! shape {
    ($flavour:expr, $plain:literal, $mfence:literal, $locked:literal, $($operands:tt)*) => {
        // SAFETY: the addresses come from `&AtomicU32`, so they are valid, aligned and may be written through; all
        // registers used are declared, and the stack is not touched.
        unsafe {
            match $flavour {
                Flavour::Plain => asm!($plain, $($operands)*, options(nostack)),
                Flavour::Mfence => asm!($mfence, $($operands)*, options(nostack)),
                Flavour::Locked => asm!($locked, $($operands)*, options(nostack)),
            }
        }
    };
}

/// a = v
#[inline(always)]
pub fn store(flavour: Flavour, a: &AtomicU32, v: u32) {
    let mut _v = v;
    shape!(
        flavour,
        "mov dword ptr [{a}], {v:e}",
        "mov dword ptr [{a}], {v:e}; mfence",
        "xchg dword ptr [{a}], {v:e}",
        a = in(reg) a.as_ptr(), v = inout(reg) _v
    );
}

/// a = v; b = w
#[inline(always)]
pub fn store_store(flavour: Flavour, a: &AtomicU32, v: u32, b: &AtomicU32, w: u32) {
    let (mut _v, mut _w) = (v, w);
    shape!(
        flavour,
        "mov dword ptr [{a}], {v:e}; mov dword ptr [{b}], {w:e}",
        "mov dword ptr [{a}], {v:e}; mfence; mov dword ptr [{b}], {w:e}",
        "xchg dword ptr [{a}], {v:e}; xchg dword ptr [{b}], {w:e}",
        a = in(reg) a.as_ptr(), b = in(reg) b.as_ptr(), v = inout(reg) _v, w = inout(reg) _w
    );
}

/// a = v; return b
#[inline(always)]
pub fn store_load(flavour: Flavour, a: &AtomicU32, v: u32, b: &AtomicU32) -> u32 {
    let mut _v = v;
    let r: u32;
    shape!(
        flavour,
        "mov dword ptr [{a}], {v:e}; mov {r:e}, dword ptr [{b}]",
        "mov dword ptr [{a}], {v:e}; mfence; mov {r:e}, dword ptr [{b}]",
        "xchg dword ptr [{a}], {v:e}; mov {r:e}, dword ptr [{b}]",
        a = in(reg) a.as_ptr(), b = in(reg) b.as_ptr(), v = inout(reg) _v, r = out(reg) r
    );
    r
}

/// r = a; b = w; return r
#[inline(always)]
pub fn load_store(flavour: Flavour, a: &AtomicU32, b: &AtomicU32, w: u32) -> u32 {
    let mut _w = w;
    let r: u32;
    shape!(
        flavour,
        "mov {r:e}, dword ptr [{a}]; mov dword ptr [{b}], {w:e}",
        "mov {r:e}, dword ptr [{a}]; mfence; mov dword ptr [{b}], {w:e}",
        "mov {r:e}, dword ptr [{a}]; xchg dword ptr [{b}], {w:e}",
        a = in(reg) a.as_ptr(), b = in(reg) b.as_ptr(), w = inout(reg) _w, r = out(reg) r
    );
    r
}

/// return (a, b), read in that order
#[inline(always)]
pub fn load_load(flavour: Flavour, a: &AtomicU32, b: &AtomicU32) -> (u32, u32) {
    let (mut r, mut s) = (0u32, 0u32);
    shape!(
        flavour,
        "mov {r:e}, dword ptr [{a}]; mov {s:e}, dword ptr [{b}]",
        "mov {r:e}, dword ptr [{a}]; mfence; mov {s:e}, dword ptr [{b}]",
        "lock xadd dword ptr [{a}], {r:e}; lock xadd dword ptr [{b}], {s:e}",
        a = in(reg) a.as_ptr(), b = in(reg) b.as_ptr(), r = inout(reg) r, s = inout(reg) s
    );
    (r, s)
}

/// LOCK INC
pub fn lock_inc(a: &AtomicU32) {
    // SAFETY: the address comes from `&AtomicU32`; the flags are clobbered by default.
    unsafe { asm!("lock inc dword ptr [{a}]", a = in(reg) a.as_ptr(), options(nostack)) }
}

/// LOCK XADD of one
pub fn lock_xadd(a: &AtomicU32) -> u32 {
    let mut r = 1u32;
    // SAFETY: as in `lock_inc`.
    unsafe {
        asm!("lock xadd dword ptr [{a}], {r:e}", a = in(reg) a.as_ptr(), r = inout(reg) r, options(nostack));
    }
    r
}

/// One LOCK CMPXCHG from `old` to `new`; the value found, which is `old` exactly if it was exchanged.
pub fn lock_cmpxchg(a: &AtomicU32, old: u32, new: u32) -> u32 {
    let mut found = old;
    // SAFETY: as in `lock_inc`.
    unsafe {
        asm!("lock cmpxchg dword ptr [{a}], {n:e}", a = in(reg) a.as_ptr(), n = in(reg) new,
            inout("eax") found, options(nostack));
    }
    found
}
