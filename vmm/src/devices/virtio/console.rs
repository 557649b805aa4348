//! Console with one port (virtio 1.2, 5.3), `hvc0` in Linux. A write costs one posted notify, so this is the
//! console for guests whose vCPUs are on several members.

use super::ring::{RingError, VirtQueue};
use super::worker::Doorbell;
use super::{Backend, Description};
use crate::devices::console::{ConsoleInput, Output};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

const RECEIVE: usize = 0;
/// Input that waits for the guest, in bytes.
const INPUT_BYTES: usize = 4096;
/// Bytes copied at a time.
const PIECE: usize = 4096;

/// Input from people to the device.
#[derive(Debug)]
pub struct Input {
    waiting: Mutex<VecDeque<u8>>,
    doorbell: Arc<Doorbell>,
}

impl ConsoleInput for Input {
    fn push(&self, bytes: &[u8]) -> usize {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let n = bytes.len().min(INPUT_BYTES.saturating_sub(waiting.len()));
        waiting.extend(&bytes[..n]);
        drop(waiting);
        self.doorbell.ring(RECEIVE);
        n
    }
}

/// The console.
#[derive(Debug)]
pub struct Console {
    input: Arc<Input>,
    output: Arc<Output>,
}

impl Console {
    /// A console, and its input, which rings `doorbell`.
    pub fn new(output: Arc<Output>, doorbell: Arc<Doorbell>) -> (Console, Arc<Input>) {
        let input = Arc::new(Input { waiting: Mutex::default(), doorbell });
        (Console { input: input.clone(), output }, input)
    }

    /// What the transport says about it.
    pub fn description(name: String) -> Description {
        Description {
            name,
            device_type: VIRTIO_ID_CONSOLE,
            features: 0,
            queue_sizes: vec![64, 64],
            // cols, rows, max_nr_ports, emerg_wr: valid with features that are not offered.
            config: vec![0; 12],
        }
    }

    fn take_input(&self, max: u64) -> Vec<u8> {
        let mut waiting = self.input.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let n = waiting.len().min(usize::try_from(max).unwrap_or(usize::MAX));
        waiting.drain(..n).collect()
    }

    fn receive(&mut self, queue: &mut VirtQueue<'_>) -> Result<(), RingError> {
        while let Some(chain) = queue.pop()? {
            let data = self.take_input(chain.writable.len());
            if data.is_empty() {
                // The buffer stays with the device until there is input, which rings the doorbell.
                queue.unpop();
                return Ok(());
            }
            chain.writable.write(queue.memory(), 0, &data)?;
            queue.push(chain.head, data.len() as u64)?;
        }
        Ok(())
    }

    fn transmit(&mut self, queue: &mut VirtQueue<'_>) -> Result<(), RingError> {
        while let Some(chain) = queue.pop()? {
            let mut offset = 0;
            let mut piece = [0; PIECE];
            loop {
                let n = chain.readable.read(queue.memory(), offset, &mut piece)?;
                if n == 0 {
                    break;
                }
                self.output.write(&piece[..n]);
                offset += n as u64;
            }
            queue.push(chain.head, 0)?;
        }
        Ok(())
    }
}

impl Backend for Console {
    fn serve(&mut self, index: usize, queue: &mut VirtQueue<'_>) -> Result<(), RingError> {
        if index == RECEIVE { self.receive(queue) } else { self.transmit(queue) }
    }
}
