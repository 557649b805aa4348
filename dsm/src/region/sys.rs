//! The userfaultfd ABI of `<linux/userfaultfd.h>`, as far as it is used here, and its ioctls.
//!
//! The usual wrapper crate can't install a page write-protected in one ioctl and needs libclang to build; these
//! few structures replace it.

use super::ops::Wake;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `UFFD_API`.
const API: u64 = 0xAA;
/// `UFFD_FEATURE_PAGEFAULT_FLAG_WP`.
const FEATURE_WP: u64 = 1 << 0;
/// `UFFD_FEATURE_THREAD_ID`.
const FEATURE_THREAD_ID: u64 = 1 << 8;

const IOC_API: libc::c_ulong = 0xc018_aa3f;
const IOC_REGISTER: libc::c_ulong = 0xc020_aa00;
const IOC_UNREGISTER: libc::c_ulong = 0x8010_aa01;
const IOC_WAKE: libc::c_ulong = 0x8010_aa02;
const IOC_COPY: libc::c_ulong = 0xc028_aa03;
const IOC_MOVE: libc::c_ulong = 0xc028_aa05;
const IOC_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;
/// `USERFAULTFD_IOC_NEW` on /dev/userfaultfd.
const IOC_NEW: libc::c_ulong = 0xaa00;

const REGISTER_MISSING: u64 = 1;
const REGISTER_WP: u64 = 2;
/// Bit of UFFDIO_MOVE among the ioctls that a registered range can take (Linux 6.8).
const CAN_MOVE: u64 = 1 << 5;
const COPY_DONTWAKE: u64 = 1;
const MOVE_DONTWAKE: u64 = 1;
const COPY_WP: u64 = 2;
const WRITEPROTECT_WP: u64 = 1;
const WRITEPROTECT_DONTWAKE: u64 = 2;

/// `UFFD_EVENT_PAGEFAULT`.
pub(super) const EVENT_PAGEFAULT: u8 = 0x12;
/// `UFFD_PAGEFAULT_FLAG_WRITE` and `UFFD_PAGEFAULT_FLAG_WP`: both mean that somebody wants to write.
pub(super) const FLAGS_WRITE: u64 = 3;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
struct UffdioWriteprotect {
    range: UffdioRange,
    mode: u64,
}

/// `struct uffdio_move`.
#[repr(C)]
struct UffdioMove {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    moved: i64,
}

/// `struct uffd_msg` of a page fault: 32 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct UffdMsg {
    pub(super) event: u8,
    reserved: [u8; 7],
    pub(super) flags: u64,
    pub(super) address: u64,
    pub(super) thread: u32,
    padding: u32,
}

/// An open userfaultfd. Its calls take addresses; they act only on memory that was registered with it.
#[derive(Debug)]
pub(super) struct Uffd {
    fd: OwnedFd,
}

impl Uffd {
    /// Opens a non-blocking userfaultfd that also sees faults taken in the kernel (KVM's are).
    pub(super) fn open() -> io::Result<Uffd> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the system call takes one integer and returns a new file descriptor or -1.
        let raw = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let fd = match i32::try_from(raw) {
            // SAFETY: the kernel just made this descriptor for us; nobody else owns it.
            Ok(fd) if fd >= 0 => unsafe { OwnedFd::from_raw_fd(fd) },
            _ => {
                let refused = io::Error::last_os_error();
                Self::open_device(flags).map_err(|_| refused)?
            }
        };
        let uffd = Uffd { fd };
        let mut api = UffdioApi { api: API, features: FEATURE_WP | FEATURE_THREAD_ID, ioctls: 0 };
        uffd.ioctl(IOC_API, &mut api)?;
        Ok(uffd)
    }

    fn open_device(flags: libc::c_int) -> io::Result<OwnedFd> {
        let device = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd")?;
        // SAFETY: this ioctl takes its flags by value and returns a new file descriptor or -1.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), IOC_NEW, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just made this descriptor for us; nobody else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    fn ioctl<T>(&self, request: libc::c_ulong, arg: &mut T) -> io::Result<()> {
        // SAFETY: every `request` in this file is passed with the structure that <linux/userfaultfd.h> defines for
        // it, so the kernel reads and writes inside `arg`. What the requests do to *other* memory is argued at
        // `Region`, the only user: copy fills pages of its own mappings that are absent, move empties a page of one and
        // fills an absent one of another, write-protect and wake change no contents, and register is given only its
        // own mappings.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), request, std::ptr::from_mut(arg)) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    pub(super) fn as_fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Says whether pages can be moved there.
    pub(super) fn register(&self, start: u64, len: u64) -> io::Result<bool> {
        let range = UffdioRange { start, len };
        let mut arg = UffdioRegister { range, mode: REGISTER_MISSING | REGISTER_WP, ioctls: 0 };
        self.ioctl(IOC_REGISTER, &mut arg)?;
        Ok(arg.ioctls & CAN_MOVE != 0)
    }

    /// Moves a page from one private mapping of this process to a place where none is. Wakes nobody.
    pub(super) fn move_page(&self, dst: u64, src: u64) -> io::Result<()> {
        let mut arg = UffdioMove { dst, src, len: 4096, mode: MOVE_DONTWAKE, moved: 0 };
        self.ioctl(IOC_MOVE, &mut arg)
    }

    /// Wakes all who wait in the range, too.
    pub(super) fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        self.ioctl(IOC_UNREGISTER, &mut UffdioRange { start, len })
    }

    pub(super) fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        self.ioctl(IOC_WAKE, &mut UffdioRange { start, len })
    }

    /// Fills absent pages. Returns how many bytes went in before an error stopped it.
    pub(super) fn copy(&self, dst: u64, src: &[u8], protect: bool, wake: Wake) -> (usize, io::Result<()>) {
        let sleep = if wake == Wake::Later { COPY_DONTWAKE } else { 0 };
        let mode = sleep | if protect { COPY_WP } else { 0 };
        let (src, len) = (src.as_ptr() as u64, src.len() as u64);
        let mut arg = UffdioCopy { dst, src, len, mode, copy: 0 };
        let result = self.ioctl(IOC_COPY, &mut arg);
        (usize::try_from(arg.copy).unwrap_or(0), result)
    }

    /// Takes the right to write away, which wakes nobody, or gives it back.
    pub(super) fn write_protect(&self, start: u64, len: u64, protect: bool, wake: Wake) -> io::Result<()> {
        let mode = match (protect, wake) {
            (true, _) => WRITEPROTECT_WP,
            (false, Wake::Now) => 0,
            (false, Wake::Later) => WRITEPROTECT_DONTWAKE,
        };
        self.ioctl(IOC_WRITEPROTECT, &mut UffdioWriteprotect { range: UffdioRange { start, len }, mode })
    }

    /// Reads as many messages as there are, up to `out.len()`; an error of kind `WouldBlock` if none.
    pub(super) fn read(&self, out: &mut [UffdMsg]) -> io::Result<usize> {
        let size = size_of_val(out);
        // SAFETY: the kernel writes at most `size` bytes into `out`, which is that large; every bit pattern is a
        // valid `UffdMsg`.
        let got = unsafe { libc::read(self.fd.as_raw_fd(), out.as_mut_ptr().cast(), size) };
        match usize::try_from(got) {
            Ok(bytes) => Ok(bytes / size_of::<UffdMsg>()),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }
}
