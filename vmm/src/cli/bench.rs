//! `spanvm bench`: the command line of the benchmark libraries.

use super::output;
use crate::control::end::End;
use crate::control::host::chain;
use clap::{Args, Subcommand};
use dsm::bench::fault::{self, FaultOptions};
use dsm::bench::group::self_launcher;
use dsm::bench::many::{self, ManyOptions};
use std::io::{IsTerminal, Write};
use std::net::SocketAddr;

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
    /// The protocol's cost as members grow, over a simulated transport. Needs no KVM.
    Many(ManyArgs),
    /// A member process of a benchmark.
    #[command(hide = true)]
    Peer(PeerArgs),
}

/// Flags of `bench fault`.
#[derive(Args, Debug)]
pub struct FaultArgs {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// Pages per run.
    #[arg(long, value_name = "N", default_value_t = FaultOptions::default().pages,
          value_parser = clap::value_parser!(u32).range(10..=1_000_000))]
    pub pages: u32,
    /// Runs; the figures are medians over them.
    #[arg(long, value_name = "N", default_value_t = FaultOptions::default().runs,
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
}

/// Flags of `bench many`.
#[derive(Args, Debug)]
pub struct ManyArgs {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// Members of the largest cluster.
    #[arg(long, value_name = "N", default_value_t = ManyOptions::default().members,
          value_parser = clap::value_parser!(u16).range(2..=64))]
    pub members: u16,
    /// Accesses per cluster.
    #[arg(long, value_name = "N", default_value_t = ManyOptions::default().accesses,
          value_parser = clap::value_parser!(u32).range(1000..=10_000_000))]
    pub accesses: u32,
}

/// Flags of `bench peer`.
#[derive(Args, Debug)]
pub struct PeerArgs {
    /// Where the benchmark listens.
    pub addr: SocketAddr,
}

/// Runs one benchmark.
///
/// # Errors
/// It could not be run.
pub fn run(args: &BenchArgs) -> Result<u8, End> {
    match &args.bench {
        Bench::Fault(args) => {
            let launcher = self_launcher(&["bench", "peer"])
                .map_err(|e| End::Failed(format!("can't find this program's own file: {e}")))?;
            let options = FaultOptions { pages: args.pages, runs: args.runs, ..FaultOptions::default() };
            let report = fault::run(options, &launcher, progress("fault")).map_err(failed)?;
            if args.json {
                let text = serde_json::to_string(&report).map_err(|e| End::Failed(format!("JSON: {e}")))?;
                output::line(&text);
            } else {
                output::line(report.to_string().trim_end());
            }
        }
        Bench::Many(args) => {
            let options =
                ManyOptions { members: args.members, accesses: args.accesses, ..ManyOptions::default() };
            let report = many::run(options, progress("many")).map_err(failed)?;
            if args.json {
                let text = serde_json::to_string(&report).map_err(|e| End::Failed(format!("JSON: {e}")))?;
                output::line(&text);
            } else {
                output::line(&report.to_string());
            }
        }
        Bench::Peer(args) => dsm::bench::peer_main(args.addr).map_err(failed)?,
    }
    Ok(0)
}

fn failed(e: dsm::bench::BenchError) -> End {
    End::Failed(chain(&e))
}

/// A line on standard error per run, rewritten in place on a terminal.
fn progress(name: &'static str) -> impl FnMut(u32, u32) {
    let terminal = std::io::stderr().is_terminal();
    move |done, all| {
        let (start, end) = match (terminal, done == all) {
            (true, false) => ("\r", ""),
            (true, true) => ("\r", "\n"),
            (false, _) => ("", "\n"),
        };
        let _ = write!(std::io::stderr().lock(), "{start}spanvm: bench {name}: run {done} of {all}{end}");
    }
}
