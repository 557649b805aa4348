//! `ipi`: ping-pong between CPU 0 and `peer=` (the last CPU) by fixed IPIs, timed with the TSC. `idle=halt` (default)
//! waits in HLT with interrupts off at CPL 3; `idle=spin` takes them while CPL 3 runs.
//! `ipimodes`: every destination form of the ICR reaches exactly the CPUs that it names.

use super::wait::{Idle, Waiter, count};
use crate::apic::Shorthand;
use crate::console::Line;
use crate::env::{Env, Failure, Page, bad};
use crate::{machine, smp};
use bare_support::cast::{apic_id, index};
use bare_support::stats::Histogram;

const PING: u8 = 0x50;
const MODES: u8 = 0x60;

fn parameters(env: &Env) -> Result<(usize, u64), Failure> {
    let last = (env.cpus - 1) as u64;
    let peer = env.cmdline.number("peer", last).map_err(|_| bad("peer="))?;
    if peer > last {
        return Err(bad("peer= is no CPU"));
    }
    Ok((index(peer), env.number("iterations", 1000, 1 << 32)?))
}

pub fn run(env: &Env, out: &mut Line) -> Result<bool, Failure> {
    let (peer, iterations) = parameters(env)?;
    let before = (count(0, PING), count(peer, PING));
    smp::all(env, ping_pong, &[])?;
    let got = (count(0, PING) - before.0, count(peer, PING) - before.1);
    let result = |i: usize| smp::slot(0).results[i].load(core::sync::atomic::Ordering::Relaxed);
    out.add("peer", peer);
    out.add("iterations", iterations);
    out.add("idle", Idle::of(env)?.name());
    for (i, key) in ["rtt_min_ns", "rtt_p50_ns", "rtt_p99_ns", "rtt_max_ns"].iter().enumerate() {
        out.add(key, env.ns(result(i)));
    }
    out.add("received0", got.0);
    out.add("received_peer", got.1);
    // One interrupt per request, none lost and none twice; a CPU that pings itself counts its own only.
    Ok(got == (iterations, iterations))
}

fn ping_pong(env: &Env, cpu: usize, _: &'static [Page]) -> Result<(), Failure> {
    let (peer, iterations) = parameters(env)?;
    let start = count(cpu, PING);
    smp::barrier(env, cpu)?;
    if cpu != 0 && cpu != peer {
        return Ok(());
    }
    let mut waiter = Waiter::new(env, cpu, Idle::of(env)?);
    let mut times = Histogram::new();
    for i in 1..=iterations {
        if cpu == 0 {
            let sent = machine::tsc();
            env.apic.ipi(apic_id(peer), PING);
            waiter.until("waited in vain for the IPI of its peer", || count(0, PING) >= start + i)?;
            times.add(machine::tsc().saturating_sub(sent));
        } else {
            waiter.until("waited in vain for the IPI of CPU 0", || count(cpu, PING) >= start + i)?;
            env.apic.ipi(0, PING);
        }
    }
    if cpu == 0 {
        let found = [times.min(), times.percentile(50), times.percentile(99), times.max()];
        found.iter().enumerate().for_each(|(i, v)| smp::report(0, i, *v));
    }
    Ok(())
}

pub fn run_modes(env: &Env, out: &mut Line) -> Result<bool, Failure> {
    let rounds = env.number("rounds", 20, 1 << 20)?;
    let mut before = [[0; 4]; crate::boot::MAX_CPUS];
    for (cpu, row) in before.iter_mut().enumerate() {
        (0u8..).zip(row.iter_mut()).for_each(|(i, n)| *n = count(cpu, MODES + i));
    }
    smp::all(env, modes, &[])?;
    let senders = env.cpus as u64;
    // Physical: one from each CPU; all but self: one from each other; all: one from each; self: its own.
    let expected = [senders * rounds, (senders - 1) * rounds, senders * rounds, rounds];
    let mut wrong = 0u64;
    for (cpu, row) in before.iter().enumerate().take(env.cpus) {
        for (i, (was, want)) in (0u8..).zip(row.iter().zip(expected)) {
            wrong += u64::from(count(cpu, MODES + i) - was != want);
        }
    }
    out.add("rounds", rounds);
    out.add("wrong", wrong);
    Ok(wrong == 0)
}

/// The CPUs send in turn, and each waits until all targets have counted: interrupts of one vector never merge.
fn modes(env: &Env, cpu: usize, _: &'static [Page]) -> Result<(), Failure> {
    let rounds = env.number("rounds", 20, 1 << 20)?;
    let mut waiter = Waiter::new(env, cpu, Idle::Spin);
    for turn in (0..rounds).flat_map(|_| 0..env.cpus) {
        for (mode, vector) in (MODES..).take(4).enumerate() {
            let mut targets = [0u64; crate::boot::MAX_CPUS];
            targets.iter_mut().enumerate().for_each(|(c, n)| *n = count(c, vector));
            smp::barrier(env, cpu)?;
            if turn == cpu {
                match mode {
                    0 => (0..env.cpus).for_each(|to| env.apic.ipi(apic_id(to), vector)),
                    1 => env.apic.ipi_to(Shorthand::Others, vector),
                    2 => env.apic.ipi_to(Shorthand::All, vector),
                    _ => env.apic.ipi_to(Shorthand::Me, vector),
                }
                for (to, was) in targets.iter().enumerate().take(env.cpus) {
                    let named = match mode {
                        1 => to != cpu,
                        3 => to == cpu,
                        _ => true,
                    };
                    waiter.until("sent an IPI that did not arrive", || {
                        count(to, vector) >= was + u64::from(named)
                    })?;
                }
            }
            // The others have their interrupts on and take what comes while they wait here.
            smp::barrier(env, cpu)?;
        }
    }
    Ok(())
}
