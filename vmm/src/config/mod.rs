//! What a VM is to be, and whether it can be: read from flags and TOML, checked before anything starts.
//!
//! [`keys`] is the raw form (each flag `--some-thing` is the TOML key `some_thing`; flags win), [`resolve`]
//! checks it and fills in defaults, [`spec`] is the result, [`files`] looks at the files it names,
//! [`shares`] splits CPUs and memory over the members, and [`plan`] turns it all into a topology.

pub mod error;
pub mod files;
pub mod keys;
pub mod plan;
pub mod resolve;
pub mod shares;
pub mod size;
pub mod spec;

pub use error::ConfigError;
pub use keys::LaunchKeys;
pub use spec::{DiskSpec, HostPort, MemberSpec, OnMemberLoss, VmSpec};

#[cfg(test)]
mod tests;
