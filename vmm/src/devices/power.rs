//! Sleep control, sleep status and reset registers (ACPI 6.5, 4.8.3.6 and 4.8.3.7).

use super::{BusDevice, PlatformEvent};
use crate::layout::{RESET_PORT, RESET_VALUE, S5_SLEEP_TYPE, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT};
use std::sync::mpsc::Sender;

const CONTROL: u64 = 0;
const STATUS: u64 = (SLEEP_STATUS_PORT - SLEEP_CONTROL_PORT) as u64;
const RESET: u64 = (RESET_PORT - SLEEP_CONTROL_PORT) as u64;
/// SLP_EN, bit 5 of the sleep control register; SLP_TYP is bits 4:2.
const SLEEP_ENABLE: u8 = 1 << 5;

/// The power registers. They keep no state: a write acts at once, a read says "awake".
#[derive(Debug)]
pub struct Power {
    events: Sender<PlatformEvent>,
}

impl Power {
    /// Registers that report to `events`.
    pub fn new(events: Sender<PlatformEvent>) -> Power {
        Power { events }
    }
}

impl BusDevice for Power {
    fn name(&self) -> &str {
        "power"
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(if matches!(offset, CONTROL | STATUS) { 0 } else { 0xFF });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let event = match (offset, data) {
            (CONTROL, [value]) if value & SLEEP_ENABLE != 0 && (value >> 2) & 7 == S5_SLEEP_TYPE => {
                PlatformEvent::PowerOff
            }
            (RESET, [RESET_VALUE]) => PlatformEvent::Reset,
            _ => return,
        };
        tracing::info!(?event, "guest wrote a power register");
        // Nobody listens any more only when the VM is already ending.
        let _ = self.events.send(event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_values_act() {
        let (tx, rx) = std::sync::mpsc::channel();
        let power = Power::new(tx);
        for (offset, value) in [(0, 0x14), (0, 0x20), (0, 0x30), (1, 0x34), (2, 0), (2, 6), (7, 1)] {
            power.write(offset, &[value]);
            assert!(rx.try_recv().is_err(), "{offset} {value:#x}");
        }
        power.write(0, &[0x34, 0]);
        assert!(rx.try_recv().is_err());
        power.write(0, &[0x34]);
        assert_eq!(rx.try_recv(), Ok(PlatformEvent::PowerOff));
        power.write(2, &[1]);
        assert_eq!(rx.try_recv(), Ok(PlatformEvent::Reset));
        let mut status = [0xEE];
        power.read(1, &mut status);
        assert_eq!(status, [0]);
    }
}
