//! The tests, by the names that `test=` takes. Each says what it measured and whether it passed.

mod counter;

use crate::console::Line;
use crate::env::{Env, Failure};

/// Runs on the first CPU; `Ok(true)` is a pass.
pub type Test = fn(&Env, &mut Line) -> Result<bool, Failure>;

/// All tests that end.
pub const TESTS: &[(&str, Test)] = &[("counter", counter::run)];

/// The test of that name.
pub fn find(name: &str) -> Option<Test> {
    TESTS.iter().find(|(n, _)| *n == name).map(|(_, t)| *t)
}
