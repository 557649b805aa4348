//! Block device over a raw image (virtio 1.2, 5.2).

use super::ring::{Chain, RingError, VirtQueue};
use super::{Backend, Description};
use crate::devices::image::{Image, SECTOR};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

const QUEUE_SIZE: u16 = 256;
/// A request has a header and a status besides its data.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes of a request's header: type, reserved, sector.
const HEADER: usize = 16;
/// Bytes of the device's name in VIRTIO_BLK_T_GET_ID.
const ID_BYTES: usize = 20;
/// Bytes copied at a time.
const PIECE: usize = 256 << 10;

/// A disk.
#[derive(Debug)]
pub struct Blk {
    image: Arc<Image>,
    id: [u8; ID_BYTES],
    buffer: Vec<u8>,
}

impl Blk {
    /// A disk over an image, which is locked. `id` is what the guest is told of it.
    pub fn new(image: Arc<Image>, id: &str) -> Blk {
        let mut bytes = [0; ID_BYTES];
        for (to, from) in bytes.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        Blk { image, id: bytes, buffer: vec![0; PIECE] }
    }

    /// What the transport says about it.
    pub fn description(&self, name: String) -> Description {
        let mut config = vec![0; 60];
        config[0..8].copy_from_slice(&(self.image.size() / SECTOR).to_le_bytes());
        config[12..16].copy_from_slice(&SEG_MAX.to_le_bytes());
        config[20..24].copy_from_slice(&512u32.to_le_bytes());
        let read_only = if self.image.is_readonly() { 1 << VIRTIO_BLK_F_RO } else { 0 };
        Description {
            name,
            device_type: VIRTIO_ID_BLOCK,
            features: 1 << VIRTIO_BLK_F_FLUSH
                | 1 << VIRTIO_BLK_F_BLK_SIZE
                | 1 << VIRTIO_BLK_F_SEG_MAX
                | read_only,
            queue_sizes: vec![QUEUE_SIZE],
            config,
        }
    }

    /// Runs one request; returns its status and the bytes written to the data buffers.
    fn run(
        &mut self,
        chain: &Chain,
        header: [u8; HEADER],
        queue: &VirtQueue<'_>,
    ) -> Result<(u32, u64), RingError> {
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let kind = u32::from_le_bytes([t0, t1, t2, t3]);
        let position = u64::from_le_bytes(sector).checked_mul(SECTOR);
        let room = chain.writable.len() - 1;
        let result = match kind {
            VIRTIO_BLK_T_IN => match self.position(position, room) {
                Some(position) => self.read(chain, queue, position, room)?,
                None => (VIRTIO_BLK_S_IOERR, 0),
            },
            VIRTIO_BLK_T_OUT => {
                let len = chain.readable.len() - HEADER as u64;
                match self.position(position, len).filter(|_| !self.image.is_readonly()) {
                    Some(position) => (self.write(chain, queue, position, len)?, 0),
                    None => (VIRTIO_BLK_S_IOERR, 0),
                }
            }
            VIRTIO_BLK_T_FLUSH => match self.image.file().sync_data() {
                Ok(()) => (VIRTIO_BLK_S_OK, 0),
                Err(error) => self.failed("flush", 0, &error),
            },
            VIRTIO_BLK_T_GET_ID if room >= ID_BYTES as u64 => {
                chain.writable.write(queue.memory(), 0, &self.id)?;
                (VIRTIO_BLK_S_OK, ID_BYTES as u64)
            }
            VIRTIO_BLK_T_GET_ID => (VIRTIO_BLK_S_IOERR, 0),
            _ => (VIRTIO_BLK_S_UNSUPP, 0),
        };
        Ok(result)
    }

    /// The position if `len` bytes from there are whole sectors of the disk.
    fn position(&self, position: Option<u64>, len: u64) -> Option<u64> {
        let position = position?;
        let inside = position.checked_add(len).is_some_and(|end| end <= self.image.size());
        (inside && len % SECTOR == 0).then_some(position)
    }

    fn failed(&self, what: &str, position: u64, error: &std::io::Error) -> (u32, u64) {
        let id = String::from_utf8_lossy(&self.id);
        tracing::warn!("{}: {what} at {position:#x}: {error}", id.trim_end_matches('\0'));
        (VIRTIO_BLK_S_IOERR, 0)
    }

    fn read(
        &mut self,
        chain: &Chain,
        queue: &VirtQueue<'_>,
        start: u64,
        len: u64,
    ) -> Result<(u32, u64), RingError> {
        let mut done = 0;
        while done < len {
            let n = usize::try_from(len - done).unwrap_or(PIECE).min(PIECE);
            if let Err(error) = self.image.file().read_exact_at(&mut self.buffer[..n], start + done) {
                return Ok(self.failed("read", start + done, &error));
            }
            chain.writable.write(queue.memory(), done, &self.buffer[..n])?;
            done += n as u64;
        }
        Ok((VIRTIO_BLK_S_OK, len))
    }

    fn write(
        &mut self,
        chain: &Chain,
        queue: &VirtQueue<'_>,
        start: u64,
        len: u64,
    ) -> Result<u32, RingError> {
        let mut done = 0;
        while done < len {
            let n = usize::try_from(len - done).unwrap_or(PIECE).min(PIECE);
            chain.readable.read(queue.memory(), HEADER as u64 + done, &mut self.buffer[..n])?;
            if let Err(error) = self.image.file().write_all_at(&self.buffer[..n], start + done) {
                return Ok(self.failed("write", start + done, &error).0);
            }
            done += n as u64;
        }
        Ok(VIRTIO_BLK_S_OK)
    }
}

impl Backend for Blk {
    fn serve(&mut self, _index: usize, queue: &mut VirtQueue<'_>) -> Result<(), RingError> {
        while let Some(chain) = queue.pop()? {
            let head = chain.head;
            let mut header = [0; HEADER];
            if chain.readable.read(queue.memory(), 0, &mut header)? != HEADER {
                return Err(RingError::Request { head, what: "a header" });
            }
            let Some(status_at) = chain.writable.len().checked_sub(1) else {
                return Err(RingError::Request { head, what: "a status" });
            };
            let (status, written) = self.run(&chain, header, queue)?;
            chain.writable.write(queue.memory(), status_at, &[u8::try_from(status).unwrap_or(u8::MAX)])?;
            queue.push(head, written + 1)?;
            queue.signal()?;
        }
        Ok(())
    }
}
