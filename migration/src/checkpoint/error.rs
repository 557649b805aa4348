//! What can be wrong with a checkpoint: every variant names the file.

use std::io;
use std::path::{Path, PathBuf};

/// Why a checkpoint can't be written or read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file system said no.
    #[error("checkpoint: can't {what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Not one of our files at all.
    #[error("checkpoint: {} is not {expected}", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it should be.
        expected: &'static str,
    },
    /// Written by a later version of this program.
    #[error("checkpoint: {} has format version {found}; this program reads up to {known}", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest that can be read.
        known: u32,
    },
    /// Cut off, changed, or inconsistent.
    #[error("checkpoint: {} is damaged: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A file that belongs to another checkpoint or another guest.
    #[error("checkpoint: {} belongs to {found}, not to {expected}", path.display())]
    Mixed {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        found: String,
        /// Whose it should be.
        expected: String,
    },
    /// A file that must be there is not.
    #[error("checkpoint: {} is missing", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// No complete checkpoint in the folder.
    #[error("checkpoint: {} holds no complete checkpoint", path.display())]
    Empty {
        /// The folder.
        path: PathBuf,
    },
    /// Another process writes to the same folder.
    #[error("checkpoint: {} is being written to by another process", path.display())]
    Busy {
        /// The folder.
        path: PathBuf,
    },
    /// Pages that no checkpoint can have: a fault of the writer.
    #[error("checkpoint: {}: {what}", path.display())]
    Pages {
        /// The file.
        path: PathBuf,
        /// What is wrong with them.
        what: String,
    },
}

impl CheckpointError {
    /// For `map_err` after a system call; a file that is not there is [`CheckpointError::Missing`].
    pub(super) fn io<'a>(
        what: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(io::Error) -> CheckpointError + 'a {
        move |source| match source.kind() {
            io::ErrorKind::NotFound => CheckpointError::Missing { path: path.to_path_buf() },
            _ => CheckpointError::Io { what, path: path.to_path_buf(), source },
        }
    }

    pub(super) fn damaged(path: &Path, what: impl Into<String>) -> CheckpointError {
        CheckpointError::Damaged { path: path.to_path_buf(), what: what.into() }
    }
}
