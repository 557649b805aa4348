//! What a vCPU or a VM is when it is not running. [`vcpu`] captures and restores one vCPU's state, [`checkpoint`] keeps a
//! whole VM on disk.

pub mod checkpoint;
pub mod vcpu;
