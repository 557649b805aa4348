//! The tests, by the names that `test=` takes. Each says what it measured and whether it passed.

mod counter;
mod ends;
mod fault;
mod forever;
mod ipi;
mod litmus;
mod pages;
mod timer;
mod touch;
mod tsc;
mod wait;

use crate::console::Line;
use crate::env::{Env, Failure};

/// Runs on the first CPU; `Ok(true)` is a pass.
pub type Test = fn(&Env, &mut Line) -> Result<bool, Failure>;

/// All tests.
pub const TESTS: &[(&str, Test)] = &[
    ("counter", counter::run),
    ("ipi", ipi::run),
    ("ipimodes", ipi::run_modes),
    ("timer", timer::run),
    ("pages", pages::shared),
    ("private", pages::private),
    ("touch", touch::run),
    ("fault", fault::run),
    ("litmus", litmus::run),
    ("tsc", tsc::run),
    ("loop", forever::run),
    ("triple", ends::triple),
    ("reset", ends::reset),
];

/// The test of that name.
pub fn find(name: &str) -> Option<Test> {
    TESTS.iter().find(|(n, _)| *n == name).map(|(_, t)| *t)
}
