//! `loop`: adds one to word 0 of each of `pages=` pages, in order, for `seconds=` or for ever. At any instant all values
//! of a range are equal but for one step down, so whoever stops, moves or saves the guest can check its memory;
//! the guest checks too. Each CPU has a range of its own; `shared=1` gives all one range, a pass each in turn. A heartbeat
//! line comes every second, or every `beat=` milliseconds; with `disk=` the first CPU writes a number to that disk with each
//! heartbeat, and looks at old ones.

use crate::console::Line;
use crate::disk::Diary;
use crate::env::{Env, Failure, Page, bad};
use crate::{machine, say, smp};
use bare_support::cast::index;
use core::sync::atomic::Ordering;

struct Plan {
    pages: u64,
    seconds: u64,
    /// Microseconds between two heartbeats.
    beat: u64,
    shared: bool,
}

fn plan(env: &Env) -> Result<Plan, Failure> {
    let number = |key, default, what| env.cmdline.number(key, default).map_err(|_| bad(what));
    Ok(Plan {
        pages: env.number("pages", 64, 1 << 22)?,
        seconds: number("seconds", 0, "seconds=")?,
        beat: number("beat", 1000, "beat=")?.clamp(1, 1_000_000) * 1000,
        shared: number("shared", 0, "shared=")? != 0,
    })
}

pub fn run(env: &Env, out: &mut Line) -> Result<bool, Failure> {
    let plan = plan(env)?;
    let ranges = if plan.shared { 1 } else { env.cpus as u64 };
    // The first page holds the stop flag and whose turn it is.
    let pages = env.pages(1 + plan.pages * ranges)?;
    let base = pages.as_ptr().addr() + 4096;
    say!("BARE loop BEGIN base={base:#x} pages={} ranges={ranges} cpus={}", plan.pages, env.cpus);
    smp::all(env, job, pages)?;
    let passes: u64 = smp::reports(env, 0).sum();
    let least = smp::reports(env, 0).min().unwrap_or(0);
    let wrong: u64 = smp::reports(env, 1).sum();
    out.add("pages", plan.pages);
    out.add("shared", u8::from(plan.shared));
    out.add("passes", passes);
    out.add("least", least);
    out.add("wrong", wrong);
    Ok(wrong == 0 && least > 0)
}

fn job(env: &Env, cpu: usize, area: &'static [Page]) -> Result<(), Failure> {
    let plan = plan(env)?;
    let count = index(plan.pages);
    let (head, rest) = area.split_first().ok_or(bad("no page"))?;
    let first = if plan.shared { 0 } else { cpu * count };
    let range = rest.get(first..first + count).ok_or(bad("too few pages"))?;
    let (stop, turn) = (&head.0[0], &head.0[8]);
    let cpus = env.cpus as u64;
    let (mut passes, mut wrong, mut beats) = (0, 0, 0);
    let mut diary = if cpu == 0 { Diary::open(env)? } else { None };
    smp::barrier(env, cpu)?;
    let start = machine::tsc();
    loop {
        if plan.shared {
            let mine =
                || turn.load(Ordering::Acquire) % cpus == cpu as u64 || stop.load(Ordering::Relaxed) != 0;
            env.wait(cpu, "waited in vain for its turn", mine)?;
        }
        // With shared pages the one whose turn it is finishes its pass, so that the range is even at the end.
        if stop.load(Ordering::Relaxed) != 0 {
            break;
        }
        let expected = if plan.shared { turn.load(Ordering::Relaxed) } else { passes };
        for page in range {
            let value = page.first().load(Ordering::Relaxed);
            wrong += u64::from(value != expected);
            page.first().store(value + 1, Ordering::Relaxed);
        }
        passes += 1;
        if plan.shared {
            turn.fetch_add(1, Ordering::Release);
        }
        smp::report(cpu, 0, passes);
        smp::report(cpu, 1, wrong);
        let us = env.us(machine::tsc().saturating_sub(start));
        if cpu == 0 && us / plan.beat > beats {
            beats = us / plan.beat;
            let mut disk = 0;
            if let Some(diary) = &mut diary {
                diary.go_on(env)?;
                disk = diary.entries;
                wrong += core::mem::take(&mut diary.wrong);
                smp::report(0, 1, wrong);
            }
            let seconds = us / 1_000_000;
            let least = smp::reports(env, 0).min().unwrap_or(0);
            let wrong: u64 = smp::reports(env, 1).sum();
            say!("BARE loop BEAT seconds={seconds} passes={passes} least={least} disk={disk} wrong={wrong}");
        }
        if cpu == 0 && plan.seconds != 0 && us >= plan.seconds * 1_000_000 {
            stop.store(1, Ordering::SeqCst);
        }
    }
    Ok(())
}
