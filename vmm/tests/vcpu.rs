//! vCPU threads on the real /dev/kvm: a real-mode guest that starts its second CPU, sends IPIs and uses the
//! timer through x2APIC MSRs. Real mode works on every KVM, the software variant included.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vmm::interrupts::{Destination, InterruptMessage};
use vmm::kvm::cpuid::{Cores, CpuidTable};
use vmm::kvm::exec::{Machine, Runner, VcpuEnd};
use vmm::kvm::gate::Gate;
use vmm::kvm::handle::VcpuHandle;
use vmm::kvm::vcpu::Vcpu;
use vmm::kvm::vm::Vm;
use vmm::time::tsc::{GuestClock, TscScale};

// Boot CPU at 0:0x1000, second CPU at 0:0x2000 (SIPI vector 2). Words at 0x500..: handshakes and counters.
// Port 0xF4 takes results: 'A' = the second CPU is up, 'I' = all IPIs came, 'T' = all timers fired, 'E' = end.
std::arch::global_asm!(
    ".pushsection .rodata",
    ".code16",
    "spanvm_bsp:",
    "cli",
    "xor ax, ax",
    "mov ds, ax",
    "mov ss, ax",
    "mov sp, 0x7000",
    // Interrupt vectors 0x40 (IPI), 0x41 (timer) and 0x50 (IPI).
    "mov word ptr [0x100], 0x3000",
    "mov word ptr [0x102], 0",
    "mov word ptr [0x104], 0x3100",
    "mov word ptr [0x106], 0",
    "mov word ptr [0x140], 0x3200",
    "mov word ptr [0x142], 0",
    "call 3f",
    // INIT, start-up.
    "mov ecx, 0x830",
    "mov edx, 1",
    "mov eax, 0x4500",
    "wrmsr",
    "mov eax, 0x4602",
    "wrmsr",
    "2: cmp word ptr [0x500], 1",
    "jne 2b",
    "mov al, 'A'",
    "out 0xf4, al",
    // 1000 times two IPIs of different priority to CPU 1, both answered before the next two.
    "mov bx, 0",
    "4: inc bx",
    "mov ecx, 0x830",
    "mov edx, 1",
    "mov eax, 0x4040",
    "wrmsr",
    "mov eax, 0x4050",
    "wrmsr",
    "5: pause",
    "cmp word ptr [0x502], bx",
    "jne 5b",
    "cmp word ptr [0x506], bx",
    "jne 5b",
    "cmp bx, 1000",
    "jne 4b",
    "mov al, 'I'",
    "out 0xf4, al",
    // 20 TSC-deadline interrupts, waited for in HLT.
    "mov ecx, 0x832",
    "xor edx, edx",
    "mov eax, 0x40041",
    "wrmsr",
    "6: rdtsc",
    "add eax, 1000000",
    "adc edx, 0",
    "mov ecx, 0x6e0",
    "wrmsr",
    "sti",
    "hlt",
    "cli",
    "cmp word ptr [0x504], 20",
    "jb 6b",
    // 10 more, waited for in the guest.
    "7: rdtsc",
    "add eax, 1000000",
    "adc edx, 0",
    "mov ecx, 0x6e0",
    "wrmsr",
    "mov bx, word ptr [0x504]",
    "sti",
    "8: cmp word ptr [0x504], bx",
    "je 8b",
    "cli",
    "cmp word ptr [0x504], 30",
    "jb 7b",
    "mov al, 'T'",
    "out 0xf4, al",
    "mov al, 'E'",
    "out 0xf4, al",
    "9: hlt",
    "jmp 9b",
    // x2APIC on, software-enabled.
    "3: mov ecx, 0x1b",
    "rdmsr",
    "or eax, 0x400",
    "wrmsr",
    "mov ecx, 0x80f",
    "mov eax, 0x1ff",
    "xor edx, edx",
    "wrmsr",
    "ret",
    "spanvm_bsp_end:",
    "spanvm_ap:",
    "cli",
    "xor ax, ax",
    "mov ds, ax",
    "mov ss, ax",
    "mov sp, 0x6000",
    "mov ecx, 0x1b",
    "rdmsr",
    "or eax, 0x400",
    "wrmsr",
    "mov ecx, 0x80f",
    "mov eax, 0x1ff",
    "xor edx, edx",
    "wrmsr",
    "mov word ptr [0x500], 1",
    "2: sti",
    "hlt",
    "jmp 2b",
    "spanvm_ap_end:",
    "spanvm_ipi:",
    "push eax",
    "push ecx",
    "push edx",
    "inc word ptr [0x502]",
    "xor eax, eax",
    "xor edx, edx",
    "mov ecx, 0x80b",
    "wrmsr",
    "pop edx",
    "pop ecx",
    "pop eax",
    "iret",
    "spanvm_ipi_end:",
    "spanvm_timer:",
    "push eax",
    "push ecx",
    "push edx",
    "inc word ptr [0x504]",
    "xor eax, eax",
    "xor edx, edx",
    "mov ecx, 0x80b",
    "wrmsr",
    "pop edx",
    "pop ecx",
    "pop eax",
    "iret",
    "spanvm_timer_end:",
    "spanvm_ipi2:",
    "push eax",
    "push ecx",
    "push edx",
    "inc word ptr [0x506]",
    "xor eax, eax",
    "xor edx, edx",
    "mov ecx, 0x80b",
    "wrmsr",
    "pop edx",
    "pop ecx",
    "pop eax",
    "iret",
    "spanvm_ipi2_end:",
    ".code64",
    ".popsection",
);

unsafe extern "C" {
    static spanvm_bsp: u8;
    static spanvm_bsp_end: u8;
    static spanvm_ap: u8;
    static spanvm_ap_end: u8;
    static spanvm_ipi: u8;
    static spanvm_ipi_end: u8;
    static spanvm_ipi2: u8;
    static spanvm_ipi2_end: u8;
    static spanvm_timer: u8;
    static spanvm_timer_end: u8;
}

fn code(start: &'static u8, end: &'static u8) -> &'static [u8] {
    let len = std::ptr::from_ref(end).addr() - std::ptr::from_ref(start).addr();
    // SAFETY: both labels are in the block of assembly above, in this order.
    unsafe { std::slice::from_raw_parts(start, len) }
}

struct TestMachine {
    vcpus: Vec<Arc<VcpuHandle>>,
    output: Mutex<String>,
    done: AtomicBool,
    remote: AtomicU64,
}

impl Machine for TestMachine {
    fn port_read(&self, _: &VcpuHandle, _: u16, data: &mut [u8]) -> Result<(), String> {
        data.fill(0xFF);
        Ok(())
    }

    fn port_write(&self, _: &VcpuHandle, port: u16, data: &[u8]) -> Result<(), String> {
        assert_eq!(port, 0xF4);
        self.output.lock().unwrap().push(char::from(data[0]));
        self.done.fetch_or(data[0] == b'E', Ordering::SeqCst);
        Ok(())
    }

    fn memory_read(&self, _: &VcpuHandle, addr: u64, _: &mut [u8]) -> Result<(), String> {
        Err(format!("read of {addr:#x}"))
    }

    fn memory_write(&self, _: &VcpuHandle, addr: u64, _: &[u8]) -> Result<(), String> {
        Err(format!("write to {addr:#x}"))
    }

    fn send_ipi(&self, _: &VcpuHandle, x2apic: bool, message: &InterruptMessage) {
        assert!(x2apic);
        let Destination::Physical(id) = message.destination else { panic!("{message:?}") };
        self.vcpus[usize::try_from(id).unwrap()].deliver(message);
    }

    fn end_of_interrupt(&self, _: u8) {
        self.remote.fetch_add(1, Ordering::SeqCst);
    }
}

/// 1 MiB of anonymous memory.
fn memory() -> &'static mut [u8] {
    Box::leak(vec![0u8; (1 << 20) + 4096].into_boxed_slice())
}

#[test]
fn ipis_timers_startup_and_the_gate_in_real_mode() {
    let Ok(kvm) = kvm_ioctls::Kvm::new() else {
        eprintln!("skipped: /dev/kvm can't be opened");
        return;
    };
    let cpuid = CpuidTable::from_supported(&kvm.get_supported_cpuid(256).unwrap(), true);
    let vm = Vm::new().unwrap();
    let raw = memory();
    let skip = raw.as_ptr().align_offset(4096);
    let ram = &mut raw[skip..skip + (1 << 20)];
    // SAFETY: the statics are the labels above, read only.
    unsafe {
        for (at, code) in [
            (0x1000, code(&spanvm_bsp, &spanvm_bsp_end)),
            (0x2000, code(&spanvm_ap, &spanvm_ap_end)),
            (0x3000, code(&spanvm_ipi, &spanvm_ipi_end)),
            (0x3100, code(&spanvm_timer, &spanvm_timer_end)),
            (0x3200, code(&spanvm_ipi2, &spanvm_ipi2_end)),
        ] {
            ram[at..at + code.len()].copy_from_slice(code);
        }
        vm.map(0, 0, 1 << 20, ram.as_mut_ptr()).unwrap();
    }

    let gate = Arc::new(Gate::default());
    let vcpus: Vec<_> = (0..2).map(|id| Arc::new(VcpuHandle::new(id, true, gate.clone()))).collect();
    // Offset 0: the software variant's guests read the host's TSC.
    let khz = vmm::member::facts::host_tsc_khz().unwrap_or(2_000_000);
    let clock = Arc::new(GuestClock::new(TscScale::IDENTITY, khz, 0));
    let machine = Arc::new(TestMachine {
        vcpus: vcpus.clone(),
        output: Mutex::default(),
        done: AtomicBool::new(false),
        remote: AtomicU64::new(0),
    });
    let start = Instant::now();
    let threads: Vec<_> = vcpus
        .iter()
        .map(|handle| {
            let table = cpuid.for_vcpu(handle.id(), Cores { package_shift: 0, cache_shift: 0 }, khz);
            let vcpu = Vcpu::new(&vm, handle.id(), handle.apic().base(), &table, &clock).unwrap();
            if handle.id() == 0 {
                let mut sregs = vcpu.reset_sregs();
                (sregs.cs.base, sregs.cs.selector) = (0, 0);
                let regs = kvm_bindings::kvm_regs { rip: 0x1000, rflags: 2, ..Default::default() };
                vcpu.set_state(&regs, &sregs).unwrap();
            }
            let runner = Runner::new(vcpu, handle.clone(), clock.clone(), machine.clone());
            std::thread::spawn(move || runner.run())
        })
        .collect();
    let mut out = 0;
    while !machine.done.load(Ordering::SeqCst) && start.elapsed() < Duration::from_secs(20) {
        if threads.iter().any(|t| t.is_finished()) {
            break;
        }
        gate.together(&vcpus, Duration::from_micros(10), || {
            out += u32::from(!vcpus.iter().any(|v| v.is_inside()));
        });
        std::thread::sleep(Duration::from_millis(5));
    }
    let took = start.elapsed();
    vcpus.iter().for_each(|v| v.stop());
    for thread in threads {
        assert_eq!(thread.join().unwrap(), VcpuEnd::Stopped);
    }
    let stats: Vec<_> = vcpus.iter().map(|v| v.stats()).collect();
    assert_eq!(*machine.output.lock().unwrap(), "AITE", "after {took:?}: {stats:#?}");
    assert!(out > 0, "never were all vCPUs out of the guest");
    assert!(stats[0].timer_fires >= 30 && stats[1].injections >= 2000, "{stats:?}");
    eprintln!("took {took:?}: {stats:?}");
}
