//! This member's part when devices go from one member to another, while the VM is paused
//! ([`crate::devices::handover`]). The coordinator makes it the whole VM's ([`crate::control::ops::devices`]).

use super::fault;
use super::runtime::Member;
use crate::devices::handover::Portable;
use crate::devices::spec::BOARD_WINDOW;
use crate::interrupts::ioapic::IoApic;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Longest piece of a console's output, bytes.
const SAID: usize = 64 << 10;

/// A piece of a console's output.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Said {
    /// The output.
    pub bytes: Vec<u8>,
    /// Bytes before it that are lost.
    pub lost: u64,
    /// Where the next piece begins.
    pub next: u64,
}

/// What the coordinator asks. Devices are named by the index of their window.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum DeviceTask {
    /// See [`crate::devices::Platform::describe`]. Answer: `Described`.
    Describe {
        /// The devices.
        windows: Vec<usize>,
        /// Members on other hosts are asked.
        elsewhere: bool,
    },
    /// See [`crate::devices::Platform::inspect`]. Answer: `Done`.
    Inspect {
        /// The devices.
        devices: Vec<Portable>,
    },
    /// See [`crate::devices::Platform::give`]. Answer: `Given`.
    Give {
        /// The devices.
        windows: Vec<usize>,
        /// Longest time it may take.
        limit: Duration,
    },
    /// See [`crate::devices::Platform::take`]. Answer: `Done`.
    Take {
        /// The devices, with their states.
        devices: Vec<(Portable, String)>,
        /// The IOAPIC, which goes with the board.
        ioapic: Option<Box<IoApic>>,
        /// Longest time it may take.
        limit: Duration,
    },
    /// See [`crate::devices::Platform::discard`]. Answer: `Done`.
    Discard {
        /// The devices.
        windows: Vec<usize>,
    },
    /// See [`crate::devices::Platform::reclaim`]. Answer: `Done`.
    Reclaim {
        /// The devices.
        windows: Vec<usize>,
    },
}

/// The answer to a [`DeviceTask`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum DeviceReply {
    /// It is done.
    Done,
    /// By what others recognise them.
    Described(Vec<Portable>),
    /// Their states, and the IOAPIC if the board is among them.
    Given(Vec<(usize, String)>, Option<Box<IoApic>>),
}

impl Member {
    /// Does its part.
    ///
    /// # Errors
    /// In words; nothing has changed here.
    pub fn device_task(&self, task: DeviceTask) -> Result<DeviceReply, String> {
        let machine = self.running_machine().ok_or("the guest does not run")?;
        let platform = &machine.platform;
        let step = match &task {
            DeviceTask::Describe { .. } => "describe",
            DeviceTask::Inspect { .. } => "inspect",
            DeviceTask::Give { .. } => "give",
            DeviceTask::Take { .. } => "take",
            DeviceTask::Discard { .. } => "discard",
            DeviceTask::Reclaim { .. } => "reclaim",
        };
        fault::at(self.plan().me, step)?;
        match task {
            DeviceTask::Describe { windows, elsewhere } => {
                return platform.describe(&windows, elsewhere).map(DeviceReply::Described);
            }
            DeviceTask::Inspect { devices } => platform.inspect(&devices)?,
            DeviceTask::Give { windows, limit } => {
                let states = platform.give(&windows, limit)?;
                let ioapic = self.switchboard().ioapic().filter(|_| windows.contains(&BOARD_WINDOW));
                return Ok(DeviceReply::Given(states, ioapic.map(|ioapic| Box::new(ioapic.clone()))));
            }
            DeviceTask::Take { devices, ioapic, limit } => {
                platform.take(&devices, limit)?;
                if let Some(ioapic) = ioapic {
                    self.switchboard().bring_ioapic(*ioapic);
                }
            }
            DeviceTask::Discard { windows } => platform.discard(&windows)?,
            DeviceTask::Reclaim { windows } => platform.reclaim(&windows)?,
        }
        Ok(DeviceReply::Done)
    }

    /// What the serial port, which is here, has said from `from` on; waits so long for it.
    ///
    /// # Errors
    /// It is not here.
    pub fn read_console(&self, from: u64, wait: Duration) -> Result<Said, String> {
        let console = self.running_machine().and_then(|machine| machine.platform.serial_console());
        let mut reader = console.ok_or("the serial port is not here")?.reader_at(from);
        let chunk = reader.read(SAID, wait);
        Ok(Said { bytes: chunk.bytes, lost: chunk.lost, next: reader.position() })
    }

    /// Types at the serial port, which is here. Returns how much it took.
    ///
    /// # Errors
    /// It is not here.
    pub fn type_in(&self, bytes: &[u8]) -> Result<usize, String> {
        let console = self.running_machine().and_then(|machine| machine.platform.serial_console());
        Ok(console.ok_or("the serial port is not here")?.try_input(bytes))
    }
}
