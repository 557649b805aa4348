//! Simulates seeds: `sim SEEDS FIRST [--trace] [--fault NAME]`. The `spanvm sim` command says it nicer.

use dsm::seeded::SeededFault;
use dsm::sim::{SimOptions, run};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |n: usize, default| args.get(n).and_then(|a| a.parse().ok()).unwrap_or(default);
    let named = |name: &str| args.iter().position(|a| a == name).map(|at| at + 1);
    let fault = named("--fault").and_then(|at| args.get(at)).and_then(|name| SeededFault::named(name));
    let options = SimOptions {
        seeds: number(0, 100),
        first_seed: number(1, 0),
        trace: named("--trace").is_some(),
        fault,
        ..SimOptions::default()
    };
    let report = run(&options);
    for failure in &report.failures {
        println!("{}\nseed {}: {}\n{}", failure.trace, failure.seed, failure.what, failure.replay);
    }
    println!("{}{} seeds, {} failures", report.trace, report.seeds, report.failures.len());
    println!("{:?}\n{:.1} s", report.tally, report.seconds);
}
