//! Which layer catches which fault; the table of `docs/testing.md` is made here.

use super::SeededFault;
use crate::sim::{SimOptions, run};
use std::fmt::Write;
use std::path::Path;

const BEGIN: &str = "<!-- seeded faults: begin -->\n";
const END: &str = "<!-- seeded faults: end -->\n";

/// Whether the mistake is in the pure protocol. The others are in what surrounds it, which the model checker does not
/// have.
fn is_in_protocol(fault: SeededFault) -> bool {
    use SeededFault as F;
    matches!(
        fault,
        F::LostInvalidation
            | F::KeptCopy
            | F::UpgradeSkipsSharer
            | F::WriteBeforeAcks
            | F::EarlyNext
            | F::EndlessHold
            | F::SilentEviction
    )
}

fn row(fault: SeededFault) -> String {
    let options = SimOptions {
        seeds: 20_000,
        fault: Some(fault),
        stop_at_first: true,
        workers: 1,
        ..SimOptions::default()
    };
    let report = run(&options);
    let first = report.failures.first();
    let simulated = first.map(|f| format!("seed {}: {}", f.seed, f.what));
    let modelled = is_in_protocol(fault).then(|| crate::protocol::find_by_model(fault)).flatten();
    println!("{fault}\n  simulation: {simulated:?}\n  model: {modelled:?}");
    assert!(simulated.is_some(), "no simulation notices {fault}");
    assert_eq!(modelled.is_some(), is_in_protocol(fault), "model checking and {fault}");
    let model = match modelled {
        Some(what) => format!("yes: {what}"),
        None => "not in the model".into(),
    };
    format!("| `{fault}` | {} | {model} | {} |\n", fault.what(), simulated.unwrap_or_default())
}

/// Compares the table with the one in the documentation, or writes it there if `SPANVM_WRITE_DOCS` is set.
#[test]
fn every_fault_is_caught_and_the_table_says_by_what() {
    let mut table = String::from("\n| fault | mistake | model checking | simulation |\n|---|---|---|---|\n");
    for fault in SeededFault::ALL {
        // Writing to a string can't fail.
        let _ = write!(table, "{}", row(fault));
    }
    table.push('\n');
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/testing.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(BEGIN).unwrap();
    let (old, after) = rest.split_once(END).unwrap();
    if std::env::var_os("SPANVM_WRITE_DOCS").is_some() {
        std::fs::write(&path, format!("{before}{BEGIN}{table}{END}{after}")).unwrap();
        return;
    }
    // Which seed is the first to notice changes with every change of the simulation; which fault is there does not.
    let names = |table: &str| -> Vec<String> {
        table
            .lines()
            .filter_map(|l| l.strip_prefix("| `")?.split_once('`').map(|(n, _)| n.to_owned()))
            .collect()
    };
    assert_eq!(names(old), names(&table), "run this test with SPANVM_WRITE_DOCS=1 to write the table anew");
}
