//! x86-TSO holds between nodes: no litmus test shows a forbidden outcome.

use serde_json::json;

use crate::context::{Context, Note};
use crate::failure::Failure;
use crate::litmus::engine::{self, Config, Tally};
use crate::litmus::program::{Layout, Test};
use crate::options::Inject;
use crate::sys::{clock, ops::Flavour};

/// What `--full` demands of each test.
const FULL: u64 = 100_000;
/// Where a fast machine stops.
const ENOUGH: u64 = 120_000;

/// Runs the check.
pub fn run(context: &Context) {
    let configs: Vec<(Test, Flavour, Layout)> = Test::ALL
        .into_iter()
        .flat_map(|t| Flavour::ALL.map(|f| (t, f)))
        .flat_map(|(t, f)| t.layouts().iter().map(move |l| (t, f, *l)))
        .collect();
    let slice = context.slice(configs.len());
    for (number, (test, flavour, layout)) in configs.into_iter().enumerate() {
        let page = match layout {
            Layout::SamePage => "same_page",
            Layout::SeparatePages => "separate_pages",
        };
        let name = format!("{}/{}/{page}", test.name(), flavour.name());
        context.sub(name, || {
            let cpus = context.topology();
            // Each configuration begins with another CPU, so that every role is played on every node.
            let cpus = (0..test.threads().len()).map(|i| cpus.cpu_for(i + number).id).collect();
            engine::run(Config {
                test,
                flavour,
                layout,
                cpus,
                slice,
                min_iterations: if context.job.options.full { FULL } else { 1 },
                max_iterations: ENOUGH,
                reorder_stores: context.injects(Inject::ReorderedStores),
                seed: clock::tsc(),
            })
            .and_then(|tally| verdict(&tally))
        });
    }
}

fn verdict(tally: &Tally) -> Result<Note, Failure> {
    let Tally { iterations, relaxed, bad, example } = tally;
    if let Some((verdict, o)) = example {
        return Err(Failure::Other(format!(
            "{bad} of {iterations} outcomes are wrong, the first {verdict:?}: registers {:?}, x={} y={}",
            o.r, o.x, o.y
        )));
    }
    Ok(Note::with_data(
        format!("{iterations} iterations, {relaxed} allowed relaxed outcomes"),
        json!({ "iterations": iterations, "relaxed": relaxed, "forbidden": bad }),
    ))
}
