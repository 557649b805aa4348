//! One device of this member, made from its specification.

use super::console::{Output, log_to_file};
use super::image::Image;
use super::pit::AbsentPit;
use super::platform::PlatformError;
use super::power::Power;
use super::rtc::Rtc;
use super::serial::Serial;
use super::spec::{DeviceSpec, DeviceWindow, WindowKind};
use super::virtio::Transport;
use super::virtio::blk::Blk;
use super::virtio::console::Console;
use super::virtio::rng::Rng;
use super::virtio::worker::Doorbell;
use super::{BusDevice, ConsoleHandle, PlatformEvent};
use crate::interrupts::IrqLines;
use std::fs::OpenOptions;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use vm_memory::GuestMemoryMmap;

/// What devices are made of.
pub(super) struct Parts {
    /// All devices of the VM.
    pub specs: Vec<DeviceSpec>,
    pub memory: GuestMemoryMmap,
    pub irq: Arc<dyn IrqLines>,
    pub events: Sender<PlatformEvent>,
    /// What the serial port says, at the member that has it from the start: people look there, so it is the same when the port
    /// comes back. Elsewhere each port begins anew.
    pub said: Option<Arc<Output>>,
}

impl std::fmt::Debug for Parts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parts").field("specs", &self.specs).finish_non_exhaustive()
    }
}

/// A device.
#[derive(Clone)]
pub(super) struct Local {
    pub device: Arc<dyn BusDevice>,
    /// With a worker.
    pub virtio: Option<Arc<Transport>>,
    /// Of a disk.
    pub image: Option<Arc<Image>>,
    pub console: Option<ConsoleHandle>,
}

impl std::fmt::Debug for Local {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Local").field("device", &self.device.name()).finish_non_exhaustive()
    }
}

impl Parts {
    /// The device's specification; `None` for what every VM has.
    pub fn spec(&self, window: &DeviceWindow) -> Option<&DeviceSpec> {
        self.specs.get(window.spec?)
    }

    /// Opens the image of a disk, without a lock; `None` for any other device.
    pub fn image(&self, window: &DeviceWindow) -> Result<Option<Image>, PlatformError> {
        match self.spec(window) {
            Some(DeviceSpec::Blk { path, readonly, .. }) => Ok(Some(Image::open(path, *readonly)?)),
            _ => Ok(None),
        }
    }

    /// Makes the device of a window. `image` is that of a disk, and locked.
    pub fn make(&self, window: &DeviceWindow, image: Option<Image>) -> Result<Local, PlatformError> {
        let only = |device: Arc<dyn BusDevice>| Local { device, virtio: None, image: None, console: None };
        Ok(match (window.kind, self.spec(window)) {
            (WindowKind::Power, _) => only(Arc::new(Power::new(self.events.clone()))),
            (WindowKind::Rtc, _) => only(Arc::new(Rtc::default())),
            (WindowKind::Pit, _) => only(Arc::new(AbsentPit)),
            (_, Some(DeviceSpec::Serial { log, .. })) => {
                let (device, console) =
                    serial(self.said.clone().unwrap_or_default(), log.as_ref(), self.irq.clone(), window)?;
                Local { console: Some(console), ..only(device) }
            }
            (_, Some(spec)) => self.virtio(spec, window, image)?,
            (_, None) => return Err(PlatformError::Unknown(window.start)),
        })
    }

    fn virtio(
        &self,
        spec: &DeviceSpec,
        window: &DeviceWindow,
        image: Option<Image>,
    ) -> Result<Local, PlatformError> {
        let name = virtio_name(&self.specs, spec, window);
        let (memory, irq) = (self.memory.clone(), self.irq.clone());
        let bell = Arc::new(Doorbell::default());
        let gsi = window.gsi.unwrap_or_default();
        let mut console = None;
        let image = image.map(Arc::new);
        let thread = |source| PlatformError::Thread { name: name.clone(), source };
        let transport = match (spec, &image) {
            (DeviceSpec::Blk { .. }, Some(image)) => {
                let blk = Blk::new(image.clone(), &name);
                Transport::new(blk.description(name.clone()), blk, bell, memory, irq, gsi)
            }
            (DeviceSpec::Blk { .. }, None) => return Err(PlatformError::Unknown(window.start)),
            (DeviceSpec::Console { .. }, _) => {
                let output = Arc::new(Output::default());
                let (device, input) = Console::new(output.clone(), bell.clone());
                console = Some(ConsoleHandle::new(output, input));
                Transport::new(Console::description(name.clone()), device, bell, memory, irq, gsi)
            }
            (DeviceSpec::Rng { .. } | DeviceSpec::Serial { .. }, _) => {
                Transport::new(Rng::description(name.clone()), Rng, bell, memory, irq, gsi)
            }
        };
        let transport = Arc::new(transport.map_err(thread)?);
        Ok(Local { device: transport.clone(), virtio: Some(transport), image, console })
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

fn serial(
    output: Arc<Output>,
    log: Option<&PathBuf>,
    irq: Arc<dyn IrqLines>,
    window: &DeviceWindow,
) -> Result<(Arc<dyn BusDevice>, ConsoleHandle), PlatformError> {
    if let Some(path) = log {
        let opened = OpenOptions::new().create(true).append(true).open(path);
        opened
            .and_then(|file| log_to_file(&output, file))
            .map_err(|source| PlatformError::Log { path: path.clone(), source })?;
    }
    let serial = Arc::new(Serial::new(output.clone(), irq, window.gsi.unwrap_or_default()));
    Ok((serial.clone(), ConsoleHandle::new(output, serial)))
}
