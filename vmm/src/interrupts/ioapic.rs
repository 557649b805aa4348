//! The IOAPIC: a pure model of the 82093AA with the EOI register of later parts (version 20H). Member 0 has the
//! only one; devices elsewhere send it their lines over the fabric.

use super::{DeliveryMode, Destination, InterruptMessage};
use crate::layout::IOAPIC_PINS;
use serde::{Deserialize, Serialize};

/// Number of redirection entries as an array length.
const PINS: usize = IOAPIC_PINS as usize;

/// Window offsets (datasheet 3.1; EOI: ICH datasheets).
mod window {
    pub const SELECT: u64 = 0x00;
    pub const DATA: u64 = 0x10;
    pub const EOI: u64 = 0x40;
}

/// Bits of a redirection entry (datasheet 3.2.4).
mod rte {
    pub const LOGICAL: u64 = 1 << 11;
    pub const DELIVERY_STATUS: u64 = 1 << 12;
    pub const REMOTE_IRR: u64 = 1 << 14;
    pub const LEVEL: u64 = 1 << 15;
    pub const MASKED: u64 = 1 << 16;
    pub const WRITABLE: u64 = 0xFF00_0000_0001_AFFF;
}

/// Version register: version 20H, index of the last entry in bits 23:16.
const VERSION: u32 = 0x20 | ((IOAPIC_PINS - 1) << 16);

/// Messages that one access can cause: at most one per pin.
pub type Messages = Vec<InterruptMessage>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Pin {
    entry: u64,
    asserted: bool,
}

/// The IOAPIC's state. A line's "level" is whether it is asserted; the polarity bit is stored and ignored, as
/// our devices have no other polarity than the one that the tables say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApic {
    select: u8,
    id: u8,
    pins: [Pin; PINS],
}

impl Default for IoApic {
    fn default() -> Self {
        IoApic { select: 0, id: 0, pins: [Pin { entry: rte::MASKED, asserted: false }; PINS] }
    }
}

impl IoApic {
    /// Sets an input line. A GSI beyond the last pin has no effect.
    pub fn set_level(&mut self, gsi: u32, asserted: bool) -> Option<InterruptMessage> {
        let pin = self.pins.get_mut(usize::try_from(gsi).ok()?)?;
        let was = std::mem::replace(&mut pin.asserted, asserted);
        if pin.entry & rte::LEVEL != 0 { pin.service_level() } else { pin.service_edge(!was && asserted) }
    }

    /// A local APIC finished `vector`, which came in as level-triggered.
    pub fn end_of_interrupt(&mut self, vector: u8) -> Messages {
        self.pins
            .iter_mut()
            .filter(|pin| pin.vector() == vector && pin.entry & rte::LEVEL != 0)
            .filter_map(|pin| {
                pin.entry &= !rte::REMOTE_IRR;
                pin.service_level()
            })
            .collect()
    }

    /// Reads the MMIO window; only aligned 32-bit accesses mean anything.
    pub fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            window::SELECT => u32::from(self.select),
            window::DATA => self.read_selected(),
            _ => 0,
        };
        data.fill(0);
        data.iter_mut().zip(value.to_le_bytes()).for_each(|(to, from)| *to = from);
    }

    /// Writes the MMIO window.
    pub fn mmio_write(&mut self, offset: u64, data: &[u8]) -> Messages {
        let mut bytes = [0; 4];
        bytes.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
        match offset {
            window::SELECT => self.select = bytes[0],
            window::DATA => return self.write_selected(u32::from_le_bytes(bytes)).into_iter().collect(),
            window::EOI => return self.end_of_interrupt(bytes[0]),
            _ => {}
        }
        Vec::new()
    }

    fn read_selected(&self) -> u32 {
        match self.select {
            0 | 2 => u32::from(self.id) << 24,
            1 => VERSION,
            select => match self.pins.get(usize::from(select.wrapping_sub(0x10) >> 1)) {
                Some(pin) => {
                    let [a, b, c, d, high @ ..] = pin.entry.to_le_bytes();
                    u32::from_le_bytes(if select & 1 == 0 { [a, b, c, d] } else { high })
                }
                None => 0,
            },
        }
    }

    fn write_selected(&mut self, value: u32) -> Option<InterruptMessage> {
        if self.select == 0 {
            let [.., id] = value.to_le_bytes();
            self.id = id & 0xF;
        }
        let pin = self.pins.get_mut(usize::from(self.select.checked_sub(0x10)? >> 1))?;
        let value = u64::from(value);
        let written = if self.select & 1 == 0 {
            pin.entry & 0xFFFF_FFFF_0000_0000 | value
        } else {
            pin.entry & 0xFFFF_FFFF | value << 32
        };
        pin.entry = written & rte::WRITABLE | pin.entry & rte::REMOTE_IRR;
        if pin.entry & rte::LEVEL == 0 {
            // Software clears a stuck remote IRR by a trip through edge mode (Linux: __eoi_ioapic_pin).
            pin.entry &= !rte::REMOTE_IRR;
            return None;
        }
        pin.service_level()
    }
}

impl Pin {
    fn vector(&self) -> u8 {
        let [vector, ..] = self.entry.to_le_bytes();
        vector
    }

    /// An edge on a masked pin is lost (datasheet 3.2.4, bit 16).
    fn service_edge(&self, rising: bool) -> Option<InterruptMessage> {
        (rising && self.entry & rte::MASKED == 0).then(|| self.message()).flatten()
    }

    fn service_level(&mut self) -> Option<InterruptMessage> {
        if !self.asserted || self.entry & (rte::MASKED | rte::REMOTE_IRR) != 0 {
            return None;
        }
        let message = self.message()?;
        if matches!(message.mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority) {
            self.entry |= rte::REMOTE_IRR;
        }
        Some(message)
    }

    fn message(&self) -> Option<InterruptMessage> {
        message(self.entry)
    }
}

/// What a redirection entry sends when its pin fires.
fn message(entry: u64) -> Option<InterruptMessage> {
    let [vector, flags, _, _, _, _, _, destination] = entry.to_le_bytes();
    let mode = match flags & 7 {
        0 => DeliveryMode::Fixed,
        1 => DeliveryMode::LowestPriority,
        4 => DeliveryMode::Nmi,
        5 => DeliveryMode::Init,
        // SMI and ExtINT have nobody to go to; 3 and 6 are reserved.
        _ => return None,
    };
    let destination = match (entry & rte::LOGICAL != 0, destination) {
        (true, mda) => Destination::Logical(u32::from(mda)),
        (false, 0xFF) => Destination::Physical(u32::MAX),
        (false, id) => Destination::Physical(u32::from(id)),
    };
    debug_assert_eq!(entry & rte::DELIVERY_STATUS, 0);
    Some(InterruptMessage {
        destination,
        mode,
        vector,
        level_triggered: entry & rte::LEVEL != 0,
        asserted: true,
        source: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn write(io: &mut IoApic, index: u8, value: u32) -> Messages {
        let _ = io.mmio_write(window::SELECT, &[index, 0, 0, 0]);
        io.mmio_write(window::DATA, &value.to_le_bytes())
    }

    fn read(io: &mut IoApic, index: u8) -> u32 {
        let _ = io.mmio_write(window::SELECT, &[index, 0, 0, 0]);
        let mut data = [0; 4];
        io.mmio_read(window::DATA, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn version_says_24_pins() {
        assert_eq!(read(&mut IoApic::default(), 1), 0x0017_0020);
    }

    #[test]
    fn entries_start_masked_and_read_back() {
        let mut io = IoApic::default();
        assert_eq!(read(&mut io, 0x10), 0x1_0000);
        write(&mut io, 0x10 + 2 * 23 + 1, 0x0300_0000);
        write(&mut io, 0x10 + 2 * 23, 0x31);
        assert_eq!((read(&mut io, 0x3E), read(&mut io, 0x3F)), (0x31, 0x0300_0000));
    }

    #[test]
    fn edge_fires_once_per_rise_and_not_while_masked() {
        let mut io = IoApic::default();
        assert_eq!(io.set_level(4, true), None);
        assert_eq!(write(&mut io, 0x18, 0x31), []);
        io.set_level(4, false);
        let message = io.set_level(4, true).expect("rising edge");
        assert_eq!((message.vector, message.level_triggered), (0x31, false));
        assert_eq!(io.set_level(4, true), None);
    }

    #[test]
    fn level_waits_for_eoi_and_fires_again_while_asserted() {
        let mut io = IoApic::default();
        write(&mut io, 0x1A, 0x8000 | 0x42);
        assert!(io.set_level(5, true).is_some());
        assert_eq!(read(&mut io, 0x1A) & 0x4000, 0x4000, "remote IRR");
        assert_eq!(io.set_level(5, true), None);
        assert_eq!(io.end_of_interrupt(0x41), []);
        assert_eq!(io.end_of_interrupt(0x42).len(), 1);
        io.set_level(5, false);
        assert_eq!(io.end_of_interrupt(0x42), []);
        assert_eq!(read(&mut io, 0x1A) & 0x4000, 0);
    }

    #[test]
    fn unmasking_an_asserted_level_pin_fires() {
        let mut io = IoApic::default();
        write(&mut io, 0x1A, 0x1_8042);
        assert_eq!(io.set_level(5, true), None);
        assert_eq!(write(&mut io, 0x1A, 0x8042).len(), 1);
    }

    #[test]
    fn going_through_edge_mode_clears_remote_irr() {
        let mut io = IoApic::default();
        write(&mut io, 0x1A, 0x8042);
        io.set_level(5, true);
        write(&mut io, 0x1A, 0x1_0042);
        assert_eq!(write(&mut io, 0x1A, 0x8042).len(), 1);
    }

    proptest! {
        /// Whatever the guest writes: no panic, and no pin has two level messages in service.
        #[test]
        fn level_messages_alternate_with_eois(ops in proptest::collection::vec((0u8..4, any::<u8>(), any::<u32>()), 0..200)) {
            let mut io = IoApic::default();
            let mut in_service = 0i64;
            for (op, index, value) in ops {
                match op {
                    0 => { write(&mut io, index, value); }
                    1 => { read(&mut io, index); }
                    2 => { io.set_level(u32::from(index), value & 1 != 0); }
                    _ => { io.end_of_interrupt(index); }
                }
            }
            // From any state: a fresh level pin fires exactly once per EOI while its line stays high.
            write(&mut io, 0x10, 0x1_0000);
            io.set_level(0, false);
            write(&mut io, 0x11, 0);
            write(&mut io, 0x10, 0x8077);
            for _ in 0..3 {
                in_service += i64::from(io.set_level(0, true).is_some());
                prop_assert_eq!(in_service, 1);
                let again = io.end_of_interrupt(0x77);
                prop_assert!(again.iter().any(|m| m.destination == Destination::Physical(0)));
            }
        }
    }
}
