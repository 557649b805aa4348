//! A whole VM at rest, on disk: the format that docs/checkpoint-format.md specifies.
//!
//! A [`store`] is a folder of checkpoints of one guest. Each is a folder with a [`manifest`] (the machine, checksums,
//! the checkpoint that it builds on) and page files ([`part`] writes them, [`reader`] reads them). [`image`] is the
//! guest's memory as a chain of them has it. Nothing here knows KVM, or what a machine is made of.

pub mod error;
pub mod id;
pub mod image;
pub mod manifest;
pub mod part;
pub mod reader;
pub mod store;
#[cfg(test)]
mod tests;

pub use error::CheckpointError;
pub use id::Id;
pub use image::Image;
pub use manifest::{Manifest, Parent, Part, Range};
pub use part::{PAGE, PartWriter};
pub use store::{Draft, PartSink, Step, Store, newest};
