//! The other CPUs: start-up, and jobs that all CPUs run together.

use crate::boot::{self, MAX_CPUS, TRAMPOLINE_VECTOR};
use crate::env::{Env, Failure, Page, bad};
use crate::machine;
use core::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};

/// What every CPU runs in a job: the environment, its own index, the job's pages.
pub type Job = fn(&Env, usize, &'static [Page]) -> Result<(), Failure>;

/// What the first CPU tells the others. A page of its own: they spin on it.
#[repr(C, align(4096))]
struct Board {
    generation: AtomicU64,
    job: AtomicUsize,
    env: AtomicPtr<Env>,
    pages: AtomicPtr<Page>,
    page_count: AtomicUsize,
}

/// Where a CPU reports, on a page of its own.
#[repr(C, align(4096))]
#[derive(Debug)]
pub struct Slot {
    /// Last job that this CPU has finished; 1 once it has started.
    done: AtomicU64,
    /// Failure of that job: text, and the CPU it names. Length 0: none.
    failed: AtomicPtr<u8>,
    failed_len: AtomicUsize,
    failed_cpu: AtomicUsize,
    /// Results, as the job defines them.
    pub results: [AtomicU64; 16],
}

#[repr(C, align(4096))]
struct Barrier(AtomicU64);

static BOARD: Board = Board {
    generation: AtomicU64::new(1),
    job: AtomicUsize::new(0),
    env: AtomicPtr::new(core::ptr::null_mut()),
    pages: AtomicPtr::new(core::ptr::null_mut()),
    page_count: AtomicUsize::new(0),
};
static BARRIER: Barrier = Barrier(AtomicU64::new(0));
static SLOTS: [Slot; MAX_CPUS] = [const {
    Slot {
        done: AtomicU64::new(0),
        failed: AtomicPtr::new(core::ptr::null_mut()),
        failed_len: AtomicUsize::new(0),
        failed_cpu: AtomicUsize::new(0),
        results: [const { AtomicU64::new(0) }; 16],
    }
}; MAX_CPUS];

/// The slot of a CPU (indices are below [`MAX_CPUS`] from start-up on).
pub fn slot(cpu: usize) -> &'static Slot {
    &SLOTS[cpu % MAX_CPUS]
}

/// Puts a result of `cpu` where [`sum`] and its kin find it.
pub fn report(cpu: usize, index: usize, value: u64) {
    slot(cpu).results[index % 16].store(value, Ordering::Relaxed);
}

/// Result `index` of every CPU.
pub fn reports(env: &Env, index: usize) -> impl Iterator<Item = u64> {
    (0..env.cpus).map(move |cpu| slot(cpu).results[index % 16].load(Ordering::Relaxed))
}

/// Starts CPUs 1.. one after the other (APIC id = index) and waits for each.
///
/// # Errors
/// The first CPU that did not come.
pub fn start(env: &'static Env) -> Result<(), Failure> {
    BOARD.env.store(core::ptr::from_ref(env).cast_mut(), Ordering::Release);
    if env.cpus == 1 {
        return Ok(());
    }
    // SAFETY: start info and command line have been copied; nothing of them is needed any more.
    unsafe { boot::place_trampoline() };
    for (cpu, id) in (1..env.cpus).zip(1u32..) {
        boot::ap_index.store(id, Ordering::Release);
        let come = || slot(cpu).done.load(Ordering::Acquire) != 0;
        env.apic.init(id);
        pause(env, 200);
        env.apic.startup(id, TRAMPOLINE_VECTOR);
        env.wait(cpu, "did not start after INIT and SIPI", come)?;
    }
    Ok(())
}

/// Spins for some microseconds.
pub fn pause(env: &Env, us: u64) {
    let start = machine::tsc();
    while env.us(machine::tsc().saturating_sub(start)) < us {
        core::hint::spin_loop();
    }
}

/// Life of a started CPU: jobs, for ever.
pub fn serve(cpu: usize) -> ! {
    // SAFETY: the first CPU has stored a reference that lives for ever before it started this CPU.
    let env = unsafe { &*BOARD.env.load(Ordering::Acquire) };
    env.apic.enable();
    let mut generation = 1;
    slot(cpu).done.store(generation, Ordering::Release);
    loop {
        while BOARD.generation.load(Ordering::Acquire) == generation {
            core::hint::spin_loop();
        }
        generation += 1;
        run(env, cpu, generation);
    }
}

fn run(env: &Env, cpu: usize, generation: u64) {
    // SAFETY: the board holds a `Job` and a slice that lives for ever, written before the generation that was read.
    let (job, pages) = unsafe {
        let job: Job = core::mem::transmute::<usize, Job>(BOARD.job.load(Ordering::Acquire));
        let (at, count) = (BOARD.pages.load(Ordering::Acquire), BOARD.page_count.load(Ordering::Acquire));
        (job, core::slice::from_raw_parts(at.cast_const(), count))
    };
    let me = slot(cpu);
    let failure = job(env, cpu, pages).err().unwrap_or(bad(""));
    me.failed.store(failure.what.as_ptr().cast_mut(), Ordering::Relaxed);
    me.failed_len.store(failure.what.len(), Ordering::Relaxed);
    me.failed_cpu.store(failure.cpu, Ordering::Relaxed);
    me.done.store(generation, Ordering::Release);
}

/// Runs `job` on all CPUs, this one included, over `pages`; results are cleared before.
///
/// # Errors
/// The first CPU that failed or did not finish.
pub fn all(env: &Env, job: Job, pages: &'static [Page]) -> Result<(), Failure> {
    SLOTS.iter().take(env.cpus).flat_map(|s| &s.results).for_each(|r| r.store(0, Ordering::Relaxed));
    BARRIER.0.store(0, Ordering::Relaxed);
    BOARD.job.store(job as usize, Ordering::Relaxed);
    BOARD.pages.store(pages.as_ptr().cast_mut(), Ordering::Relaxed);
    BOARD.page_count.store(pages.len(), Ordering::Relaxed);
    let generation = BOARD.generation.fetch_add(1, Ordering::AcqRel) + 1;
    run(env, 0, generation);
    for cpu in 0..env.cpus {
        let s = slot(cpu);
        env.wait(cpu, "did not finish", || s.done.load(Ordering::Acquire) == generation)?;
        let len = s.failed_len.load(Ordering::Relaxed);
        if len > 0 {
            // SAFETY: pointer and length of a `&'static str`, stored before `done`.
            let what = unsafe {
                let bytes = core::slice::from_raw_parts(s.failed.load(Ordering::Relaxed).cast_const(), len);
                core::str::from_utf8_unchecked(bytes)
            };
            return Err(Failure { cpu: s.failed_cpu.load(Ordering::Relaxed), what });
        }
    }
    Ok(())
}

/// Waits until every CPU of the job is here.
///
/// # Errors
/// This CPU's wait ran out.
pub fn barrier(env: &Env, cpu: usize) -> Result<(), Failure> {
    let cpus = env.cpus as u64;
    let mine = BARRIER.0.fetch_add(1, Ordering::AcqRel) + 1;
    let target = mine.div_ceil(cpus) * cpus;
    env.wait(cpu, "waited in vain at a barrier", || BARRIER.0.load(Ordering::Acquire) >= target)
}
