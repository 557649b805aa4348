//! Access to shared memory for programs that are not a hypervisor: tests, benchmarks, groups of processes.

use super::Mapping;
use crate::addr::PAGE_SIZE;
use std::sync::atomic::{AtomicU8, AtomicU64};

/// Shared memory as atomics. Touching an absent page waits until it has come; after
/// [`crate::node::Dsm::shutdown`] it raises SIGSEGV.
#[derive(Clone, Copy, Debug)]
pub struct Memory<'a> {
    mappings: &'a [Mapping],
}

impl<'a> Memory<'a> {
    /// # Safety
    /// The mappings must stay mapped for `'a`, and everything else that accesses them in this process must do so with
    /// atomics, from the kernel, or as a guest.
    pub(crate) unsafe fn new(mappings: &'a [Mapping]) -> Memory<'a> {
        Memory { mappings }
    }

    fn at(&self, gpa: u64, len: u64) -> Option<*mut u8> {
        let mapping = self.mappings.iter().find(|m| gpa >= m.gpa && gpa - m.gpa < m.len)?;
        let offset = gpa - mapping.gpa;
        let fits = offset.checked_add(len)? <= mapping.len;
        fits.then(|| mapping.hva.wrapping_add(usize::try_from(offset).unwrap_or(0)))
    }

    /// The eight bytes at an address that is a multiple of 8; `None` where there is no memory.
    pub fn u64_at(&self, gpa: u64) -> Option<&'a AtomicU64> {
        let at = self.at(gpa, 8).filter(|_| gpa % 8 == 0)?;
        // SAFETY: the eight bytes lie in a mapping that lives for 'a (promised to `new`) and are aligned, because
        // mappings and their guest-physical addresses are page-aligned. Others access them as the promise allows.
        Some(unsafe { AtomicU64::from_ptr(at.cast()) })
    }

    /// The byte at an address; `None` where there is no memory.
    pub fn u8_at(&self, gpa: u64) -> Option<&'a AtomicU8> {
        let at = self.at(gpa, 1)?;
        // SAFETY: as in `u64_at`; a byte is always aligned.
        Some(unsafe { AtomicU8::from_ptr(at) })
    }

    /// All words of the page at `gpa` (a multiple of the page size).
    pub fn words(&self, gpa: u64) -> impl Iterator<Item = &'a AtomicU64> + use<'a> {
        let memory = *self;
        (0..PAGE_SIZE / 8).map_while(move |n| memory.u64_at(gpa + n * 8))
    }
}
