//! A disk's image: opened, locked against other VMs, and recognised by another member that is to take the disk.
//!
//! Two members have the same file at the same path, so that a disk may go from one to the other, if
//!
//! - they are on one host: device and inode are the same (of a block device: its number);
//! - they are on two hosts: the path leads to the same place, and a mark with a random name and random contents, which the one
//!   has put into the file's folder, is there for the other, too, so the folder is shared; of a block device: its hardware
//!   gives the same identity (WWID, or the UUID of the device mapper).
//!
//! And the size is the same. Anything else is refused: a copy, even a good one, would be another disk.

use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Bytes of a sector, the unit of positions and lengths whatever the block size (virtio 1.2, 5.2.4).
pub const SECTOR: u64 = 512;

/// Why an image cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It cannot be opened.
    #[error("cannot open disk image {path}: {source}{}", hint(.source))]
    Open {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no file or block device.
    #[error("disk image {0} is not a file or block device")]
    NotAFile(PathBuf),
    /// Its size is no number of sectors.
    #[error("disk image {path} has {size} bytes: that is not a positive multiple of 512, is it a raw image?")]
    Size {
        /// Its path.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// It is in use.
    #[error("disk image {0} is in use by another VM: a disk that is written can have one user")]
    InUse(PathBuf),
    /// It is not the file that another member has under this path, or that cannot be shown.
    #[error("disk image {path} is not known to be the same file: {why}")]
    Other {
        /// Its path.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// What was written cannot be brought to the disk.
    #[error("cannot flush disk image {path}: {source}")]
    Flush {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => {
            " (a disk that is only read can be given as readonly)"
        }
        _ => "",
    }
}

/// By what another member recognises an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Bytes.
    size: u64,
    /// Names the running kernel of the host; nothing if that is not known.
    boot: Option<String>,
    /// Device and inode; of a block device its number, twice.
    file: (u64, u64),
    is_block: bool,
    /// Where the path leads.
    path: PathBuf,
    /// What the hardware says of a block device.
    hardware: Option<String>,
    /// What was put beside the file: name and contents; or why nothing was.
    mark: Result<(String, String), String>,
}

/// An open image.
#[derive(Debug)]
pub struct Image {
    file: File,
    path: PathBuf,
    size: u64,
    readonly: bool,
}

impl Image {
    /// Opens an image, without a lock.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn open(path: &Path, readonly: bool) -> Result<Image, ImageError> {
        let open_error = |source| ImageError::Open { path: path.to_owned(), source };
        // The type first: opening a pipe would wait.
        let kind = fs::metadata(path).map_err(open_error)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(ImageError::NotAFile(path.to_owned()));
        }
        let mut file = OpenOptions::new().read(true).write(!readonly).open(path).map_err(open_error)?;
        let size = file.seek(SeekFrom::End(0)).map_err(open_error)?;
        if size == 0 || size % SECTOR != 0 {
            return Err(ImageError::Size { path: path.to_owned(), size });
        }
        Ok(Image { file, path: path.to_owned(), size, readonly })
    }

    /// Locks it against other VMs (not against programs that take no locks): a disk that is written can have one user.
    ///
    /// # Errors
    /// [`ImageError::InUse`].
    pub fn lock(&self) -> Result<(), ImageError> {
        use rustix::fs::{FlockOperation, flock};
        let operation = if self.readonly {
            FlockOperation::NonBlockingLockShared
        } else {
            FlockOperation::NonBlockingLockExclusive
        };
        // Some network file systems have no locks; only a lock that somebody holds is an error.
        if flock(&self.file, operation) == Err(rustix::io::Errno::WOULDBLOCK) {
            return Err(ImageError::InUse(self.path.clone()));
        }
        Ok(())
    }

    /// Gives the lock up. Nothing may be written from now on.
    pub fn unlock(&self) {
        // Where there are no locks there is none to give up.
        let _ = rustix::fs::flock(&self.file, rustix::fs::FlockOperation::Unlock);
    }

    /// What was written is on the disk when this returns.
    ///
    /// # Errors
    /// [`ImageError::Flush`].
    pub fn flush(&self) -> Result<(), ImageError> {
        if self.readonly {
            return Ok(());
        }
        self.file.sync_data().map_err(|source| ImageError::Flush { path: self.path.clone(), source })
    }

    /// Forgets what this host has cached of it: another one may have written since.
    fn forget(&self) {
        // Advice; where it is not taken the file system keeps its caches coherent itself, or there is one host.
        let _ = rustix::fs::fadvise(&self.file, 0, None, rustix::fs::Advice::DontNeed);
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The guest may not write.
    pub fn is_readonly(&self) -> bool {
        self.readonly
    }

    /// By what a member, which may be on another host, recognises it; a mark that was put beside it stays until it is
    /// dropped.
    ///
    /// # Errors
    /// It is not there any more.
    pub fn identity(&self, elsewhere: bool) -> Result<(Identity, Option<Mark>), ImageError> {
        let open_error = |source| ImageError::Open { path: self.path.clone(), source };
        let meta = self.file.metadata().map_err(open_error)?;
        let path = fs::canonicalize(&self.path).map_err(open_error)?;
        let is_block = meta.file_type().is_block_device();
        let (mark, put) = match path.parent() {
            Some(folder) if elsewhere && !is_block => match Mark::put(folder) {
                Ok(mark) => (Ok((mark.name.clone(), mark.contents.clone())), Some(mark)),
                Err(e) => (Err(format!("no mark can be put into {}: {e}", folder.display())), None),
            },
            _ => (Err("no mark was put beside it".into()), None),
        };
        let file = if is_block { (meta.rdev(), meta.rdev()) } else { (meta.dev(), meta.ino()) };
        let hardware = if is_block { hardware(meta.rdev()) } else { None };
        Ok((Identity { size: self.size, boot: boot(), file, is_block, path, hardware, mark }, put))
    }

    /// Whether it is the file that another member has. What is read from then on is what that one has flushed before.
    ///
    /// # Errors
    /// It is not, or that cannot be shown.
    pub fn recognise(&self, there: &Identity) -> Result<(), ImageError> {
        let (here, _) = self.identity(false)?;
        if let Some(why) = differs(&here, there) {
            return Err(ImageError::Other { path: self.path.clone(), why });
        }
        if here.boot.is_none() || here.boot != there.boot {
            self.forget();
        }
        Ok(())
    }
}

/// Why what is here is not known to be what is there.
fn differs(here: &Identity, there: &Identity) -> Option<String> {
    if here.size != there.size {
        return Some(format!("it has {} bytes, and {} where the disk is now", here.size, there.size));
    }
    if here.is_block != there.is_block {
        return Some("one is a file, the other a block device".into());
    }
    if here.boot.is_some() && here.boot == there.boot {
        let ((a, b), (c, d)) = (here.file, there.file);
        return (here.file != there.file).then(|| format!("device and inode are {a}:{b}, and {c}:{d} there"));
    }
    if here.is_block {
        return match (&here.hardware, &there.hardware) {
            (Some(a), Some(b)) if a == b => None,
            (Some(a), Some(b)) => Some(format!("the device is {a}, and {b} there")),
            _ => Some("the device says nothing by which it can be recognised on another host".into()),
        };
    }
    if here.path != there.path {
        let (a, b) = (here.path.display(), there.path.display());
        return Some(format!("the path leads to {a}, and to {b} there"));
    }
    let (name, contents) = match &there.mark {
        Ok(mark) => mark,
        Err(why) => return Some(why.clone()),
    };
    let Some(folder) = here.path.parent().filter(|_| is_mark(name)) else {
        return Some("it is in no folder".into());
    };
    let other = || Some(format!("{} is another folder than there: no shared file system", folder.display()));
    let mut found = String::new();
    match File::open(folder.join(name)).and_then(|file| file.take(1024).read_to_string(&mut found)) {
        Ok(_) if found == *contents => None,
        Ok(_) => other(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => other(),
        Err(e) => Some(format!("the mark beside it can't be read: {e}")),
    }
}

/// Something beside an image by which another host recognises the folder. Removed when it is dropped.
#[derive(Debug)]
pub struct Mark {
    path: PathBuf,
    name: String,
    contents: String,
}

const MARK: &str = ".spanvm-";

/// Names come from another member: nothing but a mark may be looked at.
fn is_mark(name: &str) -> bool {
    let rest = name.strip_prefix(MARK).unwrap_or_default();
    rest.len() == 32 && rest.bytes().all(|b| b.is_ascii_hexdigit())
}

impl Mark {
    fn put(folder: &Path) -> io::Result<Mark> {
        let random = || format!("{:032x}", rand::random::<u128>());
        let (name, contents) = (format!("{MARK}{}", random()), random());
        let path = folder.join(&name);
        let mut file = OpenOptions::new().write(true).create_new(true).open(&path)?;
        // From here on it is removed whatever happens.
        let mark = Mark { path, name, contents };
        file.write_all(mark.contents.as_bytes())?;
        file.sync_all()?;
        Ok(mark)
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_file(&self.path) {
            tracing::warn!("{}: {e}; it can be removed", self.path.display());
        }
    }
}

fn boot() -> Option<String> {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").ok().map(|id| id.trim().to_owned())
}

/// What the hardware says of a block device: an identity that is the same on all hosts that have it, and which part of it.
fn hardware(number: u64) -> Option<String> {
    let (major, minor) = (libc::major(number), libc::minor(number));
    let folder = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    let read = |name: &str| {
        let text = fs::read_to_string(folder.join(name)).ok()?;
        Some(text.trim().to_owned()).filter(|text| !text.is_empty())
    };
    let part = read("partition").map_or(String::new(), |part| format!(", partition {part}"));
    let names = ["dm/uuid", "wwid", "device/wwid", "../wwid", "../device/wwid"];
    names.iter().find_map(|name| read(name)).map(|id| id + &part)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(path: &Path, size: usize) -> Image {
        fs::write(path, vec![0; size]).unwrap();
        Image::open(path, false).unwrap()
    }

    fn why(image: &Image, there: &Identity) -> String {
        image.recognise(there).unwrap_err().to_string()
    }

    #[test]
    fn on_one_host_it_is_the_inode_that_counts() {
        let dir = tempfile::tempdir().unwrap();
        let a = image(&dir.path().join("a"), 4096);
        let (there, _) = a.identity(false).unwrap();
        a.recognise(&there).unwrap();
        fs::hard_link(dir.path().join("a"), dir.path().join("c")).unwrap();
        Image::open(&dir.path().join("c"), true).unwrap().recognise(&there).unwrap();
        assert!(why(&image(&dir.path().join("b"), 4096), &there).contains("device and inode are"));
        let e = why(&image(&dir.path().join("b"), 512), &there);
        assert!(e.contains("it has 512 bytes, and 4096 where the disk is now"), "{e}");
    }

    #[test]
    fn on_two_hosts_it_is_a_mark_in_its_folder() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let a = image(&dir.path().join("a"), 4096);
        let (mut there, mark) = a.identity(true).unwrap();
        there.boot = Some("another host".into());
        there.file = (7, 7);
        a.recognise(&there).unwrap();
        let copy = image(&other.path().join("a"), 4096);
        assert!(why(&copy, &there).contains("the path leads to"));
        let moved = Identity { path: fs::canonicalize(other.path().join("a")).unwrap(), ..there.clone() };
        assert!(why(&copy, &moved).contains("is another folder than there"));
        let named = |name: &str| Identity { mark: Ok((name.into(), String::new())), ..there.clone() };
        assert!(why(&a, &named("a")).contains("it is in no folder"), "not every file is a mark");
        drop(mark);
        assert!(why(&a, &there).contains("no shared file system"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "the mark is gone");
        let none = Identity { mark: Err("no mark can be put into /x: denied".into()), ..there };
        assert!(why(&a, &none).contains("no mark can be put into /x"));
    }

    #[test]
    fn a_lock_is_handed_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let (first, second) = (image(&path, 512), Image::open(&path, false).unwrap());
        first.lock().unwrap();
        assert!(matches!(second.lock(), Err(ImageError::InUse(_))));
        first.flush().unwrap();
        first.unlock();
        second.lock().unwrap();
        second.forget();
        assert!(matches!(first.lock(), Err(ImageError::InUse(_))));
        drop(second);
        first.lock().unwrap();
    }
}
