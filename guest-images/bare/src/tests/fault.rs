//! `fault`: what a page costs when another CPU had it. CPU `owner=` (0) and CPU `user=` (the last) share `pages=` pages;
//! the user's accesses are timed one by one: first write of a page that nobody touched (`zero`), read of a page that the
//! owner wrote (`read`), write of a page that both read (`upgrade`), write of a page that the owner wrote (`write`).
//! On one member all of them measure the cache.

use crate::console::Line;
use crate::env::{Env, Failure, Page, bad};
use crate::{machine, smp};
use bare_support::cast::index;
use bare_support::stats::Histogram;
use core::sync::atomic::Ordering;

const STEPS: [&str; 4] = ["zero", "read", "upgrade", "write"];

struct Plan {
    pages: u64,
    owner: usize,
    user: usize,
}

fn plan(env: &Env) -> Result<Plan, Failure> {
    let cpu = |key, default| match env.cmdline.number(key, default) {
        Ok(cpu) if cpu < env.cpus as u64 => Ok(index(cpu)),
        _ => Err(bad("owner= or user= is no CPU")),
    };
    Ok(Plan {
        pages: env.number("pages", 256, 1 << 20)?,
        owner: cpu("owner", 0)?,
        user: cpu("user", env.cpus as u64 - 1)?,
    })
}

pub fn run(env: &Env, out: &mut Line) -> Result<bool, Failure> {
    let plan = plan(env)?;
    let pages = env.pages(plan.pages)?;
    smp::all(env, job, pages)?;
    let of = |i: usize| smp::slot(plan.user).results[i].load(Ordering::Relaxed);
    out.add("pages", plan.pages);
    for (i, step) in STEPS.iter().enumerate() {
        use core::fmt::Write;
        // The line is long enough for all four.
        let _ = write!(out, " {step}_p50_ns={} {step}_p99_ns={}", env.ns(of(2 * i)), env.ns(of(2 * i + 1)));
    }
    let wrong = of(8);
    out.add("wrong", wrong);
    Ok(wrong == 0)
}

/// Times `access` on each page in an order without a stride (so that no prefetch helps); returns p50 and p99.
fn timed(pages: &[Page], mut access: impl FnMut(&Page)) -> (u64, u64) {
    let mut times = Histogram::new();
    for page in scattered(pages) {
        let start = machine::tsc();
        access(page);
        times.add(machine::tsc().saturating_sub(start));
    }
    (times.percentile(50), times.percentile(99))
}

/// All pages, once each, in a scattered order: multiples of a step that shares no factor with their number.
fn scattered(pages: &[Page]) -> impl Iterator<Item = &Page> {
    let count = pages.len().max(1);
    let coprime = |step: &usize| (2..=*step).all(|d| step % d != 0 || count % d != 0);
    let step = (count * 5 / 13..).find(|s| *s > 0 && coprime(s)).unwrap_or(1);
    (0..pages.len()).filter_map(move |i| pages.get(i * step % count))
}

fn job(env: &Env, cpu: usize, pages: &'static [Page]) -> Result<(), Failure> {
    let plan = plan(env)?;
    let (owner, user) = (cpu == plan.owner, cpu == plan.user);
    let mut wrong = 0u64;
    let note = |step: usize, (p50, p99): (u64, u64)| {
        smp::report(cpu, 2 * step, p50);
        smp::report(cpu, 2 * step + 1, p99);
    };
    smp::barrier(env, cpu)?;
    if user {
        note(0, timed(pages, |p| p.first().store(1, Ordering::Relaxed)));
    }
    smp::barrier(env, cpu)?;
    if owner {
        pages.iter().for_each(|p| p.first().store(2, Ordering::Relaxed));
    }
    smp::barrier(env, cpu)?;
    if user {
        note(1, timed(pages, |p| wrong += u64::from(p.first().load(Ordering::Relaxed) != 2)));
        note(2, timed(pages, |p| p.first().store(3, Ordering::Relaxed)));
    }
    smp::barrier(env, cpu)?;
    if owner {
        wrong += pages.iter().map(|p| u64::from(p.first().swap(4, Ordering::Relaxed) != 3)).sum::<u64>();
    }
    smp::barrier(env, cpu)?;
    if user {
        note(3, timed(pages, |p| p.first().store(5, Ordering::Relaxed)));
    }
    smp::barrier(env, cpu)?;
    if owner {
        wrong += pages.iter().map(|p| u64::from(p.first().load(Ordering::Relaxed) != 5)).sum::<u64>();
    }
    // Both have a count when owner and user differ; the user's slot is the one that is read.
    smp::slot(plan.user).results[8].fetch_add(wrong, Ordering::Relaxed);
    smp::barrier(env, cpu)
}
