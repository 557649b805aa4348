//! What the protocol commands for a page, made of the kernel's calls.
//!
//! [`Kernel`] is the seam between both: production implements it with userfaultfd, the simulation with a model of
//! userfaultfd. The code that decides what to do about a page that is there already, about a copy that stopped half
//! way, or in which order rights and bytes come and go, is the same in both.

use super::{MAX_ZERO_RUN, PAGE, RegionError};
use crate::layout::Page;
use crate::seeded::{SeededFault, is_on};
use std::io;

static ZEROS: [u8; PAGE * MAX_ZERO_RUN as usize] = [0; PAGE * MAX_ZERO_RUN as usize];

fn nth(page: Page, n: usize) -> Page {
    Page(page.0.saturating_add(u32::try_from(n).unwrap_or(u32::MAX)))
}

/// When to wake who waits for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// In the same call.
    Now,
    /// The caller does it.
    Later,
}

/// The kernel's calls on guest memory, and what is made of them. Errors are the kernel's.
pub trait Kernel {
    /// Guest-physical address of a page, for errors.
    fn gpa_of(&self, page: Page) -> u64;

    /// One UFFDIO_COPY of whole pages to absent pages, write-protected if `protect`. It may stop early, and then wakes
    /// who waits for what went in. Returns how many bytes that were.
    fn sys_copy(&self, page: Page, bytes: &[u8], protect: bool, wake: Wake) -> (usize, io::Result<()>);

    /// UFFDIO_WRITEPROTECT of neighbouring pages. After an error nobody knows how far it came, and nobody was woken.
    fn sys_write_protect(&self, page: Page, count: u32, protect: bool, wake: Wake) -> io::Result<()>;

    /// UFFDIO_MOVE: takes a page out of the guest's memory and appends its bytes, if they are wanted. Wakes nobody. On an
    /// error (not every kernel can, and no kernel can with a page that a device is reading) the page is where it was.
    fn sys_move(&self, page: Page, out: Option<&mut Vec<u8>>) -> io::Result<()>;

    /// UFFDIO_WAKE of neighbouring pages.
    fn sys_wake(&self, page: Page, count: u32) -> io::Result<()>;

    /// MADV_DONTNEED of neighbouring pages: wakes nobody.
    fn sys_discard(&self, page: Page, count: u32) -> io::Result<()>;

    /// Appends the bytes of a page that is present. On an absent page the caller itself would wait for it.
    fn read(&self, page: Page, out: &mut Vec<u8>) -> Result<(), RegionError>;

    /// Counts a page that should have been absent, was there and had to be replaced.
    fn note_replaced(&self);

    /// How many of those there were.
    fn replaced(&self) -> u64;

    /// An error of one step on one page.
    fn step(&self, step: &'static str, page: Page, source: io::Error) -> RegionError {
        RegionError::Step { step, gpa: self.gpa_of(page), source }
    }

    /// Fills absent neighbouring pages, write-protected if `protect`, in one ioctl.
    fn fill(&self, page: Page, bytes: &[u8], protect: bool, wake: Wake) -> Result<(), RegionError> {
        if protect && is_on(SeededFault::CopyThenProtect) {
            self.fill_run(page, bytes, false, wake)?;
            return self.protect(page, u32::try_from(bytes.len() / PAGE).unwrap_or(u32::MAX));
        }
        self.fill_run(page, bytes, protect, wake)
    }

    /// Fills up to [`MAX_ZERO_RUN`] absent pages with zeros.
    fn fill_zero(&self, page: Page, count: u32, protect: bool, wake: Wake) -> Result<(), RegionError> {
        let count = usize::try_from(count.min(MAX_ZERO_RUN)).unwrap_or(0);
        self.fill_run(page, ZEROS.get(..count * PAGE).unwrap_or(&[]), protect, wake)
    }

    /// Fills absent neighbouring pages from `bytes`, whole pages.
    fn fill_run(&self, page: Page, bytes: &[u8], protect: bool, wake: Wake) -> Result<(), RegionError> {
        let mut done = 0usize;
        while done < bytes.len() {
            let rest = bytes.get(done..).unwrap_or(&[]);
            let (copied, result) = self.sys_copy(nth(page, done / PAGE), rest, protect, wake);
            done += copied;
            let next = nth(page, done / PAGE);
            match result {
                Ok(()) => {}
                Err(_) if copied > 0 && is_on(SeededFault::HalfCopy) => return Ok(()),
                // Part of it went in, or the address space changed under it: go on from there.
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => {}
                Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {
                    // What is there is not what the protocol says: it goes.
                    self.note_replaced();
                    self.sys_discard(next, 1).map_err(|e| self.step("drop", next, e))?;
                }
                Err(e) => return Err(self.step("fill", next, e)),
            }
        }
        Ok(())
    }

    /// Takes the right to write away from neighbouring pages. When it returns no thread and no vCPU of this process can
    /// write to them.
    fn protect(&self, page: Page, count: u32) -> Result<(), RegionError> {
        let count = if is_on(SeededFault::ShortProtect) { 1 } else { count };
        self.write_protect(page, count, true, Wake::Later, "write protection")
    }

    /// Gives the right to write.
    fn unprotect(&self, page: Page, wake: Wake) -> Result<(), RegionError> {
        self.write_protect(page, 1, false, wake, "end of write protection")
    }

    /// Changes the protection, however often the address space changes under it.
    fn write_protect(
        &self,
        page: Page,
        count: u32,
        protect: bool,
        wake: Wake,
        step: &'static str,
    ) -> Result<(), RegionError> {
        loop {
            match self.sys_write_protect(page, count, protect, wake) {
                Ok(()) => return Ok(()),
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => {}
                Err(e) => return Err(self.step(step, page, e)),
            }
        }
    }

    /// Appends the bytes of a page that is present, and drops it. Nobody of this process has written to it after they were
    /// read; if it `is_protected` nobody can anyhow.
    fn take(&self, page: Page, is_protected: bool, out: &mut Vec<u8>) -> Result<(), RegionError> {
        if self.sys_move(page, Some(out)).is_ok() {
            return Ok(());
        }
        if !is_protected {
            self.protect(page, 1)?;
        }
        self.read(page, out)?;
        self.discard(page, 1)
    }

    /// Drops a page that is present; see [`Kernel::discard`].
    fn drop_one(&self, page: Page) -> Result<(), RegionError> {
        if self.sys_move(page, None).is_ok() { Ok(()) } else { self.discard(page, 1) }
    }

    /// Drops neighbouring pages. When it returns no thread and no vCPU of this process can see the old contents.
    fn discard(&self, page: Page, count: u32) -> Result<(), RegionError> {
        self.sys_discard(page, count).map_err(|e| self.step("drop", page, e))
    }

    /// Wakes who waits for neighbouring pages.
    fn wake(&self, page: Page, count: u32) -> Result<(), RegionError> {
        self.sys_wake(page, count).map_err(|e| self.step("wake", page, e))
    }
}
