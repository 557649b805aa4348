//! Benchmarks and workloads over real processes, real userfaultfd and real TCP; no KVM needed.
//!
//! - [`fault`]: what one remote fault costs, over the physical floor measured in the same run ([`floor`]).
//! - [`fanout`]: a write to a page that many read. [`stream`]: reading much in order, and at random.
//! - [`contend`]: members that write to one page, against hold times; [`plot`] draws it.
//! - [`many`]: what the protocol costs as members grow, up to 64, over a simulated transport in this process.
//! - [`group`]: starts member processes and gives them orders; [`peer`]: a member process that takes orders.
//! - [`work`]: what members can be ordered to do with the memory; [`mix`]: the random part of it.
//!
//! A program that runs them needs a hidden subcommand that calls [`peer_main`] with the address it is given.

pub mod contend;
pub mod cpus;
pub mod fanout;
pub mod fault;
pub mod floor;
pub mod group;
pub mod many;
pub mod mix;
pub mod peer;
pub mod plot;
pub mod stream;
pub mod work;

pub use peer::{peer_main, serve};

use crate::addr::MemberId;
use crate::node::DsmError;
use crate::region::RegionError;
use crate::transport::mesh::MeshError;
use std::io;
use thiserror::Error;

/// A benchmark or workload that could not be run to its end.
#[derive(Debug, Error)]
pub enum BenchError {
    /// userfaultfd or the memory could not be had.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// A member could not be started.
    #[error(transparent)]
    Dsm(#[from] DsmError),
    /// The members could not connect.
    #[error(transparent)]
    Mesh(#[from] MeshError),
    /// A member process could not be started.
    #[error("can't start a member process: {0}")]
    Spawn(io::Error),
    /// A member process did not answer.
    #[error("no answer from the process of {member}: {source}")]
    Peer {
        /// The member.
        member: MemberId,
        /// What the connection said.
        source: io::Error,
    },
    /// A member process answered with an error.
    #[error("{member} failed: {what}")]
    Work {
        /// The member.
        member: MemberId,
        /// Its words.
        what: String,
    },
    /// A member process answered something else than it was asked.
    #[error("{0} gave an answer of the wrong kind")]
    Answer(MemberId),
    /// A socket of the benchmark itself failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The simulated cluster broke the rules.
    #[error("the simulation of {members} members failed: {what}")]
    Simulation {
        /// Size of the cluster.
        members: u16,
        /// What went wrong.
        what: String,
    },
    /// There is nothing to measure.
    #[error("{0}")]
    Options(&'static str),
}

/// All numbers below `n`, each once, no two neighbours in a row (of more than a few).
pub(crate) fn scattered(n: u64) -> impl Iterator<Item = u64> {
    fn gcd(a: u64, b: u64) -> u64 {
        if b == 0 { a } else { gcd(b, a % b) }
    }
    // A step that has no divisor in common with their number goes through all of them.
    let step = (n * 618 / 1000..n.max(1)).find(|s| gcd(*s, n) == 1).unwrap_or(1);
    (0..n).map(move |k| k * step % n)
}

/// Nanoseconds below 2^53 and counts far below it are exact in an f64.
#[allow(clippy::cast_precision_loss)]
pub(crate) fn float(n: u64) -> f64 {
    n as f64
}

/// Names what was tried when an I/O step fails.
pub(crate) fn io_step(what: &'static str) -> impl FnOnce(io::Error) -> BenchError {
    move |source| BenchError::Io { what, source }
}
