//! In-guest conformance checks.
fn main() {}
