//! What a vCPU or a VM is when it is not running. [`vcpu`] captures and restores one vCPU's state.

pub mod vcpu;
