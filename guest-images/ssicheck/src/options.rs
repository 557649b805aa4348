//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::checks::Check;
use crate::topology::parse_cpulist;

/// Text of `--help`.
pub const HELP: &str = "\
ssicheck: shows from inside a guest that it is one machine

usage: ssicheck [--json] [--cpus A,B,..] [--only CHECK,..] [--budget SECONDS] [--full] ...

  --json              one JSON object on stdout instead of the table (with --loop: one per round); progress goes to stderr
  --cpus LIST         CPUs to use, for example 0,2 (default: all; one of each NUMA node where a few are enough)
  --min-nodes N       refuse to start if the CPUs are on fewer than N NUMA nodes (default 1)
  --only A,B          only these checks: process_space, process_migration, shared_memory_ipc, root_and_files,
                      io_space, memory_model, atomics, time
  --budget SECONDS    about how long all checks together may take (default 60)
  --deadline SECONDS  a check that shows no progress for so long is killed and fails (default 120 plus its share of the budget)
  --full              at least 100000 iterations of every litmus test, however long that takes
  --disk PATH         disk for io_space (default /dev/vda, if there is one)
  --console PATH      console for io_space (default /dev/console)
  --scratch DIR       folder for temporary files (default /tmp, else /)
  --loop              again and again, until a round fails
  --for SECONDS       with --loop: start no new round after SECONDS

exit: 0 all pass, 1 a check failed, 2 nothing could be checked";

/// A fault put in on purpose, so that tests can show that the checks notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Inject {
    /// Counters are incremented without a locked instruction.
    TornAtomics,
    /// The stores of a litmus thread are executed in the wrong order.
    ReorderedStores,
    /// One CPU's clocks run a second behind.
    LateClock,
    /// Every check hangs.
    Hang,
}

/// What the user asked for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Options {
    /// JSON instead of a table.
    pub json: bool,
    /// CPUs from `--cpus`.
    pub cpus: Option<Vec<usize>>,
    /// Fewest NUMA nodes that are acceptable.
    pub min_nodes: usize,
    /// Checks to run, in this order.
    pub only: Vec<Check>,
    /// Seconds for all checks together.
    pub budget: f64,
    /// Seconds before a check is killed, if given.
    pub deadline: Option<f64>,
    /// Demand 100,000 litmus iterations.
    pub full: bool,
    /// Disk named by the user.
    pub disk: Option<PathBuf>,
    /// Console named by the user.
    pub console: Option<PathBuf>,
    /// Folder for temporary files.
    pub scratch: Option<PathBuf>,
    /// Repeat.
    pub repeat: bool,
    /// No new round after this many seconds.
    pub repeat_for: Option<f64>,
    /// Fault to put in.
    pub inject: Option<Inject>,
}

/// What a command line means.
#[derive(Debug)]
pub enum Command {
    /// Run the checks.
    Run(Options),
    /// Run one check in this process and print events; the argument is a [`Job`] as JSON.
    Child(String),
    /// Print the help.
    Help,
}

/// What the parent tells the child that runs one check.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Job {
    /// The check.
    pub check: Check,
    /// The user's options.
    pub options: Options,
    /// The CPUs to use.
    pub topology: crate::topology::Topology,
}

/// A command line that makes no sense.
#[derive(Debug, thiserror::Error)]
#[error("{0} (see ssicheck --help)")]
pub struct UsageError(String);

impl Default for Options {
    fn default() -> Options {
        Options {
            json: false,
            cpus: None,
            min_nodes: 1,
            only: Check::ALL.to_vec(),
            budget: 60.0,
            deadline: None,
            full: false,
            disk: None,
            console: None,
            scratch: None,
            repeat: false,
            repeat_for: None,
            inject: None,
        }
    }
}

impl Options {
    /// How long `check` should take if it can choose.
    pub fn share(&self, check: Check) -> Duration {
        Duration::try_from_secs_f64(self.budget * check.weight()).unwrap_or_default()
    }

    /// When `check` is killed, counted from its last sign of progress (a sub-check that begins or ends).
    pub fn deadline_of(&self, check: Check) -> Duration {
        let patience = if self.full && check == Check::MemoryModel { 3600.0 } else { 120.0 };
        let limit = self.deadline.unwrap_or(patience + 2.0 * self.budget * check.weight());
        Duration::try_from_secs_f64(limit).unwrap_or_default()
    }
}

/// Parses the arguments after the program's name.
pub fn parse(args: impl Iterator<Item = String>) -> Result<Command, UsageError> {
    let mut args = args;
    let mut o = Options::default();
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| UsageError(format!("{arg} needs a value")));
        match arg.as_str() {
            "-h" | "--help" => return Ok(Command::Help),
            "--child" => return Ok(Command::Child(value()?)),
            "--json" => o.json = true,
            "--full" => o.full = true,
            "--loop" => o.repeat = true,
            "--for" => o.repeat_for = Some(seconds(&arg, &value()?)?),
            "--budget" => o.budget = seconds(&arg, &value()?)?,
            "--deadline" => o.deadline = Some(seconds(&arg, &value()?)?),
            "--disk" => o.disk = Some(value()?.into()),
            "--console" => o.console = Some(value()?.into()),
            "--scratch" => o.scratch = Some(value()?.into()),
            "--cpus" => {
                let text = value()?;
                let list = parse_cpulist(&text).filter(|l| !l.is_empty());
                o.cpus = Some(list.ok_or_else(|| UsageError(format!("--cpus: not a CPU list: {text:?}")))?);
            }
            "--min-nodes" => {
                let text = value()?;
                o.min_nodes =
                    text.parse().map_err(|_| UsageError(format!("--min-nodes: not a number: {text:?}")))?;
            }
            "--only" => {
                o.only = value()?
                    .split(',')
                    .map(|name| {
                        Check::by_name(name)
                            .ok_or_else(|| UsageError(format!("--only: no check is called {name:?}")))
                    })
                    .collect::<Result<_, _>>()?;
            }
            "--inject" => {
                o.inject = Some(match value()?.as_str() {
                    "torn-atomics" => Inject::TornAtomics,
                    "reordered-stores" => Inject::ReorderedStores,
                    "late-clock" => Inject::LateClock,
                    "hang" => Inject::Hang,
                    other => return Err(UsageError(format!("--inject: unknown fault {other:?}"))),
                });
            }
            _ => return Err(UsageError(format!("unknown argument {arg:?}"))),
        }
    }
    if o.repeat_for.is_some() && !o.repeat {
        return Err(UsageError("--for: only with --loop".into()));
    }
    Ok(Command::Run(o))
}

/// A number of seconds above zero, at most a week.
fn seconds(flag: &str, text: &str) -> Result<f64, UsageError> {
    let value: f64 = text.parse().map_err(|_| UsageError(format!("{flag}: not a number: {text:?}")))?;
    if value > 0.0 && value <= 604_800.0 {
        return Ok(value);
    }
    Err(UsageError(format!("{flag}: {text} is not between 0 and 604800 seconds")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_words(line: &str) -> Result<Command, UsageError> {
        parse(line.split_whitespace().map(String::from))
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for line in [
            "--frob",
            "--cpus",
            "--cpus x",
            "--only nothing",
            "--budget 0",
            "--budget NaN",
            "--for -1",
            "--for 5",
            "--inject x",
            "--min-nodes two",
            "--deadline 1e99",
        ] {
            let error = parse_words(line).expect_err(line).to_string();
            assert!(error.contains(line.split_whitespace().next().unwrap_or("")), "{line}: {error}");
        }
    }

    #[test]
    fn shares_of_the_budget_add_up_to_one() {
        let sum: f64 = Check::ALL.iter().map(|c| c.weight()).sum();
        assert!((sum - 1.0).abs() < 1e-9, "{sum}");
    }
}
