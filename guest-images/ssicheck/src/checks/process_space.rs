//! One process table: a process on any CPU is in /proc, and can be signalled, stopped, killed and waited for from any
//! other.

use std::sync::atomic::Ordering;

use crate::checks::procfs;
use crate::checks::remote::{on_cpu, pair_name};
use crate::context::{Context, Note, wait_until};
use crate::failure::{Failure, expect_eq};
use crate::sys::cpu;
use crate::sys::process::{self, Ended, Task};
use crate::sys::shared::Shared;
use crate::topology::Cpu;

/// Runs the check.
pub fn run(context: &Context) {
    for (a, b) in context.topology().pairs() {
        let pair = pair_name((a, b));
        context.sub(format!("visible {pair}"), || visible(a, b));
        context.sub(format!("signals {pair}"), || signals(a, b));
        context.sub(format!("stop_and_continue {pair}"), || stop_and_continue(a, b));
        context.sub(format!("killed_by_another {pair}"), || killed_by_another(a, b));
        context.sub(format!("exit_status {pair}"), || exit_status(a, b));
    }
    context.sub("all_in_one_table", || all_in_one_table(context));
}

/// A process that computes on a CPU and says how far it is.
struct Busy {
    task: Task,
    memory: Shared,
}

/// Words of [`Busy::memory`]: its own PID, signals handled, steps done.
const PID: usize = 0;
const SIGNALS: usize = 1;
const STEPS: usize = 2;

impl Busy {
    /// Starts one on `there` and waits until it runs.
    fn start(there: Cpu) -> Result<Busy, Failure> {
        let memory = Shared::anonymous(1)?;
        let task = process::spawn(there.id, || {
            process::count_sigusr1();
            let [pid, signals, steps, ..] = memory.words() else { return 1 };
            pid.store(std::process::id(), Ordering::SeqCst);
            // It is killed by whoever started it, or with it.
            loop {
                for _ in 0..5_000 {
                    std::hint::spin_loop();
                }
                let handled = process::handled();
                if signals.load(Ordering::Relaxed) != handled {
                    signals.store(handled, Ordering::SeqCst);
                }
                steps.fetch_add(1, Ordering::SeqCst);
            }
        })?;
        let busy = Busy { task, memory };
        wait_until(&format!("start of a process on CPU {}", there.id), || Ok(busy.word(STEPS) > 0))?;
        Ok(busy)
    }

    fn word(&self, index: usize) -> u32 {
        self.memory.words().get(index).map_or(0, |w| w.load(Ordering::SeqCst))
    }

    /// Waits until it has computed on.
    fn advances(&self, when: &str) -> Result<(), Failure> {
        let before = self.word(STEPS);
        wait_until(
            &format!("progress of process {} {when}", self.task.pid),
            || Ok(self.word(STEPS) != before),
        )
    }
}

fn visible(a: Cpu, b: Cpu) -> Result<Note, Failure> {
    cpu::pin(a.id)?;
    let busy = Busy::start(b)?;
    let pid = busy.task.pid;
    expect_eq("PID that the process sees", pid.unsigned_abs(), busy.word(PID))?;
    expect_eq(format!("/proc lists process {pid}"), true, procfs::listed(pid)?)?;
    let stat = procfs::stat(pid)?;
    let me = std::process::id();
    expect_eq(format!("parent of process {pid}"), me, stat.parent.unsigned_abs())?;
    expect_eq(format!("CPU of process {pid} in /proc/PID/stat"), b.id, stat.processor)?;
    expect_eq(format!("affinity of process {pid}"), vec![b.id], cpu::affinity(pid)?)?;
    expect_eq(format!("Cpus_allowed_list of {pid}"), b.id.to_string(), procfs::allowed_list(pid)?)?;
    // The other way round: the child's node sees the parent.
    let seen = on_cpu(b, "looking for the parent", || {
        Ok((process::parent().unsigned_abs(), procfs::listed(process::parent())?))
    })?;
    expect_eq("parent as seen from the other CPU", (me, true), seen)?;
    Ok(format!("process {pid} on CPU {} is in /proc", b.id).into())
}

fn signals(a: Cpu, b: Cpu) -> Result<Note, Failure> {
    cpu::pin(a.id)?;
    let busy = Busy::start(b)?;
    let count = 10;
    for n in 1..=count {
        process::kill(busy.task.pid, libc::SIGUSR1)?;
        // One at a time: standard signals do not queue.
        wait_until(&format!("SIGUSR1 number {n} handled on CPU {}", b.id), || Ok(busy.word(SIGNALS) >= n))?;
        expect_eq("signals handled", n, busy.word(SIGNALS))?;
    }
    Ok(format!("{count} signals handled by a computing process").into())
}

fn stop_and_continue(a: Cpu, b: Cpu) -> Result<Note, Failure> {
    cpu::pin(a.id)?;
    let mut busy = Busy::start(b)?;
    let pid = busy.task.pid;
    process::kill(pid, libc::SIGSTOP)?;
    expect_eq("after SIGSTOP", Ended::Stopped(libc::SIGSTOP), busy.task.wait_change(true)?)?;
    expect_eq("state in /proc/PID/stat", 'T', procfs::stat(pid)?.state)?;
    let steps = busy.word(STEPS);
    std::thread::sleep(std::time::Duration::from_millis(20));
    expect_eq("steps while stopped", steps, busy.word(STEPS))?;
    process::kill(pid, libc::SIGCONT)?;
    busy.advances("after SIGCONT")?;
    Ok("stopped and continued".into())
}

fn killed_by_another(a: Cpu, b: Cpu) -> Result<Note, Failure> {
    cpu::pin(b.id)?;
    let mut busy = Busy::start(b)?;
    let pid = busy.task.pid;
    busy.advances("before it is killed")?;
    on_cpu(a, "killing a process", || process::kill(pid, libc::SIGKILL))?;
    expect_eq("end of the process", Ended::Killed(libc::SIGKILL), busy.task.wait_change(false)?)?;
    expect_eq(format!("/proc lists process {pid} after its end"), false, procfs::listed(pid)?)?;
    match process::kill(pid, 0) {
        Err(_) => Ok(format!("killed from CPU {}, reaped on CPU {}, gone from /proc", a.id, b.id).into()),
        Ok(()) => Err(Failure::Other(format!("process {pid} still takes signals after its end"))),
    }
}

fn exit_status(a: Cpu, b: Cpu) -> Result<Note, Failure> {
    cpu::pin(a.id)?;
    for code in [0, 1, 42, 255] {
        let mut task = process::spawn(b.id, || code)?;
        expect_eq("exit status", Ended::Exited(code), task.wait_change(false)?)?;
    }
    Ok("exit codes 0, 1, 42, 255 arrive".into())
}

/// A process on each CPU; each CPU's listing of /proc has them all.
fn all_in_one_table(context: &Context) -> Result<Note, Failure> {
    let cpus: Vec<Cpu> = context.topology().cpus.iter().copied().take(16).collect();
    let all = cpus.iter().map(|c| Busy::start(*c)).collect::<Result<Vec<_>, _>>()?;
    let pids: Vec<i32> = all.iter().map(|b| b.task.pid).collect();
    for cpu in &context.topology().spread {
        let missing = on_cpu(*cpu, "listing /proc", || {
            let mut missing = Vec::new();
            for pid in &pids {
                if !procfs::listed(*pid)? {
                    missing.push(*pid);
                }
            }
            Ok(missing)
        })?;
        expect_eq(format!("processes missing in /proc as CPU {} sees it", cpu.id), vec![], missing)?;
    }
    let boot_ids = context
        .topology()
        .spread
        .iter()
        .map(|cpu| {
            on_cpu(*cpu, "reading boot_id", || {
                let path = "/proc/sys/kernel/random/boot_id";
                crate::failure::During::during(std::fs::read_to_string(path), path)
            })
        })
        .collect::<Result<Vec<_>, _>>()?;
    expect_eq(
        "boot_id on every CPU",
        vec![boot_ids.first().cloned(); boot_ids.len()],
        boot_ids.iter().cloned().map(Some).collect::<Vec<_>>(),
    )?;
    Ok(format!("{} processes seen from {} CPUs", pids.len(), boot_ids.len()).into())
}
