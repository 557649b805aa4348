//! Benchmarks of what the hypervisor adds to `dsm`: each measures its floor in the same run.

pub mod checkpoint;
mod kernel;
pub mod migrate;
