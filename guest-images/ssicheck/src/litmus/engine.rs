//! Runs a litmus test in batches of instances.
//!
//! All threads go over the same [`BATCH`] instances between two meetings, each from a random moment on, so that one
//! page transfer serves many instances and the threads still meet at different points. The leader changes from batch to
//! batch: it judges the outcomes and clears the variables, so pages start out at a different node each time.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::failure::Failure;
use crate::litmus::barrier::Barrier;
use crate::litmus::program::{Layout, Outcome, Step, Test, Var, Verdict};
use crate::sys::ops::{self, Flavour};
use crate::sys::shared::{PAGE, Shared};
use crate::sys::{clock, cpu};

/// Instances per batch; a power of two.
pub const BATCH: usize = 512;
/// Bytes between two instances: two per cache line, 128 per page.
const STRIDE: usize = 32;
const PAGES_PER_VAR: usize = BATCH * STRIDE / PAGE;
const WORDS_PER_PAGE: usize = PAGE / 4;
const MAX_THREADS: usize = 4;

/// One configuration of a test.
#[derive(Clone, Debug)]
pub struct Config {
    /// The test.
    pub test: Test,
    /// How accesses are made.
    pub flavour: Flavour,
    /// Where the variables are.
    pub layout: Layout,
    /// CPU of each thread.
    pub cpus: Vec<usize>,
    /// Stop when this long has passed and `min_iterations` are done.
    pub slice: Duration,
    /// Fewest iterations.
    pub min_iterations: u64,
    /// Most iterations.
    pub max_iterations: u64,
    /// Fault: execute pairs of stores in the wrong order.
    pub reorder_stores: bool,
    /// Seed of orders and skews.
    pub seed: u64,
}

/// How often each verdict was given.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Instances run.
    pub iterations: u64,
    /// Allowed, but not by an interleaving.
    pub relaxed: u64,
    /// Forbidden or corrupt.
    pub bad: u64,
    /// The first bad outcome.
    pub example: Option<(Verdict, Outcome)>,
}

impl Tally {
    fn count(&mut self, verdict: Verdict, outcome: Outcome) {
        self.iterations += 1;
        match verdict {
            Verdict::Interleaved => {}
            Verdict::Relaxed => self.relaxed += 1,
            Verdict::Forbidden | Verdict::Corrupt => {
                self.bad += 1;
                self.example.get_or_insert((verdict, outcome));
            }
        }
    }

    fn merge(&mut self, other: Tally) {
        self.iterations += other.iterations;
        self.relaxed += other.relaxed;
        self.bad += other.bad;
        self.example = self.example.take().or(other.example);
    }
}

/// What the threads of one run share.
struct Arena {
    config: Config,
    vars: Shared,
    /// Per thread one page-aligned area: two registers per instance.
    registers: Vec<Shared>,
    barrier: Barrier,
    /// TSC at which the batch starts, the number of the batch, the instances judged.
    start_tsc: AtomicU64,
    judged: AtomicU64,
    over: AtomicBool,
    began: Instant,
}

/// Runs one configuration to its end.
pub fn run(config: Config) -> Result<Tally, Failure> {
    let threads = config.test.threads();
    let arena = Arena {
        vars: Shared::anonymous(2 * PAGES_PER_VAR)?,
        registers: threads.iter().map(|_| Shared::anonymous(BATCH * 8 / PAGE)).collect::<Result<_, _>>()?,
        barrier: Barrier::new(threads.len())?,
        start_tsc: AtomicU64::new(0),
        judged: AtomicU64::new(0),
        over: AtomicBool::new(false),
        began: Instant::now(),
        config,
    };
    let arena = &arena;
    std::thread::scope(|scope| {
        let workers: Vec<_> =
            threads.iter().enumerate().map(|(i, step)| scope.spawn(move || arena.thread(i, *step))).collect();
        let mut total = Tally::default();
        for worker in workers {
            total.merge(worker.join().unwrap_or_else(|_| Err(Failure::Other("a thread panicked".into())))?);
        }
        Ok(total)
    })
}

/// A well-mixed number from a few small ones (SplitMix64).
fn mix(seed: u64, a: u64, b: u64) -> u64 {
    let mut z = seed ^ a.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ b.wrapping_mul(0xd1b5_4a32_d192_ed03);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// `value` modulo `below`, as an index.
fn index(value: u64, below: usize) -> usize {
    usize::try_from(value % below.max(1) as u64).unwrap_or(0)
}

impl Arena {
    fn thread(&self, me: usize, step: Step) -> Result<Tally, Failure> {
        let config = &self.config;
        let cpu = config.cpus.get(me % config.cpus.len().max(1)).copied().unwrap_or(0);
        let pinned = cpu::pin(cpu);
        let mut tally = Tally::default();
        let mut batch = 0u64;
        let mut found = [(0u32, 0u32); BATCH];
        loop {
            let here = (batch, me as u64);
            self.barrier.meet(|| {
                if pinned.is_err() {
                    self.over.store(true, Ordering::SeqCst);
                }
                // Usually soon enough for everybody who spins to have seen the barrier open.
                let ahead = mix(config.seed, batch, 77) % 60_000;
                self.start_tsc.store(clock::tsc().wrapping_add(ahead), Ordering::SeqCst);
            })?;
            if self.over.load(Ordering::SeqCst) {
                break;
            }
            self.skew(here);
            self.pass(step, here, &mut found);
            self.keep(me, &found);
            self.barrier.meet(|| ())?;
            if index(batch, config.test.threads().len()) == me {
                self.judge(&mut tally);
            }
            batch += 1;
        }
        pinned.map(|()| tally)
    }

    /// Waits for the agreed moment plus a random skew, but never for long: clocks are not under test here.
    fn skew(&self, (batch, me): (u64, u64)) {
        let random = mix(self.config.seed, batch, me);
        let extra = match random % 4 {
            0 => 0,
            1 => (random >> 8) % 300,
            _ => (random >> 8) % 6_000,
        };
        let start = self.start_tsc.load(Ordering::SeqCst).wrapping_add(extra);
        let first = clock::tsc();
        loop {
            let now = clock::tsc();
            if now >= start || now.wrapping_sub(first) > 70_000 {
                break;
            }
        }
    }

    /// Executes this thread's part of every instance.
    fn pass(&self, step: Step, (batch, me): (u64, u64), found: &mut [(u32, u32); BATCH]) {
        let shared = mix(self.config.seed, batch, 1000);
        let own = mix(self.config.seed, batch, me + 2000);
        // Threads go through the instances in one order, mostly in step, now and then a little or far apart.
        let stride = [1, 1, BATCH - 1, 129, 5].get(index(shared, 5)).copied().unwrap_or(1);
        let offset = match own % 8 {
            0 => index(own >> 8, 8),
            1 => index(own >> 8, BATCH),
            _ => 0,
        };
        let flavour = self.config.flavour;
        let step = match step {
            Step::WW(a, v, b, w) if self.config.reorder_stores => Step::WW(b, w, a, v),
            other => other,
        };
        for k in 0..BATCH {
            let i = (k * stride + offset) % BATCH;
            let at = |var| self.var(i, var);
            let result = match step {
                Step::W(a, v) => {
                    ops::store(flavour, at(a), v);
                    (0, 0)
                }
                Step::WW(a, v, b, w) => {
                    ops::store_store(flavour, at(a), v, at(b), w);
                    (0, 0)
                }
                Step::WR(a, v, b) => (ops::store_load(flavour, at(a), v, at(b)), 0),
                Step::RW(a, b, w) => (ops::load_store(flavour, at(a), at(b), w), 0),
                Step::RR(a, b) => ops::load_load(flavour, at(a), at(b)),
            };
            if let Some(slot) = found.get_mut(i) {
                *slot = result;
            }
        }
    }

    /// The variable of an instance.
    fn var(&self, instance: usize, var: Var) -> &std::sync::atomic::AtomicU32 {
        let slot = instance * STRIDE / 4;
        let word = match (self.config.layout, var) {
            (_, Var::X) => slot,
            (Layout::SamePage, Var::Y) => slot + STRIDE / 8,
            (Layout::SeparatePages, Var::Y) => slot + PAGES_PER_VAR * WORDS_PER_PAGE,
        };
        // In range: BATCH slots fill PAGES_PER_VAR pages, and there are twice as many.
        &self.vars.words()[word]
    }

    fn keep(&self, me: usize, found: &[(u32, u32); BATCH]) {
        let Some(registers) = self.registers.get(me) else { return };
        for ((a, b), pair) in found.iter().zip(registers.words().chunks_exact(2)) {
            if let [first, second] = pair {
                first.store(*a, Ordering::Relaxed);
                second.store(*b, Ordering::Relaxed);
            }
        }
    }

    /// Classifies a finished batch, clears the variables, and decides whether there is another one.
    fn judge(&self, tally: &mut Tally) {
        let config = &self.config;
        for i in 0..BATCH {
            let mut r = [0u32; MAX_THREADS];
            let mut next = 0;
            for (step, registers) in config.test.threads().iter().zip(&self.registers) {
                let loads = match step {
                    Step::W(..) | Step::WW(..) => 0,
                    Step::WR(..) | Step::RW(..) => 1,
                    Step::RR(..) => 2,
                };
                for word in registers.words().iter().skip(2 * i).take(loads) {
                    if let Some(slot) = r.get_mut(next) {
                        *slot = word.load(Ordering::Relaxed);
                    }
                    next += 1;
                }
            }
            let (x, y) = (self.var(i, Var::X), self.var(i, Var::Y));
            let o = Outcome { r, x: x.load(Ordering::Relaxed), y: y.load(Ordering::Relaxed) };
            tally.count(config.test.classify(config.flavour, &o), o);
            x.store(0, Ordering::Relaxed);
            y.store(0, Ordering::Relaxed);
        }
        let done = self.judged.fetch_add(BATCH as u64, Ordering::SeqCst) + BATCH as u64;
        let late = self.began.elapsed() >= config.slice && done >= config.min_iterations;
        if late || done >= config.max_iterations {
            self.over.store(true, Ordering::SeqCst);
        }
    }
}
