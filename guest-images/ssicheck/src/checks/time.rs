//! No clock steps back when it is handed from CPU to CPU.
//!
//! `handover`: threads take turns through shared memory; each one reads the clock after it has seen the reading of the
//! one before. `race`: all threads at once keep the highest reading seen; nobody may read less than what was there before
//! its own reading began.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::context::{Context, Note, PATIENCE};
use crate::failure::Failure;
use crate::options::Inject;
use crate::sys::clock::Clock;
use crate::sys::shared::Shared;
use crate::sys::{cpu, futex};

const CLOCKS: usize = Clock::ALL.len();
/// Fewest and most hand-overs; between them time decides.
const MIN_TURNS: u32 = 20;
const MAX_TURNS: u32 = 200_000;
/// Sleeps and spins end when this is set as the turn.
const OVER: u32 = u32::MAX;

/// Runs the check.
pub fn run(context: &Context) {
    context.sub("handover", || handover(context, context.slice(2)));
    for clock in Clock::ALL {
        let name = format!("race_{}", clock.name());
        context.sub(name, || race(context, clock, context.slice(2 * CLOCKS)));
    }
}

/// Reads `clock`, or with the fault put in, a second less on one of the CPUs.
fn read(context: &Context, clock: Clock, thread: usize) -> Result<u64, Failure> {
    let late = if context.injects(Inject::LateClock) && thread == 1 { 1_000_000_000 } else { 0 };
    Ok(clock.read()?.saturating_sub(late))
}

fn stepped_back(clock: Clock, context: &Context, thread: usize, before: u64, now: u64) -> Failure {
    let cpu = context.topology().cpu_for(thread);
    Failure::Other(format!(
        "{} stepped back by {} on CPU {} (node {}): {before} was read earlier on another CPU, now {now}",
        clock.name(),
        before - now,
        cpu.id,
        cpu.node
    ))
}

/// Threads of a round: one per CPU, at least two, at most eight.
fn threads(context: &Context) -> usize {
    context.topology().cpus.len().clamp(2, 8)
}

/// Runs `body(i)` in threads on different CPUs; the first failure counts.
fn on_all(
    context: &Context,
    body: impl Fn(usize) -> Result<u64, Failure> + Sync,
) -> Result<(u64, usize), Failure> {
    let n = threads(context);
    std::thread::scope(|scope| {
        let body = &body;
        let workers: Vec<_> = (0..n)
            .map(|i| {
                scope.spawn(move || {
                    cpu::pin(context.topology().cpu_for(i).id)?;
                    body(i)
                })
            })
            .collect();
        let results: Vec<_> = workers
            .into_iter()
            .map(|w| w.join().unwrap_or_else(|_| Err(Failure::Other("a thread panicked".into()))))
            .collect();
        let mut sum = 0;
        for result in results {
            sum += result?;
        }
        Ok((sum, n))
    })
}

fn handover(context: &Context, slice: Duration) -> Result<Note, Failure> {
    let memory = Shared::anonymous(2)?;
    let turn = memory.words().first().ok_or_else(|| Failure::Other("no memory".into()))?;
    // The readings are on the page after the turn.
    let (_, last) = memory.longs().split_at(crate::sys::shared::PAGE / 8);
    let n = u32::try_from(threads(context)).unwrap_or(2);
    let start = Instant::now();
    let (turns, n) = on_all(context, |i| {
        let me = u32::try_from(i).unwrap_or(0);
        let mut mine = 0;
        let result = loop {
            let now = match await_turn(turn, n, me) {
                Ok(OVER) => break Ok(mine),
                Ok(now) => now,
                Err(failure) => break Err(failure),
            };
            if let Err(failure) = take_turn(context, i, last) {
                break Err(failure);
            }
            mine += 1;
            let over = now + 1 >= MAX_TURNS || (now >= MIN_TURNS && start.elapsed() > slice);
            turn.store(if over { OVER } else { now + 1 }, Ordering::Release);
            futex::wake(turn, i32::MAX);
        };
        // Whoever fails ends the round for all.
        turn.store(OVER, Ordering::Release);
        futex::wake(turn, i32::MAX);
        result
    })?;
    let text = format!("{turns} hand-overs among {n} threads, {CLOCKS} clocks each");
    Ok(Note::with_data(text, json!({ "handovers": turns, "threads": n })))
}

/// Reads all clocks and compares them with the readings of the thread before.
fn take_turn(context: &Context, thread: usize, last: &[AtomicU64]) -> Result<(), Failure> {
    for (clock, slot) in Clock::ALL.into_iter().zip(last) {
        let before = slot.load(Ordering::Acquire);
        let now = read(context, clock, thread)?;
        if now < before {
            return Err(stepped_back(clock, context, thread, before, now));
        }
        slot.store(now, Ordering::Release);
    }
    Ok(())
}

/// Waits until the turn number is this thread's, or [`OVER`].
fn await_turn(turn: &AtomicU32, n: u32, me: u32) -> Result<u32, Failure> {
    let start = Instant::now();
    loop {
        for _ in 0..200 {
            let now = turn.load(Ordering::Acquire);
            if now == OVER || now % n == me {
                return Ok(now);
            }
            std::hint::spin_loop();
        }
        let now = turn.load(Ordering::Acquire);
        if now != OVER && now % n != me {
            futex::wait(turn, now, Duration::from_millis(200));
        }
        if start.elapsed() > PATIENCE {
            return Err(Failure::timeout(format!("turn of thread {me}, stuck at turn {now}"), PATIENCE));
        }
    }
}

fn race(context: &Context, clock: Clock, slice: Duration) -> Result<Note, Failure> {
    let memory = Shared::anonymous(1)?;
    let highest = memory.longs().first().ok_or_else(|| Failure::Other("no memory".into()))?;
    let start = Instant::now();
    let (readings, n) = on_all(context, |i| {
        let mut count = 0;
        while count < 200 || (count < 2_000_000 && start.elapsed() < slice) {
            for _ in 0..20 {
                let before = highest.load(Ordering::SeqCst);
                let now = read(context, clock, i)?;
                if now < before {
                    return Err(stepped_back(clock, context, i, before, now));
                }
                highest.fetch_max(now, Ordering::SeqCst);
                count += 1;
            }
        }
        Ok(count)
    })?;
    let text = format!("{readings} readings by {n} threads");
    Ok(Note::with_data(text, json!({ "readings": readings, "threads": n })))
}
