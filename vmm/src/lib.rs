//! spanvm: one virtual machine that spans several hosts.
//!
//! Where things are: [`cli`] parses flags, [`config`] checks them, [`control`] starts and stops members over
//! the network; a [`member`] is one host's part of a VM and wires together [`kvm`] (vCPU threads),
//! [`interrupts`] (local APICs, IOAPIC), [`fabric`] (interrupts and device accesses that cross hosts),
//! [`time`] (one TSC), [`devices`], and, at the boot member, [`boot`] and [`acpi`]. [`bench`] measures.

pub mod acpi;
pub mod bench;
pub mod boot;
pub mod cli;
pub mod config;
pub mod control;
pub mod devices;
pub mod fabric;
pub mod interrupts;
pub mod kvm;
pub mod layout;
pub mod member;
pub mod time;
pub mod topology;
