//! What people see of a guest's console: an output ring that never makes the guest wait, and an input queue
//! that pushes back.
//!
//! Each reader has its own position in the ring. One that falls behind loses the oldest bytes and is told how
//! many; the guest and the other readers do not notice.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// Output that is kept for late readers, in bytes.
pub const RING_BYTES: usize = 1 << 20;
/// How long a woken reader lets more output gather, so that a byte-wise writer does not wake it per byte.
const GATHER: Duration = Duration::from_millis(4);
/// How often the log file's thread looks whether the console still exists.
const LOG_POLL: Duration = Duration::from_millis(200);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The newest output, with the number of its first byte.
#[derive(Debug, Default)]
struct Ring {
    bytes: VecDeque<u8>,
    /// Bytes that have been pushed out of the ring since the VM started.
    dropped: u64,
    closed: bool,
}

/// The output side of a console, shared by the device that writes and all readers.
#[derive(Debug, Default)]
pub struct Output {
    ring: Mutex<Ring>,
    more: Condvar,
}

impl Output {
    /// Appends; never waits for a reader.
    pub fn write(&self, bytes: &[u8]) {
        let mut ring = lock(&self.ring);
        ring.bytes.extend(bytes);
        let excess = ring.bytes.len().saturating_sub(RING_BYTES);
        ring.bytes.drain(..excess);
        ring.dropped += excess as u64;
        drop(ring);
        self.more.notify_all();
    }

    /// Tells readers that nothing will follow.
    pub fn close(&self) {
        lock(&self.ring).closed = true;
        self.more.notify_all();
    }
}

/// A device that takes input from a console.
pub trait ConsoleInput: Send + Sync {
    /// Takes as many bytes as it has room for now and says how many.
    fn push(&self, bytes: &[u8]) -> usize;
}

/// What a reader got.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Chunk {
    /// Output, empty if none came in time.
    pub bytes: Vec<u8>,
    /// Bytes that were overwritten before this reader came for them; they are missing before `bytes`.
    pub lost: u64,
    /// Nothing will follow.
    pub closed: bool,
}

/// One reader of a console.
#[derive(Clone, Debug)]
pub struct ConsoleReader {
    output: Arc<Output>,
    position: u64,
}

impl ConsoleReader {
    /// Number of the next byte, counted from the start.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The next output, or an empty chunk after `timeout`. At most `max` bytes.
    pub fn read(&mut self, max: usize, timeout: Duration) -> Chunk {
        let mut ring = lock(&self.output.ring);
        let deadline = Instant::now() + timeout;
        while ring.dropped + ring.bytes.len() as u64 <= self.position && !ring.closed {
            let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|d| !d.is_zero()) else {
                return Chunk::default();
            };
            let waited = self.output.more.wait_timeout(ring, left);
            ring = waited.unwrap_or_else(PoisonError::into_inner).0;
            drop(ring);
            std::thread::sleep(GATHER.min(left));
            ring = lock(&self.output.ring);
        }
        let lost = ring.dropped.saturating_sub(self.position);
        self.position += lost;
        let skip = usize::try_from(self.position - ring.dropped).unwrap_or(usize::MAX);
        let bytes: Vec<u8> = ring.bytes.iter().skip(skip).take(max).copied().collect();
        self.position += bytes.len() as u64;
        let closed = ring.closed && self.position == ring.dropped + ring.bytes.len() as u64;
        Chunk { bytes, lost, closed }
    }
}

/// A guest's console as the control plane sees it.
#[derive(Clone)]
pub struct ConsoleHandle {
    output: Arc<Output>,
    /// The device that takes it may be another later. Held for a look-up only.
    input: Arc<Mutex<Arc<dyn ConsoleInput>>>,
    /// Input waits: the VM is paused.
    held: Arc<AtomicBool>,
}

impl fmt::Debug for ConsoleHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConsoleHandle").finish_non_exhaustive()
    }
}

/// The guest does not take its input.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the guest took {taken} of {len} bytes of console input in {waited:?}: nothing reads its console")]
pub struct InputStalled {
    /// Bytes that were taken.
    pub taken: usize,
    /// Bytes offered.
    pub len: usize,
    /// How long.
    pub waited: Duration,
}

impl ConsoleHandle {
    /// A console of a device.
    pub fn new(output: Arc<Output>, input: Arc<dyn ConsoleInput>) -> ConsoleHandle {
        ConsoleHandle { output, input: Arc::new(Mutex::new(input)), held: Arc::default() }
    }

    /// From now on somebody else takes what is typed.
    pub fn redirect(&self, input: Arc<dyn ConsoleInput>) {
        *lock(&self.input) = input;
    }

    /// From now on what is typed goes to the device of another console.
    pub fn follow(&self, other: &ConsoleHandle) {
        let input = lock(&other.input).clone();
        self.redirect(input);
    }

    /// Output of a device that is elsewhere.
    pub fn feed(&self, bytes: &[u8]) {
        self.output.write(bytes);
    }

    /// A reader from some byte on, counted from the start.
    pub fn reader_at(&self, position: u64) -> ConsoleReader {
        ConsoleReader { output: self.output.clone(), position }
    }

    /// A reader that first gets what is still in the ring.
    pub fn reader(&self) -> ConsoleReader {
        let position = lock(&self.output.ring).dropped;
        ConsoleReader { output: self.output.clone(), position }
    }

    /// Offers input; says how much was taken. Does not wait.
    pub fn try_input(&self, bytes: &[u8]) -> usize {
        if self.held.load(Ordering::SeqCst) {
            return 0;
        }
        let input = lock(&self.input).clone();
        input.push(bytes)
    }

    /// While held, the console takes no input, so that it raises no interrupt: for a pause.
    pub fn hold(&self, held: bool) {
        self.held.store(held, Ordering::SeqCst);
    }

    /// Sends input, waiting for the guest to make room.
    ///
    /// # Errors
    /// [`InputStalled`] when the guest has not taken everything within `timeout`.
    pub fn input(&self, bytes: &[u8], timeout: Duration) -> Result<(), InputStalled> {
        let start = Instant::now();
        let mut taken = 0;
        loop {
            taken += self.try_input(&bytes[taken..]);
            if taken >= bytes.len() {
                return Ok(());
            }
            if start.elapsed() >= timeout {
                return Err(InputStalled { taken, len: bytes.len(), waited: timeout });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Copies all output to a file from a thread of its own, which ends with the console.
///
/// # Errors
/// The thread cannot be started.
pub fn log_to_file(output: &Arc<Output>, mut file: File) -> std::io::Result<()> {
    let weak: Weak<Output> = Arc::downgrade(output);
    let mut position = lock(&output.ring).dropped;
    std::thread::Builder::new().name("console-log".into()).spawn(move || {
        // The strong reference is held only while reading, so that the console can go away.
        while let Some(output) = weak.upgrade() {
            let mut reader = ConsoleReader { output, position };
            let chunk = reader.read(RING_BYTES, LOG_POLL);
            position = reader.position;
            let mark = (chunk.lost > 0).then(|| format!("\n[{} bytes lost]\n", chunk.lost));
            let written = file
                .write_all(mark.unwrap_or_default().as_bytes())
                .and_then(|()| file.write_all(&chunk.bytes));
            if let Err(e) = written {
                tracing::warn!("console log: {e}; no more output is logged");
                return;
            }
            if chunk.closed {
                return;
            }
        }
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    struct Slow(Mutex<Vec<u8>>);
    impl ConsoleInput for Slow {
        fn push(&self, bytes: &[u8]) -> usize {
            let mut taken = self.0.lock().unwrap();
            let n = bytes.len().min(3).min(10 - taken.len());
            taken.extend(&bytes[..n]);
            n
        }
    }

    fn console() -> (Arc<Output>, Arc<Slow>, ConsoleHandle) {
        let output = Arc::new(Output::default());
        let input = Arc::new(Slow(Mutex::default()));
        let handle = ConsoleHandle::new(output.clone(), input.clone());
        (output, input, handle)
    }

    #[test]
    fn every_reader_gets_everything_and_late_ones_the_ring() {
        let (output, _, handle) = console();
        let mut first = handle.reader();
        assert_eq!(first.read(10, Duration::ZERO), Chunk::default());
        output.write(b"hello");
        let mut late = handle.reader();
        assert_eq!(first.read(3, SOON).bytes, b"hel");
        assert_eq!(first.read(9, SOON).bytes, b"lo");
        assert_eq!(late.read(9, SOON).bytes, b"hello");
        let writer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            output.write(b"!");
            output.close();
        });
        assert_eq!(late.read(9, SOON).bytes, b"!");
        writer.join().unwrap();
        assert!(late.read(9, SOON).closed);
    }

    #[test]
    fn a_flood_costs_the_slow_reader_only() {
        let (output, _, handle) = console();
        let mut reader = handle.reader();
        for _ in 0..3 {
            output.write(&vec![b'x'; RING_BYTES]);
        }
        output.write(b"end");
        let chunk = reader.read(RING_BYTES, SOON);
        assert_eq!(chunk.lost, 2 * RING_BYTES as u64 + 3);
        assert_eq!(&chunk.bytes[RING_BYTES - 3..], b"end");
    }

    #[test]
    fn input_pushes_back() {
        let (_, input, handle) = console();
        handle.input(b"12345", SOON).unwrap();
        let e = handle.input(b"abcdefg", Duration::from_millis(20)).unwrap_err();
        assert_eq!((e.taken, e.len), (5, 7));
        assert_eq!(*input.0.lock().unwrap(), b"12345abcde");
    }

    #[test]
    fn the_log_file_gets_all_output() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let (output, _, _) = console();
        output.write(b"before");
        log_to_file(&output, File::create(&path).unwrap()).unwrap();
        output.write(b" after");
        output.close();
        let deadline = Instant::now() + SOON;
        while std::fs::read(&path).unwrap() != b"before after" {
            assert!(Instant::now() < deadline, "log is incomplete");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
