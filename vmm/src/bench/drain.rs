//! How fast a member that leaves gets rid of its pages: real VMs of two members, whose guest has filled its memory on the one
//! that is drained.
//!
//! In one the guest rests meanwhile. The floor is then a program that receives as many pages over one TCP connection and puts
//! them in place with UFFDIO_COPY, in the same run. In another it counts in a small part of its memory on the other
//! member: how much slower it does so while its pages move shows in its accesses to the serial port, of which there is
//! one per so many passes. On a machine with few processors that guest takes one away from both members; hosts of their
//! own have more than the one that it uses.

use super::kernel::{self, Touch};
use super::vm::{BenchError, Folder, Vm, median, spanvm};
use crate::control::ops::drain::DrainReport;
use dsm::bench::floor::warm_up;
use dsm::bench::group::Launcher;
use dsm::bench::stream;
use serde::Serialize;
use std::time::{Duration, Instant};

/// Where the guest's data begins.
const START: u64 = 16 << 20;
/// Memory besides the data, MiB; the first of it behind the data is what the guest counts in.
const BESIDES: u32 = 64;
/// Pages that the guest counts in.
const WORK: u64 = 256;
/// Passes over them per access to the serial port.
const PASSES: u64 = 100;
/// For how long the guest counts undisturbed.
const QUIET: Duration = Duration::from_secs(2);
/// Pages of a MiB.
const PAGES: f64 = 256.0;

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrainOptions {
    /// Data on the member that is drained, MiB.
    pub mib: u32,
    /// Runs; the figures are medians over them.
    pub runs: u32,
    /// Each member of the VM that rests on a processor of its own ([`dsm::bench::cpus`]).
    pub is_pinned: bool,
}

/// What the guest gets done.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Guest {
    /// Passes per second before.
    pub before_per_s: f64,
    /// Passes per second during the whole drain, pauses included.
    pub during_per_s: f64,
    /// The one over the other.
    pub slowdown: f64,
    /// How fast the pages went.
    pub pages_per_s: f64,
}

/// The floor.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Floor {
    /// Raw TCP and UFFDIO_COPY, pages per second.
    pub pages_per_s: f64,
}

/// The result.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DrainBench {
    /// `drain`.
    pub bench: &'static str,
    /// Data, MiB.
    pub mib: u32,
    /// Pages that went.
    pub pages: f64,
    /// How fast, while the guest rested.
    pub pages_per_s: f64,
    /// From the command to the end of the member's process, milliseconds.
    pub total_ms: f64,
    /// The two short pauses, milliseconds.
    pub pauses_ms: [f64; 2],
    /// Another one, that counts meanwhile.
    pub guest: Guest,
    /// The floor.
    pub floor: Floor,
    /// Speed over that of the floor.
    pub ratio: f64,
    /// Whether each member had a processor of its own.
    pub is_pinned: bool,
}

impl std::fmt::Display for DrainBench {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let guest = &self.guest;
        writeln!(
            f,
            "drain         {:.0} pages, {:.0} a second; {:.0} ms in all, pauses of {:.0} and {:.0} ms",
            self.pages, self.pages_per_s, self.total_ms, self.pauses_ms[0], self.pauses_ms[1]
        )?;
        writeln!(f, "floor         {:.0} pages a second: ratio {:.2}", self.floor.pages_per_s, self.ratio)?;
        write!(
            f,
            "counting      {:.0} passes a second before, {:.0} meanwhile: {:.2} times as slow; {:.0} pages a second",
            guest.before_per_s, guest.during_per_s, guest.slowdown, guest.pages_per_s
        )
    }
}

/// Runs the benchmark; `progress` is told of every run that has ended.
///
/// # Errors
/// [`BenchError`].
pub fn run(
    options: DrainOptions,
    launcher: Launcher<'_>,
    mut progress: impl FnMut(u32, u32),
) -> Result<DrainBench, BenchError> {
    let folder = Folder::new(&std::env::temp_dir())?;
    let mut runs = Vec::new();
    for n in 0..options.runs {
        runs.push(measure(&folder, n, options, launcher)?);
        progress(n + 1, options.runs);
    }
    let middle = |value: fn(&Run) -> f64| median(runs.iter().map(value));
    Ok(DrainBench {
        bench: "drain",
        mib: options.mib,
        pages: middle(|run| pages(&run.resting)),
        pages_per_s: middle(|run| speed(&run.resting)),
        total_ms: middle(|run| run.resting.total_ms),
        pauses_ms: [middle(|run| run.resting.pauses_ms[0]), middle(|run| run.resting.pauses_ms[1])],
        guest: Guest {
            before_per_s: middle(|run| run.before),
            during_per_s: middle(|run| run.during),
            slowdown: middle(|run| run.before / run.during.max(f64::MIN_POSITIVE)),
            pages_per_s: middle(|run| speed(&run.counting)),
        },
        floor: Floor { pages_per_s: middle(|run| run.floor) },
        ratio: middle(|run| speed(&run.resting) / run.floor.max(f64::MIN_POSITIVE)),
        is_pinned: options.is_pinned,
    })
}

struct Run {
    resting: DrainReport,
    floor: f64,
    counting: DrainReport,
    before: f64,
    during: f64,
}

fn pages(report: &DrainReport) -> f64 {
    // Pages are far below 2^53.
    #[allow(clippy::cast_precision_loss)]
    let pages = report.pages as f64;
    pages
}

fn speed(report: &DrainReport) -> f64 {
    pages(report) * 1e3 / report.evict_ms.max(f64::MIN_POSITIVE)
}

fn measure(
    folder: &Folder,
    n: u32,
    options: DrainOptions,
    launcher: Launcher<'_>,
) -> Result<Run, BenchError> {
    let floor = || stream::floor(options.mib, options.is_pinned, launcher);
    let drain = |vm: &Vm| vm.command(&["member", "drain", &vm.name, "1", "--json"], &[]);
    let vm = start(folder, &format!("{n}r"), options, Then::Rest)?;
    // Before and after, so that a disturbance at one moment does not make it look high or low.
    let before = floor()?;
    warm_up(u64::from(options.mib) << 20);
    let resting = drain(&vm)?;
    let floor = f64::midpoint(before, floor()?) * PAGES;
    drop(vm);
    let vm = start(folder, &format!("{n}c"), options, Then::Count)?;
    let before = Tally::now(&vm)?;
    std::thread::sleep(QUIET);
    let before = before.rate(&vm)?;
    let during = Tally::now(&vm)?;
    let counting = drain(&vm)?;
    let during = during.rate(&vm)?;
    Ok(Run { resting, floor, counting, before, during })
}

/// A VM whose guest has filled its memory on member 1, and goes on on member 0.
fn start(folder: &Folder, what: &str, options: DrainOptions, then: Then) -> Result<Vm, BenchError> {
    let mib = options.mib;
    let vm = Vm::start(&folder.0, what, &guest(mib, then), mib + BESIDES)?;
    // A guest that counts needs a processor as well, and member 0 has only one then.
    if options.is_pinned && then == Then::Rest {
        vm.pin()?;
    }
    // It waits for a byte before it fills its memory, and does that where it is then.
    spanvm(&["vcpu", "migrate", &vm.name, "0", "--to", "1"])?;
    spanvm(&["console", &vm.name, "--send", "x"])?;
    vm.await_filled()?;
    spanvm(&["vcpu", "migrate", &vm.name, "0", "--to", "0"])?;
    // The pages that it counts in come.
    std::thread::sleep(QUIET);
    Ok(vm)
}

/// How far the guest was, and when.
struct Tally {
    passes: f64,
    at: Instant,
}

impl Tally {
    fn now(vm: &Vm) -> Result<Tally, BenchError> {
        let info = vm.info()?;
        let vcpus =
            info.members.iter().filter(|member| member.id == 0).flat_map(|member| &member.stats.vcpus);
        let accesses: u64 = vcpus.filter(|vcpu| vcpu.vcpu == 0).map(|vcpu| vcpu.pio).sum();
        // Accesses are far below 2^53.
        #[allow(clippy::cast_precision_loss)]
        let passes = accesses as f64 * PASSES as f64;
        Ok(Tally { passes, at: Instant::now() })
    }

    /// Passes per second since then.
    fn rate(&self, vm: &Vm) -> Result<f64, BenchError> {
        let now = Tally::now(vm)?;
        Ok((now.passes - self.passes) / now.at.duration_since(self.at).as_secs_f64())
    }
}

/// What the guest does with its memory filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    Rest,
    Count,
}

/// A kernel that waits for a byte, writes to each page of its data once, prints an F, and then rests, or counts in a few other
/// pages for ever, with a dot per so many passes.
fn guest(mib: u32, then: Then) -> Vec<u8> {
    let data = u64::from(mib) << 20;
    let mut code = Vec::new();
    // mov dx, COM1's line status; in al, dx; test al, 1; jz to the second
    code.extend([0x66, 0xBA, 0xFD, 0x03, 0xEC, 0xA8, 0x01, 0x74, 0xFB]);
    // mov dx, COM1; in al, dx
    code.extend([0x66, 0xBA, 0xF8, 0x03, 0xEC]);
    kernel::over_pages(&mut code, START, data >> 12, Touch::Write);
    // mov al, 'F'; out dx, al
    code.extend([0xB0, 0x46, 0xEE]);
    if then == Then::Rest {
        // cli; hlt; jmp to the first
        code.extend([0xFA, 0xF4, 0xEB, 0xFC]);
        return kernel::elf(&code);
    }
    // mov rbx, PASSES
    code.extend([0x48, 0xBB]);
    code.extend(PASSES.to_le_bytes());
    kernel::over_pages(&mut code, START + data, WORK, Touch::Count);
    // dec rbx; jnz to this loop; mov al, '.'; out dx, al; jmp to mov rbx
    code.extend([0x48, 0xFF, 0xCB, 0x75, 0xD8, 0xB0, 0x2E, 0xEE, 0xEB, 0xC9]);
    kernel::elf(&code)
}
