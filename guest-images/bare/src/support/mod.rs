//! Parts of the guest that need no machine: command line and statistics.
#![cfg_attr(not(test), no_std)]

pub mod cast;
pub mod cmdline;
pub mod stats;
