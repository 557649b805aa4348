//! x86-TSO litmus tests.
//!
//! - `program`: the tests as data, and what each outcome means (pure)
//! - `barrier`: where the threads of a test meet
//! - `engine`: runs batches of instances on pinned threads

mod barrier;
pub mod engine;
pub mod program;
