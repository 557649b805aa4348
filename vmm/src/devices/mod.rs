//! Devices and the buses they sit on. A device lives on one member; its workers read and write guest memory
//! through the member's mapping, so DSM makes it coherent with no extra code.
//!
//! [`spec`] says which devices a VM has and gives each its window and interrupt, the same on all members;
//! [`platform`] builds those of one member and routes an access to the right one or to the right member;
//! [`bus`] finds a device by address; [`handover`] lets devices go from one member to another, disks with their [`image`]. The
//! devices: [`serial`] with its [`console`], [`power`] (ACPI sleep and
//! reset registers), [`rtc`], [`pit`] and everything under [`virtio`].

pub mod bus;
pub mod console;
pub mod handover;
pub mod image;
mod local;
pub mod pit;
pub mod platform;
pub mod power;
pub mod rtc;
pub mod serial;
pub mod spec;
pub mod virtio;

pub use bus::{Bus, BusError};
pub use console::{ConsoleHandle, ConsoleReader};
pub use platform::{Platform, PlatformError, Route};
pub use spec::{DeviceSpec, DeviceWindow, Space, WindowKind};

/// A device as a bus sees it. Called by vCPU threads (and by the fabric for vCPUs elsewhere), several at a
/// time: state is behind the device's own locks, and no lock is held across an access to guest memory.
pub trait BusDevice: Send + Sync {
    /// Name for messages and statistics, such as `com1` or `virtio-blk0`.
    fn name(&self) -> &str;

    /// Reads `data.len()` bytes (1, 2, 4 or 8) at `offset` in the device's window. Unknown registers read as
    /// the specification says, else as all ones.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Writes at `offset`. Unknown registers ignore it.
    fn write(&self, offset: u64, data: &[u8]);

    /// True when a write to `offset` needs no completion before the vCPU goes on (a queue notify, a serial
    /// port's transmit register): from another member it is sent without waiting. Order is kept.
    fn is_posted(&self, _offset: u64) -> bool {
        false
    }

    /// All of its state, while it is quiet; empty for a device that has none.
    fn save(&self) -> String {
        String::new()
    }

    /// Becomes what [`BusDevice::save`] said, before the guest runs; a worker is paused until the VM goes on.
    ///
    /// # Errors
    /// Not a state of this device, in words.
    fn restore(&self, state: &str) -> Result<(), String> {
        if state.is_empty() { Ok(()) } else { Err("it has no state, and this is one".into()) }
    }
}

/// Why the platform ends or restarts the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum PlatformEvent {
    /// The guest powered off through ACPI S5.
    PowerOff,
    /// The guest wrote the reset register.
    Reset,
}
