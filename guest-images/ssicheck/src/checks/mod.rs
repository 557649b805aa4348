//! The checks. Each one runs in a process of its own; see `runner`.

mod atomics;
pub mod io_space;
mod ipc;
mod memory_model;
mod process_migration;
mod process_space;
mod procfs;
mod remote;
mod root_and_files;
mod time;

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::context::{Context, Note};
use crate::options::Inject;

/// A check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Check {
    /// A process on any CPU is in /proc, and can be signalled, killed and waited for from any other.
    ProcessSpace,
    /// A computing process moves between CPUs with its state intact.
    ProcessMigration,
    /// Threads, shared memory, pipes, sockets, futexes, eventfds, signals work across nodes.
    SharedMemoryIpc,
    /// One root; what one CPU writes, another reads.
    RootAndFiles,
    /// Disk and console work from every node.
    IoSpace,
    /// x86-TSO, by litmus tests.
    MemoryModel,
    /// Locked increments are exact.
    Atomics,
    /// Clocks never step back between CPUs.
    Time,
}

impl Check {
    /// All checks, in the order in which they run.
    pub const ALL: [Check; 8] = [
        Check::ProcessSpace,
        Check::ProcessMigration,
        Check::SharedMemoryIpc,
        Check::RootAndFiles,
        Check::IoSpace,
        Check::MemoryModel,
        Check::Atomics,
        Check::Time,
    ];

    /// The key in the JSON.
    pub fn name(self) -> &'static str {
        match self {
            Check::ProcessSpace => "process_space",
            Check::ProcessMigration => "process_migration",
            Check::SharedMemoryIpc => "shared_memory_ipc",
            Check::RootAndFiles => "root_and_files",
            Check::IoSpace => "io_space",
            Check::MemoryModel => "memory_model",
            Check::Atomics => "atomics",
            Check::Time => "time",
        }
    }

    /// The check called `name`.
    pub fn by_name(name: &str) -> Option<Check> {
        Check::ALL.into_iter().find(|c| c.name() == name)
    }

    /// Its share of the budget.
    pub fn weight(self) -> f64 {
        match self {
            Check::ProcessSpace | Check::RootAndFiles | Check::IoSpace => 0.06,
            Check::ProcessMigration | Check::Atomics | Check::Time => 0.08,
            Check::SharedMemoryIpc => 0.12,
            Check::MemoryModel => 0.46,
        }
    }
}

/// Runs the check that `context` asks for.
pub fn run(context: &Context) {
    if context.injects(Inject::Hang) {
        context.sub("injected", || {
            std::thread::sleep(Duration::from_secs(86_400));
            Ok(Note::default())
        });
    }
    match context.job.check {
        Check::ProcessSpace => process_space::run(context),
        Check::ProcessMigration => process_migration::run(context),
        Check::SharedMemoryIpc => ipc::run(context),
        Check::RootAndFiles => root_and_files::run(context),
        Check::IoSpace => io_space::run(context),
        Check::MemoryModel => memory_model::run(context),
        Check::Atomics => atomics::run(context),
        Check::Time => time::run(context),
    }
}
