//! `pages`: each of `pages=` pages is counted up by every CPU `rounds=` times under a lock in the page. The value
//! is kept at both ends and in the middle of the page. Nobody may see one go down, or the three differ under the lock.
//! `unlocked=1` leaves the lock out, to see the test fail.
//! `private`: each CPU writes `pages=` pages of its own, `rounds=` times, and must find what it wrote before.

use crate::console::Line;
use crate::env::{Env, Failure, Page, bad};
use crate::{machine, smp};
use bare_support::cast::index;
use core::sync::atomic::{AtomicU64, Ordering};

/// Words of a page that hold its value.
const COPIES: [usize; 3] = [0, 255, 511];
/// Word of a page that holds its lock.
const LOCK: usize = 64;

struct Plan {
    pages: u64,
    rounds: u64,
}

fn plan(env: &Env) -> Result<Plan, Failure> {
    Ok(Plan { pages: env.number("pages", 16, 1 << 22)?, rounds: env.number("rounds", 100, 1 << 32)? })
}

/// Takes the lock of a page for `cpu`.
pub fn lock(env: &Env, cpu: usize, word: &AtomicU64) -> Result<(), Failure> {
    let mine = cpu as u64 + 1;
    env.wait(cpu, "waited in vain for the lock of a page", || {
        word.load(Ordering::Relaxed) == 0
            && word.compare_exchange(0, mine, Ordering::Acquire, Ordering::Relaxed).is_ok()
    })
}

pub fn shared(env: &Env, out: &mut Line) -> Result<bool, Failure> {
    let plan = plan(env)?;
    let notes = plan.pages.div_ceil(512) * env.cpus as u64;
    let pages = env.pages(plan.pages + notes)?;
    let start = machine::tsc();
    smp::all(env, count_up, pages)?;
    let ticks = machine::tsc().saturating_sub(start);
    let expected = plan.rounds * env.cpus as u64;
    let wrong = pages
        .iter()
        .take(index(plan.pages))
        .filter(|p| COPIES.iter().any(|&w| p.0[w].load(Ordering::SeqCst) != expected))
        .count();
    let down: u64 = smp::reports(env, 0).sum();
    let torn: u64 = smp::reports(env, 1).sum();
    out.add("pages", plan.pages);
    out.add("rounds", plan.rounds);
    out.add("wrong", wrong);
    out.add("went_down", down);
    out.add("torn", torn);
    out.add("us", env.us(ticks));
    Ok(wrong == 0 && down == 0 && torn == 0)
}

fn count_up(env: &Env, cpu: usize, area: &'static [Page]) -> Result<(), Failure> {
    let plan = plan(env)?;
    let count = index(plan.pages);
    let (pages, notes) = area.split_at_checked(count).ok_or(bad("too few pages"))?;
    let mine = notes.len() / env.cpus;
    let notes = notes.get(cpu * mine..(cpu + 1) * mine).ok_or(bad("too few pages"))?;
    let locked = env.cmdline.text("unlocked").is_none();
    let (mut down, mut torn) = (0, 0);
    smp::barrier(env, cpu)?;
    // Each CPU starts elsewhere, so that they meet in all orders.
    let first = cpu * count / env.cpus;
    for i in (0..plan.rounds).flat_map(|_| (0..count).map(|i| (first + i) % count)) {
        let (page, seen) = (&pages[i], &notes[i / 512].0[i % 512]);
        let glimpse = page.first().load(Ordering::Acquire);
        down += u64::from(glimpse < seen.load(Ordering::Relaxed));
        if locked {
            lock(env, cpu, &page.0[LOCK])?;
        }
        let value = page.first().load(Ordering::Relaxed);
        down += u64::from(value < glimpse);
        torn += u64::from(COPIES.iter().any(|&w| page.0[w].load(Ordering::Relaxed) != value));
        COPIES.iter().for_each(|&w| page.0[w].store(value + 1, Ordering::Relaxed));
        page.0[LOCK].store(0, Ordering::Release);
        seen.store(value + 1, Ordering::Relaxed);
    }
    smp::report(cpu, 0, down);
    smp::report(cpu, 1, torn);
    Ok(())
}

pub fn private(env: &Env, out: &mut Line) -> Result<bool, Failure> {
    let plan = plan(env)?;
    let pages = env.pages(plan.pages * env.cpus as u64)?;
    let start = machine::tsc();
    smp::all(env, rewrite, pages)?;
    let ticks = machine::tsc().saturating_sub(start);
    let wrong: u64 = smp::reports(env, 0).sum();
    out.add("pages", plan.pages);
    out.add("rounds", plan.rounds);
    out.add("wrong", wrong);
    out.add("us", env.us(ticks));
    Ok(wrong == 0)
}

fn rewrite(env: &Env, cpu: usize, area: &'static [Page]) -> Result<(), Failure> {
    let plan = plan(env)?;
    let count = index(plan.pages);
    let pages = area.get(cpu * count..(cpu + 1) * count).ok_or(bad("too few pages"))?;
    let mut wrong = 0;
    smp::barrier(env, cpu)?;
    let tag = (cpu as u64 + 1) << 48;
    for round in 0..plan.rounds {
        for (page, number) in pages.iter().zip(0u64..) {
            let mark = |round: u64| if round == 0 { 0 } else { tag | number << 24 | round };
            for word in &page.0 {
                wrong += u64::from(word.load(Ordering::Relaxed) != mark(round));
                word.store(mark(round + 1), Ordering::Relaxed);
            }
        }
    }
    smp::report(cpu, 0, wrong);
    Ok(())
}
