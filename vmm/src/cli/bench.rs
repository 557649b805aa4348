//! `spanvm bench`.

use crate::control::end::End;
use clap::{Args, Subcommand};

/// Flags.
#[derive(Args, Debug)]
pub struct BenchArgs {
    /// Which one.
    #[command(subcommand)]
    pub bench: Bench,
}

/// Benchmarks. Each measures its physical floor in the same run.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// A page fault that another process answers: read, write, upgrade. Needs no KVM.
    Fault(FaultArgs),
}

/// Flags of `bench fault`.
#[derive(Args, Debug)]
pub struct FaultArgs {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Runs one benchmark.
///
/// # Errors
/// It could not be run.
pub fn run(args: &BenchArgs) -> Result<u8, End> {
    match &args.bench {
        Bench::Fault(_) => Err(End::Failed("the fault benchmark is not part of this build".into())),
    }
}
