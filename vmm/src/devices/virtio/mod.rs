//! virtio 1.2 over MMIO. Everything that the guest's driver writes is hostile until checked.
//!
//! [`transport`] is the register file that vCPUs access; [`worker`] the thread of each device, which a notify
//! wakes, so that a vCPU never waits for a disk or for a page; [`ring`] the queues as that thread sees them;
//! [`interrupt`] the way back. A device is a [`Backend`] behind them: [`blk`], [`rng`], [`console`].
//!
//! Locks, in this order: the transport's registers (vCPUs), the worker's doorbell (vCPUs and worker, held for
//! a few instructions), a queue's state (worker only, and whoever saves a quiet device). Guest memory is
//! touched with none but the last held, because a page may be at another member.

pub mod blk;
pub mod console;
pub mod interrupt;
pub mod ring;
pub mod rng;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
pub mod transport;
pub mod worker;

pub use transport::Transport;

use ring::{RingError, VirtQueue};

/// Most descriptors in one chain, those of an indirect table included.
pub const MAX_CHAIN: usize = 1024;

/// What the transport tells the driver about a device.
#[derive(Clone, Debug)]
pub struct Description {
    /// Name for messages and threads, such as `virtio-blk0`.
    pub name: String,
    /// Device type (virtio 1.2, 5).
    pub device_type: u32,
    /// Feature bits of the device; those of the transport are added.
    pub features: u64,
    /// Largest size of each queue, powers of 2.
    pub queue_sizes: Vec<u16>,
    /// Configuration space. It does not change while the VM runs.
    pub config: Vec<u8>,
}

/// A device. Called by its worker only.
pub trait Backend: Send + 'static {
    /// Serves what is available in queue `index`.
    ///
    /// # Errors
    /// A ring that the driver broke: the device then needs a reset.
    fn serve(&mut self, index: usize, queue: &mut VirtQueue<'_>) -> Result<(), RingError>;
}
