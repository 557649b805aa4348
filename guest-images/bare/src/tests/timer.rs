//! `timer`: the local APIC's timer on every CPU at once: `mode=deadline` (default), `oneshot` or `periodic`, `count=`
//! interrupts of `period_us=`. No interrupt may come early (deadline), and each must come once.

use super::wait::count;
use crate::apic::{LVT_TIMER, TIMER_DIVIDE, TIMER_INITIAL, TSC_DEADLINE};
use crate::console::Line;
use crate::env::{Env, Failure, Page, bad};
use crate::{boot, machine, smp};
use bare_support::stats::Histogram;
use core::sync::atomic::Ordering;

const VECTOR: u8 = 0x41;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    OneShot = 0,
    Periodic = 1,
    Deadline = 2,
}

struct Plan {
    mode: Mode,
    count: u64,
    period_us: u64,
    /// Timer ticks per microsecond for the modes that count bus clocks; 1 GHz unless `timer_mhz=` says otherwise.
    mhz: u64,
}

fn plan(env: &Env) -> Result<Plan, Failure> {
    let mode = match env.cmdline.text("mode") {
        None | Some("deadline") => Mode::Deadline,
        Some("oneshot") => Mode::OneShot,
        Some("periodic") => Mode::Periodic,
        Some(_) => return Err(bad("mode= must be deadline, oneshot or periodic")),
    };
    Ok(Plan {
        mode,
        count: env.number("count", 100, 1 << 32)?,
        period_us: env.number("period_us", 1000, 1_000_000)?,
        mhz: env.number("timer_mhz", 1000, 4000)?,
    })
}

pub fn run(env: &Env, out: &mut Line) -> Result<bool, Failure> {
    let plan = plan(env)?;
    smp::all(env, job, &[])?;
    let early: u64 = smp::reports(env, 0).sum();
    let wrong: u64 = smp::reports(env, 1).sum();
    out.add("count", plan.count);
    out.add("period_us", plan.period_us);
    out.add("early", early);
    out.add("wrong", wrong);
    for (i, key) in [(2, "late_min_ns"), (3, "late_p50_ns"), (4, "late_p99_ns"), (5, "late_max_ns")] {
        out.add(key, env.ns(smp::reports(env, i).max().unwrap_or(0)));
    }
    Ok(early == 0 && wrong == 0)
}

fn job(env: &Env, cpu: usize, _: &'static [Page]) -> Result<(), Failure> {
    let plan = plan(env)?;
    let period = plan.period_us * env.khz / 1000;
    let initial = u32::try_from(plan.period_us * plan.mhz).map_err(|_| bad("period_us="))?;
    let start_count = count(cpu, VECTOR);
    let last = || boot::cpu_blocks[cpu % boot::MAX_CPUS].interrupt_tsc.load(Ordering::Relaxed);
    let mut late = Histogram::new();
    let mut early = 0;
    smp::barrier(env, cpu)?;
    env.apic.write(LVT_TIMER, (plan.mode as u32) << 17 | u32::from(VECTOR));
    env.apic.write(TIMER_DIVIDE, 0b1011);
    let mut due = machine::tsc() + period;
    if plan.mode == Mode::Periodic {
        env.apic.write(TIMER_INITIAL, initial);
    }
    for i in 1..=plan.count {
        match plan.mode {
            Mode::Deadline => {
                due = machine::tsc() + period;
                machine::wrmsr(TSC_DEADLINE, due);
            }
            Mode::OneShot => {
                due = machine::tsc() + period;
                env.apic.write(TIMER_INITIAL, initial);
            }
            Mode::Periodic => {}
        }
        while count(cpu, VECTOR) < start_count + i {
            machine::halt();
        }
        let came = last();
        // The other two modes run on another clock, whose frequency is only assumed.
        early += u64::from(plan.mode == Mode::Deadline && came < due);
        late.add(came.saturating_sub(due));
        due += period;
    }
    env.apic.write(LVT_TIMER, 1 << 16);
    env.apic.write(TIMER_INITIAL, 0);
    // A periodic timer may have fired once more before it was masked.
    let extra = count(cpu, VECTOR) - start_count - plan.count;
    smp::report(cpu, 0, early);
    smp::report(cpu, 1, if plan.mode == Mode::Periodic { 0 } else { extra });
    let found = [late.min(), late.percentile(50), late.percentile(99), late.max()];
    found.iter().enumerate().for_each(|(i, v)| smp::report(cpu, i + 2, *v));
    Ok(())
}
