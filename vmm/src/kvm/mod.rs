//! The KVM shell: VM and vCPU file descriptors, CPUID, MSRs, the vCPU loop.

pub mod cpuid;
