//! One root: all CPUs see the same mounts, and what one CPU writes, another reads.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::Ordering;

use crate::checks::remote::{on_cpu, pair_name};
use crate::context::{Context, Note};
use crate::failure::{During, Failure, expect_eq};
use crate::sys::shared::{PAGE, Shared};
use crate::sys::{cpu, io, process};
use crate::topology::Cpu;

/// Records that each process appends, and rounds of the locked counter.
const RECORDS: u64 = 40;

/// Runs the check.
pub fn run(context: &Context) {
    context.sub("same_root", || same_root(context));
    for (a, b) in context.topology().pairs() {
        let pair = pair_name((a, b));
        context.sub(format!("written_here_read_there {pair}"), || write_read(context, a, b));
        context.sub(format!("rename_and_unlink {pair}"), || rename_unlink(context, a, b));
        context.sub(format!("mapped_and_read {pair}"), || mapped_read(context, a, b));
        context.sub(format!("append_from_both {pair}"), || append_both(context, a, b));
        context.sub(format!("file_lock {pair}"), || file_lock(context, a, b));
    }
}

/// Device and inode of the root, the mounts and the host name, as seen from every node.
fn same_root(context: &Context) -> Result<Note, Failure> {
    let view = || {
        let root = fs::metadata("/").during("stat of /")?;
        let mounts = fs::read_to_string("/proc/self/mountinfo").during("/proc/self/mountinfo")?;
        let name = fs::read_to_string("/proc/sys/kernel/hostname").during("/proc/sys/kernel/hostname")?;
        Ok((root.dev(), root.ino(), mounts, name))
    };
    let here = view()?;
    for cpu in &context.topology().spread {
        let there = on_cpu(*cpu, "looking at the root", view)?;
        expect_eq(format!("root, mounts and host name seen from CPU {}", cpu.id), &here, &there)?;
    }
    Ok(format!("root is device {} inode {}, host {}", here.0, here.1, here.3.trim()).into())
}

/// Contents that depend on the place in the file.
fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i % 251).to_le_bytes().first().copied().unwrap_or(0) ^ seed).collect()
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    fs::read(path).during(format!("reading {}", path.display()))
}

fn write_read(context: &Context, a: Cpu, b: Cpu) -> Result<Note, Failure> {
    cpu::pin(a.id)?;
    let path = context.file("shared");
    // Not a multiple of the page size, and more than one page.
    let (head, tail) = (pattern(9_000, 0x11), pattern(5_000, 0x77));
    fs::write(&path, &head).during(format!("writing {}", path.display()))?;
    on_cpu(b, "reading and appending", || {
        expect_eq("file as written on the other CPU", true, read(&path)? == head)?;
        let mut file = File::options().append(true).open(&path).during("opening the file to append")?;
        file.write_all(&tail).during("appending")?;
        file.sync_all().during("fsync")
    })?;
    expect_eq("file with what the other CPU appended", true, read(&path)? == [head, tail].concat())?;
    Ok("14000 bytes, written on one CPU and appended on the other".into())
}

fn rename_unlink(context: &Context, a: Cpu, b: Cpu) -> Result<Note, Failure> {
    cpu::pin(a.id)?;
    let (old, new, dir) = (context.file("old-name"), context.file("dir/new-name"), context.file("dir"));
    fs::write(&old, b"name").during("writing a file")?;
    on_cpu(b, "making a folder and moving the file there", || {
        fs::create_dir(&dir).during("mkdir")?;
        fs::rename(&old, &new).during("rename")
    })?;
    expect_eq("old name is there", false, old.exists())?;
    expect_eq("file under its new name", b"name".to_vec(), read(&new)?)?;
    on_cpu(b, "removing the file and the folder", || {
        fs::remove_file(&new).during("unlink")?;
        fs::remove_dir(&dir).during("rmdir")
    })?;
    expect_eq("folder is there", false, dir.exists())?;
    Ok("names change for everybody".into())
}

/// The page cache is one: mappings and read(2)/write(2) on different CPUs see the same bytes.
fn mapped_read(context: &Context, a: Cpu, b: Cpu) -> Result<Note, Failure> {
    cpu::pin(a.id)?;
    let path = context.file("mapped");
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .during("making a file")?;
    file.set_len(2 * PAGE as u64).during("sizing the file")?;
    let mapping = Shared::of_file(&file, 2)?;
    for (n, byte) in mapping.bytes().iter().zip(pattern(2 * PAGE, 0x3c)) {
        n.store(byte, Ordering::SeqCst);
    }
    on_cpu(b, "reading what is mapped elsewhere", || {
        expect_eq("file as stored through a mapping", true, read(&path)? == pattern(2 * PAGE, 0x3c))?;
        let mut file = File::options().write(true).open(&path).during("opening the file")?;
        file.seek(SeekFrom::Start(100)).during("seek")?;
        file.write_all(b"written").during("writing")
    })?;
    let seen: Vec<u8> = mapping.bytes().iter().skip(100).take(7).map(|b| b.load(Ordering::SeqCst)).collect();
    expect_eq("mapping after write(2) on the other CPU", b"written".to_vec(), seen)?;
    Ok("mapping and file agree".into())
}

/// Runs the same work in a process on each of two CPUs at once.
fn both(a: Cpu, b: Cpu, what: &str, work: impl Fn(u8) -> Result<(), Failure>) -> Result<(), Failure> {
    let run = |who: u8| match work(who) {
        Ok(()) => 0,
        Err(failure) => {
            eprintln!("ssicheck: {failure}");
            1
        }
    };
    let first = process::spawn(a.id, || run(0))?;
    let second = process::spawn(b.id, || run(1))?;
    first.finish(&format!("{what} on CPU {}", a.id))?;
    second.finish(&format!("{what} on CPU {}", b.id))
}

fn append_both(context: &Context, a: Cpu, b: Cpu) -> Result<Note, Failure> {
    let path = context.file("appended");
    fs::write(&path, b"").during("making a file")?;
    both(a, b, "appending", |who| {
        let mut file = File::options().append(true).open(&path).during("opening the file to append")?;
        for n in 0..RECORDS {
            file.write_all(format!("{who} {n:>13}\n").as_bytes()).during("appending")?;
        }
        Ok(())
    })?;
    let text = String::from_utf8_lossy(&read(&path)?).into_owned();
    for who in 0..2u8 {
        let own: Vec<&str> = text.lines().filter(|l| l.starts_with(&who.to_string())).collect();
        let expected: Vec<String> = (0..RECORDS).map(|n| format!("{who} {n:>13}")).collect();
        expect_eq(format!("records of process {who}"), true, own == expected)?;
    }
    expect_eq("records of both", 2 * RECORDS, text.lines().count() as u64)?;
    fs::remove_file(&path).during("unlink")?;
    Ok(format!("{} records, whole and in order", 2 * RECORDS).into())
}

/// A counter in a file, incremented under flock(2) from both CPUs.
fn file_lock(context: &Context, a: Cpu, b: Cpu) -> Result<Note, Failure> {
    let path = context.file("counter");
    fs::write(&path, b"0").during("making a file")?;
    both(a, b, "counting under a file lock", |_| {
        for _ in 0..RECORDS {
            let mut file =
                File::options().read(true).write(true).open(&path).during("opening the counter")?;
            io::lock_exclusive(&file)?;
            let mut text = String::new();
            file.read_to_string(&mut text).during("reading the counter")?;
            let count: u64 = text.parse().map_err(|_| Failure::Other(format!("counter is {text:?}")))?;
            file.rewind().during("seek")?;
            // Closing the file gives the lock back.
            file.write_all((count + 1).to_string().as_bytes()).during("writing the counter")?;
        }
        Ok(())
    })?;
    let count = String::from_utf8_lossy(&read(&path)?).into_owned();
    expect_eq("counter", (2 * RECORDS).to_string(), count)?;
    Ok(format!("{} increments under flock, exact", 2 * RECORDS).into())
}
