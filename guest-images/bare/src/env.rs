//! What the loader and the command line say: read once by the first CPU, then shared read-only.

use crate::apic::Mode;
use crate::boot::{self, MAPPED_GIB, MAX_CPUS};
use crate::machine;
use bare_support::cast::index;
use bare_support::cmdline::Cmdline;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering};

/// Why a test, or the start-up, could not go on.
#[derive(Clone, Copy, Debug)]
pub struct Failure {
    /// The CPU that gave up, or that did not answer.
    pub cpu: usize,
    /// What went wrong.
    pub what: &'static str,
}

/// Shorthand for a failure of the calling CPU's own input.
pub const fn bad(what: &'static str) -> Failure {
    Failure { cpu: 0, what }
}

const MAX_RANGES: usize = 16;
const MAX_CMDLINE: usize = 2048;
/// Clock assumed when nobody says the TSC's frequency; deadlines and microseconds are then approximate.
const ASSUMED_KHZ: u64 = 2_000_000;

/// The guest's parameters.
#[derive(Debug)]
pub struct Env {
    /// The command line.
    pub cmdline: Cmdline<'static>,
    /// CPUs to use, 1..=[`MAX_CPUS`].
    pub cpus: usize,
    /// TSC frequency.
    pub khz: u64,
    /// Who said so: `cmdline`, `cpuid` or `assumed`.
    pub khz_from: &'static str,
    /// How the local APIC is driven.
    pub apic: Mode,
    /// TSC ticks after which a wait gives up (`deadline=` seconds, default 60).
    pub patience: u64,
    ram: [(u64, u64); MAX_RANGES],
    next: AtomicU64,
}

/// One guest page as 512 words.
#[repr(C, align(4096))]
#[derive(Debug)]
pub struct Page(pub [AtomicU64; 512]);

impl Page {
    /// Word 0, where most tests keep their value.
    pub const fn first(&self) -> &AtomicU64 {
        &self.0[0]
    }
}

/// A word of physical memory below 16 GiB, read as the loader left it.
fn peek<T: Copy>(address: u64) -> T {
    // SAFETY: identity-mapped; a loader's pointer beyond RAM reads as open bus. Unaligned reads are fine.
    unsafe { core::ptr::read_unaligned(address as *const T) }
}

/// Where the command line is kept.
struct Text(UnsafeCell<[u8; MAX_CMDLINE]>);

// SAFETY: written once, by the first CPU, before any other runs.
unsafe impl Sync for Text {}

fn copy_cmdline(address: u64) -> &'static str {
    static TEXT: Text = Text(UnsafeCell::new([0; MAX_CMDLINE]));
    if address == 0 {
        return "";
    }
    // SAFETY: called once, by the first CPU, before any other runs.
    let text = unsafe { &mut *TEXT.0.get() };
    let mut len = 0;
    for (slot, at) in text.iter_mut().zip(address..) {
        *slot = peek(at);
        if *slot == 0 {
            break;
        }
        len += 1;
    }
    text.get(..len).and_then(|t| core::str::from_utf8(t).ok()).unwrap_or("")
}

/// E820 RAM of the start info, or nothing if the loader gave no map (then no check is made).
fn copy_ram(info: u64) -> [(u64, u64); MAX_RANGES] {
    let mut ram = [(0, 0); MAX_RANGES];
    let version: u32 = peek(info + 4);
    if version >= 1 {
        let (table, entries): (u64, u32) = (peek(info + 40), peek(info + 48));
        let usable = (0..u64::from(entries)).map(|i| table + i * 24).filter(|e| peek::<u32>(e + 16) == 1);
        for (slot, entry) in ram.iter_mut().zip(usable) {
            let start: u64 = peek(entry);
            *slot = (start, start + peek::<u64>(entry + 8));
        }
    }
    ram
}

/// The TSC's frequency from CPUID: the hypervisor's timing leaf, or crystal ratio and frequency (SDM, leaf 15H).
fn cpuid_khz() -> Option<u64> {
    let [top, ..] = machine::cpuid(0x4000_0000);
    if (0x4000_0010..0x4000_0100).contains(&top) {
        let [khz, ..] = machine::cpuid(0x4000_0010);
        return (khz != 0).then_some(khz.into());
    }
    if machine::cpuid(0)[0] < 0x15 {
        return None;
    }
    let [denominator, numerator, hz, _] = machine::cpuid(0x15);
    let khz = u64::from(hz) * u64::from(numerator) / u64::from(denominator.max(1)) / 1000;
    (khz != 0).then_some(khz)
}

impl Env {
    /// Reads the start info.
    ///
    /// # Errors
    /// A parameter that makes no sense.
    pub fn read(info: u64) -> Result<Self, Failure> {
        let known = peek::<u32>(info) == 0x336e_c578;
        let cmdline = Cmdline::new(if known { copy_cmdline(peek(info + 24)) } else { "" });
        let ram = if known { copy_ram(info) } else { [(0, 0); MAX_RANGES] };
        let number =
            |key, default| cmdline.number(key, default).map_err(|_| bad("a number on the command line"));
        let cpus = number("cpus", 1)?;
        if cpus == 0 || cpus > MAX_CPUS as u64 {
            return Err(bad("cpus= must be 1 to 64"));
        }
        let apic = match cmdline.text("apic") {
            None | Some("x2apic") => Mode::X2,
            Some("xapic") => Mode::X,
            Some(_) => return Err(bad("apic= must be x2apic or xapic")),
        };
        let (khz, khz_from) = match (number("tsc_early_khz", 0)?, cpuid_khz()) {
            (0, Some(khz)) => (khz, "cpuid"),
            (0, None) => (ASSUMED_KHZ, "assumed"),
            (khz, _) => (khz, "cmdline"),
        };
        let patience = number("deadline", 60)?.saturating_mul(1000).saturating_mul(khz);
        let base = number("base", 0x100_0000)?;
        if base % 4096 != 0 || base < boot::end_of_image() {
            return Err(bad("base= must be a page above the image"));
        }
        Ok(Self {
            cmdline,
            cpus: index(cpus),
            khz,
            khz_from,
            apic,
            patience,
            ram,
            next: AtomicU64::new(base),
        })
    }

    /// A number of the command line.
    ///
    /// # Errors
    /// A value that is no number, or not in `1..=max`.
    pub fn number(&self, key: &'static str, default: u64, max: u64) -> Result<u64, Failure> {
        match self.cmdline.number(key, default) {
            Ok(value) if (1..=max).contains(&value) => Ok(value),
            _ => Err(bad(key)),
        }
    }

    /// Pages that no test has used yet, so that their first use is the first in the guest's life.
    ///
    /// # Errors
    /// Not that much RAM above `base=`.
    pub fn pages(&self, count: u64) -> Result<&'static [Page], Failure> {
        let start = self.next.load(Ordering::Relaxed);
        let end = start.saturating_add(count.saturating_mul(4096));
        let in_ram = |&(from, to): &(u64, u64)| from <= start && end <= to;
        if end > MAPPED_GIB << 30 || (self.ram[0].1 != 0 && !self.ram.iter().any(in_ram)) {
            return Err(bad("not enough RAM above base="));
        }
        self.next.store(end, Ordering::Relaxed);
        // SAFETY: identity-mapped RAM above the image, handed out once, and only ever used through atomics.
        Ok(unsafe { core::slice::from_raw_parts(start as *const Page, index(count)) })
    }

    /// TSC ticks in microseconds.
    pub const fn us(&self, ticks: u64) -> u64 {
        self.ns(ticks) / 1000
    }

    /// TSC ticks in nanoseconds.
    pub const fn ns(&self, ticks: u64) -> u64 {
        (ticks / self.khz).saturating_mul(1_000_000).saturating_add(ticks % self.khz * 1_000_000 / self.khz)
    }

    /// Spins until `done` or the deadline.
    ///
    /// # Errors
    /// `what`, in the name of `cpu`, at the deadline.
    pub fn wait(
        &self,
        cpu: usize,
        what: &'static str,
        mut done: impl FnMut() -> bool,
    ) -> Result<(), Failure> {
        let start = machine::tsc();
        while !done() {
            // A TSC behind `start` is a fault of another test; here it must not end the wait.
            if machine::tsc().saturating_sub(start) > self.patience {
                return Err(Failure { cpu, what });
            }
            core::hint::spin_loop();
        }
        Ok(())
    }
}
