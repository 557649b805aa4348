//! `triple` and `reset`: the two other ways in which a machine ends; `cpu=` does it (default 0).

use crate::console::Line;
use crate::env::{Env, Failure, Page, bad};
use crate::{machine, say, smp};
use bare_support::cast::index;

fn culprit(env: &Env) -> Result<usize, Failure> {
    let cpu = env.cmdline.number("cpu", 0).map_err(|_| bad("cpu="))?;
    if cpu < env.cpus as u64 { Ok(index(cpu)) } else { Err(bad("cpu= is no CPU")) }
}

pub fn triple(env: &Env, _: &mut Line) -> Result<bool, Failure> {
    say!("BARE triple BEGIN cpu={}", culprit(env)?);
    smp::all(env, |env, cpu, _: &'static [Page]| end(env, cpu, machine::triple_fault), &[])?;
    Ok(false)
}

pub fn reset(env: &Env, _: &mut Line) -> Result<bool, Failure> {
    say!("BARE reset BEGIN cpu={}", culprit(env)?);
    smp::all(env, |env, cpu, _: &'static [Page]| end(env, cpu, machine::reset), &[])?;
    Ok(false)
}

fn end(env: &Env, cpu: usize, how: fn() -> !) -> Result<(), Failure> {
    if cpu == culprit(env)? { how() } else { Ok(()) }
}
