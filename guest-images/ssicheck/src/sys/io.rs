//! Descriptors: pipes, eventfds, poll, block devices, terminals, memory aligned for direct I/O.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use crate::failure::Failure;
use crate::sys::shared::PAGE;

/// BLKROGET of linux/fs.h: is the block device read-only?
const BLKROGET: libc::Ioctl = 0x125e;

/// A pipe: (read end, write end).
pub fn pipe() -> Result<(File, File), Failure> {
    let mut fds = [0i32; 2];
    // SAFETY: the kernel writes two descriptors.
    if unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(Failure::last_os("pipe2"));
    }
    let [r, w] = fds;
    // SAFETY: both descriptors are new and owned by nobody else.
    unsafe { Ok((File::from_raw_fd(r), File::from_raw_fd(w))) }
}

/// An eventfd counter of 0.
pub fn eventfd() -> Result<File, Failure> {
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
    if fd < 0 {
        return Err(Failure::last_os("eventfd"));
    }
    // SAFETY: the descriptor is new and owned by nobody else.
    Ok(unsafe { File::from(OwnedFd::from_raw_fd(fd)) })
}

/// Waits until `fd` can be read (or has ended); fails after `limit`, naming `what`.
pub fn wait_readable(fd: &impl AsFd, limit: Duration, what: &str) -> Result<(), Failure> {
    let mut poll = libc::pollfd { fd: fd.as_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let ms = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
    loop {
        // SAFETY: one pollfd is given and counted as one.
        match unsafe { libc::poll(&raw mut poll, 1, ms) } {
            0 => return Err(Failure::timeout(what, limit)),
            n if n > 0 => return Ok(()),
            _ if std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted => {}
            _ => return Err(Failure::last_os(format!("poll: {what}"))),
        }
    }
}

/// Whether a block device is read-only; `None` if `file` is no block device.
pub fn block_read_only(file: &File) -> Option<bool> {
    let mut flag = 0i32;
    // SAFETY: BLKROGET writes one int; other kinds of file refuse the request.
    let rc = unsafe { libc::ioctl(file.as_raw_fd(), BLKROGET, &raw mut flag) };
    (rc == 0).then_some(flag != 0)
}

/// Waits until all output of a terminal has left; false if `file` is no terminal.
pub fn drain_terminal(file: &File) -> bool {
    // SAFETY: tcdrain takes a descriptor, and files that are no terminal refuse it.
    unsafe { libc::tcdrain(file.as_raw_fd()) == 0 }
}

/// Forgets the cached pages of `file`, so that the next read asks the device.
pub fn drop_cache(file: &File, offset: u64, len: u64) {
    if let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) {
        // SAFETY: advice only; no memory is involved.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), offset, len, libc::POSIX_FADV_DONTNEED) };
    }
}

/// One page of memory, aligned as direct I/O wants it.
#[repr(C, align(4096))]
#[derive(Clone)]
pub struct PageBuffer(pub [u8; PAGE]);

impl std::fmt::Debug for PageBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PageBuffer")
    }
}

impl PageBuffer {
    /// A zeroed page on the heap.
    pub fn new() -> Box<PageBuffer> {
        Box::new(PageBuffer([0; PAGE]))
    }
}

/// Takes the exclusive flock(2) of `file`; closing the file gives it back.
pub fn lock_exclusive(file: &File) -> Result<(), Failure> {
    // SAFETY: flock takes a descriptor and a number.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) } != 0 {
        return Err(Failure::last_os("flock"));
    }
    Ok(())
}

/// A connected pair of Unix sequenced-packet sockets. std knows no such type; send and recv are those of datagrams.
pub fn seqpacket_pair() -> Result<(UnixDatagram, UnixDatagram), Failure> {
    let mut fds = [0i32; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: the kernel writes two descriptors.
    if unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) } != 0 {
        return Err(Failure::last_os("making a pair of sequenced-packet sockets"));
    }
    let [a, b] = fds;
    // SAFETY: both descriptors are new and owned by nobody else.
    unsafe { Ok((UnixDatagram::from_raw_fd(a), UnixDatagram::from_raw_fd(b))) }
}
