//! `counter`: every CPU adds `iterations=` times one to the same word by LOCK XADD; the sum must be exact.
//! Between two increments a CPU pauses `gap=` times, so that the CPUs meet. `unlocked=1` leaves LOCK out, to see the test fail.

use crate::console::Line;
use crate::env::{Env, Failure, Page, bad};
use crate::{machine, smp};
use core::sync::atomic::Ordering;

pub fn run(env: &Env, out: &mut Line) -> Result<bool, Failure> {
    let iterations = env.number("iterations", 100_000, 1 << 40)?;
    let pages = env.pages(1)?;
    let start = machine::tsc();
    smp::all(env, job, pages)?;
    let ticks = machine::tsc().saturating_sub(start);
    let sum = pages.first().ok_or(bad("no page"))?.first().load(Ordering::SeqCst);
    let expected = iterations * env.cpus as u64;
    out.add("iterations", iterations);
    out.add("sum", sum);
    out.add("expected", expected);
    out.add("us", env.us(ticks));
    Ok(sum == expected)
}

fn job(env: &Env, cpu: usize, pages: &'static [Page]) -> Result<(), Failure> {
    let iterations = env.number("iterations", 100_000, 1 << 40)?;
    let word = pages.first().ok_or(bad("no page"))?.first();
    smp::barrier(env, cpu)?;
    let gap = env.cmdline.number("gap", 4).map_err(|_| bad("gap="))?;
    let locked = env.cmdline.text("unlocked").is_none();
    for _ in 0..iterations {
        if locked {
            word.fetch_add(1, Ordering::SeqCst);
        } else {
            word.store(word.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
        (0..gap).for_each(|_| core::hint::spin_loop());
    }
    Ok(())
}
