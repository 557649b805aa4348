//! The runtime directory: one folder per VM that runs on this host, with its HTTP socket, log and lock.
//!
//! The lock is held by the coordinator's process, so the kernel releases it however that process ends. A
//! folder whose lock is free is left over from a process that was killed, and whoever meets it removes it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Why a VM's folder can't be had.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// A VM of this name runs.
    #[error("a VM named {0:?} runs on this host already: choose another --name, or `spanvm stop {0}`")]
    Taken(String),
    /// The folder can't be made or locked.
    #[error("{}: {error}; set SPANVM_RUNTIME_DIR to a folder that this user can write to", path.display())]
    Io {
        /// What was touched.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
    /// A Unix socket's path is at most 107 bytes.
    #[error("{} is too long for a socket's path: set SPANVM_RUNTIME_DIR to a shorter one", .0.display())]
    TooLong(PathBuf),
}

/// The runtime directory of this user.
pub fn root() -> PathBuf {
    if let Some(dir) = std::env::var_os("SPANVM_RUNTIME_DIR").filter(|dir| !dir.is_empty()) {
        return PathBuf::from(dir);
    }
    // SAFETY: geteuid has no preconditions and always succeeds (POSIX.1-2024).
    let user = unsafe { libc::geteuid() };
    if user == 0 {
        return PathBuf::from("/run/spanvm");
    }
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty()) {
        Some(dir) => PathBuf::from(dir).join("spanvm"),
        None => PathBuf::from(format!("/tmp/spanvm-{user}")),
    }
}

/// The HTTP socket of a VM under `root`.
pub fn socket(root: &Path, vm: &str) -> PathBuf {
    root.join(vm).join("api.sock")
}

/// Where the log of a VM that failed is kept.
pub fn kept_log(folder: &Path) -> PathBuf {
    let mut path = folder.as_os_str().to_owned();
    path.push(".log");
    PathBuf::from(path)
}

/// A VM's folder, locked as long as this lives, removed when it is dropped.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    _lock: File,
}

impl RunDir {
    /// Makes and locks the folder of `vm`; removes what a killed coordinator left in it.
    ///
    /// # Errors
    /// A running VM has it, or the file system says no.
    pub fn claim(root: &Path, vm: &str) -> Result<RunDir, RunDirError> {
        let path = root.join(vm);
        let io = |path: &Path| {
            let path = path.to_path_buf();
            move |error| RunDirError::Io { path, error }
        };
        if socket(root, vm).as_os_str().len() > 107 {
            return Err(RunDirError::TooLong(socket(root, vm)));
        }
        fs::DirBuilder::new().recursive(true).mode(0o700).create(root).map_err(io(root))?;
        // Somebody who cleans up may remove the folder between our open and our lock: then try again.
        for _ in 0..10 {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(io(&path))?;
            let file = path.join("lock");
            let opened = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&file);
            let lock = match opened {
                Ok(lock) => lock,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(io(&file)(e)),
            };
            if !try_lock(&lock).map_err(io(&file))? {
                return Err(RunDirError::Taken(vm.to_string()));
            }
            if !same_file(&lock, &file) {
                continue;
            }
            for left in [path.join("api.sock"), path.join("log"), kept_log(&path)] {
                match fs::remove_file(&left) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(io(&left)(e)),
                    _ => {}
                }
            }
            return Ok(RunDir { path, _lock: lock });
        }
        let error = io::Error::other("it is removed again and again by another process");
        Err(RunDirError::Io { path, error })
    }

    /// The HTTP socket.
    pub fn socket(&self) -> PathBuf {
        self.path.join("api.sock")
    }

    /// The log of the coordinator and of the members it spawned.
    pub fn log(&self) -> PathBuf {
        self.path.join("log")
    }

    /// Keeps the log, unless it is empty, as `NAME.log` beside the folder, which is about to go.
    pub fn keep_log(&self) {
        if fs::metadata(self.log()).is_ok_and(|meta| meta.len() > 0) {
            let _ = fs::rename(self.log(), kept_log(&self.path));
        }
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// Removes a folder whose lock the caller holds. The lock goes last: as soon as it is gone the folder can be another
/// coordinator's, and what lies in it that one's.
fn remove(path: &Path) {
    let lock = path.join("lock");
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        let left = entry.path();
        if left != lock {
            // Never a folder, unless somebody put one there.
            let _ = fs::remove_file(&left).or_else(|_| fs::remove_dir_all(&left));
        }
    }
    let _ = fs::remove_file(lock);
    // Fails if another coordinator has it already.
    let _ = fs::remove_dir(path);
}

/// Takes the lock if it is free.
fn try_lock(file: &File) -> io::Result<bool> {
    // SAFETY: flock only takes a descriptor, which `file` keeps open for the call (flock(2)).
    match unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } {
        0 => Ok(true),
        _ => match io::Error::last_os_error() {
            e if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
            e => Err(e),
        },
    }
}

fn same_file(open: &File, path: &Path) -> bool {
    match (open.metadata(), fs::metadata(path)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

/// Names of the VMs that run under `root`, ascending; removes the folders of those that don't any more.
pub fn running(root: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(root) else { return Vec::new() };
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| crate::config::resolve::check_name(name).is_ok() && !remove_stale(root, name))
        .collect();
    names.sort();
    names
}

/// Removes the folder of `vm` if nobody holds its lock. True when it is gone (or never was a VM's).
pub fn remove_stale(root: &Path, vm: &str) -> bool {
    let path = root.join(vm);
    let lock = match OpenOptions::new().write(true).open(path.join("lock")) {
        Ok(lock) => lock,
        Err(_) => return true,
    };
    match try_lock(&lock) {
        Ok(true) => {
            if same_file(&lock, &path.join("lock")) {
                remove(&path);
            }
            true
        }
        Ok(false) | Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_vm_of_a_name() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let first = RunDir::claim(root, "a").unwrap();
        assert!(matches!(RunDir::claim(root, "a"), Err(RunDirError::Taken(name)) if name == "a"));
        let other = RunDir::claim(root, "b").unwrap();
        assert_eq!(running(root), ["a", "b"]);
        drop((first, other));
        assert!(running(root).is_empty() && !root.join("a").exists());
        RunDir::claim(root, "a").unwrap();
    }

    #[test]
    fn one_that_comes_while_another_goes_keeps_what_is_its_own() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let use_it = || {
            let mut times = 0;
            while times < 500 {
                let Ok(mine) = RunDir::claim(root, "a") else { continue };
                for path in [mine.socket(), mine.log()] {
                    fs::write(&path, "").unwrap();
                }
                std::thread::sleep(std::time::Duration::from_micros(50));
                assert!(mine.socket().exists() && mine.log().exists());
                times += 1;
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(use_it);
            scope.spawn(use_it);
            scope.spawn(|| (0..2000).for_each(|_| drop(running(root))));
        });
    }

    #[test]
    fn what_a_killed_process_left_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        for vm in ["dead", "dead2"] {
            fs::create_dir(root.join(vm)).unwrap();
            fs::write(root.join(vm).join("lock"), "").unwrap();
            fs::write(root.join(vm).join("api.sock"), "").unwrap();
        }
        let mine = RunDir::claim(root, "dead").unwrap();
        assert!(!mine.socket().exists());
        assert_eq!(running(root), ["dead"]);
        assert!(!root.join("dead2").exists());
    }

    #[test]
    fn a_folder_that_cannot_be() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("file"), "").unwrap();
        assert!(matches!(RunDir::claim(&root.path().join("file"), "a"), Err(RunDirError::Io { .. })));
        let long = root.path().join("x".repeat(120));
        assert!(matches!(RunDir::claim(&long, "a"), Err(RunDirError::TooLong(_))));
    }
}
