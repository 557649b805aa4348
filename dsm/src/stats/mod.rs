//! Counters that are always on: plain numbers under the locks that the page path holds anyway.

mod log;
mod shard;
mod snapshot;
mod waits;

pub use log::{FaultLog, FaultRecord};
pub use shard::{ShardStats, Totals};
pub use snapshot::{DsmSnapshot, FaultCounts, HotPage, Latency, PeerTraffic};
pub use waits::PeerWaits;
