//! The thread of a device. A notify sets a bit and wakes it; a reset takes the queues away from it and waits,
//! with a deadline, until it has let go of them.

use super::Backend;
use super::interrupt::Interrupt;
use super::ring::VirtQueue;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;

/// What a worker has between DRIVER_OK and reset.
pub struct Activation {
    /// By index; `None` for a queue that the driver did not set up.
    pub queues: Mutex<Vec<Option<Queue>>>,
    /// Guest memory.
    pub memory: GuestMemoryMmap,
    /// Set by a reset: no more requests are taken, none is given back.
    pub cancelled: AtomicBool,
}

impl fmt::Debug for Activation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Activation").field("queues", &self.queues).finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct DoorState {
    /// Queues with something to do, one bit each.
    rung: u64,
    active: Option<Arc<Activation>>,
    /// The worker is serving.
    busy: bool,
    paused: bool,
    stop: bool,
}

/// The worker's doorbell. Its lock is never held while guest memory is touched.
#[derive(Debug, Default)]
pub struct Doorbell {
    state: Mutex<DoorState>,
    work: Condvar,
    idle: Condvar,
}

impl Doorbell {
    fn lock(&self) -> MutexGuard<'_, DoorState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something happened to queue `index`. Before activation it does nothing.
    pub fn ring(&self, index: usize) {
        let mut state = self.lock();
        if state.active.is_some() && index < 64 {
            state.rung |= 1 << index;
            self.work.notify_one();
        }
    }

    /// Hands queues to the worker and has it look at all of them once: drivers may fill a queue first.
    pub fn activate(&self, activation: Activation) {
        let mut state = self.lock();
        state.active = Some(Arc::new(activation));
        state.rung = u64::MAX;
        self.work.notify_one();
    }

    /// Positions in the rings, by queue: next available, next used. `None` before activation or for a queue that was not
    /// set up. Only while the worker is quiet.
    pub fn positions(&self) -> Vec<Option<(u16, u16)>> {
        let Some(active) = self.lock().active.clone() else { return Vec::new() };
        let queues = active.queues.lock().unwrap_or_else(PoisonError::into_inner);
        queues.iter().map(|q| q.as_ref().map(|q| (q.next_avail(), q.next_used()))).collect()
    }

    /// Takes the queues away; true once the worker has let go of them, false if it has not by the deadline
    /// (a request waits for a page or a disk; it is not given back when it ends).
    pub fn deactivate(&self, timeout: Duration) -> bool {
        let mut state = self.lock();
        if let Some(active) = state.active.take() {
            active.cancelled.store(true, Ordering::SeqCst);
        }
        state.rung = 0;
        self.wait_idle(state, timeout)
    }

    /// True if the worker serves nothing now.
    pub fn is_idle(&self) -> bool {
        !self.lock().busy
    }

    /// Lets the worker finish what it is at and take nothing new; true if it was quiet by the deadline.
    pub fn pause(&self, timeout: Duration) -> bool {
        let mut state = self.lock();
        state.paused = true;
        self.wait_idle(state, timeout)
    }

    /// Ends a pause. What came in meanwhile is served.
    pub fn resume(&self) {
        self.lock().paused = false;
        self.work.notify_one();
    }

    fn stop(&self) {
        let mut state = self.lock();
        if let Some(active) = state.active.take() {
            active.cancelled.store(true, Ordering::SeqCst);
        }
        state.stop = true;
        self.work.notify_one();
    }

    fn wait_idle(&self, mut state: MutexGuard<'_, DoorState>, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        while state.busy {
            let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|d| !d.is_zero()) else {
                return false;
            };
            state = self.idle.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// The next work; `None` at the end.
    fn next(&self) -> Option<(Arc<Activation>, u64)> {
        let mut state = self.lock();
        loop {
            if state.stop {
                return None;
            }
            if !state.paused && state.rung != 0 {
                if let Some(active) = state.active.clone() {
                    state.busy = true;
                    return Some((active, std::mem::take(&mut state.rung)));
                }
            }
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A running worker. Dropping it tells the thread to end, without waiting.
#[derive(Debug)]
pub struct Worker {
    /// Wakes it.
    pub doorbell: Arc<Doorbell>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(
        name: &str,
        mut backend: impl Backend,
        doorbell: Arc<Doorbell>,
        interrupt: Arc<Interrupt>,
    ) -> std::io::Result<Worker> {
        let shared = doorbell.clone();
        let device = name.to_owned();
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            while let Some((active, rung)) = shared.next() {
                let _done = Done(&shared);
                serve(&device, &mut backend, &active, rung, &interrupt);
            }
        })?;
        Ok(Worker { doorbell, thread: Some(thread) })
    }

    /// Ends the thread; true if it has ended by the deadline. Only then may guest memory be unmapped.
    pub fn shut_down(&mut self, timeout: Duration) -> bool {
        self.doorbell.stop();
        let deadline = Instant::now() + timeout;
        while self.thread.as_ref().is_some_and(|t| !t.is_finished()) {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.doorbell.stop();
    }
}

/// Says that the worker is idle, even if it panics: nobody must wait for a dead thread.
struct Done<'a>(&'a Doorbell);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.lock().busy = false;
        self.0.idle.notify_all();
    }
}

fn serve(name: &str, backend: &mut impl Backend, active: &Activation, rung: u64, interrupt: &Interrupt) {
    let mut queues = active.queues.lock().unwrap_or_else(PoisonError::into_inner);
    for (index, queue) in queues.iter_mut().enumerate() {
        let Some(queue) = queue.as_mut().filter(|_| rung >> index & 1 != 0) else { continue };
        if interrupt.needs_reset() {
            return;
        }
        let mut queue = VirtQueue::new(queue, &active.memory, interrupt, &active.cancelled);
        let served = backend.serve(index, &mut queue).and_then(|()| queue.signal());
        if let Err(error) = served {
            if !active.cancelled.load(Ordering::SeqCst) {
                tracing::warn!("{name}: queue {index}: {error}; the device stops until the guest resets it");
                interrupt.fail();
            }
        }
    }
}
