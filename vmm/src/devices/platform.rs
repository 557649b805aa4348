//! The devices of one member, and the way to those of the others.

use super::console::{Output, log_to_file};
use super::pit::AbsentPit;
use super::power::Power;
use super::rtc::Rtc;
use super::serial::Serial;
use super::spec::{self, DeviceSpec, DeviceWindow, Space, SpecError, WindowKind};
use super::virtio::Transport;
use super::virtio::blk::{Blk, ImageError};
use super::virtio::console::Console;
use super::virtio::rng::Rng;
use super::virtio::worker::Doorbell;
use super::{Bus, BusDevice, BusError, ConsoleHandle, PlatformEvent};
use crate::interrupts::IrqLines;
use dsm::addr::MemberId;
use std::fs::OpenOptions;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Sender;
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
pub enum Route<'a> {
    /// To a device of this member, at this offset in its window.
    Local(&'a Arc<dyn BusDevice>, u64),
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

impl std::fmt::Debug for Route<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Route::Local(device, offset) => write!(f, "Local({}+{offset:#x})", device.name()),
            Route::Remote { member, posted } => write!(f, "Remote({member}, posted: {posted})"),
            Route::Unmapped => f.write_str("Unmapped"),
        }
    }
}

/// The devices of one member. Immutable once built, so lookups take no lock. Guest memory may be unmapped only
/// after [`Platform::shut_down`] said that no worker uses it.
#[derive(Debug)]
pub struct Platform {
    pio: Bus,
    mmio: Bus,
    windows: Vec<DeviceWindow>,
    me: MemberId,
    serial: Option<ConsoleHandle>,
    console: Option<ConsoleHandle>,
    virtio: Vec<Arc<Transport>>,
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
        let mut platform = Platform {
            pio: Bus::default(),
            mmio: Bus::default(),
            windows,
            me,
            serial: None,
            console: None,
            virtio: Vec::new(),
        };
        for window in platform.windows.clone().iter().filter(|w| w.member == me) {
            let spec = window.spec.and_then(|n| specs.get(n));
            let device: Arc<dyn BusDevice> = match (window.kind, spec) {
                (WindowKind::Power, _) => Arc::new(Power::new(events.clone())),
                (WindowKind::Rtc, _) => Arc::new(Rtc::default()),
                (WindowKind::Pit, _) => Arc::new(AbsentPit),
                (_, Some(DeviceSpec::Serial { log, .. })) => {
                    let (device, handle) = serial(log.as_ref(), irq.clone(), window)?;
                    platform.serial = Some(handle);
                    device
                }
                (_, Some(spec)) => {
                    let name = virtio_name(specs, spec, window);
                    let (device, handle) = virtio(spec, name, memory.clone(), irq.clone(), window)?;
                    platform.console = platform.console.take().or(handle);
                    platform.virtio.push(device.clone());
                    device
                }
                (_, None) => continue,
            };
            let bus = match window.space {
                Space::Pio => &mut platform.pio,
                Space::Mmio => &mut platform.mmio,
            };
            bus.insert(window.start, window.len, device)?;
        }
        Ok(platform)
    }

    /// Ends all workers; returns the names of those that have not ended by the deadline (they wait for a page
    /// or a disk): while there are any, guest memory must stay mapped.
    pub fn shut_down(&self, timeout: Duration) -> Vec<String> {
        let deadline = Instant::now() + timeout;
        let left = || deadline.saturating_duration_since(Instant::now());
        let stuck = self.virtio.iter().filter(|t| !t.shut_down(left()));
        stuck.map(|t| t.name().to_owned()).collect()
    }

    /// Lets all workers finish what they are at and take nothing new; returns the names of those that were not quiet
    /// by the deadline (they wait for a page or a disk). Either way the pause lasts until [`Platform::resume`].
    pub fn pause(&self, timeout: Duration) -> Vec<String> {
        let deadline = Instant::now() + timeout;
        let left = || deadline.saturating_duration_since(Instant::now());
        let stuck = self.virtio.iter().filter(|t| !t.pause(left()));
        stuck.map(|t| t.name().to_owned()).collect()
    }

    /// Ends a pause: what came in meanwhile is served.
    pub fn resume(&self) {
        self.virtio.iter().for_each(|t| t.resume());
    }

    /// The state of each device of this member that has one: index of its window, state. While all are quiet.
    pub fn save(&self) -> Vec<(usize, String)> {
        let local = self.windows.iter().enumerate().filter(|(_, w)| w.member == self.me);
        let saved = local.filter_map(|(n, w)| Some((n, self.bus(w.space).find(w.start, 1)?.0.save())));
        saved.filter(|(_, state)| !state.is_empty()).collect()
    }

    /// Sets the devices of this member, among those of the whole VM, to what [`Platform::save`] said.
    ///
    /// # Errors
    /// Not a state of the device, which is named.
    pub fn restore(&self, states: &[(usize, String)]) -> Result<(), String> {
        for (n, state) in states {
            let Some(window) = self.windows.get(*n) else {
                return Err(format!("the checkpoint has a device {n}, the VM has {}", self.windows.len()));
            };
            if window.member != self.me {
                continue;
            }
            let (device, _) = self.bus(window.space).find(window.start, 1).ok_or("a device is missing")?;
            device.restore(state).map_err(|e| format!("the state of {}: {e}", device.name()))?;
        }
        Ok(())
    }

    /// Where an access of `len` bytes at `addr` goes.
    pub fn route(&self, space: Space, addr: u64, len: usize) -> Route<'_> {
        if let Some((device, offset)) = self.bus(space).find(addr, len) {
            return Route::Local(device, offset);
        }
        let inside = |w: &&DeviceWindow| {
            let end = addr.checked_sub(w.start).and_then(|offset| offset.checked_add(len as u64));
            w.space == space && end.is_some_and(|end| end <= w.len) && w.member != self.me
        };
        match self.windows.iter().find(inside) {
            Some(w) => Route::Remote { member: w.member, posted: w.kind.is_posted(addr - w.start) },
            None => Route::Unmapped,
        }
    }

    /// The bus of this member's devices, for accesses that came from elsewhere.
    pub fn bus(&self, space: Space) -> &Bus {
        match space {
            Space::Pio => &self.pio,
            Space::Mmio => &self.mmio,
        }
    }

    /// All windows of the VM.
    pub fn windows(&self) -> &[DeviceWindow] {
        &self.windows
    }

    /// The console of the serial port, on the member that has it.
    pub fn serial_console(&self) -> Option<&ConsoleHandle> {
        self.serial.as_ref()
    }

    /// The virtio console, on the member that has it.
    pub fn virtio_console(&self) -> Option<&ConsoleHandle> {
        self.console.as_ref()
    }
}

/// `virtio-blk0` for the first disk of the VM, and so on.
fn virtio_name(specs: &[DeviceSpec], spec: &DeviceSpec, window: &DeviceWindow) -> String {
    let same = |other: &&DeviceSpec| std::mem::discriminant(*other) == std::mem::discriminant(spec);
    let n = specs.iter().take(window.spec.unwrap_or_default()).filter(same).count();
    let kind = match spec {
        DeviceSpec::Blk { .. } => "blk",
        DeviceSpec::Rng { .. } => "rng",
        DeviceSpec::Console { .. } => "console",
        DeviceSpec::Serial { .. } => "serial",
    };
    format!("virtio-{kind}{n}")
}

fn virtio(
    spec: &DeviceSpec,
    name: String,
    memory: GuestMemoryMmap,
    irq: Arc<dyn IrqLines>,
    window: &DeviceWindow,
) -> Result<(Arc<Transport>, Option<ConsoleHandle>), PlatformError> {
    let bell = Arc::new(Doorbell::default());
    let gsi = window.gsi.unwrap_or_default();
    let mut handle = None;
    let thread = |source| PlatformError::Thread { name: name.clone(), source };
    let transport = match spec {
        DeviceSpec::Blk { path, readonly, .. } => {
            let blk = Blk::open(path, *readonly, &name)?;
            Transport::new(blk.description(name.clone()), blk, bell, memory, irq, gsi).map_err(thread)?
        }
        DeviceSpec::Console { .. } => {
            let output = Arc::new(Output::default());
            let (console, input) = Console::new(output.clone(), bell.clone());
            handle = Some(ConsoleHandle::new(output, input));
            let description = Console::description(name.clone());
            Transport::new(description, console, bell, memory, irq, gsi).map_err(thread)?
        }
        DeviceSpec::Rng { .. } | DeviceSpec::Serial { .. } => {
            Transport::new(Rng::description(name.clone()), Rng, bell, memory, irq, gsi).map_err(thread)?
        }
    };
    Ok((Arc::new(transport), handle))
}

fn serial(
    log: Option<&PathBuf>,
    irq: Arc<dyn IrqLines>,
    window: &DeviceWindow,
) -> Result<(Arc<dyn BusDevice>, ConsoleHandle), PlatformError> {
    let output = Arc::new(Output::default());
    if let Some(path) = log {
        let opened = OpenOptions::new().create(true).append(true).open(path);
        opened
            .and_then(|file| log_to_file(&output, file))
            .map_err(|source| PlatformError::Log { path: path.clone(), source })?;
    }
    let serial = Arc::new(Serial::new(output.clone(), irq, window.gsi.unwrap_or_default()));
    Ok((serial.clone(), ConsoleHandle::new(output, serial)))
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
        assert!(matches!(boot.route(Space::Pio, 0x600, 1), Route::Local(_, 0)));
        let Route::Remote { member, posted } = other.route(Space::Pio, 0x602, 1) else { panic!() };
        assert_eq!((member, posted), (MemberId(0), false));
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
