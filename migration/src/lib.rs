//! What a vCPU or a VM is when it is not running.
