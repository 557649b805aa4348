//! The memory map that the guest is told: home ranges merged into RAM, less what firmware keeps below 1 MiB.

use super::{BootError, KERNEL_START, LOW_MEMORY_END};
use crate::layout::{HIGH_RAM_START, LOW_RAM_END};
use dsm::addr::{HomeRange, PAGE_SIZE};

/// What an entry of the memory map is; the values are those of e820 and of PVH's memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RegionKind {
    /// Usable RAM.
    Ram = 1,
    /// Not for the guest's allocator.
    Reserved = 2,
}

/// One entry of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First guest-physical address.
    pub start: u64,
    /// First address behind.
    pub end: u64,
    /// What it is.
    pub kind: RegionKind,
}

/// RAM as contiguous ranges `(start, end)`, ascending; neighbours with different homes are one range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamMap {
    ranges: Vec<(u64, u64)>,
}

impl RamMap {
    /// Merges home ranges.
    ///
    /// # Errors
    /// [`BootError::MemoryMap`] if ranges are empty, unaligned, unordered, overlap, reach into the 32-bit
    /// hole, or if there is no RAM from 0 to at least 1 MiB.
    pub fn new(memory: &[HomeRange]) -> Result<RamMap, BootError> {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for range in memory {
            let (start, len) = (range.start, range.len);
            let bad = |why: &str| Err(BootError::MemoryMap(format!("range {start:#x}+{len:#x} {why}")));
            let Some(end) = start.checked_add(len) else { return bad("overflows") };
            if len == 0 || start % PAGE_SIZE != 0 || len % PAGE_SIZE != 0 {
                return bad("is empty or not a multiple of a page");
            }
            if start < HIGH_RAM_START && end > LOW_RAM_END {
                return bad("reaches into the hole below 4 GiB");
            }
            match ranges.last_mut() {
                Some(last) if start < last.1 => return bad("is out of order or overlaps"),
                Some(last) if start == last.1 => last.1 = end,
                _ => ranges.push((start, end)),
            }
        }
        match ranges.first() {
            Some(&(0, end)) if end > KERNEL_START => Ok(RamMap { ranges }),
            _ => Err(BootError::MemoryMap("there must be RAM from 0 to beyond 1 MiB".into())),
        }
    }

    /// The ranges, ascending.
    pub fn ranges(&self) -> &[(u64, u64)] {
        &self.ranges
    }

    /// End of the contiguous RAM that starts at 0.
    pub fn low_end(&self) -> u64 {
        self.ranges.first().map_or(0, |r| r.1)
    }

    /// True if `[start, end)` is RAM throughout.
    pub fn contains(&self, start: u64, end: u64) -> bool {
        start <= end && self.ranges.iter().any(|r| r.0 <= start && end <= r.1)
    }

    /// The map for e820 and for PVH.
    pub fn regions(&self) -> Vec<Region> {
        let ram = |start, end| Region { start, end, kind: RegionKind::Ram };
        let mut regions = vec![
            ram(0, LOW_MEMORY_END),
            Region { start: LOW_MEMORY_END, end: KERNEL_START, kind: RegionKind::Reserved },
        ];
        regions.extend(self.ranges.iter().map(|&(start, end)| ram(start.max(KERNEL_START), end)));
        regions
    }
}
