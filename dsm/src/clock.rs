//! Times in nanoseconds, as cores, threads and messages count them.

use std::time::Duration;

/// In 64 bits there is room for 584 years; more is as much.
pub(crate) fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
