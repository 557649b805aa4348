//! All system calls without a safe wrapper in std, and all assembly. The only unsafe code of the program.
//!
//! - `cpu`: affinity, and moving between CPUs with live registers
//! - `shared`: memory shared between processes
//! - `process`: fork, signals, waiting
//! - `futex`: waiting on shared memory
//! - `io`: poll, pipes, eventfd, block devices, terminals
//! - `clock`: clocks and the TSC
//! - `ops`: single x86 instructions: litmus shapes and locked increments

pub mod clock;
pub mod cpu;
pub mod futex;
pub mod io;
pub mod ops;
pub mod process;
pub mod shared;

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!("ssicheck checks x86-64 Linux guests");
