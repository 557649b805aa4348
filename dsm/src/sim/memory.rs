//! A model of one member's guest memory under userfaultfd (MISSING and WP), as far as anybody can tell from outside.
//!
//! - An access succeeds if the page is there and, for a write, not protected. Otherwise the thread joins the queue of
//!   the userfaultfd and sleeps until somebody wakes it; awake, it tries again.
//! - A wake takes every sleeper of the page out of the queue, whether its fault has been read or not. A fault that has
//!   been read may thus be answered long after its thread has gone on.
//! - A page table may hold an entry that no thread can use (a page under migration, a marker): UFFDIO_COPY finds
//!   it and says EEXIST, MADV_DONTNEED clears it.

use crate::layout::Page;
use crate::region::Fault;

pub(super) const PAGE: usize = 4096;
pub(super) type Bytes = Box<[u8; PAGE]>;

/// A page that is there.
#[derive(Debug)]
pub(super) struct Copy {
    pub(super) bytes: Bytes,
    pub(super) writable: bool,
}

#[derive(Debug)]
enum Slot {
    Absent,
    /// An entry that is in the way of a copy.
    Unusable,
    Present(Copy),
}

#[derive(Debug)]
struct Sleeper {
    thread: u16,
    page: Page,
    write: bool,
    is_read: bool,
}

#[derive(Debug)]
pub(super) struct Memory {
    slots: Vec<Slot>,
    sleepers: Vec<Sleeper>,
    spare: Vec<Bytes>,
}

impl Memory {
    pub(super) fn new(pages: u32) -> Memory {
        Memory { slots: (0..pages).map(|_| Slot::Absent).collect(), sleepers: Vec::new(), spare: Vec::new() }
    }

    /// The page, if a thread may access it so.
    pub(super) fn access(&mut self, page: Page, write: bool) -> Option<&mut Copy> {
        match self.slots.get_mut(page.0 as usize) {
            Some(Slot::Present(copy)) if copy.writable || !write => Some(copy),
            _ => None,
        }
    }

    pub(super) fn copy(&self, page: Page) -> Option<&Copy> {
        match self.slots.get(page.0 as usize) {
            Some(Slot::Present(copy)) => Some(copy),
            _ => None,
        }
    }

    /// Whether UFFDIO_COPY would say EEXIST.
    pub(super) fn is_occupied(&self, page: Page) -> bool {
        !matches!(self.slots.get(page.0 as usize), Some(Slot::Absent))
    }

    pub(super) fn sleep(&mut self, thread: u16, page: Page, write: bool) {
        self.sleepers.push(Sleeper { thread, page, write, is_read: false });
    }

    /// Whether nobody waits for a page.
    pub(super) fn is_idle(&self) -> bool {
        self.sleepers.is_empty()
    }

    /// Reads faults from the userfaultfd: each once, at most `max`.
    pub(super) fn read_faults(&mut self, max: usize, mut out: impl FnMut(Fault)) {
        for sleeper in self.sleepers.iter_mut().filter(|s| !s.is_read).take(max) {
            sleeper.is_read = true;
            out(Fault { page: sleeper.page, write: sleeper.write, thread: u32::from(sleeper.thread) });
        }
    }

    /// Wakes all who wait for the page.
    pub(super) fn wake(&mut self, page: Page, mut woken: impl FnMut(u16)) {
        self.sleepers.retain(|s| {
            if s.page == page {
                woken(s.thread);
            }
            s.page != page
        });
    }

    /// Puts a page where none is.
    pub(super) fn put(&mut self, page: Page, from: &[u8], writable: bool) {
        let mut bytes = self.spare.pop().unwrap_or_else(|| Box::new([0; PAGE]));
        match from.try_into() {
            Ok(page) => *bytes = page,
            Err(_) => bytes.fill(0),
        }
        if let Some(slot) = self.slots.get_mut(page.0 as usize) {
            *slot = Slot::Present(Copy { bytes, writable });
        }
    }

    /// Puts an entry that no thread can use where no page is.
    pub(super) fn obstruct(&mut self, page: Page) {
        if let Some(slot @ Slot::Absent) = self.slots.get_mut(page.0 as usize) {
            *slot = Slot::Unusable;
        }
    }

    pub(super) fn protect(&mut self, page: Page, protect: bool) {
        if let Some(Slot::Present(copy)) = self.slots.get_mut(page.0 as usize) {
            copy.writable = !protect;
        }
    }

    pub(super) fn discard(&mut self, page: Page) {
        let Some(slot) = self.slots.get_mut(page.0 as usize) else { return };
        if let Slot::Present(copy) = std::mem::replace(slot, Slot::Absent) {
            self.spare.push(copy.bytes);
        }
    }
}
