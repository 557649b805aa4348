//! What a checkpoint costs: real VMs of two members, made and saved with this program's own commands, whose guest has
//! filled its memory and goes on writing to a part of it.
//!
//! Throughput is that of full checkpoints until they are safe on disk, against writing and syncing as many bytes to the same
//! folder, in turn. The pause of incremental ones is measured with little and with much memory and the same part that
//! changes: it may grow with that part, not with the memory.

use super::kernel::{self, Touch};
use super::vm::{BenchError, Folder, Vm, io, median};
use crate::control::ops::checkpoint::CheckpointReport;
use serde::Serialize;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Where the guest's data begins.
const START: u64 = 16 << 20;
/// Memory besides the data.
const BESIDES: u32 = 64;
/// Bytes per write of the floor.
const PIECE: usize = 1 << 20;

/// What to measure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointOptions {
    /// Data of the larger guest, MiB; the smaller one has a quarter.
    pub mib: u32,
    /// Data that changes all the time, MiB.
    pub dirty_mib: u32,
    /// Full checkpoints, and incremental ones, of each guest.
    pub runs: u32,
    /// Folder for the checkpoints, on the disk that is to be measured.
    pub dir: PathBuf,
}

/// Full checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Full {
    /// Bytes of one.
    pub bytes: u64,
    /// Until it was safe on disk, milliseconds, median.
    pub total_ms: f64,
    /// For how long the guest stood still, milliseconds, median.
    pub pause_ms: f64,
    /// Writing and syncing as many bytes, milliseconds, median.
    pub write_ms: f64,
}

/// Incremental checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Incremental {
    /// Data of the guest, MiB.
    pub mib: u32,
    /// Pages saved, median.
    pub pages: u64,
    /// For how long the guest stood still, milliseconds, median.
    pub pause_ms: f64,
}

/// The result.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CheckpointBench {
    /// `checkpoint`.
    pub bench: &'static str,
    /// Of the larger guest.
    pub full: Full,
    /// Throughput over that of writing the same bytes.
    pub ratio: f64,
    /// By size of the guest.
    pub incremental: Vec<Incremental>,
    /// Pause with much memory over that with little, where the memory is four times as large.
    pub pause_growth: f64,
}

impl std::fmt::Display for CheckpointBench {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let full = &self.full;
        writeln!(
            f,
            "full          {} MiB in {:.0} ms, the guest stood still for {:.0} ms",
            full.bytes >> 20,
            full.total_ms,
            full.pause_ms
        )?;
        writeln!(
            f,
            "floor         the same bytes written in {:.0} ms: ratio {:.2}",
            full.write_ms, self.ratio
        )?;
        for one in &self.incremental {
            writeln!(
                f,
                "incremental   {} pages of a guest of {} MiB: it stood still for {:.1} ms",
                one.pages, one.mib, one.pause_ms
            )?;
        }
        write!(f, "pause growth  {:.2} when the memory is four times as large", self.pause_growth)
    }
}

/// Runs the benchmark; `progress` hears how many of how many checkpoints are made.
///
/// # Errors
/// [`BenchError`].
pub fn run(
    options: &CheckpointOptions,
    mut progress: impl FnMut(u32, u32),
) -> Result<CheckpointBench, BenchError> {
    let folder = Folder::new(&options.dir)?;
    let sizes = [options.mib.div_ceil(4), options.mib];
    let all = options.runs * 4;
    let mut made = 0;
    let mut step = || {
        made += 1;
        progress(made, all);
    };
    let mut incremental = Vec::new();
    let (mut fulls, mut writes) = (Vec::new(), Vec::new());
    for mib in sizes {
        let vm = start(&folder.0, mib, options.dirty_mib)?;
        (fulls, writes) = (Vec::new(), Vec::new());
        for _ in 0..options.runs {
            let report = checkpoint(&vm, &folder.0, &["--full"])?;
            writes.push(write_and_sync(&folder.0, report.bytes)?);
            fulls.push(report);
            step();
        }
        let mut parts = Vec::new();
        for _ in 0..options.runs {
            parts.push(checkpoint(&vm, &folder.0, &[])?);
            step();
        }
        parts.sort_by_key(|part| part.pages);
        incremental.push(Incremental {
            mib,
            pages: parts.get(parts.len() / 2).map_or(0, |part| part.pages),
            pause_ms: median(parts.iter().map(|part| part.pause_ms)),
        });
    }
    let full = Full {
        bytes: fulls.iter().map(|one| one.bytes).max().unwrap_or(0),
        total_ms: median(fulls.iter().map(|one| one.total_ms)),
        pause_ms: median(fulls.iter().map(|one| one.pause_ms)),
        write_ms: median(writes.iter().copied()),
    };
    let pauses: Vec<f64> = incremental.iter().map(|one| one.pause_ms).collect();
    let pause_growth = match pauses[..] {
        [little, much] if little > 0.0 => much / little,
        _ => 0.0,
    };
    Ok(CheckpointBench {
        bench: "checkpoint",
        ratio: full.write_ms / full.total_ms.max(0.001),
        full,
        incremental,
        pause_growth,
    })
}

/// Milliseconds to write so many bytes, and to sync them.
fn write_and_sync(folder: &Path, bytes: u64) -> Result<f64, BenchError> {
    let path = folder.join("floor");
    let piece: Vec<u8> = (0..PIECE).map(|n| u8::try_from(n % 251).unwrap_or(0)).collect();
    let start = Instant::now();
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&path)?;
        let mut left = bytes;
        while left > 0 {
            let now = usize::try_from(left).unwrap_or(PIECE).min(PIECE);
            file.write_all(piece.get(..now).unwrap_or(&piece))?;
            left -= now as u64;
        }
        file.sync_all()
    };
    write().map_err(io(path.display()))?;
    let took = start.elapsed().as_secs_f64() * 1e3;
    fs::remove_file(&path).map_err(io(path.display()))?;
    Ok(took)
}

/// A VM whose guest has filled its memory.
fn start(folder: &Path, mib: u32, dirty_mib: u32) -> Result<Vm, BenchError> {
    let vm = Vm::start(folder, &mib.to_string(), &guest(mib, dirty_mib), mib + BESIDES)?;
    vm.await_filled()?;
    Ok(vm)
}

fn checkpoint(vm: &Vm, folder: &Path, more: &[&str]) -> Result<CheckpointReport, BenchError> {
    let dir = folder.join(format!("{}.ck", vm.name));
    vm.command(&["checkpoint", &vm.name, "--json", "--to", &dir.to_string_lossy()], more)
}

/// A kernel that writes to each page of its data once, prints an F, and then counts in the pages that change, for ever.
fn guest(mib: u32, dirty_mib: u32) -> Vec<u8> {
    let pages = |mib: u32| u64::from(mib) << 20 >> 12;
    let mut code = Vec::new();
    kernel::over_pages(&mut code, START, pages(mib), Touch::Write);
    // mov dx, COM1; mov al, 'F'; out dx, al
    code.extend([0x66, 0xBA, 0xF8, 0x03, 0xB0, 0x46, 0xEE]);
    kernel::over_pages(&mut code, START, pages(dirty_mib.min(mib)), Touch::Count);
    // jmp to this loop
    code.extend([0xEB, 0xDB]);
    kernel::elf(&code)
}
