//! N threads x M increments of one counter give exactly N x M, by locked instructions and by a mutex.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Barrier, Mutex};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::context::{Context, Note};
use crate::failure::{Failure, expect_eq};
use crate::options::Inject;
use crate::sys::shared::Shared;
use crate::sys::{cpu, ops};

/// Fewest and most increments per thread; between them time decides.
const MIN_PER_THREAD: u64 = 500;
const MAX_PER_THREAD: u64 = 3_000_000;
/// Increments between two looks at the clock.
const STRIDE: u64 = 50;

/// One way to add one to a counter.
type Increment = fn(&AtomicU32);

/// The ways, with their names.
const WAYS: [(&str, Increment); 3] = [
    ("lock_inc", ops::lock_inc),
    ("lock_xadd", |a| {
        ops::lock_xadd(a);
    }),
    ("lock_cmpxchg", |a| {
        let mut old = a.load(Ordering::Relaxed);
        loop {
            let found = ops::lock_cmpxchg(a, old, old.wrapping_add(1));
            if found == old {
                break;
            }
            old = found;
        }
    }),
];

/// An increment that is not atomic, to show that the check notices.
fn torn(a: &AtomicU32) {
    let old = a.load(Ordering::Relaxed);
    for _ in 0..20 {
        std::hint::spin_loop();
    }
    if old % 64 == 0 {
        // On a machine with more work than CPUs the two halves must also meet other threads.
        cpu::yield_now();
    }
    a.store(old.wrapping_add(1), Ordering::Relaxed);
}

/// Runs the check.
pub fn run(context: &Context) {
    let slice = context.slice(WAYS.len() + 1);
    for (name, way) in WAYS {
        let way = if context.injects(Inject::TornAtomics) { torn } else { way };
        context.sub(name, || {
            let memory = Shared::anonymous(1)?;
            let counter = memory.words().first().ok_or_else(|| Failure::Other("no memory".into()))?;
            let made = hammer(context, slice, || way(counter))?;
            verdict(made, u64::from(counter.load(Ordering::SeqCst)))
        });
    }
    context.sub("mutex", || {
        let counter = Mutex::new(0u64);
        let made = hammer(context, slice, || {
            // A poisoned lock still guards the counter.
            *counter.lock().unwrap_or_else(|p| p.into_inner()) += 1;
        })?;
        verdict(made, counter.into_inner().unwrap_or_else(|p| p.into_inner()))
    });
}

/// The threads and what they did together.
struct Made {
    threads: u64,
    increments: u64,
}

/// Calls `step` from one thread per CPU, at least two and at most eight, until the time is over.
fn hammer(context: &Context, slice: Duration, step: impl Fn() + Sync) -> Result<Made, Failure> {
    let threads = context.topology().cpus.len().clamp(2, 8);
    let total = AtomicU64::new(0);
    let gate = Barrier::new(threads);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|i| {
                let (gate, total, step) = (&gate, &total, &step);
                scope.spawn(move || {
                    let pinned = cpu::pin(context.topology().cpu_for(i).id);
                    gate.wait();
                    pinned?;
                    let start = Instant::now();
                    let mut done = 0;
                    while done < MIN_PER_THREAD || (done < MAX_PER_THREAD && start.elapsed() < slice) {
                        for _ in 0..STRIDE {
                            step();
                        }
                        done += STRIDE;
                    }
                    total.fetch_add(done, Ordering::SeqCst);
                    Ok(())
                })
            })
            .collect();
        workers
            .into_iter()
            .try_for_each(|w| w.join().unwrap_or_else(|_| Err(Failure::Other("a thread panicked".into()))))
    })?;
    Ok(Made { threads: threads as u64, increments: total.into_inner() })
}

fn verdict(made: Made, counted: u64) -> Result<Note, Failure> {
    let Made { threads, increments } = made;
    expect_eq(format!("counter after {increments} increments by {threads} threads"), increments, counted)?;
    Ok(Note::with_data(
        format!("{increments} increments by {threads} threads, exact"),
        json!({ "threads": threads, "increments": increments }),
    ))
}
