//! Which devices a VM has, and the window and interrupt of each: a pure function of the list of devices, so
//! every member and the ACPI tables agree without asking.

use crate::layout::{
    COM1_GSI, COM1_PORT, COM1_PORTS, IOAPIC_PINS, RESET_PORT, SLEEP_CONTROL_PORT, VIRTIO_GSI_BASE,
    VIRTIO_MMIO_SIZE, VIRTIO_MMIO_START,
};
use dsm::addr::MemberId;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Most virtio devices a VM can have: one IOAPIC pin each.
pub const MAX_VIRTIO: u32 = IOAPIC_PINS - VIRTIO_GSI_BASE;
/// Index and data port of the RTC.
pub const RTC_PORT: u16 = 0x70;
/// Number of ports of the RTC.
pub const RTC_PORTS: u16 = 2;
/// First port of the interval timer that a VM does not have.
pub const PIT_PORT: u16 = 0x40;
/// Number of ports of the interval timer.
pub const PIT_PORTS: u16 = 4;
/// The window whose member has the board: power registers, RTC, serial port and IOAPIC.
pub const BOARD_WINDOW: usize = 0;

/// A device that the user asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum DeviceSpec {
    /// COM1, a 16550. At most one.
    Serial {
        /// The member it lives on.
        member: MemberId,
        /// A file on that member's host that gets all output.
        #[serde(default)]
        log: Option<PathBuf>,
    },
    /// virtio block device over a raw image.
    Blk {
        /// The member it lives on.
        member: MemberId,
        /// The image, on that member's host.
        path: PathBuf,
        /// The guest may not write.
        #[serde(default)]
        readonly: bool,
    },
    /// virtio entropy source.
    Rng {
        /// The member it lives on.
        member: MemberId,
    },
    /// virtio console with one port, `hvc0` in Linux. At most one.
    Console {
        /// The member it lives on.
        member: MemberId,
    },
}

impl DeviceSpec {
    /// The member it lives on.
    pub fn member(&self) -> MemberId {
        match self {
            Self::Serial { member, .. }
            | Self::Blk { member, .. }
            | Self::Rng { member }
            | Self::Console { member } => *member,
        }
    }

    /// It lives on another member.
    pub fn set_member(&mut self, to: MemberId) {
        match self {
            Self::Serial { member, .. }
            | Self::Blk { member, .. }
            | Self::Rng { member }
            | Self::Console { member } => *member = to,
        }
    }
}

/// One of the two address spaces of devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Space {
    /// Ports.
    Pio,
    /// Guest-physical memory.
    Mmio,
}

/// What sits in a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WindowKind {
    /// COM1.
    Serial,
    /// A virtio-mmio transport.
    Virtio,
    /// ACPI sleep and reset registers.
    Power,
    /// The RTC.
    Rtc,
    /// Where an interval timer would be.
    Pit,
}

impl WindowKind {
    /// True when a write to `offset` needs no completion. Known without the device, so that a member that
    /// only forwards does not wait.
    ///
    /// Of virtio only the notify: the driver looks at the rings right after it acknowledged an interrupt, and
    /// frees them right after a reset, so both must have happened by then.
    pub fn is_posted(self, offset: u64) -> bool {
        match self {
            Self::Serial | Self::Rtc | Self::Pit => true,
            Self::Virtio => offset == u64::from(virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY),
            Self::Power => false,
        }
    }
}

/// Where a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceWindow {
    /// Ports or memory.
    pub space: Space,
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// Its interrupt; the power registers and the RTC have none.
    pub gsi: Option<u32>,
    /// The member it lives on.
    pub member: MemberId,
    /// What it is.
    pub kind: WindowKind,
    /// Its index in the list of specs; `None` for what every VM has.
    pub spec: Option<usize>,
}

/// Why a list of devices is impossible.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpecError {
    /// More virtio devices than interrupts.
    #[error("{0} virtio devices (disks, rng, console), a VM can have {MAX_VIRTIO}")]
    TooMany(usize),
    /// A second device of a kind that a VM has once.
    #[error("two {0} devices, a VM can have one")]
    Twice(&'static str),
    /// The member does not exist.
    #[error("a device on {member}, the VM has {members} members")]
    NoMember {
        /// The device's member.
        member: MemberId,
        /// Number of members.
        members: usize,
    },
}

/// Checks a list of devices against the number of members.
///
/// # Errors
/// See [`SpecError`].
pub fn check(specs: &[DeviceSpec], members: usize) -> Result<(), SpecError> {
    if let Some(spec) = specs.iter().find(|s| usize::from(s.member().0) >= members) {
        return Err(SpecError::NoMember { member: spec.member(), members });
    }
    let count = |is: fn(&DeviceSpec) -> bool| specs.iter().filter(|s| is(s)).count();
    if count(|s| matches!(s, DeviceSpec::Serial { .. })) > 1 {
        return Err(SpecError::Twice("serial"));
    }
    if count(|s| matches!(s, DeviceSpec::Console { .. })) > 1 {
        return Err(SpecError::Twice("console"));
    }
    let virtio = count(|s| !matches!(s, DeviceSpec::Serial { .. }));
    if virtio > MAX_VIRTIO as usize {
        return Err(SpecError::TooMany(virtio));
    }
    Ok(())
}

/// The windows of all devices of the VM, those that every VM has included.
///
/// # Errors
/// As [`check`] on any number of members.
pub fn windows(specs: &[DeviceSpec]) -> Result<Vec<DeviceWindow>, SpecError> {
    check(specs, usize::MAX)?;
    // The board is where its serial port is.
    let serial = specs.iter().find(|spec| matches!(spec, DeviceSpec::Serial { .. }));
    let member = serial.map_or(MemberId(0), DeviceSpec::member);
    let board = |kind, start: u16, len: u16| DeviceWindow {
        space: Space::Pio,
        start: u64::from(start),
        len: u64::from(len),
        gsi: None,
        member,
        kind,
        spec: None,
    };
    let mut windows = vec![
        board(WindowKind::Power, SLEEP_CONTROL_PORT, RESET_PORT + 1 - SLEEP_CONTROL_PORT),
        board(WindowKind::Rtc, RTC_PORT, RTC_PORTS),
        board(WindowKind::Pit, PIT_PORT, PIT_PORTS),
    ];
    let mut virtio = 0;
    for (index, spec) in specs.iter().enumerate() {
        windows.push(match spec {
            DeviceSpec::Serial { member, .. } => DeviceWindow {
                gsi: Some(COM1_GSI),
                member: *member,
                spec: Some(index),
                ..board(WindowKind::Serial, COM1_PORT, COM1_PORTS)
            },
            _ => {
                let n = virtio;
                virtio += 1;
                DeviceWindow {
                    space: Space::Mmio,
                    start: VIRTIO_MMIO_START + u64::from(n) * VIRTIO_MMIO_SIZE,
                    len: VIRTIO_MMIO_SIZE,
                    gsi: Some(VIRTIO_GSI_BASE + n),
                    member: spec.member(),
                    kind: WindowKind::Virtio,
                    spec: Some(index),
                }
            }
        });
    }
    Ok(windows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_follow_the_layout() {
        let specs = [
            DeviceSpec::Rng { member: MemberId(1) },
            DeviceSpec::Serial { member: MemberId(0), log: None },
            DeviceSpec::Blk { member: MemberId(2), path: "/a".into(), readonly: true },
        ];
        let windows = windows(&specs).unwrap();
        let find = |n| *windows.iter().find(|w| w.spec == Some(n)).unwrap();
        assert_eq!((find(0).start, find(0).gsi, find(0).member), (0xD000_0000, Some(5), MemberId(1)));
        assert_eq!((find(1).start, find(1).gsi, find(1).space), (0x3F8, Some(4), Space::Pio));
        assert_eq!((find(2).start, find(2).gsi, find(2).member), (0xD000_1000, Some(6), MemberId(2)));
    }

    #[test]
    fn impossible_lists_are_refused() {
        let serial = DeviceSpec::Serial { member: MemberId(0), log: None };
        let console = DeviceSpec::Console { member: MemberId(0) };
        let rng = DeviceSpec::Rng { member: MemberId(1) };
        assert_eq!(check(&[serial.clone(), serial], 1), Err(SpecError::Twice("serial")));
        assert_eq!(check(&[console.clone(), console], 1), Err(SpecError::Twice("console")));
        assert_eq!(
            check(std::slice::from_ref(&rng), 1).unwrap_err().to_string(),
            "a device on member 1, the VM has 1 members"
        );
        assert_eq!(check(&vec![rng; 20], 2), Err(SpecError::TooMany(20)));
    }

    #[test]
    fn specs_are_readable_in_configuration_files() {
        let spec: DeviceSpec = toml::from_str("type = 'blk'\nmember = 1\npath = '/x'\n").unwrap();
        assert_eq!(spec, DeviceSpec::Blk { member: MemberId(1), path: "/x".into(), readonly: false });
    }
}
