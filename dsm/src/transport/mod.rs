//! How members reach each other: TCP, one stream per pair and channel, dedicated threads on top (in [`crate::node`]).
//!
//! - [`mesh`] connects every member with every other and authenticates both ends ([`handshake`]).
//! - [`frame`] is the page protocol on the wire: a fixed little-endian header, then a page or nothing.
//! - [`run`] puts messages about neighbouring pages into one frame.
//! - [`link`] sends without ever blocking: what the socket does not take at once waits in a queue.
//! - [`ear`] looks for an answer that should be here soon, rather than sleep.

pub mod ear;
pub mod frame;
mod handshake;
pub mod kept;
pub mod link;
pub mod mesh;
pub mod reader;
pub mod redial;
pub mod run;
