//! Devices by address. Filled when the platform is built and not changed afterwards, so it needs no lock.

use super::BusDevice;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// Why a device cannot be put on a bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// Another device is there.
    #[error("{name} at {start:#x}+{len:#x} overlaps {other}")]
    Overlap {
        /// The new device.
        name: String,
        /// Its first address.
        start: u64,
        /// Its length.
        len: u64,
        /// The device that is there.
        other: String,
    },
    /// The range is empty or leaves the address space.
    #[error("{name} at {start:#x}+{len:#x} is not a range")]
    Range {
        /// The new device.
        name: String,
        /// Its first address.
        start: u64,
        /// Its length.
        len: u64,
    },
}

/// One address space with devices in disjoint ranges.
#[derive(Default)]
pub struct Bus {
    /// By first address: address behind the last, and the device.
    ranges: BTreeMap<u64, (u64, Arc<dyn BusDevice>)>,
}

impl Bus {
    /// Adds a device.
    ///
    /// # Errors
    /// The range is none, or not free.
    pub fn insert(&mut self, start: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let name = || device.name().to_owned();
        let end = start.checked_add(len).filter(|end| *end > start);
        let end = end.ok_or_else(|| BusError::Range { name: name(), start, len })?;
        if let Some((_, (other_end, other))) = self.ranges.range(..end).next_back() {
            if *other_end > start {
                return Err(BusError::Overlap { name: name(), start, len, other: other.name().to_owned() });
            }
        }
        self.ranges.insert(start, (end, device));
        Ok(())
    }

    /// The device at `[addr, addr + len)` and the offset in its window; `None` if any of the bytes is
    /// outside.
    pub fn find(&self, addr: u64, len: usize) -> Option<(&Arc<dyn BusDevice>, u64)> {
        let (start, (end, device)) = self.ranges.range(..=addr).next_back()?;
        let last = addr.checked_add(len as u64)?;
        (last <= *end).then_some((device, addr - start))
    }

    /// Reads; where no device is, all ones. True if there was one.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        match self.find(addr, data.len()) {
            Some((device, offset)) => {
                device.read(offset, data);
                true
            }
            None => {
                data.fill(0xFF);
                false
            }
        }
    }

    /// Writes; where no device is, nothing happens. True if there was one.
    pub fn write(&self, addr: u64, data: &[u8]) -> bool {
        let found = self.find(addr, data.len());
        if let Some((device, offset)) = &found {
            device.write(*offset, data);
        }
        found.is_some()
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entries = self.ranges.iter().map(|(start, (end, d))| (format!("{start:#x}..{end:#x}"), d.name()));
        f.debug_map().entries(entries).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(&'static str);
    impl BusDevice for Echo {
        fn name(&self) -> &str {
            self.0
        }
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }
        fn write(&self, _: u64, _: &[u8]) {}
    }

    #[test]
    fn lookup_is_by_range() {
        let mut bus = Bus::default();
        bus.insert(0x100, 0x10, Arc::new(Echo("a"))).unwrap();
        bus.insert(0x110, 0x10, Arc::new(Echo("b"))).unwrap();
        for (addr, len, want) in [
            (0xFF, 1, None),
            (0x100, 1, Some(0)),
            (0x10F, 1, Some(15)),
            (0x10F, 2, None),
            (0x110, 4, Some(0)),
            (0x11C, 4, Some(12)),
            (0x11D, 4, None),
            (0x120, 1, None),
            (u64::MAX, 8, None),
        ] {
            let mut data = [0xEE; 8];
            assert_eq!(bus.read(addr, &mut data[..len]), want.is_some(), "{addr:#x}");
            assert!(data[..len].iter().all(|b| *b == want.unwrap_or(0xFF)), "{addr:#x}");
            assert_eq!(bus.write(addr, &data[..len]), want.is_some());
        }
    }

    #[test]
    fn overlaps_and_empty_ranges_are_refused() {
        let mut bus = Bus::default();
        bus.insert(0x100, 0x10, Arc::new(Echo("a"))).unwrap();
        for (start, len) in [(0xF1, 0x10), (0x100, 1), (0x10F, 1), (0x80, 0x200)] {
            let e = bus.insert(start, len, Arc::new(Echo("b"))).unwrap_err();
            assert!(matches!(e, BusError::Overlap { .. }), "{e}");
        }
        for (start, len) in [(0, 0), (u64::MAX, 2)] {
            let e = bus.insert(start, len, Arc::new(Echo("b"))).unwrap_err();
            assert!(matches!(e, BusError::Range { .. }), "{e}");
        }
        bus.insert(0xF0, 0x10, Arc::new(Echo("b"))).unwrap();
    }
}
