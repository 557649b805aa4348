//! A disk: virtio-blk over MMIO (virtio 1.2, 4.2.2 and 5.2), one request at a time, which is over when the used ring says so and
//! its interrupt has come through the IOAPIC.

use crate::env::{Env, Failure, Page, bad};
use crate::{boot, machine};
use bare_support::cast::{index, low32};
use core::sync::atomic::{AtomicU64, Ordering};

/// First window, and bytes from one to the next.
const WINDOWS: u64 = 0xD000_0000;
const WINDOW: u64 = 0x1000;
/// Pin of the first window's device.
const FIRST_PIN: u64 = 5;
/// Index and data register of the IOAPIC (82093AA).
const IOAPIC: u64 = 0xFEC0_0000;
const IOAPIC_DATA: u64 = IOAPIC + 0x10;
/// Interrupt vector of the disk.
const VECTOR: u8 = 0x51;

const MAGIC: u64 = 0x0;
const DEVICE_ID: u64 = 0x8;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SEL: u64 = 0x24;
const QUEUE_SEL: u64 = 0x30;
const QUEUE_NUM: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const QUEUE_NOTIFY: u64 = 0x50;
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACK: u64 = 0x64;
const STATUS: u64 = 0x70;
const QUEUE_DESC: u64 = 0x80;
const QUEUE_DRIVER: u64 = 0x90;
const QUEUE_DEVICE: u64 = 0xA0;

const BLK: u32 = 2;
const READ: u64 = 0;
const WRITE: u64 = 1;
/// Descriptor flags: another follows; the device writes.
const NEXT: u64 = 1;
const DEVICE_WRITES: u64 = 2;
/// Where the rings are in the first page, in words.
const AVAIL: usize = 128;
const USED: usize = 256;
/// Where a request is in the second page, in words.
const DATA: usize = 64;
const DONE: usize = 192;
/// Words of a sector.
const SECTOR: usize = 64;

/// A disk of one CPU, the first.
#[derive(Debug)]
pub struct Disk {
    base: u64,
    rings: &'static Page,
    request: &'static Page,
    requests: u64,
}

/// A register of a device.
fn get(at: u64) -> u32 {
    // SAFETY: device memory, identity-mapped; reading it reaches no memory of the guest.
    unsafe { core::ptr::read_volatile(at as *const u32) }
}

fn set(at: u64, value: u32) {
    // SAFETY: as above; what the device writes to was handed to it for that.
    unsafe { core::ptr::write_volatile(at as *mut u32, value) };
}

fn address(word: &AtomicU64) -> u64 {
    (&raw const *word).addr() as u64
}

fn interrupts() -> &'static AtomicU64 {
    &boot::cpu_blocks[0].interrupts[VECTOR as usize]
}

impl Disk {
    /// The disk whose window is at `disk=`; `None` if there is no such word.
    ///
    /// # Errors
    /// No disk there, or one that does not take its driver.
    pub fn open(env: &Env) -> Result<Option<Self>, Failure> {
        let base = env.cmdline.number("disk", 0).map_err(|_| bad("disk="))?;
        if base == 0 {
            return Ok(None);
        }
        if base < WINDOWS || get(base + MAGIC) != u32::from_le_bytes(*b"virt") || get(base + DEVICE_ID) != BLK
        {
            return Err(bad("no disk at disk="));
        }
        let [rings, request] = env.pages(2)? else { return Err(bad("no pages")) };
        let disk = Self { base, rings, request, requests: 0 };
        // Reset, acknowledge, driver; VIRTIO_F_VERSION_1 alone; features are fine.
        for status in [0, 1, 3] {
            disk.set(STATUS, status);
        }
        disk.set(DRIVER_FEATURES_SEL, 1);
        disk.set(DRIVER_FEATURES, 1);
        disk.set(STATUS, 11);
        disk.set(QUEUE_SEL, 0);
        disk.set(QUEUE_NUM, 8);
        for (register, word) in [(QUEUE_DESC, 0), (QUEUE_DRIVER, AVAIL), (QUEUE_DEVICE, USED)] {
            let at = address(&rings.0[word]);
            disk.set(register, low32(at));
            disk.set(register + 4, low32(at >> 32));
        }
        disk.set(QUEUE_READY, 1);
        disk.set(STATUS, 15);
        if get(base + STATUS) != 15 {
            return Err(bad("the disk does not take its driver"));
        }
        // Edge, fixed, to APIC id 0.
        let pin = low32(FIRST_PIN + (base - WINDOWS) / WINDOW);
        for (register, value) in [(0x11 + 2 * pin, 0), (0x10 + 2 * pin, u32::from(VECTOR))] {
            set(IOAPIC, register);
            set(IOAPIC_DATA, value);
        }
        machine::interrupts(true);
        Ok(Some(disk))
    }

    fn set(&self, register: u64, value: u32) {
        set(self.base + register, value);
    }

    /// Fills a sector with a number.
    ///
    /// # Errors
    /// The disk does not do it, or does not say that it did.
    pub fn write(&mut self, env: &Env, sector: u64, value: u64) -> Result<(), Failure> {
        self.request.0[DATA..DATA + SECTOR].iter().for_each(|word| word.store(value, Ordering::Relaxed));
        self.run(env, WRITE, sector)
    }

    /// The number of which a sector is full; `None` if it is full of several.
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub fn read(&mut self, env: &Env, sector: u64) -> Result<Option<u64>, Failure> {
        let data = &self.request.0[DATA..DATA + SECTOR];
        data.iter().for_each(|word| word.store(u64::MAX, Ordering::Relaxed));
        self.run(env, READ, sector)?;
        let first = data[0].load(Ordering::Acquire);
        Ok(data.iter().all(|word| word.load(Ordering::Relaxed) == first).then_some(first))
    }

    fn run(&mut self, env: &Env, kind: u64, sector: u64) -> Result<(), Failure> {
        let page = &self.request.0;
        page[0].store(kind, Ordering::Relaxed);
        page[1].store(sector, Ordering::Relaxed);
        page[DONE].store(0xEE, Ordering::Relaxed);
        let data = if kind == READ { NEXT | DEVICE_WRITES } else { NEXT };
        let parts = [
            (address(&page[0]), 16, NEXT),
            (address(&page[DATA]), 8 * SECTOR as u64, data),
            (address(&page[DONE]), 1, DEVICE_WRITES),
        ];
        for (n, (at, len, flags)) in (0u64..).zip(parts) {
            let descriptor = &self.rings.0[2 * index(n)..];
            descriptor[0].store(at, Ordering::Relaxed);
            descriptor[1].store(len | flags << 32 | (n + 1) << 48, Ordering::Relaxed);
        }
        let before = interrupts().load(Ordering::Acquire);
        self.requests += 1;
        let number = self.requests & 0xFFFF;
        // Every entry of the ring names descriptor 0.
        self.rings.0[AVAIL].store(number << 16, Ordering::SeqCst);
        self.set(QUEUE_NOTIFY, 0);
        let used = &self.rings.0[USED];
        env.wait(0, "waited in vain for the disk", || used.load(Ordering::Acquire) >> 16 & 0xFFFF == number)?;
        env.wait(0, "waited in vain for the disk's interrupt", || {
            interrupts().load(Ordering::Acquire) > before
        })?;
        self.set(INTERRUPT_ACK, get(self.base + INTERRUPT_STATUS));
        match page[DONE].load(Ordering::Acquire) & 0xFF {
            0 => Ok(()),
            _ => Err(bad("the disk says that it failed")),
        }
    }
}

/// What a test does with a disk, bit by bit: numbers that come later go to other sectors, and are found again.
#[derive(Debug)]
pub struct Diary {
    disk: Disk,
    /// Numbers written so far.
    pub entries: u64,
    /// Numbers that were not found again.
    pub wrong: u64,
}

/// Sectors that are used.
const SECTORS: u64 = 8;

impl Diary {
    /// See [`Disk::open`].
    ///
    /// # Errors
    /// See [`Disk::open`].
    pub fn open(env: &Env) -> Result<Option<Self>, Failure> {
        Ok(Disk::open(env)?.map(|disk| Self { disk, entries: 0, wrong: 0 }))
    }

    /// Writes one number more, and looks at the oldest one and the last one before it.
    ///
    /// # Errors
    /// The disk does not do it.
    pub fn go_on(&mut self, env: &Env) -> Result<(), Failure> {
        let next = self.entries + 1;
        for old in [next.saturating_sub(SECTORS - 1), next - 1] {
            let found = if old == 0 { Some(0) } else { self.disk.read(env, old % SECTORS)? };
            self.wrong += u64::from(found != Some(old));
        }
        self.disk.write(env, next % SECTORS, next)?;
        self.entries = next;
        Ok(())
    }
}
