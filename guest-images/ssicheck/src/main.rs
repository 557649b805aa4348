//! In-guest conformance: shows from inside a guest that it is one machine.
//!
//! ```text
//! main -> runner -> (one child process per check) -> checks::* -> sys (all system calls and assembly)
//!            |                                          |
//!         report (table, JSON)                       litmus (x86-TSO programs, classifier, engine)
//! ```
//! A NUMA node of the guest is a member of the virtual machine, so tasks are pinned to CPUs of different nodes.

mod checks;
mod context;
mod failure;
mod litmus;
mod options;
mod report;
mod runner;
mod sys;
mod topology;

use std::process::ExitCode;
use std::time::Instant;

use options::{Command, Job, Options};
use topology::Topology;

fn main() -> ExitCode {
    match options::parse(std::env::args().skip(1)) {
        Ok(Command::Help) => {
            println!("{}", options::HELP);
            ExitCode::SUCCESS
        }
        Ok(Command::Child(job)) => child(&job),
        Ok(Command::Run(options)) => run(&options),
        Err(error) => refuse(&error.to_string()),
    }
}

/// Says why nothing can be checked.
fn refuse(why: &str) -> ExitCode {
    eprintln!("ssicheck: {why}");
    ExitCode::from(2)
}

/// The parent: rounds of checks, each check in its own process.
fn run(options: &Options) -> ExitCode {
    let topology = match Topology::discover(options.cpus.as_deref(), options.min_nodes) {
        Ok(topology) => topology,
        Err(error) => return refuse(&error.to_string()),
    };
    let start = Instant::now();
    let mut round = 1;
    loop {
        let ok = run_round(options, &topology, round);
        let over = options.repeat_for.is_some_and(|limit| start.elapsed().as_secs_f64() >= limit);
        if !ok {
            return ExitCode::from(1);
        }
        if !options.repeat || over {
            return ExitCode::SUCCESS;
        }
        round += 1;
    }
}

/// One round; true if every check passed.
fn run_round(options: &Options, topology: &Topology, round: u64) -> bool {
    if !options.json {
        let cpus: Vec<String> = topology.cpus.iter().map(|c| format!("{}@{}", c.id, c.node)).collect();
        println!("round {round}: {} node(s), CPUs cpu@node {}", topology.nodes, cpus.join(" "));
    }
    let mut results = Vec::new();
    for &check in &options.only {
        let result = runner::run(check, options, topology);
        // With --json the table is still worth something as progress, on the other stream.
        if options.json {
            eprint!("{}", report::to_rows(&result));
        } else {
            print!("{}", report::to_rows(&result));
        }
        results.push(result);
    }
    let pass = report::all_pass(&results);
    if options.json {
        println!("{}", report::to_json(&results, topology, round));
    } else {
        println!("{}", if pass { "all pass" } else { "FAILED" });
    }
    pass
}

/// The child: one check, events on stdout.
fn child(job: &str) -> ExitCode {
    let job: Job = match serde_json::from_str(job) {
        Ok(job) => job,
        Err(error) => return refuse(&format!("--child: {error}")),
    };
    sys::process::die_with_parent();
    match context::Context::new(job) {
        Ok(context) => {
            checks::run(&context);
            context::emit(&runner::Event::Done);
            ExitCode::SUCCESS
        }
        Err(failure) => refuse(&failure.to_string()),
    }
}
