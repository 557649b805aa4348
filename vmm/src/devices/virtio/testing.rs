//! A virtio driver for tests: drives a transport's registers and lays out a queue in plain memory, rightly or
//! wrongly.

use super::Transport;
use crate::devices::BusDevice;
use crate::interrupts::IrqLines;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use virtio_bindings::virtio_mmio::*;
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
pub const MEMORY: usize = 1 << 20;
pub const QUEUE: u16 = 16;
/// Where buffers may go.
pub const DATA: u64 = 0x1_0000;
/// Rings of queue `n` start at `RINGS + n * 0x2000`.
const RINGS: u64 = 0x1000;
const AVAIL: u64 = 0x800;
const USED: u64 = 0x1000;

#[derive(Default)]
pub struct Lines(pub AtomicU32);

impl IrqLines for Lines {
    fn set_level(&self, _gsi: u32, high: bool) {
        self.0.fetch_add(u32::from(high), Ordering::SeqCst);
    }
}

pub fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap()
}

pub struct Driver<'a> {
    pub transport: &'a Transport,
    pub memory: &'a GuestMemoryMmap,
    avail: [u16; 2],
    used: [u16; 2],
    pub features: u64,
}

/// Waits for a condition that a worker brings about.
pub fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_micros(200));
    }
}

impl<'a> Driver<'a> {
    pub fn new(transport: &'a Transport, memory: &'a GuestMemoryMmap) -> Driver<'a> {
        Driver { transport, memory, avail: [0; 2], used: [0; 2], features: 1 << 32 }
    }

    pub fn get(&self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.transport.read(u64::from(register), &mut data);
        u32::from_le_bytes(data)
    }

    pub fn set(&self, register: u32, value: u32) {
        self.transport.write(u64::from(register), &value.to_le_bytes());
    }

    pub fn status(&self) -> u32 {
        self.get(VIRTIO_MMIO_STATUS)
    }

    pub fn negotiate(&self) {
        self.set(VIRTIO_MMIO_STATUS, 0);
        self.set(VIRTIO_MMIO_STATUS, 1);
        self.set(VIRTIO_MMIO_STATUS, 3);
        for sel in 0..2 {
            self.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, sel);
            let half = self.features >> (32 * sel) & 0xFFFF_FFFF;
            self.set(VIRTIO_MMIO_DRIVER_FEATURES, u32::try_from(half).unwrap());
        }
        self.set(VIRTIO_MMIO_STATUS, 11);
    }

    pub fn set_up_queue(&self, index: u32, desc: u64, avail: u64, used: u64) {
        self.set(VIRTIO_MMIO_QUEUE_SEL, index);
        self.set(VIRTIO_MMIO_QUEUE_NUM, u32::from(QUEUE));
        for (low, high, value) in [
            (VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH, desc),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, avail),
            (VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_QUEUE_USED_HIGH, used),
        ] {
            self.set(low, u32::try_from(value & 0xFFFF_FFFF).unwrap());
            self.set(high, u32::try_from(value >> 32).unwrap());
        }
        self.set(VIRTIO_MMIO_QUEUE_READY, 1);
    }

    pub fn rings(index: u32) -> (u64, u64, u64) {
        let base = RINGS + u64::from(index) * 0x2000;
        (base, base + AVAIL, base + USED)
    }

    /// The whole initialisation with zeroed rings.
    pub fn start(&mut self, queues: u32) {
        self.negotiate();
        for index in 0..queues {
            let (desc, avail, used) = Self::rings(index);
            self.memory.write_slice(&[0; 0x2000], GuestAddress(desc)).unwrap();
            self.set_up_queue(index, desc, avail, used);
        }
        (self.avail, self.used) = ([0; 2], [0; 2]);
        self.set(VIRTIO_MMIO_STATUS, 15);
    }

    pub fn descriptor(&self, index: u32, slot: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = Self::rings(index).0 + u64::from(slot) * 16;
        let raw = RawDescriptor::from(Descriptor::new(addr, len, flags, next));
        self.memory.write_obj(raw, GuestAddress(at)).unwrap();
    }

    /// Makes the chain at `head` available and notifies.
    pub fn offer(&mut self, index: u32, head: u16) {
        let avail = Self::rings(index).1;
        let count = &mut self.avail[index as usize];
        let slot = u64::from(*count % QUEUE);
        self.memory.write_obj(head, GuestAddress(avail + 4 + 2 * slot)).unwrap();
        *count = count.wrapping_add(1);
        self.memory.store(*count, GuestAddress(avail + 2), Ordering::Release).unwrap();
        self.set(VIRTIO_MMIO_QUEUE_NOTIFY, index);
    }

    /// A chain from slot 0 on: `(addr, len, writable)`.
    pub fn submit(&mut self, index: u32, buffers: &[(u64, u32, bool)]) {
        for (slot, (addr, len, writable)) in (0u16..).zip(buffers) {
            let last = usize::from(slot) + 1 == buffers.len();
            let flags = if last { 0 } else { NEXT } | if *writable { WRITE } else { 0 };
            self.descriptor(index, slot, *addr, *len, flags, slot + 1);
        }
        self.offer(index, 0);
    }

    pub fn used_index(&self, index: u32) -> u16 {
        self.memory.load(GuestAddress(Self::rings(index).2 + 2), Ordering::Acquire).unwrap()
    }

    /// Waits for the next used buffer; returns head and length.
    pub fn used(&mut self, index: u32) -> (u32, u32) {
        let mine = self.used[index as usize];
        wait("a used buffer", || self.used_index(index) != mine);
        let at = Self::rings(index).2 + 4 + 8 * u64::from(mine % QUEUE);
        self.used[index as usize] = mine.wrapping_add(1);
        let [head, len] = [at, at + 4].map(|at| self.memory.read_obj::<u32>(GuestAddress(at)).unwrap());
        (head, len)
    }

    pub fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(addr)).unwrap();
        data
    }

    pub fn fill(&self, addr: u64, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(addr)).unwrap();
    }
}
