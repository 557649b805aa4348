//! Guest memory as this process sees it: private anonymous mappings under userfaultfd. All `unsafe` that
//! concerns memory lives in this folder.
//!
//! - [`Region`] maps the ranges and registers them with one or several userfaultfds.
//! - [`Kernel`] carries out what the protocol commands for a page: fill it with a right, protect, unprotect, read,
//!   drop, wake.
//! - [`sys`] is the kernel's ABI.
//!
//! A page is filled with its right in one ioctl: filling it first and protecting it then would leave a moment in
//! which a vCPU writes to a shared copy.

mod access;
mod attic;
mod map;
mod ops;
mod sys;

pub use access::Memory;
pub use map::Mapping;
pub use ops::{Kernel, Wake};

use crate::addr::PAGE_SIZE;
use crate::layout::{Layout, Page};
use attic::Attic;
use map::Map;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use sys::{EVENT_PAGEFAULT, FLAGS_WRITE, Uffd, UffdMsg};
use thiserror::Error;

const PAGE: usize = 4096;
/// Most pages that one command can fill with zeros.
pub const MAX_ZERO_RUN: u32 = 64;
/// Memory is dealt out to userfaultfds in stripes of at least this many bytes.
const MIN_STRIPE: u64 = 2 << 20;
/// Most stripes per range; each is a VMA of its own when there are several userfaultfds.
const MAX_STRIPES: u64 = 64;

/// A step that the kernel refused.
#[derive(Debug, Error)]
pub enum RegionError {
    /// No userfaultfd for faults in kernel mode.
    #[error(
        "userfaultfd is not usable ({source}): run as root, or set vm.unprivileged_userfaultfd=1, or give the user \
         access to /dev/userfaultfd"
    )]
    Unusable {
        /// The kernel's answer.
        source: io::Error,
    },
    /// The address space or the memory limit has no room.
    #[error("can't map {len} bytes of guest memory: {source}")]
    Map {
        /// Length of the range in bytes.
        len: u64,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The page's contents can't be had from the image.
    #[error("guest page {gpa:#x} can't be read from the image: {what}")]
    Image {
        /// The page's address.
        gpa: u64,
        /// Why.
        what: String,
    },
    /// One step on one page failed.
    #[error("{step} of guest page {gpa:#x} failed: {source}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// The page's address.
        gpa: u64,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// A thread waits for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The page.
    pub page: Page,
    /// Whether it wants to write.
    pub write: bool,
    /// Its thread id.
    pub thread: u32,
}

/// Says whether this process can use userfaultfd as this crate needs it.
pub fn probe() -> Result<(), RegionError> {
    Uffd::open().map(|_| ()).map_err(|source| RegionError::Unusable { source })
}

#[derive(Debug)]
struct Span {
    map: Map,
    gpa: u64,
    first: u32,
    stripe: u64,
}

/// The memory of one member.
///
/// Soundness: all mappings are this struct's own, nothing in Rust holds a reference into them, and guest memory is read
/// and written through raw pointers only. Registering memory with userfaultfd can make any thread that touches
/// it wait, which is why only these mappings are registered.
#[derive(Debug)]
pub struct Region {
    layout: Layout,
    spans: Vec<Span>,
    mappings: Vec<Mapping>,
    uffds: Vec<Uffd>,
    /// One for each userfaultfd, or none.
    attics: Vec<Attic>,
    replaced: AtomicU64,
}

impl Region {
    /// Maps the memory and registers it with `shards` (at least 1) userfaultfds.
    pub fn new(layout: &Layout, shards: usize) -> Result<Region, RegionError> {
        let shards = shards.max(1);
        let uffds = (0..shards)
            .map(|_| Uffd::open())
            .collect::<io::Result<Vec<_>>>()
            .map_err(|source| RegionError::Unusable { source })?;
        let mut spans = Vec::new();
        let mut first = 0;
        for range in layout.ranges() {
            let map = Map::new(range.len).map_err(|source| RegionError::Map { len: range.len, source })?;
            let even = range.len.div_ceil(MAX_STRIPES).max(MIN_STRIPE).next_multiple_of(MIN_STRIPE);
            let stripe = if shards == 1 { range.len } else { even };
            spans.push(Span { map, gpa: range.start, first, stripe });
            first = first.saturating_add(u32::try_from(range.len / PAGE_SIZE).unwrap_or(u32::MAX));
        }
        let mappings = spans.iter().map(|s| s.map.mapping(s.gpa)).collect();
        let replaced = AtomicU64::new(0);
        let mut region =
            Region { layout: layout.clone(), spans, mappings, uffds, attics: Vec::new(), replaced };
        region
            .each_stripe(|uffd, start, len| uffd.register(start, len).map(|_| ()))
            .map_err(|(gpa, source)| RegionError::Step { step: "registration", gpa, source })?;
        for uffd in &region.uffds {
            let attic = Attic::new(uffd).map_err(|source| RegionError::Step {
                step: "registration of a spare page",
                gpa: 0,
                source,
            })?;
            region.attics.extend(attic);
        }
        Ok(region)
    }

    /// Frees pages that were given away. For when nobody waits for this thread.
    pub fn tidy(&self) {
        for attic in &self.attics {
            if let Err(e) = attic.tidy() {
                tracing::warn!("pages that were given away are not freed: {e}");
            }
        }
    }

    fn each_stripe(
        &self,
        mut f: impl FnMut(&Uffd, u64, u64) -> io::Result<()>,
    ) -> Result<(), (u64, io::Error)> {
        for span in &self.spans {
            let mut offset = 0;
            while offset < span.map.len() {
                let len = span.stripe.min(span.map.len() - offset);
                f(self.uffd(span, offset), span.map.base() + offset, len)
                    .map_err(|source| (span.gpa + offset, source))?;
                offset += len;
            }
        }
        Ok(())
    }

    fn uffd_index(&self, span: &Span, offset: u64) -> usize {
        usize::try_from(offset / span.stripe).unwrap_or(0) % self.uffds.len()
    }

    fn uffd(&self, span: &Span, offset: u64) -> &Uffd {
        &self.uffds[self.uffd_index(span, offset)]
    }

    /// Number of userfaultfds.
    pub fn shards(&self) -> usize {
        self.uffds.len()
    }

    /// The mappings, one per range, in ascending order of guest-physical address.
    pub fn mappings(&self) -> &[Mapping] {
        &self.mappings
    }

    /// The memory as atomics.
    pub fn memory(&self) -> Memory<'_> {
        // SAFETY: the mappings live as long as this region, hence as the borrow. In this process they are otherwise
        // accessed by `read` and `write` here (on pages that nobody writes to, and before anybody runs), by the
        // kernel, and by who took a raw pointer from `Mapping` and answers for it.
        unsafe { Memory::new(&self.mappings) }
    }

    /// The userfaultfd of a shard, to wait for faults.
    pub fn shard_fd(&self, shard: usize) -> Option<BorrowedFd<'_>> {
        self.uffds.get(shard).map(|u| u.as_fd().as_fd())
    }

    /// Appends the faults that wait at a shard, at most 16; none is no error.
    pub fn faults(&self, shard: usize, out: &mut Vec<Fault>) -> io::Result<()> {
        let Some(uffd) = self.uffds.get(shard) else { return Ok(()) };
        let mut messages = [UffdMsg::default(); 16];
        let got = match uffd.read(&mut messages) {
            Ok(got) => got,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
            Err(e) => return Err(e),
        };
        for message in messages.iter().take(got).filter(|m| m.event == EVENT_PAGEFAULT) {
            if let Some(page) = self.page_of(message.address) {
                let write = message.flags & FLAGS_WRITE != 0;
                out.push(Fault { page, write, thread: message.thread });
            }
        }
        Ok(())
    }

    fn page_of(&self, hva: u64) -> Option<Page> {
        self.spans.iter().find_map(|s| {
            let offset = hva.checked_sub(s.map.base()).filter(|o| *o < s.map.len())?;
            Some(Page(s.first + u32::try_from(offset / PAGE_SIZE).ok()?))
        })
    }

    /// The span of a page and the page's offset in it.
    fn locate(&self, page: Page) -> Option<(&Span, u64)> {
        let at = self.spans.partition_point(|s| s.first <= page.0).checked_sub(1)?;
        let span = self.spans.get(at)?;
        let offset = u64::from(page.0 - span.first) * PAGE_SIZE;
        (offset < span.map.len()).then_some((span, offset))
    }

    fn found(&self, page: Page) -> io::Result<(&Span, u64)> {
        self.locate(page).ok_or_else(|| io::Error::from_raw_os_error(libc::EFAULT))
    }

    /// Does something to a run of pages, cut where a mapping ends and where another userfaultfd begins: each takes only its
    /// own.
    fn each_piece(
        &self,
        page: Page,
        count: u32,
        f: impl Fn(&Span, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut rest = page.0..page.0.saturating_add(count);
        while !rest.is_empty() {
            let (span, offset) = self.found(Page(rest.start))?;
            let room = (span.stripe - offset % span.stripe).min(span.map.len() - offset);
            let len = room.min(u64::from(rest.end - rest.start) * PAGE_SIZE);
            f(span, offset, len)?;
            rest.start += u32::try_from(len / PAGE_SIZE).unwrap_or(u32::MAX);
        }
        Ok(())
    }

    /// Overwrites part of a page that is present and writable; what does not fit into the page is left out.
    pub fn write(&self, page: Page, at: usize, bytes: &[u8]) -> Result<(), RegionError> {
        let (span, offset) = self.found(page).map_err(|e| self.step("write", page, e))?;
        span.map.write(offset + at.min(PAGE) as u64, &bytes[..bytes.len().min(PAGE - at.min(PAGE))]);
        Ok(())
    }

    /// Makes the memory inaccessible, then lets go of all who wait: a vCPU gets EFAULT, a system call that was
    /// given guest memory too, a thread that reads it directly SIGSEGV. Nobody goes on with invented zeros.
    pub fn close(&self) {
        for span in &self.spans {
            if let Err(e) = span.map.forbid() {
                tracing::error!("guest memory at {:#x} stays accessible: {e}", span.gpa);
            }
        }
        if let Err((gpa, e)) = self.each_stripe(|uffd, start, len| uffd.unregister(start, len)) {
            tracing::error!("userfaultfd stays registered at {gpa:#x}: {e}");
        }
    }
}

impl Kernel for Region {
    fn gpa_of(&self, page: Page) -> u64 {
        self.layout.gpa_of(page)
    }

    fn sys_copy(&self, page: Page, bytes: &[u8], protect: bool, wake: Wake) -> (usize, io::Result<()>) {
        let (span, offset) = match self.found(page) {
            Ok(found) => found,
            Err(e) => return (0, Err(e)),
        };
        // A run is cut where the range ends, and where another userfaultfd begins: each takes only its own.
        let room = (span.stripe - offset % span.stripe).min(span.map.len() - offset);
        let len = bytes.len().min(usize::try_from(room).unwrap_or(usize::MAX));
        self.uffd(span, offset).copy(span.map.base() + offset, bytes.get(..len).unwrap_or(&[]), protect, wake)
    }

    fn sys_write_protect(&self, page: Page, count: u32, protect: bool, wake: Wake) -> io::Result<()> {
        self.each_piece(page, count, |span, offset, len| {
            let start = span.map.base() + offset;
            self.uffd(span, offset).write_protect(start, len, protect, wake)
        })
    }

    fn sys_move(&self, page: Page, out: Option<&mut Vec<u8>>) -> io::Result<()> {
        let (span, offset) = self.found(page)?;
        let index = self.uffd_index(span, offset);
        let attic = self.attics.get(index).ok_or(io::ErrorKind::Unsupported)?;
        attic.take(&self.uffds[index], span.map.base() + offset, out)
    }

    fn sys_wake(&self, page: Page, count: u32) -> io::Result<()> {
        let wake = |span: &Span, offset, len| self.uffd(span, offset).wake(span.map.base() + offset, len);
        self.each_piece(page, count, wake)
    }

    fn sys_discard(&self, page: Page, count: u32) -> io::Result<()> {
        self.each_piece(page, count, |span, offset, len| span.map.discard(offset, len))
    }

    fn read(&self, page: Page, out: &mut Vec<u8>) -> Result<(), RegionError> {
        let (span, offset) = self.found(page).map_err(|e| self.step("read", page, e))?;
        span.map.read(offset, PAGE, out);
        Ok(())
    }

    fn note_replaced(&self) {
        self.replaced.fetch_add(1, Ordering::Relaxed);
    }

    fn replaced(&self) -> u64 {
        self.replaced.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests;
