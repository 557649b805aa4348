//! Where pages go that this member gives away: UFFDIO_MOVE (Linux 6.8) takes a page out of guest memory with its contents in
//! one step, where write-protecting, reading and dropping it are two calls, of which the second frees the page at once.
//!
//! The page is read where it is now, and freed with others later, when nobody waits.

use super::map::Map;
use super::sys::Uffd;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

const PAGE: u64 = 4096;
/// The same as a length.
const PAGE_LEN: usize = 4096;
/// Pages that it has room for.
const ROOM: u64 = 64;
/// From so many on [`Attic::tidy`] frees them.
const MANY: u64 = 16;

/// Memory of one userfaultfd that no guest sees.
#[derive(Debug)]
pub(super) struct Attic {
    map: Map,
    /// Pages in it, from the start.
    used: Mutex<u64>,
    /// The kernel can't do it, or not with these mappings.
    is_useless: AtomicBool,
}

impl Attic {
    /// One for this userfaultfd; `None` if its kernel can't move pages.
    pub(super) fn new(uffd: &Uffd) -> io::Result<Option<Attic>> {
        let map = Map::new(ROOM * PAGE)?;
        let can_move = uffd.register(map.base(), map.len())?;
        let attic = Attic { map, used: Mutex::new(0), is_useless: AtomicBool::new(false) };
        Ok(can_move.then_some(attic))
    }

    fn used(&self) -> MutexGuard<'_, u64> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the page at `hva` out of the guest's memory and appends its bytes, if they are wanted. On an error it is where
    /// it was.
    pub(super) fn take(&self, uffd: &Uffd, hva: u64, out: Option<&mut Vec<u8>>) -> io::Result<()> {
        if self.is_useless.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let mut used = self.used();
        if *used == ROOM {
            self.empty(&mut used)?;
        }
        let at = *used * PAGE;
        if let Err(e) = uffd.move_page(self.map.base() + at, hva) {
            if e.raw_os_error() == Some(libc::EINVAL) {
                self.is_useless.store(true, Ordering::Relaxed);
            }
            return Err(e);
        }
        *used += 1;
        if let Some(out) = out {
            self.map.read(at, PAGE_LEN, out);
        }
        Ok(())
    }

    /// Frees what is there, if it is worth a system call. For when nobody waits.
    pub(super) fn tidy(&self) -> io::Result<()> {
        let mut used = self.used();
        if *used >= MANY { self.empty(&mut used) } else { Ok(()) }
    }

    fn empty(&self, used: &mut u64) -> io::Result<()> {
        self.map.discard(0, *used * PAGE)?;
        *used = 0;
        Ok(())
    }
}
