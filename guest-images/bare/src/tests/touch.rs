//! `touch`: CPU `writer=` (0) fills `mib=` of memory with a pattern that depends on the address, then CPU `reader=` (the
//! last) checks it, so that every page moves when the two live on different members. `words=` per page (512 = all).

use crate::console::Line;
use crate::env::{Env, Failure, Page, bad};
use crate::{machine, smp};
use bare_support::cast::index;
use core::sync::atomic::Ordering;

struct Plan {
    mib: u64,
    writer: usize,
    reader: usize,
    step: usize,
}

fn plan(env: &Env) -> Result<Plan, Failure> {
    let cpu = |key, default| match env.cmdline.number(key, default) {
        Ok(cpu) if cpu < env.cpus as u64 => Ok(index(cpu)),
        _ => Err(bad("writer= or reader= is no CPU")),
    };
    let words = env.number("words", 512, 512)?;
    Ok(Plan {
        mib: env.number("mib", 16, 1 << 14)?,
        writer: cpu("writer", 0)?,
        reader: cpu("reader", env.cpus as u64 - 1)?,
        step: 512 / index(words),
    })
}

pub fn run(env: &Env, out: &mut Line) -> Result<bool, Failure> {
    let plan = plan(env)?;
    let pages = env.pages(plan.mib * 256)?;
    smp::all(env, job, pages)?;
    let of = |cpu: usize, i: usize| smp::slot(cpu).results[i].load(Ordering::Relaxed);
    let (write, read, wrong) = (of(plan.writer, 0), of(plan.reader, 1), of(plan.reader, 2));
    out.add("mib", plan.mib);
    out.add("writer", plan.writer);
    out.add("reader", plan.reader);
    out.add("write_us", env.us(write));
    out.add("read_us", env.us(read));
    out.add("write_ns_page", env.ns(write) / (plan.mib * 256));
    out.add("read_ns_page", env.ns(read) / (plan.mib * 256));
    out.add("wrong", wrong);
    Ok(wrong == 0)
}

/// A value that says where it belongs, and never 0.
const fn pattern(page: u64, word: u64) -> u64 {
    (page << 9 | word).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1
}

fn job(env: &Env, cpu: usize, pages: &'static [Page]) -> Result<(), Failure> {
    let plan = plan(env)?;
    let words = || {
        pages
            .iter()
            .zip(0u64..)
            .flat_map(|(p, n)| p.0.iter().zip(0u64..).step_by(plan.step).map(move |w| (n, w)))
    };
    smp::barrier(env, cpu)?;
    if cpu == plan.writer {
        let start = machine::tsc();
        words().for_each(|(n, (word, w))| word.store(pattern(n, w), Ordering::Relaxed));
        smp::report(cpu, 0, machine::tsc().saturating_sub(start));
    }
    smp::barrier(env, cpu)?;
    if cpu == plan.reader {
        let start = machine::tsc();
        let wrong = words().filter(|(n, (word, w))| word.load(Ordering::Relaxed) != pattern(*n, *w)).count();
        smp::report(cpu, 1, machine::tsc().saturating_sub(start));
        smp::report(cpu, 2, wrong as u64);
    }
    smp::barrier(env, cpu)
}
