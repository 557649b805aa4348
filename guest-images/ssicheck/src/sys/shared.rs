//! Memory shared between threads and processes, always seen through atomics.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};

use crate::failure::Failure;

/// Bytes per page: the unit of coherence.
pub const PAGE: usize = 4096;

/// How the memory is given back.
#[derive(Debug)]
enum Kind {
    Mapped,
    SysV,
}

/// A page-aligned mapping that forked children share.
#[derive(Debug)]
pub struct Shared {
    base: *mut u8,
    len: usize,
    kind: Kind,
}

// SAFETY: the memory belongs to this value until it is dropped, and is only handed out as shared references to
// atomics, which any thread may use.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// `pages` zeroed pages shared with children.
    pub fn anonymous(pages: usize) -> Result<Shared, Failure> {
        map(pages * PAGE, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, "anonymous shared memory")
    }

    /// `pages` zeroed pages that a child gets a private copy of.
    pub fn private(pages: usize) -> Result<Shared, Failure> {
        map(pages * PAGE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, "private memory")
    }

    /// The first `pages` pages of a file, shared. The file must be at least that long and stay so: beyond its end the
    /// kernel raises SIGBUS.
    pub fn of_file(file: &File, pages: usize) -> Result<Shared, Failure> {
        map(pages * PAGE, libc::MAP_SHARED, file.as_raw_fd(), "a file")
    }

    /// A new SysV segment of `pages` pages. It is marked for removal at once (Linux still lets children that inherit
    /// the attachment use it), so it can't outlive its users.
    pub fn sysv(pages: usize) -> Result<Shared, Failure> {
        // SAFETY: creates a kernel object; no memory of ours is involved.
        let id = unsafe { libc::shmget(libc::IPC_PRIVATE, pages * PAGE, libc::IPC_CREAT | 0o600) };
        if id < 0 {
            return Err(Failure::last_os("shmget"));
        }
        let shared = Shared::attach(id, pages);
        // SAFETY: IPC_RMID reads no buffer.
        unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) };
        shared
    }

    fn attach(id: i32, pages: usize) -> Result<Shared, Failure> {
        // SAFETY: a null address lets the kernel choose free address space.
        let base = unsafe { libc::shmat(id, std::ptr::null(), 0) };
        if base as isize == -1 {
            return Err(Failure::last_os("shmat"));
        }
        Ok(Shared { base: base.cast(), len: pages * PAGE, kind: Kind::SysV })
    }

    /// The memory as bytes.
    pub fn bytes(&self) -> &[AtomicU8] {
        // SAFETY: `base..base+len` is mapped and writable while `self` lives, and all access is atomic.
        unsafe { std::slice::from_raw_parts(self.base.cast(), self.len) }
    }

    /// The memory as 32-bit words.
    pub fn words(&self) -> &[AtomicU32] {
        // SAFETY: as in `bytes`; a page-aligned base is aligned for u32.
        unsafe { std::slice::from_raw_parts(self.base.cast(), self.len / 4) }
    }

    /// The memory as 64-bit words.
    pub fn longs(&self) -> &[AtomicU64] {
        // SAFETY: as in `bytes`; a page-aligned base is aligned for u64.
        unsafe { std::slice::from_raw_parts(self.base.cast(), self.len / 8) }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by this type, and no reference into it outlives `self`.
        unsafe {
            match self.kind {
                Kind::Mapped => libc::munmap(self.base.cast(), self.len),
                Kind::SysV => libc::shmdt(self.base.cast()),
            };
        }
    }
}

fn map(len: usize, flags: i32, fd: i32, what: &str) -> Result<Shared, Failure> {
    // SAFETY: without MAP_FIXED the kernel picks free address space, so no existing memory is touched.
    let base =
        unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) };
    if base == libc::MAP_FAILED {
        return Err(Failure::last_os(format!("mapping {len} bytes of {what}")));
    }
    Ok(Shared { base: base.cast(), len, kind: Kind::Mapped })
}
