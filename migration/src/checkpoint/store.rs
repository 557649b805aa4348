//! A folder of checkpoints of one guest, and the steps in which a new one comes to be:
//!
//! ```text
//! DIR/lock          held by whoever writes
//! DIR/00000004/     a complete checkpoint
//! DIR/.new-00000005 one that is being written, or that was when somebody pulled the plug
//!
//! make .new-N -> write page files -> sync them -> write and sync the manifest -> sync .new-N
//!   -> rename to N -> sync DIR -> remove what N does not need (rename to .old-.., remove)
//! ```
//! Until the rename nothing that was there before is touched; the rename is atomic; so at any instant the newest
//! folder without a dot is a whole checkpoint.

use super::error::CheckpointError;
use super::image::Image;
use super::manifest::{self, MANIFEST, Manifest};
use super::part::file_name;
use rustix::fs::{FlockOperation, flock};
use serde::Serialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes after which the kernel is asked to begin to write a page file to disk.
const WRITE_BACK: u64 = 8 << 20;

/// A step of writing, in order. Tests let each of them fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Step {
    Lock,
    MakeDraft,
    MakePart,
    WritePart,
    SyncPart,
    WriteManifest,
    SyncManifest,
    SyncDraft,
    Rename,
    SyncStore,
    Prune,
}

/// Called before each step; an error is taken for the kernel's.
pub type Probe = Arc<dyn Fn(Step) -> io::Result<()> + Send + Sync>;

/// A folder of checkpoints, open for writing.
pub struct Store {
    root: PathBuf,
    probe: Probe,
    /// The lock goes when the file is closed, however this process ends.
    _lock: File,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("root", &self.root).finish_non_exhaustive()
    }
}

/// Folders of complete checkpoints, oldest first.
///
/// # Errors
/// The folder can't be read.
pub fn complete(root: &Path) -> Result<Vec<String>, CheckpointError> {
    let entries = fs::read_dir(root).map_err(CheckpointError::io("read", root))?;
    let names = entries.flatten().filter_map(|e| e.file_name().into_string().ok());
    let mut names: Vec<_> = names.filter(|name| number(name).is_some()).collect();
    names.sort();
    Ok(names)
}

/// The folder of the newest complete checkpoint. `path` may also be that of one checkpoint itself.
///
/// # Errors
/// There is none.
pub fn newest(path: &Path) -> Result<PathBuf, CheckpointError> {
    if path.join(MANIFEST).exists() {
        return Ok(path.to_path_buf());
    }
    let newest = complete(path)?.pop().ok_or_else(|| CheckpointError::Empty { path: path.to_path_buf() })?;
    Ok(path.join(newest))
}

/// Number of checkpoints that the newest one consists of, itself included.
///
/// # Errors
/// There is none, or one is damaged.
pub fn chain_length(root: &Path) -> Result<usize, CheckpointError> {
    chain(root).map(|names| names.len())
}

/// Folders of the newest checkpoint and of those that it builds on.
fn chain(root: &Path) -> Result<Vec<String>, CheckpointError> {
    let mut needed = Vec::new();
    let mut next = newest(root)?.file_name().map(|n| n.to_string_lossy().into_owned());
    while let Some(name) = next.filter(|n| !needed.contains(n)) {
        let manifest: Manifest<IgnoredAny> = manifest::read(&root.join(&name).join(MANIFEST))?;
        next = manifest.parent.map(|p| p.folder);
        needed.push(name);
    }
    Ok(needed)
}

fn number(name: &str) -> Option<u32> {
    (name.len() == 8 && name.bytes().all(|b| b.is_ascii_digit())).then(|| name.parse().ok())?
}

impl Store {
    /// Opens a folder, or makes it, and removes what an interrupted writer left.
    ///
    /// # Errors
    /// Another process writes to it, or the file system says no.
    pub fn open(root: &Path) -> Result<Store, CheckpointError> {
        Store::open_with(root, Arc::new(|_| Ok(())))
    }

    /// As [`Store::open`], with `probe` called before each step.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_with(root: &Path, probe: Probe) -> Result<Store, CheckpointError> {
        // Relative names would mean something else to a process that was started elsewhere.
        let root = std::path::absolute(root).map_err(CheckpointError::io("find", root))?;
        probe(Step::Lock).map_err(CheckpointError::io("lock", &root))?;
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&root);
        made.map_err(CheckpointError::io("make the folder", &root))?;
        let path = root.join("lock");
        let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let lock = lock.map_err(CheckpointError::io("open", &path))?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(CheckpointError::Busy { path: root });
        }
        let store = Store { root, probe, _lock: lock };
        store.clean();
        Ok(store)
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn step(&self, step: Step, what: &'static str, path: &Path) -> Result<(), CheckpointError> {
        (self.probe)(step).map_err(CheckpointError::io(what, path))
    }

    /// Removes what is neither complete nor needed. What can't be removed now is removed next time.
    fn clean(&self) {
        let Ok(entries) = fs::read_dir(&self.root) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            if name.to_str().is_some_and(|n| n.starts_with(".new-") || n.starts_with(".old-")) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }

    /// Begins a checkpoint.
    ///
    /// # Errors
    /// The file system says no.
    pub fn begin(self: &Arc<Self>) -> Result<Draft, CheckpointError> {
        let last = complete(&self.root)?.last().and_then(|name| number(name)).unwrap_or(0);
        let next =
            last.checked_add(1).filter(|n| *n < 100_000_000).ok_or_else(|| CheckpointError::Pages {
                path: self.root.clone(),
                what: "the numbers of checkpoints have run out".into(),
            })?;
        let name = format!("{next:08}");
        let path = self.root.join(format!(".new-{name}"));
        self.step(Step::MakeDraft, "make the folder", &path)?;
        let made = fs::DirBuilder::new().mode(0o700).create(&path);
        made.map_err(CheckpointError::io("make the folder", &path))?;
        Ok(Draft { store: self.clone(), name, path, is_done: false })
    }

    /// Removes all checkpoints that the newest does not need. Returns their names.
    ///
    /// # Errors
    /// The newest can't be read, or the file system says no.
    pub fn prune(&self) -> Result<Vec<String>, CheckpointError> {
        let needed = chain(&self.root)?;
        let old: Vec<_> = complete(&self.root)?.into_iter().filter(|n| !needed.contains(n)).collect();
        for name in &old {
            let (from, to) = (self.root.join(name), self.root.join(format!(".old-{name}")));
            self.step(Step::Prune, "remove", &from)?;
            fs::rename(&from, &to).map_err(CheckpointError::io("rename", &from))?;
            fs::remove_dir_all(&to).map_err(CheckpointError::io("remove", &to))?;
        }
        Ok(old)
    }

    /// Makes a full checkpoint of the newest one, if that is incremental; it keeps its id, so the next incremental one
    /// can build on it. Returns its folder.
    ///
    /// # Errors
    /// A damaged chain, or the file system says no.
    pub fn consolidate<M: Serialize + DeserializeOwned>(
        self: &Arc<Self>,
    ) -> Result<PathBuf, CheckpointError> {
        let folder = newest(&self.root)?;
        let (mut manifest, image) = Image::open::<M>(&folder)?;
        if manifest.parent.is_none() {
            return Ok(folder);
        }
        let draft = self.begin()?;
        let sink = draft.part(0)?;
        let part = image.copy_to(sink, manifest.guest, manifest.id)?;
        manifest.parent = None;
        manifest.parts = vec![part];
        draft.finish(&manifest)
    }
}

/// A checkpoint that is being written. Dropped before [`Draft::finish`] it leaves nothing.
#[derive(Debug)]
pub struct Draft {
    store: Arc<Store>,
    name: String,
    path: PathBuf,
    is_done: bool,
}

impl Draft {
    /// Name that the checkpoint's folder will have.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A new page file.
    ///
    /// # Errors
    /// The file system says no.
    pub fn part(&self, number: u32) -> Result<PartSink, CheckpointError> {
        let path = self.path.join(file_name(number));
        self.store.step(Step::MakePart, "make", &path)?;
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let file = file.map_err(CheckpointError::io("make", &path))?;
        Ok(PartSink { file, path, probe: self.store.probe.clone(), written: 0, asked: 0 })
    }

    /// Makes it the newest checkpoint: returns when it would survive the host. Page files must have been written and
    /// are synced here.
    ///
    /// # Errors
    /// The file system says no, or a page file has not the length that the manifest gives; then nothing has changed.
    pub fn finish<M: Serialize>(mut self, manifest: &Manifest<M>) -> Result<PathBuf, CheckpointError> {
        let store = self.store.clone();
        for part in &manifest.parts {
            let path = self.path.join(&part.file);
            store.step(Step::SyncPart, "sync", &path)?;
            let file = File::open(&path).map_err(CheckpointError::io("open", &path))?;
            file.sync_all().map_err(CheckpointError::io("sync", &path))?;
            let length = file.metadata().map_err(CheckpointError::io("look at", &path))?.len();
            if length != part.length {
                let what = format!("{length} of {} bytes were written", part.length);
                return Err(CheckpointError::Pages { path, what });
            }
        }
        let path = self.path.join(MANIFEST);
        let bytes = manifest::encode(manifest)
            .map_err(|e| CheckpointError::Pages { path: path.clone(), what: e.to_string() })?;
        store.step(Step::WriteManifest, "write", &path)?;
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(CheckpointError::io("make", &path))?;
        file.write_all(&bytes).map_err(CheckpointError::io("write", &path))?;
        store.step(Step::SyncManifest, "sync", &path)?;
        file.sync_all().map_err(CheckpointError::io("sync", &path))?;
        store.step(Step::SyncDraft, "sync", &self.path)?;
        sync_folder(&self.path)?;
        let done = store.root.join(&self.name);
        store.step(Step::Rename, "rename", &self.path)?;
        fs::rename(&self.path, &done).map_err(CheckpointError::io("rename", &self.path))?;
        self.is_done = true;
        store.step(Step::SyncStore, "sync", &store.root)?;
        sync_folder(&store.root)?;
        Ok(done)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.is_done {
            // What stays is removed by the next writer.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

fn sync_folder(path: &Path) -> Result<(), CheckpointError> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(CheckpointError::io("sync", path))
}

/// A page file under construction. Its errors name it.
pub struct PartSink {
    file: File,
    path: PathBuf,
    probe: Probe,
    written: u64,
    asked: u64,
}

impl std::fmt::Debug for PartSink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PartSink").field("path", &self.path).finish_non_exhaustive()
    }
}

impl PartSink {
    /// Appends.
    ///
    /// # Errors
    /// Disk full, for one.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        (self.probe)(Step::WritePart)
            .and_then(|()| self.file.write_all(bytes))
            .map_err(CheckpointError::io("write", &self.path))?;
        self.written += bytes.len() as u64;
        if self.written - self.asked >= WRITE_BACK {
            // Or the disk would have nothing to do until the sync at the end.
            start_write_back(&self.file, self.asked, self.written - self.asked);
            self.asked = self.written;
        }
        Ok(())
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Write for PartSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.append(bytes).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn start_write_back(file: &File, offset: u64, len: u64) {
    use std::os::fd::AsRawFd;
    let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else { return };
    // SAFETY: takes a descriptor, which `file` keeps open for the call, and numbers (sync_file_range(2)). A file system
    // that does not know it writes at the sync.
    unsafe { libc::sync_file_range(file.as_raw_fd(), offset, len, libc::SYNC_FILE_RANGE_WRITE) };
}
