//! A split virtqueue as a device's worker sees it (virtio 1.2, 2.7), on top of the `virtio-queue` crate, which
//! ends a chain silently at the first bad descriptor; here a chain is complete and inside guest memory, or
//! the ring is broken.

use super::MAX_CHAIN;
use super::interrupt::Interrupt;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

/// What a driver did to a ring that the device cannot go on with.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// An index or a ring that is out of bounds.
    #[error("ring: {0}")]
    Queue(#[from] virtio_queue::Error),
    /// A ring or buffer that is not in guest memory.
    #[error("guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// A chain that loops, ends in a bad index, is too long, or has readable buffers behind writable ones.
    #[error("descriptor chain at {0} is malformed")]
    Chain(u16),
    /// A buffer that is not RAM.
    #[error("descriptor chain at {head} has a buffer at {addr:#x}+{len:#x}, which is not RAM")]
    Buffer {
        /// The chain.
        head: u16,
        /// The buffer's address.
        addr: u64,
        /// Its length.
        len: u32,
    },
    /// A request without the part that every request has.
    #[error("descriptor chain at {head} lacks {what}")]
    Request {
        /// The chain.
        head: u16,
        /// What is missing.
        what: &'static str,
    },
}

/// Buffers of one direction of a chain, as one sequence of bytes.
#[derive(Clone, Debug, Default)]
pub struct Buffers {
    parts: Vec<(GuestAddress, u32)>,
}

impl Buffers {
    /// Bytes in all.
    pub fn len(&self) -> u64 {
        self.parts.iter().map(|p| u64::from(p.1)).sum()
    }

    /// True if there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Calls `f` with address and range in `0..len` for each part of `len` bytes from `offset` on.
    fn each(
        &self,
        mut offset: u64,
        len: usize,
        mut f: impl FnMut(GuestAddress, std::ops::Range<usize>) -> Result<(), RingError>,
    ) -> Result<usize, RingError> {
        let mut done = 0;
        for (addr, part) in &self.parts {
            let part = u64::from(*part);
            if offset >= part {
                offset -= part;
                continue;
            }
            let n = usize::try_from(part - offset).unwrap_or(usize::MAX).min(len - done);
            // In bounds: the whole part was checked to be in memory.
            f(GuestAddress(addr.0 + offset), done..done + n)?;
            done += n;
            offset = 0;
            if done == len {
                break;
            }
        }
        Ok(done)
    }

    /// Copies out of guest memory; returns the number of bytes, fewer than asked at the end.
    ///
    /// # Errors
    /// The memory is gone.
    pub fn read(&self, memory: &GuestMemoryMmap, offset: u64, data: &mut [u8]) -> Result<usize, RingError> {
        self.each(offset, data.len(), |addr, range| Ok(memory.read_slice(&mut data[range], addr)?))
    }

    /// Copies into guest memory; returns the number of bytes, fewer than given at the end.
    ///
    /// # Errors
    /// The memory is gone.
    pub fn write(&self, memory: &GuestMemoryMmap, offset: u64, data: &[u8]) -> Result<usize, RingError> {
        self.each(offset, data.len(), |addr, range| Ok(memory.write_slice(&data[range], addr)?))
    }
}

/// One request: buffers that the device reads, then buffers that it writes.
#[derive(Clone, Debug)]
pub struct Chain {
    /// Index of its first descriptor.
    pub head: u16,
    /// What the device may read.
    pub readable: Buffers,
    /// What the device may write.
    pub writable: Buffers,
}

/// A queue while its worker serves it.
#[derive(Debug)]
pub struct VirtQueue<'a> {
    queue: &'a mut Queue,
    memory: &'a GuestMemoryMmap,
    interrupt: &'a Interrupt,
    cancelled: &'a AtomicBool,
    /// Buffers were used and the driver has not been told.
    unsignalled: bool,
}

impl<'a> VirtQueue<'a> {
    /// A queue that is ready; `cancelled` stops it between requests.
    pub fn new(
        queue: &'a mut Queue,
        memory: &'a GuestMemoryMmap,
        interrupt: &'a Interrupt,
        cancelled: &'a AtomicBool,
    ) -> VirtQueue<'a> {
        VirtQueue { queue, memory, interrupt, cancelled, unsignalled: false }
    }

    /// Guest memory.
    pub fn memory(&self) -> &'a GuestMemoryMmap {
        self.memory
    }

    /// The next request, or `None` when there is none and the driver will notify of the next.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn pop(&mut self) -> Result<Option<Chain>, RingError> {
        let mut looked_again = false;
        loop {
            if self.cancelled.load(Ordering::SeqCst) {
                return Ok(None);
            }
            if let Some(chain) = self.queue.iter(self.memory)?.next() {
                return self.walk(chain).map(Some);
            }
            if looked_again {
                // The index says there is something that cannot be read.
                return Err(virtio_queue::Error::InvalidAvailRingIndex.into());
            }
            if !self.queue.enable_notification(self.memory)? {
                return Ok(None);
            }
            looked_again = true;
        }
    }

    /// Makes the next [`VirtQueue::pop`] return the last request again.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    fn walk(&self, mut chain: DescriptorChain<&GuestMemoryMmap>) -> Result<Chain, RingError> {
        let head = chain.head_index();
        let mut result = Chain { head, readable: Buffers::default(), writable: Buffers::default() };
        let mut complete = false;
        let mut count = 0;
        for descriptor in chain.by_ref() {
            let (addr, len) = (descriptor.addr(), descriptor.len());
            count += 1;
            complete = !descriptor.has_next();
            let writable = descriptor.is_write_only();
            if count > MAX_CHAIN || (!writable && !result.writable.parts.is_empty()) {
                return Err(RingError::Chain(head));
            }
            let (access, buffers) = if writable {
                (Permissions::Write, &mut result.writable)
            } else {
                (Permissions::Read, &mut result.readable)
            };
            let in_memory = usize::try_from(len).is_ok_and(|len| self.memory.check_range(addr, len, access));
            if len > 0 && !in_memory {
                return Err(RingError::Buffer { head, addr: addr.0, len });
            }
            buffers.parts.push((addr, len));
        }
        if complete { Ok(result) } else { Err(RingError::Chain(head)) }
    }

    /// Gives a request back to the driver with `written` bytes in its writable buffers.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn push(&mut self, head: u16, written: u64) -> Result<(), RingError> {
        // A reset must not find the device writing into memory that the driver has taken back.
        if !self.cancelled.load(Ordering::SeqCst) {
            self.queue.add_used(self.memory, head, u32::try_from(written).unwrap_or(u32::MAX))?;
            self.unsignalled = true;
        }
        Ok(())
    }

    /// Interrupts the driver for what was used, if it wants that.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn signal(&mut self) -> Result<(), RingError> {
        if !std::mem::take(&mut self.unsignalled) {
            return Ok(());
        }
        let wanted = if self.queue.event_idx_enabled() {
            self.queue.needs_notification(self.memory)?
        } else {
            // virtio-queue does not know this flag. The used index must be visible before the flag is read.
            fence(Ordering::SeqCst);
            let flags: u16 = self.memory.load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)?;
            u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0
        };
        if wanted {
            self.interrupt.used();
        }
        Ok(())
    }
}
