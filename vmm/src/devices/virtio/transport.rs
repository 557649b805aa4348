//! The register file of a virtio-mmio device, version 2 (virtio 1.2, 4.2.2).
//!
//! ```text
//!  status:  0 -> ACKNOWLEDGE -> DRIVER -> FEATURES_OK -> DRIVER_OK ---------> reset (write 0)
//!                features may change -^      ^- queues may change     ^- the worker has the queues
//! ```
//! A step out of this order is ignored, as is a register written in the wrong state.

use super::interrupt::Interrupt;
use super::worker::{Activation, Doorbell, Worker};
use super::{Backend, Description};
use crate::devices::{BusDevice, WindowKind};
use crate::interrupts::IrqLines;
use serde::{Deserialize, Serialize};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"span");
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const TRANSPORT_FEATURES: u64 = VERSION_1 | EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// How long a reset waits for the request that the worker is at.
const RESET_TIMEOUT: Duration = Duration::from_secs(2);

/// One queue's registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRegisters {
    size: u32,
    ready: bool,
    desc: u64,
    avail: u64,
    used: u64,
}

/// All registers of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueRegisters>,
    /// A reset whose worker has not let go of the queues yet.
    resetting: bool,
}

/// All of a quiet device.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    registers: TransportState,
    /// Reason bits; the device has failed.
    interrupt: (u32, bool),
    /// Next available, next used.
    positions: Vec<Option<(u16, u16)>>,
}

/// A virtio device on the bus.
#[derive(Debug)]
pub struct Transport {
    description: Description,
    memory: GuestMemoryMmap,
    state: Mutex<TransportState>,
    interrupt: Arc<Interrupt>,
    doorbell: Arc<Doorbell>,
    worker: Mutex<Worker>,
}

fn half(value: u64, sel: u32) -> u32 {
    match sel {
        0 => u32::try_from(value & 0xFFFF_FFFF).unwrap_or_default(),
        1 => u32::try_from(value >> 32).unwrap_or_default(),
        _ => 0,
    }
}

fn set_half(value: &mut u64, high: bool, half: u32) {
    let shift = if high { 32 } else { 0 };
    *value = *value & !(0xFFFF_FFFF << shift) | u64::from(half) << shift;
}

impl Transport {
    /// A device after reset, and its worker. `doorbell` is the one that the backend's own events ring.
    ///
    /// # Errors
    /// The worker's thread cannot be started.
    pub fn new(
        description: Description,
        backend: impl Backend,
        doorbell: Arc<Doorbell>,
        memory: GuestMemoryMmap,
        irq: Arc<dyn IrqLines>,
        gsi: u32,
    ) -> std::io::Result<Transport> {
        let interrupt = Arc::new(Interrupt::new(irq, gsi));
        let worker = Worker::start(&description.name, backend, doorbell.clone(), interrupt.clone())?;
        let queues = Self::reset_queues(&description);
        let state = Mutex::new(TransportState { queues, ..Default::default() });
        Ok(Transport { description, memory, state, interrupt, doorbell, worker: Mutex::new(worker) })
    }

    /// Ends the worker; true if it has ended by the deadline. Only then may guest memory be unmapped.
    pub fn shut_down(&self, timeout: Duration) -> bool {
        self.worker.lock().unwrap_or_else(PoisonError::into_inner).shut_down(timeout)
    }

    /// Lets the worker finish what it is at and take nothing new; true if it was quiet by the deadline.
    pub fn pause(&self, timeout: Duration) -> bool {
        self.doorbell.pause(timeout)
    }

    /// Ends a pause.
    pub fn resume(&self) {
        self.doorbell.resume();
    }

    fn reset_queues(description: &Description) -> Vec<QueueRegisters> {
        let register = |size: &u16| QueueRegisters { size: u32::from(*size), ..Default::default() };
        description.queue_sizes.iter().map(register).collect()
    }

    fn lock(&self) -> MutexGuard<'_, TransportState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn features(&self) -> u64 {
        self.description.features | TRANSPORT_FEATURES
    }

    fn queue_max(&self, state: &TransportState) -> u32 {
        let max = usize::try_from(state.queue_sel).ok().and_then(|n| self.description.queue_sizes.get(n));
        max.copied().map_or(0, u32::from)
    }

    fn read_register(&self, offset: u32) -> u32 {
        let mut state = self.lock();
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.description.device_type,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => half(self.features(), state.device_features_sel),
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.queue_max(&state),
            VIRTIO_MMIO_QUEUE_READY => state.selected().map_or(0, |q| u32::from(q.ready)),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            VIRTIO_MMIO_STATUS => {
                if state.resetting && self.doorbell.is_idle() {
                    self.finish_reset(&mut state);
                }
                let failed = if self.interrupt.needs_reset() { VIRTIO_CONFIG_S_NEEDS_RESET } else { 0 };
                state.status | failed
            }
            // There is no shared memory: length -1.
            VIRTIO_MMIO_SHM_LEN_LOW | VIRTIO_MMIO_SHM_LEN_HIGH => u32::MAX,
            // ConfigGeneration is constant because the configuration is; write-only and unknown registers.
            _ => 0,
        }
    }

    fn write_register(&self, offset: u32, value: u32) {
        let mut state = self.lock();
        let state = &mut *state;
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => state.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => state.driver_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES => {
                if state.has(VIRTIO_CONFIG_S_DRIVER) && !state.has(VIRTIO_CONFIG_S_FEATURES_OK) {
                    let sel = state.driver_features_sel;
                    if sel < 2 {
                        set_half(&mut state.driver_features, sel == 1, value);
                    }
                }
            }
            VIRTIO_MMIO_QUEUE_SEL => state.queue_sel = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => {
                if state.has(VIRTIO_CONFIG_S_DRIVER_OK) {
                    if let Ok(index) = usize::try_from(value) {
                        self.doorbell.ring(index);
                    }
                }
            }
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            VIRTIO_MMIO_STATUS => self.write_status(state, value),
            _ => self.write_queue(state, offset, value),
        }
    }

    fn write_queue(&self, state: &mut TransportState, offset: u32, value: u32) {
        let max = self.queue_max(state);
        if !state.has(VIRTIO_CONFIG_S_FEATURES_OK) || state.has(VIRTIO_CONFIG_S_DRIVER_OK) {
            return;
        }
        let Some(queue) = state.selected_mut() else { return };
        match offset {
            VIRTIO_MMIO_QUEUE_READY => queue.ready = value & 1 != 0,
            _ if queue.ready => {}
            VIRTIO_MMIO_QUEUE_NUM if value.is_power_of_two() && value <= max => queue.size = value,
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_half(&mut queue.desc, false, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_half(&mut queue.desc, true, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_half(&mut queue.avail, false, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_half(&mut queue.avail, true, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_half(&mut queue.used, false, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_half(&mut queue.used, true, value),
            _ => {}
        }
    }

    fn write_status(&self, state: &mut TransportState, value: u32) {
        if value == 0 {
            // The registers' lock is held meanwhile: the driver waits here anyway, and the worker needs it not.
            if self.doorbell.deactivate(RESET_TIMEOUT) {
                self.finish_reset(state);
            } else {
                tracing::warn!("{}: reset while a request hangs", self.description.name);
                state.resetting = true;
            }
            return;
        }
        // A reset that is not finished shows as a status that is not 0; nothing else happens until then.
        if state.resetting || value & state.status != state.status & !VIRTIO_CONFIG_S_NEEDS_RESET {
            return;
        }
        let added = value & !state.status;
        state.status |=
            added & (VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FAILED);
        let known = state.driver_features & !self.features() == 0;
        let modern = state.driver_features & VERSION_1 != 0;
        if added & VIRTIO_CONFIG_S_FEATURES_OK != 0 && state.has(VIRTIO_CONFIG_S_DRIVER) && known && modern {
            state.status |= VIRTIO_CONFIG_S_FEATURES_OK;
        }
        if added & VIRTIO_CONFIG_S_DRIVER_OK != 0 && state.has(VIRTIO_CONFIG_S_FEATURES_OK) {
            state.status |= VIRTIO_CONFIG_S_DRIVER_OK;
            self.activate(state);
        }
    }

    fn finish_reset(&self, state: &mut TransportState) {
        *state = TransportState { queues: Self::reset_queues(&self.description), ..Default::default() };
        self.interrupt.reset();
    }

    fn activate(&self, state: &TransportState) {
        self.activate_at(state, &[]);
    }

    /// Hands the queues to the worker; `positions` are where a checkpoint left them.
    fn activate_at(&self, state: &TransportState, positions: &[Option<(u16, u16)>]) {
        let mut queues = Vec::new();
        for (index, registers) in state.queues.iter().enumerate() {
            let queue = registers.ready.then(|| self.build_queue(registers, state));
            match queue {
                Some(None) => {
                    tracing::warn!("{}: queue {index} is not in RAM: {registers:x?}", self.description.name);
                    self.interrupt.fail();
                    return;
                }
                Some(Some(mut queue)) => {
                    if let Some((avail, used)) = positions.get(index).copied().flatten() {
                        queue.set_next_avail(avail);
                        queue.set_next_used(used);
                    }
                    queues.push(Some(queue));
                }
                None => queues.push(None),
            }
        }
        self.doorbell.activate(Activation {
            queues: Mutex::new(queues),
            memory: self.memory.clone(),
            cancelled: AtomicBool::new(false),
        });
    }

    /// The queue that the registers describe, or `None` if its rings are unaligned or not RAM.
    fn build_queue(&self, registers: &QueueRegisters, state: &TransportState) -> Option<Queue> {
        let size = u16::try_from(registers.size).ok()?;
        let mut queue = Queue::new(size).ok()?;
        queue.try_set_size(size).ok()?;
        queue.try_set_desc_table_address(GuestAddress(registers.desc)).ok()?;
        queue.try_set_avail_ring_address(GuestAddress(registers.avail)).ok()?;
        queue.try_set_used_ring_address(GuestAddress(registers.used)).ok()?;
        queue.set_event_idx(state.driver_features & EVENT_IDX != 0);
        queue.set_ready(true);
        (registers.avail != 0 && queue.is_valid(&self.memory)).then_some(queue)
    }
}

impl TransportState {
    fn has(&self, bit: u32) -> bool {
        self.status & bit != 0
    }

    fn selected(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::try_from(self.queue_sel).ok()?)
    }

    fn selected_mut(&mut self) -> Option<&mut QueueRegisters> {
        self.queues.get_mut(usize::try_from(self.queue_sel).ok()?)
    }
}

impl BusDevice for Transport {
    fn name(&self) -> &str {
        &self.description.name
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(at) = offset.checked_sub(u64::from(VIRTIO_MMIO_CONFIG)) {
            let config = usize::try_from(at).ok().and_then(|at| self.description.config.get(at..));
            let config = config.unwrap_or_default();
            for (n, byte) in data.iter_mut().enumerate() {
                *byte = config.get(n).copied().unwrap_or(0);
            }
            return;
        }
        match (u32::try_from(offset), data) {
            (Ok(register), data) if data.len() == 4 && register % 4 == 0 => {
                data.copy_from_slice(&self.read_register(register).to_le_bytes());
            }
            // Registers are 32 bits wide and aligned (4.2.2.2).
            (_, data) => data.fill(0),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Ok(register), Ok(value)) = (u32::try_from(offset), <[u8; 4]>::try_from(data)) {
            if register < VIRTIO_MMIO_CONFIG && register % 4 == 0 {
                self.write_register(register, u32::from_le_bytes(value));
            }
        }
    }

    fn is_posted(&self, offset: u64) -> bool {
        WindowKind::Virtio.is_posted(offset)
    }

    fn save(&self) -> String {
        let saved = Saved {
            registers: self.lock().clone(),
            interrupt: self.interrupt.save(),
            positions: self.doorbell.positions(),
        };
        serde_json::to_string(&saved).unwrap_or_default()
    }

    fn restore(&self, state: &str) -> Result<(), String> {
        let saved: Saved = serde_json::from_str(state).map_err(|e| e.to_string())?;
        let sizes = &self.description.queue_sizes;
        let fits = |(q, max): (&QueueRegisters, &u16)| q.size <= u32::from(*max);
        if saved.registers.queues.len() != sizes.len() || !saved.registers.queues.iter().zip(sizes).all(fits)
        {
            return Err("its queues are not those of this device".into());
        }
        if saved.registers.driver_features & !self.features() != 0 {
            return Err("the driver uses a feature that this device has not".into());
        }
        let mut registers = self.lock();
        *registers = saved.registers;
        self.interrupt.restore(saved.interrupt);
        if registers.has(VIRTIO_CONFIG_S_DRIVER_OK) && !saved.interrupt.1 {
            self.activate_at(&registers, &saved.positions);
        }
        Ok(())
    }
}
