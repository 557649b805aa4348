//! The KVM ioctls that kvm-ioctls does not have on x86.

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_device_attr, kvm_interrupt};
use kvm_ioctls::VcpuFd;
use std::io;
use std::os::fd::AsRawFd;

/// `_IOW(0xAE, 0x86, struct kvm_interrupt)`
const KVM_INTERRUPT: libc::c_ulong = 0x4004_AE86;
/// `_IOW(0xAE, 0xE1, struct kvm_device_attr)`
const KVM_SET_DEVICE_ATTR: libc::c_ulong = 0x4018_AEE1;

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Queues an external interrupt; the vCPU must be ready for it.
pub(super) fn interrupt(fd: &VcpuFd, vector: u8) -> io::Result<()> {
    let argument = kvm_interrupt { irq: u32::from(vector) };
    // SAFETY: a vCPU's descriptor and a valid argument that the kernel only reads.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), KVM_INTERRUPT, &argument) })
}

/// Sets what is added to the (scaled) host TSC in the guest. Linux 5.16.
pub(super) fn set_tsc_offset(fd: &VcpuFd, offset: u64) -> io::Result<()> {
    let attribute = kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: std::ptr::from_ref(&offset).addr() as u64,
    };
    // SAFETY: a vCPU's descriptor; the attribute points to a u64 that lives through the call and is only read.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), KVM_SET_DEVICE_ATTR, &attribute) })
}
