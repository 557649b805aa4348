//! What a vCPU or a VM is when it is not running. [`vcpu`] captures and restores one vCPU's state, [`checkpoint`] keeps a
//! whole VM on disk, [`placement`] decides where vCPUs should live.

pub mod checkpoint;
pub mod placement;
pub mod vcpu;
