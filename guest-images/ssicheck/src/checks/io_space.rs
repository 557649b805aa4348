//! One I/O space: disk and console work from CPUs of every node, whichever member owns the device.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::checks::remote::{on_cpu, pair_name};
use crate::context::{Context, Note, emit, repeat};
use crate::failure::{During, Failure, expect_eq};
use crate::runner::Event;
use crate::sys::io::{self, PageBuffer};
use crate::sys::shared::PAGE;
use crate::topology::Cpu;

/// The disk that is used if it exists and none is named.
const DEFAULT_DISK: &str = "/dev/vda";
const DEFAULT_CONSOLE: &str = "/dev/console";
/// Why a disk that somebody else uses is not written.
const IN_USE: &str = "the disk is in use or refuses writers";
const BLOCK: u64 = PAGE as u64;

/// What a disk held where the check writes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Saved {
    /// The disk.
    pub path: PathBuf,
    offset: u64,
    bytes: Vec<u8>,
}

impl Saved {
    /// Puts the bytes back.
    pub fn restore(&self) -> Result<(), Failure> {
        let mut block = PageBuffer::new();
        for (to, from) in block.0.iter_mut().zip(&self.bytes) {
            *to = *from;
        }
        Disk::open(&self.path, true)?.write(self.offset, &block)
    }
}

/// Runs the check.
pub fn run(context: &Context) {
    let named = context.job.options.disk.clone();
    let disk = named.or_else(|| Path::new(DEFAULT_DISK).exists().then(|| DEFAULT_DISK.into()));
    match &disk {
        Some(path) => disk_checks(context, path),
        None => context.sub("disk", || {
            let text = format!("no disk: {DEFAULT_DISK} is not there; only the console is exercised");
            Ok(Note::with_data(text, json!({ "disk": null })))
        }),
    }
    let console = context.job.options.console.clone().unwrap_or_else(|| DEFAULT_CONSOLE.into());
    for cpu in &context.topology().spread {
        context.sub(format!("console {}@{}", cpu.id, cpu.node), || console_line(&console, *cpu));
    }
}

/// An open disk (or an image file), with direct I/O where the file system has it.
#[derive(Debug)]
struct Disk {
    file: File,
    direct: bool,
}

impl Disk {
    fn open(path: &Path, write: bool) -> Result<Disk, Failure> {
        let what = format!("opening {}", path.display());
        let open = |flags| File::options().read(true).write(write).custom_flags(flags).open(path);
        match open(libc::O_DIRECT) {
            Ok(file) => Ok(Disk { file, direct: true }),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                Ok(Disk { file: open(0).during(what)?, direct: false })
            }
            Err(e) => Err(e).during(what),
        }
    }

    /// Bytes, rounded down to whole blocks.
    fn size(&self) -> Result<u64, Failure> {
        use std::io::Seek;
        let end = (&self.file).seek(std::io::SeekFrom::End(0)).during("size of the disk")?;
        Ok(end / BLOCK * BLOCK)
    }

    fn write(&self, offset: u64, block: &PageBuffer) -> Result<(), Failure> {
        self.file.write_all_at(&block.0, offset).during(format!("writing the disk at {offset}"))?;
        self.file.sync_all().during("fsync of the disk")
    }

    fn read(&self, offset: u64) -> Result<Box<PageBuffer>, Failure> {
        if !self.direct {
            io::drop_cache(&self.file, offset, BLOCK);
        }
        let mut block = PageBuffer::new();
        self.file.read_exact_at(&mut block.0, offset).during(format!("reading the disk at {offset}"))?;
        Ok(block)
    }
}

/// What is known before the disk is used.
struct Facts {
    size: u64,
    /// Why nothing may be written, if so.
    read_only: Option<&'static str>,
    direct: bool,
    node: Option<i64>,
}

fn disk_checks(context: &Context, path: &Path) {
    let facts = match facts(path) {
        Ok(facts) => facts,
        Err(failure) => return context.sub("disk", || Err(failure)),
    };
    for pair in context.topology().pairs() {
        let name = format!("disk_read {}", pair_name(pair));
        context.sub(name, || read_from_both(context, path, &facts, pair));
    }
    if let Some(why) = facts.read_only {
        return context.sub("disk_write", || Ok(format!("not written: {why}").into()));
    }
    for pair in context.topology().pairs() {
        let name = format!("disk_write_and_read {}", pair_name(pair));
        context.sub(name, || write_and_restore(context, path, &facts, pair));
    }
}

fn facts(path: &Path) -> Result<Facts, Failure> {
    let meta = std::fs::metadata(path).during(format!("disk {}", path.display()))?;
    if meta.is_dir() {
        return Err(Failure::Other(format!("{} is a directory, not a disk", path.display())));
    }
    let disk = Disk::open(path, false)?;
    let size = disk.size()?;
    if size == 0 {
        return Err(Failure::Other(format!("{} has less than {BLOCK} bytes", path.display())));
    }
    let block_device = meta.file_type().is_block_device();
    let read_only = if io::block_read_only(&disk.file) == Some(true) || meta.permissions().readonly() {
        Some("the disk is read-only")
    } else if block_device && File::options().write(true).custom_flags(libc::O_EXCL).open(path).is_err() {
        // O_EXCL without O_CREAT on a block device: refused while it is mounted or otherwise claimed.
        Some(IN_USE)
    } else {
        None
    };
    Ok(Facts { size, read_only, direct: disk.direct, node: device_node(path) })
}

/// The NUMA node of the device as sysfs tells it: that of the bus device below the virtio device.
fn device_node(path: &Path) -> Option<i64> {
    let name = path.file_name()?.to_str()?;
    let text = std::fs::read_to_string(format!("/sys/class/block/{name}/device/../numa_node")).ok()?;
    text.trim().parse().ok()
}

fn note(facts: &Facts, text: String, rounds: u64) -> Note {
    let how = if facts.direct { "O_DIRECT" } else { "buffered" };
    let data = json!({ "rounds": rounds, "direct": facts.direct, "device_node": facts.node });
    Note::with_data(format!("{text}, {how}"), data)
}

/// The same blocks, read from both CPUs.
fn read_from_both(
    context: &Context,
    path: &Path,
    facts: &Facts,
    (a, b): (Cpu, Cpu),
) -> Result<Note, Failure> {
    let blocks = facts.size / BLOCK;
    let offsets: Vec<u64> = (0..8).map(|i| (blocks - 1) * i / 7 * BLOCK).collect();
    let sums = || {
        let disk = Disk::open(path, false)?;
        offsets.iter().map(|o| disk.read(*o).map(|block| checksum(&block.0))).collect::<Result<Vec<_>, _>>()
    };
    let rounds = repeat(context.slice(8), 1, 50, |_| {
        // A disk in use may be written to between the two readings.
        let mut tries = if facts.read_only == Some(IN_USE) { 5 } else { 1 };
        loop {
            let first = on_cpu(a, "reading the disk", sums)?;
            let second = on_cpu(b, "reading the disk", sums)?;
            tries -= 1;
            if first == second || tries == 0 {
                return expect_eq("checksums of the same blocks", first, second);
            }
        }
    })?;
    Ok(note(facts, format!("{} blocks x {rounds} read on both CPUs", offsets.len()), rounds))
}

/// FNV-1a.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
}

/// Writes the last block from one CPU, reads it from the other, and puts back what was there.
fn write_and_restore(
    context: &Context,
    path: &Path,
    facts: &Facts,
    pair: (Cpu, Cpu),
) -> Result<Note, Failure> {
    let offset = facts.size - BLOCK;
    let bytes = Disk::open(path, false)?.read(offset)?.0.to_vec();
    let saved = Saved { path: path.into(), offset, bytes };
    emit(&Event::Saved(saved.clone()));
    let result = write_there_read_here(context, path, offset, pair);
    saved.restore()?;
    let now = Disk::open(path, false)?.read(offset)?;
    expect_eq("scratch block is restored", true, now.0.as_slice() == saved.bytes)?;
    emit(&Event::Restored);
    let rounds = result?;
    Ok(note(facts, format!("{rounds} blocks written on one CPU, read on the other, restored"), rounds))
}

fn write_there_read_here(
    context: &Context,
    path: &Path,
    offset: u64,
    (a, b): (Cpu, Cpu),
) -> Result<u64, Failure> {
    repeat(context.slice(4), 2, 50, |round| {
        let mut block = PageBuffer::new();
        let seed = checksum(&[round.to_le_bytes(), u64::from(std::process::id()).to_le_bytes()].concat());
        for (i, byte) in block.0.iter_mut().enumerate() {
            *byte = (seed.rotate_left(u32::try_from(i % 64).unwrap_or(0)) & 0xff).to_le_bytes()[0];
        }
        on_cpu(a, "writing the disk", || Disk::open(path, true)?.write(offset, &block))?;
        let found = on_cpu(b, "reading the disk", || {
            let disk = Disk::open(path, false)?;
            disk.read(offset).map(|block| checksum(&block.0))
        })?;
        expect_eq(format!("block written on CPU {}", a.id), checksum(&block.0), found)
    })
}

fn console_line(path: &Path, cpu: Cpu) -> Result<Note, Failure> {
    let drained = on_cpu(cpu, "writing to the console", || {
        let mut file = File::options()
            .append(true)
            .custom_flags(libc::O_NOCTTY)
            .open(path)
            .during(format!("opening {} (name another one with --console)", path.display()))?;
        let line = format!("ssicheck: console from CPU {} node {}\n", cpu.id, cpu.node);
        file.write_all(line.as_bytes()).during(format!("writing to {}", path.display()))?;
        Ok(io::drain_terminal(&file))
    })?;
    let how = if drained { "and sent" } else { "(not a terminal)" };
    Ok(format!("line written to {} {how}", path.display()).into())
}
