//! The spanvm command.
fn main() {}
