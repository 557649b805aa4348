//! The clock of a PC's RTC (MC146818), read-only, in UTC: it gives the guest the date at boot. No alarm, no
//! interrupt, no NVRAM.

use super::BusDevice;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// Register B: 24-hour mode, BCD.
const STATUS_B: u8 = 0x02;
/// Register D: the battery is good.
const STATUS_D: u8 = 0x80;

/// The RTC.
#[derive(Debug, Default)]
pub struct Rtc {
    index: AtomicU8,
}

fn bcd(value: u64) -> u8 {
    u8::try_from(value % 10 + value / 10 % 10 * 16).unwrap_or(0)
}

/// Year, month and day of a day counted from 1970-01-01 (proleptic Gregorian calendar).
fn civil(days: u64) -> (u64, u64, u64) {
    // The algorithm counts from 0000-03-01, so that leap days are the last of their year.
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (yoe + era * 400 + u64::from(month <= 2), month, day)
}

/// The value of a register at `now` seconds since 1970.
fn register(index: u8, now: u64) -> u8 {
    let (days, seconds) = (now / 86_400, now % 86_400);
    let (year, month, day) = civil(days);
    match index {
        0 => bcd(seconds % 60),
        2 => bcd(seconds / 60 % 60),
        4 => bcd(seconds / 3600),
        6 => bcd((days + 4) % 7 + 1),
        7 => bcd(day),
        8 => bcd(month),
        9 => bcd(year % 100),
        0x32 => bcd(year / 100),
        0x0B => STATUS_B,
        0x0D => STATUS_D,
        _ => 0,
    }
}

impl BusDevice for Rtc {
    fn name(&self) -> &str {
        "rtc"
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xFF);
        if let (1, [value]) = (offset, data) {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
            *value = register(self.index.load(Ordering::Relaxed), now);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, [value]) = (offset, data) {
            // Bit 7 of the index port masks NMI on a PC; there is nothing to mask here.
            self.index.store(value & 0x7F, Ordering::Relaxed);
        }
    }

    fn is_posted(&self, offset: u64) -> bool {
        super::WindowKind::Rtc.is_posted(offset)
    }

    fn save(&self) -> String {
        self.index.load(Ordering::Relaxed).to_string()
    }

    fn restore(&self, state: &str) -> Result<(), String> {
        let index: u8 = state.parse().map_err(|_| format!("{state:?} is no index of the RTC"))?;
        self.index.store(index & 0x7F, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right() {
        // 2000-02-29 12:34:56, a Tuesday; 2026-01-01 00:00:00, a Thursday.
        let read = |now| [0x32, 9, 8, 7, 4, 2, 0, 6].map(|r| register(r, now));
        assert_eq!(read(951_827_696), [0x20, 0x00, 0x02, 0x29, 0x12, 0x34, 0x56, 3]);
        assert_eq!(read(1_767_225_600), [0x20, 0x26, 1, 1, 0, 0, 0, 5]);
    }

    #[test]
    fn index_selects_the_register() {
        let rtc = Rtc::default();
        rtc.write(0, &[0x8D]);
        let mut value = [0];
        rtc.read(1, &mut value);
        assert_eq!(value, [0x80]);
        rtc.read(0, &mut value);
        assert_eq!(value, [0xFF]);
    }
}
