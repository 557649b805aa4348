//! Entropy source (virtio 1.2, 5.4): the host's getrandom.

use super::ring::{RingError, VirtQueue};
use super::{Backend, Description};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

/// Most bytes per request; the driver asks again.
const MAX_BYTES: u64 = 4096;

/// The entropy source.
#[derive(Debug, Default)]
pub struct Rng;

impl Rng {
    /// What the transport says about it.
    pub fn description(name: String) -> Description {
        Description { name, device_type: VIRTIO_ID_RNG, features: 0, queue_sizes: vec![64], config: vec![] }
    }
}

impl Backend for Rng {
    fn serve(&mut self, _index: usize, queue: &mut VirtQueue<'_>) -> Result<(), RingError> {
        while let Some(chain) = queue.pop()? {
            let mut data = vec![0; usize::try_from(chain.writable.len().min(MAX_BYTES)).unwrap_or(0)];
            // Once the host's pool is initialised getrandom does not fail; a short answer is allowed anyway.
            let got =
                rustix::rand::getrandom(&mut data[..], rustix::rand::GetRandomFlags::empty()).unwrap_or(0);
            chain.writable.write(queue.memory(), 0, &data[..got])?;
            queue.push(chain.head, got as u64)?;
        }
        Ok(())
    }
}
