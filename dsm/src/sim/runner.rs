//! Many seeds, one after the other, on as many threads as there are processors; each run is alone in its thread.

use super::plan::Plan;
use super::world::{Tally, World};
use crate::seeded::SeededFault;
use serde::{Deserialize, Serialize};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

/// Lines of a failing run that are shown unless all are asked for.
const TAIL: usize = 60;
/// Failures after which no new seed is begun.
const ENOUGH: usize = 5;

/// What to simulate.
#[derive(Clone, Debug)]
pub struct SimOptions {
    /// Number of seeds.
    pub seeds: u64,
    /// The first of them.
    pub first_seed: u64,
    /// Threads that run seeds; 0 for one per processor.
    pub workers: usize,
    /// Keep every line of the story of every run that fails, and of the run itself if there is only one seed.
    pub trace: bool,
    /// A bug to switch on; only with the cargo feature `seeded-faults`, otherwise it is ignored.
    pub fault: Option<SeededFault>,
    /// End at the first failure.
    pub stop_at_first: bool,
}

impl Default for SimOptions {
    fn default() -> Self {
        SimOptions { seeds: 1, first_seed: 0, workers: 0, trace: false, fault: None, stop_at_first: false }
    }
}

/// A run in which something went wrong.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SimFailure {
    /// The seed; it replays the run.
    pub seed: u64,
    /// What went wrong.
    pub what: String,
    /// How it came to that: the last lines about the page, or all if asked for.
    pub trace: String,
    /// The command that replays the run and tells all of it.
    pub replay: String,
}

/// How often things happened, over all runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SimTally {
    /// Accesses by simulated threads that succeeded.
    pub accesses: u64,
    /// Faults that they took.
    pub faults: u64,
    /// Frames delivered.
    pub frames: u64,
    /// Connections that broke and were made again.
    pub resumed: u64,
    /// Events that the protocol handled.
    pub handled: u64,
    /// Pages that were kept although somebody waited.
    pub holds: u64,
    /// Commands between whose steps the world went on.
    pub pauses: u64,
    /// Copies that met an entry in the page table.
    pub exists: u64,
    /// Kernel calls that had to be made again.
    pub again: u64,
    /// Sockets that were full.
    pub full: u64,
    /// Pages asked for along with one that was missed.
    pub aheads: u64,
    /// Pages asked for because they follow one that was missed.
    pub hints: u64,
    /// How often a home declined that.
    pub declined: u64,
    /// Frames with messages about several pages.
    pub runs: u64,
    /// Times that contended pages were let go together.
    pub yields: u64,
    /// Pages that were asked to go.
    pub evictions: u64,
    /// Times that pages got other homes.
    #[serde(default)]
    pub rehomed: u64,
    /// Times that a member rested or was about to wait for another.
    pub rests: u64,
    /// Runs in which a member crashed, a connection broke or a forged frame was sent.
    pub fatal: u64,
}

impl SimTally {
    fn add(&mut self, t: &Tally, is_fatal: bool) {
        self.accesses += t.accesses;
        self.faults += t.faults;
        self.frames += t.frames;
        self.handled += t.handled;
        self.holds += t.holds;
        self.pauses += t.pauses;
        self.exists += t.exists;
        self.again += t.again;
        self.full += t.full;
        self.aheads += t.aheads;
        self.yields += t.yields;
        self.rests += t.rests;
        self.resumed += t.resumed;
        self.hints += t.hints;
        self.declined += t.declined;
        self.runs += t.runs;
        self.evictions += t.evictions;
        self.rehomed += t.rehomed;
        self.fatal += u64::from(is_fatal);
    }
}

/// What came out.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SimReport {
    /// The first seed.
    pub first_seed: u64,
    /// Runs made; fewer than asked for after several failures.
    pub seeds: u64,
    /// Runs that failed, ascending.
    pub failures: Vec<SimFailure>,
    /// How often things happened.
    pub tally: SimTally,
    /// Duration in seconds.
    pub seconds: f64,
    /// The story of the run, if there was only one and it was asked for.
    #[serde(skip_serializing_if = "String::is_empty", default)]
    pub trace: String,
}

impl SimReport {
    /// Whether all runs were good.
    pub fn is_clean(&self) -> bool {
        self.failures.is_empty()
    }
}

fn replay_command(seed: u64, fault: Option<SeededFault>) -> String {
    let fault = fault.map(|f| format!(" --fault {f}")).unwrap_or_default();
    format!("spanvm sim --seeds 1 --seed {seed} --trace{fault}")
}

#[derive(Default)]
struct Shared {
    failures: Vec<SimFailure>,
    tally: SimTally,
    trace: String,
}

/// Simulates; see [`run_with`].
pub fn run(options: &SimOptions) -> SimReport {
    run_with(options, |_| ())
}

/// Simulates and tells `progress`, from any thread, how many runs are done.
pub fn run_with(options: &SimOptions, progress: impl Fn(u64) + Sync) -> SimReport {
    let start = Instant::now();
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let workers = if options.workers == 0 { processors } else { options.workers };
    let workers = workers.min(usize::try_from(options.seeds).unwrap_or(usize::MAX)).max(1);
    let next = AtomicU64::new(0);
    let done = AtomicU64::new(0);
    let is_over = AtomicBool::new(false);
    let shared = Mutex::new(Shared::default());
    let work = || {
        switch_on(options.fault);
        while !is_over.load(Ordering::Relaxed) {
            let n = next.fetch_add(1, Ordering::Relaxed);
            if n >= options.seeds {
                break;
            }
            let seed = options.first_seed.wrapping_add(n);
            let is_enough = one(seed, options, &shared);
            if is_enough {
                is_over.store(true, Ordering::Relaxed);
            }
            progress(done.fetch_add(1, Ordering::Relaxed) + 1);
        }
        switch_on(None);
    };
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(work);
        }
    });
    let mut shared = shared.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    shared.failures.sort_by_key(|f| f.seed);
    SimReport {
        first_seed: options.first_seed,
        seeds: done.into_inner(),
        failures: shared.failures,
        tally: shared.tally,
        seconds: start.elapsed().as_secs_f64(),
        trace: shared.trace,
    }
}

/// Runs one seed; a failing one twice, the second time to tell its story. Says whether there were failures enough.
fn one(seed: u64, options: &SimOptions, shared: &Mutex<Shared>) -> bool {
    let wants_story = options.trace && options.seeds == 1;
    let Some(world) = World::new(seed, |sched| Plan::random(&sched.rng), wants_story) else { return false };
    let verdict = world.run();
    let failure = verdict.map(|verdict| {
        let told = if wants_story { None } else { tell(seed) };
        let told = told.as_ref().unwrap_or(&world);
        let (page, most) = if options.trace { (None, usize::MAX) } else { (verdict.page, TAIL) };
        let trace = told.trace.tail(page, most);
        SimFailure { seed, what: verdict.what, trace, replay: replay_command(seed, options.fault) }
    });
    let mut shared = shared.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    shared.tally.add(&world.tally(), world.plan.fatal().is_some());
    if wants_story {
        shared.trace = format!("{:#?}\n{}", world.plan, world.trace.tail(None, usize::MAX));
    }
    shared.failures.extend(failure);
    shared.failures.len() >= if options.stop_at_first { 1 } else { ENOUGH }
}

fn tell(seed: u64) -> Option<World> {
    let world = World::new(seed, |sched| Plan::random(&sched.rng), true)?;
    world.run();
    Some(world)
}

#[cfg(feature = "seeded-faults")]
fn switch_on(fault: Option<SeededFault>) {
    crate::seeded::switch_on(fault);
}

#[cfg(not(feature = "seeded-faults"))]
fn switch_on(_: Option<SeededFault>) {}
