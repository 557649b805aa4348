//! Looks at the files that a specification names, so that a wrong path, a folder or a cut-off download is
//! found before anything starts.

use super::error::ConfigError;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

/// Largest kernel or initrd that is read, bytes.
pub const MAX_IMAGE: u64 = 2 << 30;

/// Checks that `path` is a file that can be read and is not empty.
///
/// # Errors
/// What it is instead.
pub fn check_file(key: &'static str, path: &Path) -> Result<Metadata, ConfigError> {
    let bad = |problem: String, hint: &str| ConfigError::value(key, path.display(), problem, hint);
    let meta = std::fs::metadata(path).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => bad("no such file".into(), "check the path"),
        _ => bad(e.to_string(), "give a file that can be read"),
    })?;
    if meta.is_dir() {
        return Err(bad("is a directory".into(), "give a file"));
    }
    if !meta.is_file() {
        return Err(bad("is not a regular file".into(), "give a file"));
    }
    File::open(path).map_err(|e| bad(e.to_string(), "make it readable for this user"))?;
    if meta.len() == 0 {
        return Err(bad("is empty".into(), "fetch or build it again"));
    }
    Ok(meta)
}

/// Reads a kernel or initrd whole.
///
/// # Errors
/// As [`check_file`]; also a file larger than [`MAX_IMAGE`], and one that shrinks while it is read.
pub fn read_image(key: &'static str, path: &Path) -> Result<Vec<u8>, ConfigError> {
    let meta = check_file(key, path)?;
    if meta.len() > MAX_IMAGE {
        return Err(ConfigError::value(
            key,
            path.display(),
            "is larger than 2G",
            "give a boot image, not a disk",
        ));
    }
    std::fs::read(path)
        .map_err(|e| ConfigError::value(key, path.display(), e.to_string(), "give a file that can be read"))
}

/// Checks that a kernel image is a bzImage or an x86-64 ELF and that all of it is there.
///
/// # Errors
/// Not a kernel, or a truncated one.
pub fn check_kernel(path: &Path, image: &[u8]) -> Result<(), ConfigError> {
    let bad = |problem: &str, hint: &str| {
        Err(ConfigError::value("kernel", path.display(), problem.to_string(), hint.to_string()))
    };
    let needed = if image.starts_with(b"\x7fELF") {
        match elf_length(image) {
            Some(needed) => needed,
            None => return bad("is not a complete x86-64 ELF file", "fetch or build it again"),
        }
    } else if image.get(0x202..0x206) == Some(b"HdrS") {
        bzimage_length(image).unwrap_or(u64::MAX)
    } else {
        return bad("is neither a bzImage nor an ELF kernel", "give a vmlinuz or vmlinux for x86-64");
    };
    let have = u64::try_from(image.len()).unwrap_or(u64::MAX);
    if have < needed {
        return bad(
            &format!("is truncated: {have} bytes, its header says at least {needed}"),
            "fetch or build it again",
        );
    }
    Ok(())
}

fn u16_at(image: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(image.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

fn u32_at(image: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(image.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(image: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(image.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

/// Linux x86 boot protocol: setup_sects at 0x1F1 (0 means 4), syssize at 0x1F4 in 16-byte paragraphs.
fn bzimage_length(image: &[u8]) -> Option<u64> {
    let setup = match image.get(0x1F1)? {
        0 => 4,
        sectors => u64::from(*sectors),
    };
    Some((setup + 1) * 512 + u64::from(u32_at(image, 0x1F4)?) * 16)
}

/// ELF64, little-endian, EM_X86_64: the end of the last program header's bytes in the file.
fn elf_length(image: &[u8]) -> Option<u64> {
    const EM_X86_64: u16 = 62;
    if image.get(4..6)? != [2, 1] || u16_at(image, 18)? != EM_X86_64 {
        return None;
    }
    let headers = usize::try_from(u64_at(image, 32)?).ok()?;
    let (size, count) = (usize::from(u16_at(image, 54)?), usize::from(u16_at(image, 56)?));
    let mut end = 0;
    for index in 0..count {
        let at = headers.checked_add(index.checked_mul(size)?)?;
        end = end.max(u64_at(image, at.checked_add(8)?)?.checked_add(u64_at(image, at.checked_add(32)?)?)?);
    }
    Some(end)
}

/// Checks a disk on this host: a regular file or block device, readable, writable unless `readonly`, whose
/// size is a multiple of 512.
///
/// # Errors
/// What it is instead.
pub fn check_disk(path: &Path, readonly: bool) -> Result<(), ConfigError> {
    let bad = |problem: String, hint: &str| Err(ConfigError::value("disks", path.display(), problem, hint));
    let meta = match std::fs::metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return bad("no such file".into(), "make it with `truncate -s 1G FILE`, or check the path");
        }
        Err(e) => return bad(e.to_string(), "give an image that can be read"),
    };
    if meta.is_dir() {
        return bad("is a directory".into(), "give an image file or a block device");
    }
    if !meta.is_file() && !meta.file_type().is_block_device() {
        return bad("is neither a file nor a block device".into(), "give an image file or a block device");
    }
    if let Err(e) = File::options().read(true).write(!readonly).open(path) {
        let hint =
            if readonly { "make it readable for this user" } else { "make it writable, or add ,readonly" };
        return bad(e.to_string(), hint);
    }
    if meta.is_file() && (meta.len() == 0 || meta.len() % 512 != 0) {
        let problem = format!("is {} bytes, not a whole number of 512-byte sectors", meta.len());
        return bad(problem, "it may be truncated: make or fetch it again");
    }
    let mut first = [0; 4];
    let qcow = File::open(path).and_then(|mut f| f.read_exact(&mut first)).is_ok() && &first == b"QFI\xfb";
    if qcow {
        return bad("is a qcow2 image".into(), "convert it: `qemu-img convert -O raw FROM TO`");
    }
    Ok(())
}
