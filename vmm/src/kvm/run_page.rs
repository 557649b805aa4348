//! The page that a vCPU shares with the kernel (`struct kvm_run`). All reading of its unions is here.

use kvm_bindings::{KVM_EXIT_IO_IN, kvm_run};
use kvm_ioctls::VcpuFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

/// A vCPU's `kvm_run`. The mapping belongs to the [`VcpuFd`] it came from and must not outlive it; the vCPU's
/// thread owns both.
#[derive(Debug)]
pub(super) struct RunPage(NonNull<kvm_run>);

/// A port access as the exit describes it: `count` items of `size` bytes.
#[derive(Debug)]
pub(super) struct PortAccess<'a> {
    pub port: u16,
    pub is_read: bool,
    pub size: usize,
    pub data: &'a mut [u8],
}

/// A memory-mapped access.
#[derive(Debug)]
pub(super) struct MmioAccess<'a> {
    pub addr: u64,
    pub is_write: bool,
    pub data: &'a mut [u8],
}

/// RDMSR or WRMSR. Setting `error` makes it a #GP.
#[derive(Debug)]
pub(super) struct MsrAccess<'a> {
    pub index: u32,
    pub data: &'a mut u64,
    pub error: &'a mut u8,
}

impl RunPage {
    pub fn of(fd: &mut VcpuFd) -> RunPage {
        RunPage(NonNull::from(fd.get_kvm_run()))
    }

    fn get(&self) -> &kvm_run {
        // SAFETY: the pointer is to the mapping of a VcpuFd that its owner keeps longer than this. The kernel
        // writes to it only inside KVM_RUN, which this thread isn't in.
        unsafe { self.0.as_ref() }
    }

    fn get_mut(&mut self) -> &mut kvm_run {
        // SAFETY: as in `get`; `&mut self` makes this the only reference that Rust code has.
        unsafe { self.0.as_mut() }
    }

    /// The byte that makes the next KVM_RUN return at once.
    pub fn immediate_exit(&self) -> *mut u8 {
        // SAFETY: a field of a live mapping; no reference is made.
        unsafe { &raw mut (*self.0.as_ptr()).immediate_exit }
    }

    pub fn set_immediate_exit(&self, value: u8) {
        // SAFETY: valid and aligned for a byte; it is only ever accessed atomically (here and in the signal
        // handler), the kernel reads it inside KVM_RUN.
        unsafe { AtomicU8::from_ptr(self.immediate_exit()) }.store(value, Ordering::SeqCst);
    }

    pub fn exit_reason(&self) -> u32 {
        self.get().exit_reason
    }

    pub fn interrupts_enabled(&self) -> bool {
        self.get().if_flag != 0
    }

    pub fn ready_for_injection(&self) -> bool {
        self.get().ready_for_interrupt_injection != 0
    }

    /// An interrupt was queued: the kernel takes no other before it says so at the next return of KVM_RUN. Until then
    /// the field would still show the state before, and a second interrupt would replace the first.
    pub fn injected(&mut self) {
        self.get_mut().ready_for_interrupt_injection = 0;
    }

    /// The vCPU's state was set from outside: what the kernel last said of it is void.
    pub fn entered_anew(&mut self, rflags: u64) {
        let run = self.get_mut();
        run.ready_for_interrupt_injection = 0;
        run.if_flag = u8::from(rflags & (1 << 9) != 0);
        run.request_interrupt_window = 0;
    }

    pub fn request_window(&mut self, wanted: bool) {
        self.get_mut().request_interrupt_window = u8::from(wanted);
    }

    pub fn cr8(&self) -> u8 {
        let [cr8, ..] = self.get().cr8.to_le_bytes();
        cr8 & 0xF
    }

    pub fn set_cr8(&mut self, cr8: u8) {
        self.get_mut().cr8 = u64::from(cr8);
    }

    /// Only after KVM_EXIT_IO.
    pub fn port(&mut self) -> PortAccess<'_> {
        let base = self.0.as_ptr().cast::<u8>();
        // SAFETY: KVM_EXIT_IO says that this member of the union is the valid one.
        let io = unsafe { self.get().__bindgen_anon_1.io };
        let len = usize::from(io.size) * usize::try_from(io.count).unwrap_or(0);
        let data = match usize::try_from(io.data_offset) {
            // SAFETY: the kernel put `len` bytes at this offset of the vCPU's mapping, behind `kvm_run` itself;
            // nobody else refers to them until the next KVM_RUN.
            Ok(offset) => unsafe { std::slice::from_raw_parts_mut(base.add(offset), len) },
            Err(_) => &mut [],
        };
        let size = usize::from(io.size).max(1);
        PortAccess { port: io.port, is_read: u32::from(io.direction) == KVM_EXIT_IO_IN, size, data }
    }

    /// Only after KVM_EXIT_MMIO.
    pub fn mmio(&mut self) -> MmioAccess<'_> {
        // SAFETY: KVM_EXIT_MMIO says that this member of the union is the valid one.
        let mmio = unsafe { &mut self.get_mut().__bindgen_anon_1.mmio };
        let len = usize::try_from(mmio.len).unwrap_or(0).min(mmio.data.len());
        let (data, _) = mmio.data.split_at_mut(len);
        MmioAccess { addr: mmio.phys_addr, is_write: mmio.is_write != 0, data }
    }

    /// Only after KVM_EXIT_X86_RDMSR and KVM_EXIT_X86_WRMSR.
    pub fn msr(&mut self) -> MsrAccess<'_> {
        // SAFETY: these exits say that this member of the union is the valid one.
        let msr = unsafe { &mut self.get_mut().__bindgen_anon_1.msr };
        MsrAccess { index: msr.index, data: &mut msr.data, error: &mut msr.error }
    }

    /// Only after KVM_EXIT_FAIL_ENTRY: the hardware's reason.
    pub fn fail_entry(&self) -> u64 {
        // SAFETY: KVM_EXIT_FAIL_ENTRY says that this member of the union is the valid one.
        unsafe { self.get().__bindgen_anon_1.fail_entry.hardware_entry_failure_reason }
    }

    /// Only after KVM_EXIT_INTERNAL_ERROR: the sub-error and its data.
    pub fn internal_error(&self) -> (u32, Vec<u64>) {
        // SAFETY: KVM_EXIT_INTERNAL_ERROR says that this member of the union is the valid one.
        let internal = unsafe { self.get().__bindgen_anon_1.internal };
        let count = usize::try_from(internal.ndata).unwrap_or(0);
        (internal.suberror, internal.data.iter().take(count).copied().collect())
    }
}
