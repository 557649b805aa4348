//! The devices of one member, and the way to those of the others.

use super::image::{ImageError, Mark};
use super::local::{Local, Parts};
use super::spec::{self, DeviceSpec, DeviceWindow, Space, SpecError};
use super::{Bus, BusDevice, BusError, ConsoleHandle, PlatformEvent};
use crate::interrupts::IrqLines;
use arc_swap::ArcSwap;
use dsm::addr::MemberId;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vm_memory::GuestMemoryMmap;

/// Why a member's devices cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum PlatformError {
    /// The list of devices is impossible.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Two devices at one address.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// A disk's image cannot be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A device's thread cannot be started.
    #[error("cannot start the thread of {name}: {source}")]
    Thread {
        /// The device.
        name: String,
        /// Why.
        source: std::io::Error,
    },
    /// There is no such device.
    #[error("the VM has no device at {0:#x}")]
    Unknown(u64),
    /// The serial port's log cannot be written.
    #[error("cannot write the console log {path}: {source}")]
    Log {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// Where an access goes.
pub enum Route {
    /// To a device of this member, at this offset in its window.
    Local(Arc<dyn BusDevice>, u64),
    /// To a device of another member; `posted` says that a write there needs no answer.
    Remote {
        /// That member.
        member: MemberId,
        /// A write needs no answer.
        posted: bool,
    },
    /// Nowhere: reads are all ones, writes are ignored.
    Unmapped,
}

impl std::fmt::Debug for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Route::Local(device, offset) => write!(f, "Local({}+{offset:#x})", device.name()),
            Route::Remote { member, posted } => write!(f, "Remote({member}, posted: {posted})"),
            Route::Unmapped => f.write_str("Unmapped"),
        }
    }
}

/// Who has which device. Not changed once it is made: another one takes its place ([`Platform::assign`]), so look-ups take no
/// lock.
#[derive(Debug)]
pub(super) struct Board {
    pub windows: Vec<DeviceWindow>,
    /// This member's, by window.
    pub local: BTreeMap<usize, Local>,
    pio: Bus,
    mmio: Bus,
}

impl Board {
    pub fn new(windows: Vec<DeviceWindow>, local: BTreeMap<usize, Local>) -> Result<Board, BusError> {
        let (mut pio, mut mmio) = (Bus::default(), Bus::default());
        for (n, device) in &local {
            let Some(window) = windows.get(*n) else { continue };
            let bus = match window.space {
                Space::Pio => &mut pio,
                Space::Mmio => &mut mmio,
            };
            bus.insert(window.start, window.len, device.device.clone())?;
        }
        Ok(Board { windows, local, pio, mmio })
    }

    fn bus(&self, space: Space) -> &Bus {
        match space {
            Space::Pio => &self.pio,
            Space::Mmio => &self.mmio,
        }
    }
}

/// Devices on their way from one member to another, while the VM is paused ([`super::handover`]).
#[derive(Debug, Default)]
pub(super) struct Aside {
    /// Here, and not in the table as this member's: they come, or they have gone. By window.
    pub held: BTreeMap<usize, Local>,
    /// Those that were given away: until they are reclaimed they do nothing.
    pub given: BTreeSet<usize>,
    /// Beside the images of devices that are to go to another host.
    pub marks: Vec<Mark>,
}

/// The devices of one member. Guest memory may be unmapped only after [`Platform::shut_down`] said that no worker uses it.
#[derive(Debug)]
pub struct Platform {
    pub(super) me: MemberId,
    pub(super) parts: Parts,
    pub(super) now: ArcSwap<Board>,
    aside: Mutex<Aside>,
}

impl Platform {
    /// Builds the devices of `specs` that live on `me`, and the table of all others.
    ///
    /// # Errors
    /// An impossible list, or a file of a device that cannot be used; the message names it.
    pub fn build(
        specs: &[DeviceSpec],
        me: MemberId,
        memory: GuestMemoryMmap,
        irq: Arc<dyn IrqLines>,
        events: Sender<PlatformEvent>,
    ) -> Result<Platform, PlatformError> {
        let windows = spec::windows(specs)?;
        let has_serial = windows.iter().any(|w| w.kind == spec::WindowKind::Serial && w.member == me);
        let said = has_serial.then(Arc::default);
        let parts = Parts { specs: specs.to_vec(), memory, irq, events, said };
        let mut local = BTreeMap::new();
        for (n, window) in windows.iter().enumerate().filter(|(_, w)| w.member == me) {
            let image = parts.image(window)?;
            image.as_ref().map_or(Ok(()), super::image::Image::lock)?;
            local.insert(n, parts.make(window, image)?);
        }
        let now = ArcSwap::from_pointee(Board::new(windows, local)?);
        Ok(Platform { me, parts, now, aside: Mutex::default() })
    }

    /// Held for a look-up only.
    pub(super) fn aside(&self) -> MutexGuard<'_, Aside> {
        self.aside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends all workers; returns the names of those that have not ended by the deadline (they wait for a page
    /// or a disk): while there are any, guest memory must stay mapped.
    pub fn shut_down(&self, timeout: Duration) -> Vec<String> {
        let deadline = Instant::now() + timeout;
        let left = || deadline.saturating_duration_since(Instant::now());
        let board = self.now.load_full();
        let held: Vec<Local> = self.aside().held.values().cloned().collect();
        let all = board.local.values().chain(&held).filter_map(|device| device.virtio.as_ref());
        all.filter(|t| !t.shut_down(left())).map(|t| t.name().to_owned()).collect()
    }

    /// Lets all workers finish what they are at and take nothing new; returns the names of those that were not quiet
    /// by the deadline (they wait for a page or a disk). Either way the pause lasts until [`Platform::resume`].
    pub fn pause(&self, timeout: Duration) -> Vec<String> {
        let deadline = Instant::now() + timeout;
        let left = || deadline.saturating_duration_since(Instant::now());
        let board = self.now.load_full();
        let all = board.local.values().filter_map(|device| device.virtio.as_ref());
        all.filter(|t| !t.pause(left())).map(|t| t.name().to_owned()).collect()
    }

    /// Ends a pause: what came in meanwhile is served.
    pub fn resume(&self) {
        let given = self.aside().given.clone();
        let board = self.now.load();
        let here = board.local.iter().filter(|(n, _)| !given.contains(n));
        here.filter_map(|(_, device)| device.virtio.as_ref()).for_each(|t| t.resume());
    }

    /// The state of each device of this member that has one: index of its window, state. While all are quiet.
    pub fn save(&self) -> Vec<(usize, String)> {
        let board = self.now.load();
        let saved = board.local.iter().map(|(n, device)| (*n, device.device.save()));
        saved.filter(|(_, state)| !state.is_empty()).collect()
    }

    /// Sets the devices of this member, among those of the whole VM, to what [`Platform::save`] said.
    ///
    /// # Errors
    /// Not a state of the device, which is named.
    pub fn restore(&self, states: &[(usize, String)]) -> Result<(), String> {
        let board = self.now.load();
        for (n, state) in states {
            let Some(window) = board.windows.get(*n) else {
                return Err(format!("the checkpoint has a device {n}, the VM has {}", board.windows.len()));
            };
            if window.member != self.me {
                continue;
            }
            let device = &board.local.get(n).ok_or("a device is missing")?.device;
            device.restore(state).map_err(|e| format!("the state of {}: {e}", device.name()))?;
        }
        Ok(())
    }

    /// Where an access of `len` bytes at `addr` goes.
    pub fn route(&self, space: Space, addr: u64, len: usize) -> Route {
        let board = self.now.load();
        if let Some((device, offset)) = board.bus(space).find(addr, len) {
            return Route::Local(device.clone(), offset);
        }
        let inside = |w: &&DeviceWindow| {
            let end = addr.checked_sub(w.start).and_then(|offset| offset.checked_add(len as u64));
            w.space == space && end.is_some_and(|end| end <= w.len) && w.member != self.me
        };
        match board.windows.iter().find(inside) {
            Some(w) => Route::Remote { member: w.member, posted: w.kind.is_posted(addr - w.start) },
            None => Route::Unmapped,
        }
    }

    /// Reads from a device of this member; where none is, all ones.
    pub fn read(&self, space: Space, addr: u64, data: &mut [u8]) {
        self.now.load().bus(space).read(addr, data);
    }

    /// Writes to a device of this member; where none is, nothing happens.
    pub fn write(&self, space: Space, addr: u64, data: &[u8]) {
        self.now.load().bus(space).write(addr, data);
    }

    /// All windows of the VM.
    pub fn windows(&self) -> Vec<DeviceWindow> {
        self.now.load().windows.clone()
    }

    /// The console of the serial port, on the member that has it.
    pub fn serial_console(&self) -> Option<ConsoleHandle> {
        self.console(spec::WindowKind::Serial)
    }

    /// The virtio console, on the member that has it.
    pub fn virtio_console(&self) -> Option<ConsoleHandle> {
        self.console(spec::WindowKind::Virtio)
    }

    fn console(&self, kind: spec::WindowKind) -> Option<ConsoleHandle> {
        let board = self.now.load();
        let of_kind = |n: &usize| board.windows.get(*n).is_some_and(|w| w.kind == kind);
        board.local.iter().filter(|(n, _)| of_kind(n)).find_map(|(_, device)| device.console.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct NoLines;
    impl IrqLines for NoLines {
        fn set_level(&self, _: u32, _: bool) {}
    }

    fn build(specs: &[DeviceSpec], me: u16) -> Result<Platform, PlatformError> {
        let memory = GuestMemoryMmap::from_ranges(&[(vm_memory::GuestAddress(0), 1 << 20)]).unwrap();
        Platform::build(specs, MemberId(me), memory, Arc::new(NoLines), std::sync::mpsc::channel().0)
    }

    #[test]
    fn accesses_find_their_member() {
        let specs = [DeviceSpec::Serial { member: MemberId(1), log: None }];
        let (boot, other) = (build(&specs, 0).unwrap(), build(&specs, 1).unwrap());
        assert!(matches!(other.route(Space::Pio, 0x600, 1), Route::Local(_, 0)), "the board goes with it");
        let Route::Remote { member, posted } = boot.route(Space::Pio, 0x602, 1) else { panic!() };
        assert_eq!((member, posted), (MemberId(1), false));
        let Route::Remote { member, posted } = boot.route(Space::Pio, 0x3F8, 1) else { panic!() };
        assert_eq!((member, posted), (MemberId(1), true));
        assert!(matches!(other.route(Space::Pio, 0x3FD, 1), Route::Local(_, 5)));
        assert!(other.serial_console().is_some() && boot.serial_console().is_none());
        for (addr, len) in [(0x400, 1), (0x3FF, 2), (0x3F7, 1), (0x3F7, 4), (u64::MAX, 4)] {
            assert!(matches!(boot.route(Space::Pio, addr, len), Route::Unmapped), "{addr:#x}");
        }
        assert!(matches!(boot.route(Space::Mmio, 0x3F8, 1), Route::Unmapped));
    }

    #[test]
    fn a_log_that_cannot_be_written_is_named() {
        let specs = [DeviceSpec::Serial { member: MemberId(0), log: Some("/nowhere/log".into()) }];
        let e = build(&specs, 0).unwrap_err().to_string();
        assert!(e.contains("cannot write the console log /nowhere/log"), "{e}");
    }
}
