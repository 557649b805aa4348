use super::blk::Blk;
use super::console::Console;
use super::rng::Rng;
use super::testing::*;
use super::worker::Doorbell;
use super::*;
use crate::devices::console::Output;
use crate::devices::image::{Image, ImageError};
use crate::devices::{BusDevice, ConsoleHandle};
use proptest::prelude::*;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use virtio_bindings::virtio_mmio::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const NEEDS_RESET: u32 = 64;
const HEADER: u64 = DATA;
const STATUS: u64 = DATA + 0x100;
const BUFFER: u64 = DATA + 0x1000;

fn transport(
    description: Description,
    backend: impl Backend,
    memory: &GuestMemoryMmap,
) -> (Transport, Arc<Lines>) {
    let (lines, bell) = (Arc::new(Lines::default()), Arc::new(Doorbell::default()));
    (Transport::new(description, backend, bell, memory.clone(), lines.clone(), 5).unwrap(), lines)
}

fn rng(memory: &GuestMemoryMmap) -> (Transport, Arc<Lines>) {
    transport(Rng::description("virtio-rng0".into()), Rng, memory)
}

fn image(dir: &Path, len: usize) -> PathBuf {
    let path = dir.join("disk");
    std::fs::write(&path, (0..len).map(|n| u8::try_from(n / 512 % 251).unwrap()).collect::<Vec<_>>())
        .unwrap();
    path
}

fn locked(path: &Path, readonly: bool) -> Result<Image, ImageError> {
    let image = Image::open(path, readonly)?;
    image.lock()?;
    Ok(image)
}

fn blk(path: &Path, readonly: bool, memory: &GuestMemoryMmap) -> Transport {
    let blk = Blk::new(Arc::new(locked(path, readonly).unwrap()), "disk-id");
    transport(blk.description("virtio-blk0".into()), blk, memory).0
}

/// Runs one block request with `len` bytes of data; returns its status.
fn request(driver: &mut Driver<'_>, kind: u32, sector: u64, len: u32, write: bool) -> u8 {
    driver.fill(HEADER, &[kind.to_le_bytes(), [0; 4]].concat());
    driver.fill(HEADER + 8, &sector.to_le_bytes());
    driver.fill(STATUS, &[0xEE]);
    if len == 0 {
        driver.submit(0, &[(HEADER, 16, false), (STATUS, 1, true)]);
    } else {
        driver.submit(0, &[(HEADER, 16, false), (BUFFER, len, !write), (STATUS, 1, true)]);
    }
    driver.used(0);
    driver.bytes(STATUS, 1)[0]
}

#[test]
fn registers_before_initialisation() {
    let memory = memory();
    let (transport, _) = rng(&memory);
    let driver = Driver::new(&transport, &memory);
    let ids = [0, 4, 8, 0xC, 0x34, 0x44, 0x60, 0x70, 0xFC, 0xB0].map(|r| driver.get(r));
    assert_eq!(ids, [0x7472_6976, 2, 4, 0x6E61_7073, 64, 0, 0, 0, 0, u32::MAX]);
    driver.set(VIRTIO_MMIO_QUEUE_SEL, 7);
    assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
    let mut odd = [0xEE; 2];
    transport.read(1, &mut odd);
    assert_eq!(odd, [0; 2]);
    transport.read(u64::MAX, &mut odd);
    transport.write(u64::MAX, &odd);
    transport.write(0x70, &odd);
    assert_eq!(driver.status(), 0);
}

#[test]
fn negotiation_is_checked() {
    let memory = memory();
    let (transport, _) = rng(&memory);
    let mut driver = Driver::new(&transport, &memory);
    for (features, want) in [(1 << 32, 11), (0, 3), (1 << 32 | 1 << 5, 3), (1 << 32 | 1 << 28 | 1 << 29, 11)]
    {
        driver.features = features;
        driver.negotiate();
        assert_eq!(driver.status(), want, "{features:#x}");
    }
    // DRIVER_OK without FEATURES_OK, and bits that are taken back, do nothing.
    driver.set(VIRTIO_MMIO_STATUS, 0);
    driver.set(VIRTIO_MMIO_STATUS, 7);
    assert_eq!(driver.status(), 3);
    driver.set(VIRTIO_MMIO_STATUS, 1);
    assert_eq!(driver.status(), 3);
    // Queues cannot be changed before FEATURES_OK, nor to impossible sizes.
    driver.set(VIRTIO_MMIO_QUEUE_READY, 1);
    assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_READY), 0);
}

#[test]
fn rng_fills_buffers_and_interrupts() {
    let memory = memory();
    let (transport, lines) = rng(&memory);
    let mut driver = Driver::new(&transport, &memory);
    driver.start(1);
    driver.submit(0, &[(BUFFER, 20, true), (BUFFER + 100, 20, true)]);
    assert_eq!(driver.used(0), (0, 40));
    assert_ne!(driver.bytes(BUFFER, 20), [0; 20]);
    assert_ne!(driver.bytes(BUFFER + 100, 20), [0; 20]);
    assert_eq!(driver.bytes(BUFFER + 20, 80), [0; 80]);
    wait("an interrupt", || lines.0.load(Ordering::SeqCst) == 1);
    assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 1);
    driver.set(VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    assert_eq!(driver.status(), 15);
}

#[test]
fn a_driver_that_wants_no_interrupts_gets_none() {
    let memory = memory();
    let (transport, lines) = rng(&memory);
    let mut driver = Driver::new(&transport, &memory);
    driver.start(1);
    memory.write_obj(1u16, GuestAddress(Driver::rings(0).1)).unwrap();
    driver.submit(0, &[(BUFFER, 20, true)]);
    driver.used(0);
    memory.write_obj(0u16, GuestAddress(Driver::rings(0).1)).unwrap();
    driver.submit(0, &[(BUFFER, 20, true)]);
    driver.used(0);
    wait("an interrupt", || lines.0.load(Ordering::SeqCst) == 1);

    // With EVENT_IDX: none until the used index passes the event.
    driver.features |= 1 << 29;
    driver.start(1);
    let event = Driver::rings(0).1 + 4 + 2 * u64::from(QUEUE);
    memory.write_obj(1u16, GuestAddress(event)).unwrap();
    driver.submit(0, &[(BUFFER, 20, true)]);
    driver.used(0);
    driver.submit(0, &[(BUFFER, 20, true)]);
    driver.used(0);
    wait("an interrupt", || lines.0.load(Ordering::SeqCst) == 2);
    // And the device asks to be notified of the next buffer.
    let avail_event = Driver::rings(0).2 + 4 + 8 * u64::from(QUEUE);
    wait("an avail event", || memory.read_obj::<u16>(GuestAddress(avail_event)).unwrap() == 2);
}

#[test]
fn broken_rings_need_a_reset_and_survive_one() {
    let memory = memory();
    let (transport, lines) = rng(&memory);
    let end = MEMORY as u64;
    type Break = fn(&mut Driver<'_>);
    let cases: [(&str, Break); 10] = [
        ("head out of bounds", |d| d.offer(0, QUEUE)),
        ("next out of bounds", |d| {
            d.descriptor(0, 0, BUFFER, 8, NEXT | WRITE, 999);
            d.offer(0, 0);
        }),
        ("loop", |d| {
            d.descriptor(0, 0, BUFFER, 8, NEXT | WRITE, 1);
            d.descriptor(0, 1, BUFFER, 8, NEXT | WRITE, 0);
            d.offer(0, 0);
        }),
        ("address beyond memory", |d| d.submit(0, &[(1 << 40, 8, true)])),
        ("length beyond memory", |d| d.submit(0, &[(MEMORY as u64 - 8, 9, true)])),
        ("overflow", |d| d.submit(0, &[(u64::MAX - 3, 8, true)])),
        ("more than 4 GiB", |d| d.submit(0, &[(0, u32::MAX, true), (0, u32::MAX, true)])),
        ("readable behind writable", |d| d.submit(0, &[(BUFFER, 8, true), (BUFFER, 8, false)])),
        ("indirect in indirect", |d| {
            d.fill(BUFFER, &d.bytes(Driver::rings(0).0, 16));
            d.descriptor(0, 1, BUFFER, 16, INDIRECT, 0);
            d.fill(BUFFER, &d.bytes(Driver::rings(0).0 + 16, 16));
            d.offer(0, 1);
        }),
        ("available index too far", |d| {
            d.memory.write_obj(900u16, GuestAddress(Driver::rings(0).1 + 2)).unwrap();
            d.set(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        }),
    ];
    for (name, break_it) in cases {
        let mut driver = Driver::new(&transport, &memory);
        driver.start(1);
        break_it(&mut driver);
        wait(name, || driver.status() & NEEDS_RESET != 0);
        assert_eq!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS) & 2, 2, "{name}");
        assert_eq!(driver.used_index(0), 0, "{name}");
        driver.start(1);
        assert_eq!((driver.status(), driver.get(VIRTIO_MMIO_INTERRUPT_STATUS)), (15, 0), "{name}");
        driver.submit(0, &[(BUFFER, 8, true)]);
        assert_eq!(driver.used(0), (0, 8), "{name}");
    }
    assert!(lines.0.load(Ordering::SeqCst) >= 20);

    // Rings that are not in memory, not aligned, or nowhere.
    for (desc, avail, used) in [
        (end - 16, 0x2000, 0x3000),
        (0x1000, end, 0x3000),
        (0x1000, 0x2000, u64::MAX - 3),
        (0x1008, 0x2000, 0x3000),
        (0x1000, 0x2001, 0x3000),
        (0x1000, 0x2000, 0x3002),
        (0x1000, 0, 0x3000),
    ] {
        let driver = Driver::new(&transport, &memory);
        driver.negotiate();
        driver.set_up_queue(0, desc, avail, used);
        driver.set(VIRTIO_MMIO_STATUS, 15);
        assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET, "{desc:#x} {avail:#x} {used:#x}");
        driver.set(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    }
}

#[test]
fn blk_reads_writes_flushes_and_says_its_name() {
    let (dir, memory) = (tempfile::tempdir().unwrap(), memory());
    let path = image(dir.path(), 64 * 512);
    let transport = blk(&path, false, &memory);
    let mut driver = Driver::new(&transport, &memory);
    let mut config = [0; 24];
    transport.read(0x100, &mut config);
    assert_eq!((config[0], config[12], config[20..24].to_vec()), (64, 254, vec![0, 2, 0, 0]));
    let mut beyond = [0xEE; 4];
    transport.read(0x100 + 58, &mut beyond);
    assert_eq!(beyond, [0; 4]);
    driver.start(1);
    assert_eq!(request(&mut driver, 0, 3, 1024, false), 0);
    assert_eq!(driver.bytes(BUFFER, 1024), [[3; 512], [4; 512]].concat());
    driver.fill(BUFFER, &[0xAB; 512]);
    assert_eq!(request(&mut driver, 1, 63, 512, true), 0);
    assert_eq!(request(&mut driver, 4, 0, 0, false), 0);
    assert_eq!(std::fs::read(&path).unwrap()[63 * 512..], [0xAB; 512]);
    assert_eq!(request(&mut driver, 8, 0, 20, false), 0);
    assert_eq!(driver.bytes(BUFFER, 20), b"disk-id\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert!(transport.shut_down(Duration::from_secs(5)));
}

#[test]
fn blk_answers_bad_requests_with_a_status() {
    let (dir, memory) = (tempfile::tempdir().unwrap(), memory());
    let path = image(dir.path(), 64 * 512);
    let before = std::fs::read(&path).unwrap();
    let transport = blk(&path, false, &memory);
    let mut driver = Driver::new(&transport, &memory);
    driver.start(1);
    for (kind, sector, len, write, want) in [
        (0, 64, 512, false, 1),
        (0, 63, 1024, false, 1),
        (0, 1 << 60, 512, false, 1),
        (0, u64::MAX, 512, false, 1),
        (0, 0, 100, false, 1),
        (1, 64, 512, true, 1),
        (1, 0, 513, true, 1),
        (8, 0, 19, false, 1),
        (11, 0, 512, true, 2),
        (99, 0, 0, false, 2),
        (0, 63, 512, false, 0),
    ] {
        assert_eq!(request(&mut driver, kind, sector, len, write), want, "{kind} {sector} {len}");
    }
    assert_eq!(driver.status(), 15);
    assert_eq!(std::fs::read(&path).unwrap(), before);
    // The image shrinks under the VM: an error, not a hang.
    std::fs::File::options().write(true).open(&path).unwrap().set_len(512).unwrap();
    assert_eq!(request(&mut driver, 0, 8, 512, false), 1);
    // Without header or status there is nothing to answer.
    for buffers in [&[(HEADER, 15, false), (STATUS, 1, true)][..], &[(HEADER, 16, false)]] {
        driver.start(1);
        driver.submit(0, buffers);
        wait("a broken request", || driver.status() & NEEDS_RESET != 0);
    }
}

#[test]
fn a_readonly_disk_is_not_written() {
    let (dir, memory) = (tempfile::tempdir().unwrap(), memory());
    let path = image(dir.path(), 4096);
    let transport = blk(&path, true, &memory);
    let mut driver = Driver::new(&transport, &memory);
    assert_eq!(driver.get(VIRTIO_MMIO_DEVICE_FEATURES) & 1 << 5, 1 << 5);
    driver.features |= 1 << 5;
    driver.start(1);
    assert_eq!(request(&mut driver, 1, 0, 512, true), 1);
    assert_eq!(request(&mut driver, 0, 1, 512, false), 0);
    assert_eq!(driver.bytes(BUFFER, 512), [1; 512]);
}

#[test]
fn images_that_are_none_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let odd = dir.path().join("odd");
    std::fs::write(&odd, [0; 1000]).unwrap();
    let empty = dir.path().join("empty");
    std::fs::write(&empty, []).unwrap();
    for (path, want) in [
        (dir.path().join("gone"), "cannot open disk image"),
        (dir.path().to_owned(), "is not a file"),
        ("/dev/null".into(), "is not a file"),
        (odd, "has 1000 bytes"),
        (empty, "has 0 bytes"),
    ] {
        let e = locked(&path, true).unwrap_err().to_string();
        assert!(e.contains(want) && e.contains(path.to_str().unwrap()), "{e}");
    }
    let denied = std::io::Error::from_raw_os_error(libc::EACCES);
    let e = ImageError::Open { path: "/x".into(), source: denied }.to_string();
    assert!(e.contains("given as readonly"), "{e}");
    let path = image(dir.path(), 512);
    let writer = locked(&path, false).unwrap();
    assert!(matches!(locked(&path, true), Err(ImageError::InUse(_))));
    drop(writer);
    let _first = locked(&path, true).unwrap();
    locked(&path, true).unwrap();
    assert!(matches!(locked(&path, false), Err(ImageError::InUse(_))));
}

#[test]
fn console_carries_both_ways() {
    let memory = memory();
    let (output, bell, lines) =
        (Arc::new(Output::default()), Arc::new(Doorbell::default()), Arc::new(Lines::default()));
    let (console, input) = Console::new(output.clone(), bell.clone());
    let handle = ConsoleHandle::new(output, input);
    let description = Console::description("virtio-console0".into());
    let transport = Transport::new(description, console, bell, memory.clone(), lines.clone(), 6).unwrap();
    let mut driver = Driver::new(&transport, &memory);
    assert_eq!(handle.try_input(b"early"), 5);
    driver.start(2);
    driver.fill(BUFFER, b"hello, world");
    driver.submit(1, &[(BUFFER, 7, false), (BUFFER + 7, 5, false)]);
    assert_eq!(driver.used(1), (0, 0));
    assert_eq!(handle.reader().read(100, Duration::from_secs(5)).bytes, b"hello, world");
    driver.submit(0, &[(BUFFER, 3, true)]);
    assert_eq!(driver.used(0), (0, 3));
    assert_eq!(driver.bytes(BUFFER, 3), b"ear");
    driver.submit(0, &[(BUFFER, 100, true)]);
    assert_eq!(driver.used(0), (0, 2));
    // A buffer waits for input.
    driver.submit(0, &[(BUFFER, 100, true)]);
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(driver.used_index(0), 2);
    handle.input(b"key", Duration::from_secs(5)).unwrap();
    assert_eq!(driver.used(0), (0, 3));
    assert_eq!(driver.bytes(BUFFER, 3), b"key");
    // Nobody takes more than the queue holds.
    assert_eq!(handle.try_input(&[b'x'; 10_000]), 4096);
    assert!(handle.input(b"y", Duration::from_millis(5)).is_err());
}

/// A backend that hangs until told.
struct Hang(std::sync::mpsc::Receiver<()>);
impl Backend for Hang {
    fn serve(&mut self, _: usize, queue: &mut ring::VirtQueue<'_>) -> Result<(), ring::RingError> {
        while let Some(chain) = queue.pop()? {
            let _ = self.0.recv();
            queue.push(chain.head, 0)?;
        }
        Ok(())
    }
}

#[test]
fn a_reset_during_a_hanging_request_ends_and_gives_nothing_back() {
    let memory = memory();
    let (go, wait_for) = std::sync::mpsc::channel();
    let (transport, _) = transport(Rng::description("hang".into()), Hang(wait_for), &memory);
    let mut driver = Driver::new(&transport, &memory);
    driver.start(1);
    driver.submit(0, &[(BUFFER, 8, true)]);
    std::thread::sleep(Duration::from_millis(20));
    driver.set(VIRTIO_MMIO_STATUS, 0);
    // Not done yet: the driver must not take its memory back.
    assert_eq!(driver.status(), 15);
    driver.set(VIRTIO_MMIO_STATUS, 1);
    assert_eq!(driver.status(), 15);
    assert!(!transport.shut_down(Duration::from_millis(5)));
    go.send(()).unwrap();
    wait("the reset", || driver.status() == 0);
    assert_eq!(driver.used_index(0), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Whatever is in rings and registers, the device answers, ends and can be reset.
    #[test]
    fn hostile_drivers_do_no_harm(
        descriptors in prop::collection::vec((0u64..0x11_0000, 0u32..0x2000, 0u16..8, 0u16..20), 16),
        heads in prop::collection::vec(0u16..20, 16),
        avail in 0u16..40,
        writes in prop::collection::vec((0u32..0x110, any::<u32>()), 0..40),
        features in prop::sample::select(vec![1u64 << 32, 7 << 28 | 1 << 32, 3 << 28 | 1 << 32]),
    ) {
        let (dir, memory) = (tempfile::tempdir().unwrap(), memory());
        let transport = blk(&image(dir.path(), 64 * 512), false, &memory);
        let mut driver = Driver::new(&transport, &memory);
        driver.features = features;
        driver.start(1);
        for (slot, (addr, len, flags, next)) in (0u16..).zip(descriptors) {
            driver.descriptor(0, slot, addr, len, flags, next);
        }
        let ring = Driver::rings(0).1;
        for (slot, head) in (0u64..).zip(heads) {
            memory.write_obj(head, GuestAddress(ring + 4 + 2 * slot)).unwrap();
        }
        memory.write_obj(avail, GuestAddress(ring + 2)).unwrap();
        driver.set(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        for (register, value) in writes {
            driver.set(register & !3, value);
            driver.get(register);
        }
        driver.set(VIRTIO_MMIO_STATUS, 0);
        prop_assert_eq!(driver.status(), 0);
        driver.features = 1 << 32;
        driver.start(1);
        prop_assert_eq!(request(&mut driver, 0, 0, 512, false), 0);
        prop_assert!(transport.shut_down(Duration::from_secs(5)));
    }
}
