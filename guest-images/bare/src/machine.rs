//! What the machine offers to code at CPL 3: ports (TSS I/O bitmap), the TSC, and the CPL-0 services behind UD2.

use crate::boot::SERVICE_MAGIC;
use core::arch::asm;

/// Port of COM1's transmit register.
const COM1: u16 = 0x3F8;
/// ACPI sleep control register of the VM's hardware-reduced ACPI.
const SLEEP_CONTROL: u16 = 0x600;
/// ACPI reset register, and the value that resets.
const RESET: (u16, u8) = (0x602, 1);
/// SLP_EN and SLP_TYP 5 of the sleep control register (ACPI 6.5, 4.8.3.7).
const S5: u8 = (5 << 2) | (1 << 5);

/// Writes a byte to a port.
pub fn out8(port: u16, value: u8) {
    // SAFETY: port space is the devices'; none that the guest writes reaches into its memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
}

/// Sends a byte to COM1. The VM's UART is always ready, so its line status is not read: that would double the exits.
pub fn serial(byte: u8) {
    out8(COM1, byte);
}

/// Powers the VM off (S5).
pub fn power_off() -> ! {
    out8(SLEEP_CONTROL, S5);
    stop()
}

/// Resets the VM through the reset register.
pub fn reset() -> ! {
    out8(RESET.0, RESET.1);
    stop()
}

/// Parks this CPU for good.
pub fn stop() -> ! {
    loop {
        core::hint::spin_loop();
    }
}

/// The time-stamp counter, read after every earlier instruction and before every later one.
#[inline(always)]
pub fn tsc() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads a counter.
    unsafe {
        asm!("lfence", "rdtsc", "lfence", out("eax") low, out("edx") high, options(nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Asks CPL 0 for service `number` (`traps.s`).
#[inline(always)]
fn service(number: u64, rcx: u64, rdx: u64) -> u64 {
    let result;
    // SAFETY: the handler preserves all registers but RAX, and uses its own stack.
    unsafe { asm!("ud2", inlateout("rax") SERVICE_MAGIC + number => result, in("rcx") rcx, in("rdx") rdx) };
    result
}

/// Reads an MSR.
pub fn rdmsr(msr: u32) -> u64 {
    service(0, msr.into(), 0)
}

/// Writes an MSR.
pub fn wrmsr(msr: u32, value: u64) {
    service(1, msr.into(), value);
}

/// Waits in HLT for one interrupt. With interrupts off at CPL 3, one that came earlier ends the wait at once.
pub fn halt() {
    service(2, 0, 0);
}

/// Whether interrupts are taken while CPL 3 runs (they always are in [`halt`]).
pub fn interrupts(on: bool) {
    service(3, 0, if on { 0x200 } else { 0 });
}

/// Triple fault: an exception without an IDT.
pub fn triple_fault() -> ! {
    service(4, 0, 0);
    stop()
}

/// CPUID leaf (subleaf 0): EAX, EBX, ECX, EDX, as CPL 0 sees it. At CPL 3 a software KVM may show the host's.
pub fn cpuid(leaf: u32) -> [u32; 4] {
    let mut regs = [0u32; 4];
    service(5, leaf.into(), (&raw mut regs).addr() as u64);
    // SAFETY: the service has written the array through the address it was given.
    unsafe { core::ptr::read_volatile(&raw const regs) }
}
