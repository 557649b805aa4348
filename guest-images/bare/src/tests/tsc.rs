//! `tsc`: all CPUs read the TSC in turn under a lock, `iterations=` times each; no reading may be below the one before,
//! whichever CPU took it.

use super::pages::lock;
use crate::console::Line;
use crate::env::{Env, Failure, Page, bad};
use crate::{machine, smp};
use core::sync::atomic::Ordering;

pub fn run(env: &Env, out: &mut Line) -> Result<bool, Failure> {
    let iterations = env.number("iterations", 5000, 1 << 32)?;
    let pages = env.pages(1)?;
    smp::all(env, job, pages)?;
    let steps: u64 = smp::reports(env, 0).sum();
    let worst = smp::reports(env, 1).max().unwrap_or(0);
    let handovers: u64 = smp::reports(env, 2).sum();
    out.add("iterations", iterations);
    out.add("handovers", handovers);
    out.add("steps_back", steps);
    out.add("worst_ns", env.ns(worst));
    // Without a change of CPU nothing was compared.
    Ok(steps == 0 && (handovers > 0 || env.cpus == 1))
}

fn job(env: &Env, cpu: usize, pages: &'static [Page]) -> Result<(), Failure> {
    let iterations = env.number("iterations", 5000, 1 << 32)?;
    let page = pages.first().ok_or(bad("no page"))?;
    let [word, last, who] = [0, 8, 9].map(|i| &page.0[i]);
    let (mut steps, mut worst, mut handovers) = (0, 0, 0);
    smp::barrier(env, cpu)?;
    for _ in 0..iterations {
        lock(env, cpu, word)?;
        let before = last.load(Ordering::Relaxed);
        let now = machine::tsc();
        last.store(now, Ordering::Relaxed);
        handovers += u64::from(who.swap(cpu as u64, Ordering::Relaxed) != cpu as u64);
        word.store(0, Ordering::Release);
        // Leave the lock to another CPU for a moment: only a change of CPU compares two counters.
        let patience = now.saturating_add(env.khz / 5);
        while env.cpus > 1 && who.load(Ordering::Relaxed) == cpu as u64 && machine::tsc() < patience {
            core::hint::spin_loop();
        }
        if now < before {
            steps += 1;
            worst = worst.max(before - now);
        }
    }
    smp::report(cpu, 0, steps);
    smp::report(cpu, 1, worst);
    smp::report(cpu, 2, handovers);
    Ok(())
}
