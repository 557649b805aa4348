//! The ports of the 8254 interval timer that a VM does not have.
//!
//! Linux calibrates the CPU frequency against the PIT before it reads any ACPI table. It waits for the counter of
//! channel 2 to leave 0xFF and gives up after 50,000 pairs of reads (`quick_pit_calibrate`): with the all-ones of
//! an unmapped port that is 100,000 exits at boot. A counter that reads 0 ends it at the first look.

use super::BusDevice;

/// Reads as zero, ignores writes.
#[derive(Debug)]
pub struct AbsentPit;

impl BusDevice for AbsentPit {
    fn name(&self) -> &str {
        "absent-pit"
    }

    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}

    fn is_posted(&self, offset: u64) -> bool {
        super::WindowKind::Pit.is_posted(offset)
    }
}
