//! `spanvm sim`: the page engine in simulated clusters, from seeds.

use super::output;
use crate::control::end::End;
use clap::Args;
use dsm::seeded::SeededFault;
use dsm::sim::{SimOptions, SimReport, run_with};
use indicatif::{ProgressBar, ProgressStyle};

/// Flags.
#[derive(Args, Debug)]
pub struct SimArgs {
    /// How many seeds.
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..))]
    pub seeds: u64,
    /// The first seed.
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// Tell the whole story of a single seed, or of every seed that fails.
    #[arg(long)]
    pub trace: bool,
    /// Seeds at a time; as many as there are processors if not given.
    #[arg(long, value_name = "N")]
    pub workers: Option<usize>,
    /// A bug to switch on.
    #[cfg(feature = "seeded-faults")]
    #[arg(long, value_name = "NAME", value_parser = fault_named)]
    pub fault: Option<SeededFault>,
}

#[cfg(feature = "seeded-faults")]
fn fault_named(name: &str) -> Result<SeededFault, String> {
    let names = || SeededFault::ALL.map(SeededFault::name).join(", ");
    SeededFault::named(name).ok_or_else(|| format!("there are {}", names()))
}

impl SimArgs {
    #[cfg(feature = "seeded-faults")]
    fn fault(&self) -> Option<SeededFault> {
        self.fault
    }

    #[cfg(not(feature = "seeded-faults"))]
    fn fault(&self) -> Option<SeededFault> {
        None
    }
}

/// Runs the seeds; exit code 1 if one fails.
///
/// # Errors
/// The report can't be printed.
pub fn run(args: &SimArgs) -> Result<u8, End> {
    let options = SimOptions {
        seeds: args.seeds,
        first_seed: args.seed,
        workers: args.workers.unwrap_or(0),
        trace: args.trace,
        fault: args.fault(),
        stop_at_first: false,
    };
    let bar = ProgressBar::new(args.seeds);
    if let Ok(style) = ProgressStyle::with_template("simulating {bar:40} {pos} of {len} seeds, {eta} left") {
        bar.set_style(style);
    }
    let report = run_with(&options, |done| bar.set_position(done));
    bar.finish_and_clear();
    if args.json {
        output::json(&report)?;
    } else {
        print(&report);
    }
    Ok(u8::from(!report.is_clean()))
}

fn print(report: &SimReport) {
    if !report.trace.is_empty() {
        output::line(report.trace.trim_end());
    }
    for failure in &report.failures {
        if report.trace.is_empty() {
            output::line(failure.trace.trim_end());
        }
        output::line(&format!(
            "seed {} failed: {}\nreplay it with: {}\n",
            failure.seed, failure.what, failure.replay
        ));
    }
    let t = &report.tally;
    let rows = [
        ("accesses", t.accesses),
        ("faults", t.faults),
        ("frames", t.frames),
        ("protocol events", t.handled),
        ("holds", t.holds),
        ("interrupted commands", t.pauses),
        ("EEXIST", t.exists),
        ("EAGAIN", t.again),
        ("full sockets", t.full),
        ("connections that broke and were made again", t.resumed),
        ("pages asked for along", t.aheads),
        ("pages asked for because they follow", t.hints),
        ("of these declined", t.declined),
        ("yields", t.yields),
        ("rests", t.rests),
        ("evictions", t.evictions),
        ("runs with a crash, a cut or a forged frame", t.fatal),
    ];
    output::line(&output::table(
        &["WHAT", "TIMES"],
        &["TIMES"],
        rows.map(|(what, times)| vec![what.to_string(), times.to_string()]),
    ));
    let verdict = if report.is_clean() { "all clean" } else { "not clean" };
    output::line(&format!(
        "\n{} seeds from {} on in {}: {verdict}, {} failures",
        report.seeds,
        report.first_seed,
        output::duration(report.seconds),
        report.failures.len()
    ));
}
