//! Benchmarks of what the hypervisor adds to `dsm`: each measures its floor in the same run.

pub mod checkpoint;
pub mod drain;
mod kernel;
pub mod migrate;
mod vm;

pub use vm::BenchError;
