//! `spanvm bench`: the command line of the benchmark libraries.

use super::output;
use crate::bench::checkpoint::{self, CheckpointOptions};
use crate::bench::drain::{self, DrainOptions};
use crate::bench::migrate::{self, MigrateOptions};
use crate::control::end::End;
use crate::control::host::chain;
use clap::{Args, Subcommand};
use dsm::bench::contend::{self, ContendOptions};
use dsm::bench::fanout::{self, FanoutOptions};
use dsm::bench::fault::{self, FaultOptions};
use dsm::bench::group::self_launcher;
use dsm::bench::many::{self, ManyOptions};
use dsm::bench::peer::Tuning;
use dsm::bench::stream::{self, StreamOptions};
use serde::Serialize;
use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::path::PathBuf;

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
    /// A write to a page that many others read. Needs no KVM.
    Fanout(FanoutArgs),
    /// Reading much that another process has, in order and at random. Needs no KVM.
    Stream(StreamArgs),
    /// Processes that write to one page, against hold times. Needs no KVM.
    Contend(ContendArgs),
    /// How long the guest is without a vCPU that moves. Needs KVM.
    Migrate(MigrateArgs),
    /// What a checkpoint costs: time on disk, and for how long the guest stands still. Needs KVM.
    Checkpoint(CheckpointArgs),
    /// How fast a member that is drained gets rid of its pages, and how much that slows the guest down. Needs KVM.
    Drain(DrainArgs),
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
    /// Let the scheduler choose processors and let them sleep, instead of one awake for each member.
    #[arg(long)]
    pub no_pin: bool,
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

/// Flags of `bench fanout`.
#[derive(Args, Debug)]
pub struct FanoutArgs {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// Processes that read.
    #[arg(long, value_name = "N", default_value_t = FanoutOptions::default().sharers,
          value_parser = clap::value_parser!(u16).range(1..=63))]
    pub sharers: u16,
    /// Pages per run.
    #[arg(long, value_name = "N", default_value_t = FanoutOptions::default().pages,
          value_parser = clap::value_parser!(u32).range(10..=100_000))]
    pub pages: u32,
    /// Runs; the figures are medians over them.
    #[arg(long, value_name = "N", default_value_t = FanoutOptions::default().runs,
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
    /// Let the scheduler choose processors, instead of spreading the members over them.
    #[arg(long)]
    pub no_pin: bool,
}

/// Flags of `bench stream`.
#[derive(Args, Debug)]
pub struct StreamArgs {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// Mebibytes that are read in order.
    #[arg(long, value_name = "N", default_value_t = StreamOptions::default().mib,
          value_parser = clap::value_parser!(u32).range(1..=16_384))]
    pub mib: u32,
    /// Runs; the figures are medians over them.
    #[arg(long, value_name = "N", default_value_t = StreamOptions::default().runs,
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
    /// Let the scheduler choose processors, instead of one for each member.
    #[arg(long)]
    pub no_pin: bool,
}

/// Flags of `bench contend`.
#[derive(Args, Debug)]
pub struct ContendArgs {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// Members of the largest group; every smaller one is measured as well.
    #[arg(long, value_name = "N", default_value_t = ContendOptions::default().members,
          value_parser = clap::value_parser!(u16).range(2..=16))]
    pub members: u16,
    /// Milliseconds per measurement.
    #[arg(long, value_name = "MS", default_value_t = ContendOptions::default().millis,
          value_parser = clap::value_parser!(u64).range(10..=60_000))]
    pub millis: u64,
    /// Draw throughput against hold time into this file.
    #[arg(long, value_name = "FILE.png")]
    pub plot: Option<PathBuf>,
}

/// Flags of `bench migrate`.
#[derive(Args, Debug)]
pub struct MigrateArgs {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// Moves.
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub moves: u32,
}

/// Flags of `bench checkpoint`.
#[derive(Args, Debug)]
pub struct CheckpointArgs {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// Data of the guest, MiB; one with a quarter of it is measured as well.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(4..=2048))]
    pub mib: u32,
    /// Data that changes all the time, MiB.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub dirty_mib: u32,
    /// Checkpoints of each kind.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
    /// Folder on the disk to measure.
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub dir: PathBuf,
}

/// Flags of `bench drain`.
#[derive(Args, Debug)]
pub struct DrainArgs {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// Data that the member has, MiB.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(4..=2048))]
    pub mib: u32,
    /// Runs; the figures are medians over them.
    #[arg(long, value_name = "N", default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
    /// Let the scheduler choose processors, instead of one for each member.
    #[arg(long)]
    pub no_pin: bool,
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
    let launcher = self_launcher(&["bench", "peer"])
        .map_err(|e| End::Failed(format!("can't find this program's own file: {e}")))?;
    match &args.bench {
        Bench::Fault(args) => {
            let options = FaultOptions {
                pages: args.pages,
                runs: args.runs,
                tuning: Tuning { is_pinned: !args.no_pin, ..Tuning::default() },
            };
            let report = fault::run(options, &launcher, progress("fault")).map_err(failed)?;
            print(&report, args.json)?;
        }
        Bench::Many(args) => {
            let options =
                ManyOptions { members: args.members, accesses: args.accesses, ..ManyOptions::default() };
            print(&many::run(options, progress("many")).map_err(failed)?, args.json)?;
        }
        Bench::Fanout(args) => {
            let FanoutArgs { sharers, pages, runs, no_pin, .. } = *args;
            let options = FanoutOptions { sharers, pages, runs, is_pinned: !no_pin };
            print(&fanout::run(options, &launcher, progress("fanout")).map_err(failed)?, args.json)?;
        }
        Bench::Stream(args) => {
            let options = StreamOptions {
                mib: args.mib,
                runs: args.runs,
                is_pinned: !args.no_pin,
                ..StreamOptions::default()
            };
            print(&stream::run(options, &launcher, progress("stream")).map_err(failed)?, args.json)?;
        }
        Bench::Contend(args) => {
            let options =
                ContendOptions { members: args.members, millis: args.millis, ..ContendOptions::default() };
            let report = contend::run(options, &launcher, progress("contend")).map_err(failed)?;
            if let Some(path) = &args.plot {
                let written = report.plot().and_then(|png| std::fs::write(path, png));
                written.map_err(|e| End::Failed(format!("can't write {}: {e}", path.display())))?;
            }
            print(&report, args.json)?;
        }
        Bench::Migrate(args) => {
            let report = migrate::run(MigrateOptions { moves: args.moves }, progress("migrate"))
                .map_err(|e| End::Failed(chain(&e)))?;
            print(&report, args.json)?;
        }
        Bench::Checkpoint(args) => {
            let options = CheckpointOptions {
                mib: args.mib,
                dirty_mib: args.dirty_mib,
                runs: args.runs,
                dir: args.dir.clone(),
            };
            let report =
                checkpoint::run(&options, progress("checkpoint")).map_err(|e| End::Failed(chain(&e)))?;
            print(&report, args.json)?;
        }
        Bench::Drain(args) => {
            let options = DrainOptions { mib: args.mib, runs: args.runs, is_pinned: !args.no_pin };
            let report =
                drain::run(options, &launcher, progress("drain")).map_err(|e| End::Failed(chain(&e)))?;
            print(&report, args.json)?;
        }
        Bench::Peer(args) => dsm::bench::peer_main(args.addr).map_err(failed)?,
    }
    Ok(0)
}

/// A table for people, or one line of JSON.
fn print<R: Serialize + Display>(report: &R, json: bool) -> Result<(), End> {
    if json {
        let text = serde_json::to_string(report).map_err(|e| End::Failed(format!("JSON: {e}")))?;
        output::line(&text);
    } else {
        output::line(report.to_string().trim_end());
    }
    Ok(())
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
