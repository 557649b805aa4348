//! CPU affinity.

use std::arch::asm;

use crate::failure::Failure;

/// Words of a CPU mask: room for 65536 CPUs.
const MASK_WORDS: usize = 1024;

/// Lets thread `tid` (0: the calling thread) run on `cpu` alone.
pub fn set_affinity(tid: i32, cpu: usize) -> Result<(), Failure> {
    let mask = mask_of(cpu)?;
    // SAFETY: the kernel reads exactly the given number of bytes, all of them inside `mask`.
    let rc = unsafe { libc::sched_setaffinity(tid, size_of_val(&*mask), mask.as_ptr().cast()) };
    if rc == 0 { Ok(()) } else { Err(Failure::last_os(format!("moving task {tid} to CPU {cpu}"))) }
}

/// The CPUs on which thread `tid` (0: the calling thread) may run, ascending.
pub fn affinity(tid: i32) -> Result<Vec<usize>, Failure> {
    let mut mask = vec![0u64; MASK_WORDS];
    // SAFETY: the kernel writes at most the given number of bytes, all of them inside `mask`.
    let rc = unsafe { libc::sched_getaffinity(tid, size_of_val(&*mask), mask.as_mut_ptr().cast()) };
    if rc != 0 {
        return Err(Failure::last_os(format!("reading the affinity of task {tid}")));
    }
    let bits = |(word, bits): (usize, &u64)| {
        let bits = *bits;
        (0..64).filter(move |b| bits >> b & 1 == 1).map(move |b| word * 64 + b)
    };
    Ok(mask.iter().enumerate().flat_map(bits).collect())
}

/// The CPU the calling thread is on right now.
pub fn current() -> Result<usize, Failure> {
    // SAFETY: no arguments, no memory.
    let cpu = unsafe { libc::sched_getcpu() };
    usize::try_from(cpu).map_err(|_| Failure::last_os("sched_getcpu"))
}

/// Pins the calling thread to `cpu` and checks that it arrived there.
pub fn pin(cpu: usize) -> Result<(), Failure> {
    set_affinity(0, cpu)?;
    crate::failure::expect_eq(format!("CPU after pinning to {cpu}"), cpu, current()?)
}

/// Lets another thread of this CPU run.
pub fn yield_now() {
    std::thread::yield_now();
}

/// Moves the calling thread to `cpu` while values live in general and SSE registers; true if all of them survived.
pub fn move_with_registers(cpu: usize, seed: u64) -> Result<bool, Failure> {
    let mask = mask_of(cpu)?;
    let mut rc: i64 = libc::SYS_sched_setaffinity;
    let (a, b, c, d) = (seed, !seed, seed.rotate_left(17), seed ^ 0x5555_aaaa_3333_cccc);
    let (mut a2, mut b2, mut c2, mut d2) = (a, b, c, d);
    let (mut x0, mut x7, mut x15): (u64, u64, u64);
    // SAFETY: the block makes one sched_setaffinity call, which reads `mask` (alive across the block) and keeps every
    // register but rax, rcx and r11, all of which are declared; the other registers written are declared as well.
    unsafe {
        asm!(
            "movq xmm0, r12",
            "movq xmm7, r13",
            "movq xmm15, r14",
            "syscall",
            "movq r8, xmm0",
            "movq r9, xmm7",
            "movq r10, xmm15",
            inout("rax") rc,
            in("rdi") 0,
            in("rsi") size_of_val(&*mask),
            in("rdx") mask.as_ptr(),
            inout("r12") a2,
            inout("r13") b2,
            inout("r14") c2,
            inout("r15") d2,
            out("r8") x0,
            out("r9") x7,
            out("r10") x15,
            out("rcx") _,
            out("r11") _,
            out("xmm0") _,
            out("xmm7") _,
            out("xmm15") _,
            options(nostack),
        );
    }
    if rc < 0 {
        return Err(Failure::Other(format!("moving to CPU {cpu} with live registers: errno {}", -rc)));
    }
    Ok((a2, b2, c2, d2) == (a, b, c, d) && (x0, x7, x15) == (a, b, c))
}

fn mask_of(cpu: usize) -> Result<Vec<u64>, Failure> {
    let mut mask = vec![0u64; MASK_WORDS];
    let word = mask.get_mut(cpu / 64).ok_or_else(|| Failure::Other(format!("CPU {cpu} is out of range")))?;
    *word = 1 << (cpu % 64);
    Ok(mask)
}
