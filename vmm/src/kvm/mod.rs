//! The KVM shell: VM and vCPU file descriptors, CPUID, MSRs, the vCPU loop.
//!
//! [`vm`] makes a VM without the in-kernel interrupt controllers; [`vcpu`] is one vCPU's state as its thread
//! owns it and [`exec`] the loop of that thread; [`handle`] is what everybody else has of a vCPU: its local
//! APIC, a mailbox, a desk for orders ([`desk`]) and a way to get its attention ([`signal`]);
//! [`gate`] keeps all of a member's vCPUs out of the guest for a moment. [`image`] is a vCPU on
//! its way to another member. [`cpuid`] and [`msr`] are tables and policy.

pub mod cpuid;
pub mod desk;
pub mod exec;
pub mod gate;
pub mod handle;
pub mod image;
pub mod msr;
mod run_page;
mod signal;
pub mod still;
mod sys;
pub mod vcpu;
pub mod vm;
