//! Deterministic simulation: whole clusters in one thread, from a seed.
//!
//! The members run the production protocol, the production execution of its commands ([`crate::node`]'s shard), the
//! production frames, links and readers; simulated are what lies under them:
//!
//! - [`sched`]: time, and chance; [`rng`].
//! - [`memory`]: userfaultfd. [`net`]: connections.
//! - [`member`]: a member, put together. [`workload`]: what its threads do.
//! - [`world`]: who does what next. [`chaos`]: what goes wrong meanwhile; [`plan`]: what of it a seed stands for.
//!   [`rehome`]: other homes meanwhile.
//! - [`truth`]: what every access must see and who may have what; [`trace`]: the story of a run.
//! - [`runner`]: many seeds. [`scale`]: many members, and nothing goes wrong.
//!
//! Checked at every step: one writer or many readers; every read returns the last write in the page's order and every page
//! that arrives holds it; a page stays for its hold time; only who must fail fails and blames the right peer.
//! After everything has healed: every access completes in bounded time. At rest: the directory says what the memories
//! hold, and all members read the same.

mod chaos;
mod member;
mod memory;
mod net;
mod plan;
mod rehome;
mod rng;
mod runner;
pub(crate) mod scale;
mod sched;
mod trace;
mod truth;
mod workload;
mod world;

pub use runner::{SimFailure, SimOptions, SimReport, SimTally, run, run_with};

#[cfg(test)]
mod tests;
