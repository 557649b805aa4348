//! What it takes to write to a page that many others read: one round of messages, however many they are.

use super::fault::{Cost, median, percentile, touch};
use super::floor::{Samples, fan_out, local_faults};
use super::group::{Group, Launcher};
use super::peer::{Order, Tuning};
use super::work::Work;
use super::{BenchError, float, io_step};
use crate::addr::{HomeRange, MemberId, PAGE_SIZE};
use crate::stats::DsmSnapshot;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

/// A process answers an order within this time or is given up.
const PATIENCE: Duration = Duration::from_secs(60);

/// How much to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FanoutOptions {
    /// Members that read a page, a process each, 1 to 63.
    pub sharers: u16,
    /// Pages per run.
    pub pages: u32,
    /// Runs; the figures are medians over them.
    pub runs: u32,
    /// Each member on a processor of its own as far as there are enough ([`super::cpus`]).
    pub is_pinned: bool,
}

impl Default for FanoutOptions {
    fn default() -> Self {
        FanoutOptions { sharers: 7, pages: 1000, runs: 5, is_pinned: true }
    }
}

/// The floor, in microseconds, p50.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Floor {
    /// A write to a protected page that a thread of the process unprotects at once.
    pub wp_us: f64,
    /// 48 bytes to one process and back.
    pub rtt_one_us: f64,
    /// 48 bytes to every one of the processes, then as many back from each.
    pub rtt_all_us: f64,
}

/// The result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FanoutReport {
    /// Name of the benchmark: `fanout`.
    pub bench: String,
    /// Members that read.
    pub sharers: u16,
    /// The floor.
    pub floor: Floor,
    /// A write to a page that one other member reads.
    pub one: Cost,
    /// A write to a page that all of them read.
    pub all: Cost,
    /// p50 of `all` over p50 of `one`.
    pub over_one: f64,
    /// Invalidations to each sharer per write. They leave together, so this is the number of rounds.
    pub rounds: f64,
    /// p50 of `all` over the floor: the write-protect fault and the round trips to all.
    pub ratio: f64,
    /// Whether the members were spread over the processors.
    pub is_pinned: bool,
}

impl fmt::Display for FanoutReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Floor { wp_us, rtt_one_us, rtt_all_us } = self.floor;
        writeln!(
            f,
            "floor    write-protect fault {wp_us:.1} us, round trip {rtt_one_us:.1} us, to all {rtt_all_us:.1} us"
        )?;
        writeln!(f, "{:<8} {:>9} {:>9} {:>9} {:>7}", "sharers", "p50 us", "p99 us", "floor us", "ratio")?;
        for (sharers, cost, rtt) in [(1, self.one, rtt_one_us), (self.sharers, self.all, rtt_all_us)] {
            let floor = wp_us + rtt;
            let Cost { p50_us, p99_us } = cost;
            writeln!(f, "{sharers:<8} {p50_us:>9.1} {p99_us:>9.1} {floor:>9.1} {:>7.2}", p50_us / floor)?;
        }
        write!(
            f,
            "{} sharers take {:.2} times one; message rounds: {:.2}",
            self.sharers, self.over_one, self.rounds
        )
    }
}

#[derive(Clone, Copy)]
struct Run {
    floor: Floor,
    costs: [Cost; 2],
    rounds: f64,
}

/// Starts a process per sharer and measures. `progress` is told of every run that has ended.
pub fn run(
    opts: FanoutOptions,
    launcher: Launcher<'_>,
    mut progress: impl FnMut(u32, u32),
) -> Result<FanoutReport, BenchError> {
    if !(1..64).contains(&opts.sharers) || opts.pages < 10 || opts.runs == 0 {
        return Err(BenchError::Options("1 to 63 sharers, at least 10 pages and one run are needed"));
    }
    let len = u64::from(opts.pages) * PAGE_SIZE;
    let runs_len = len.saturating_mul(u64::from(opts.runs));
    let memory = [HomeRange { start: 0, len: runs_len, home: MemberId(0) }];
    // One sharer and who asks it may both look for each other's words; eight members on two processors can't. And there the
    // scheduler often wakes all sharers on one processor while the other has nothing to do: they are spread over both.
    let tuning = Tuning { busy_poll: false, is_pinned: opts.is_pinned, ..Tuning::default() };
    let mut group = Group::start(opts.sharers + 1, true, &memory, tuning, launcher)?;
    let mut streams = bounces(&mut group)?;
    let mut runs = Vec::new();
    for n in 0..opts.runs {
        // Pages of its own for every run: those of the one before count as contended.
        runs.push(measure(opts, &mut group, &mut streams, u64::from(n) * len)?);
        progress(n + 1, opts.runs);
    }
    Ok(report(opts, &runs))
}

/// A stream to every process, which sends back what it gets.
fn bounces(group: &mut Group) -> Result<Vec<TcpStream>, BenchError> {
    let mut streams = Vec::new();
    for peer in &mut group.peers {
        let listener = TcpListener::bind("127.0.0.1:0").map_err(io_step("can't listen on loopback"))?;
        let addr = listener.local_addr().map_err(io_step("can't listen on loopback"))?;
        peer.ask(&Order::Bounce(addr), PATIENCE)?;
        let (stream, _) = listener.accept().map_err(io_step("a process did not connect"))?;
        stream.set_nodelay(true).map_err(io_step("can't use a stream to a process"))?;
        streams.push(stream);
    }
    Ok(streams)
}

fn measure(
    opts: FanoutOptions,
    group: &mut Group,
    streams: &mut [TcpStream],
    gpa: u64,
) -> Result<Run, BenchError> {
    let len = u64::from(opts.pages) * PAGE_SIZE;
    let count = usize::try_from(opts.pages).unwrap_or(usize::MAX);
    let mut wp = local_faults(opts.pages)?.protected;
    let mut rtt_all = fan_out(streams, count)?;
    let mut rtt_one = fan_out(streams.get_mut(..1).unwrap_or(&mut []), count)?;
    let mut one = write_shared(group, 1, gpa, len)?;
    let before = own_snapshot(group)?;
    let mut all = write_shared(group, usize::from(opts.sharers), gpa, len)?;
    let after = own_snapshot(group)?;
    // The floor again, so that a disturbance at one moment does not make it look high or low.
    rtt_all.extend(fan_out(streams, count)?);
    rtt_one.extend(fan_out(streams.get_mut(..1).unwrap_or(&mut []), count)?);
    wp.extend(local_faults(opts.pages)?.protected);
    let floor = Floor {
        wp_us: percentile(&mut wp, 50),
        rtt_one_us: percentile(&mut rtt_one, 50),
        rtt_all_us: percentile(&mut rtt_all, 50),
    };
    let costs = [&mut one, &mut all].map(|s| Cost { p50_us: percentile(s, 50), p99_us: percentile(s, 99) });
    let writes = float(u64::from(opts.pages) * u64::from(opts.sharers));
    let rounds = float(after.invalidations_sent - before.invalidations_sent) / writes;
    Ok(Run { floor, costs, rounds })
}

fn own_snapshot(group: &Group) -> Result<DsmSnapshot, BenchError> {
    let own = group.own.as_ref().ok_or(BenchError::Options("this process is no member"))?;
    Ok(own.dsm.snapshot())
}

/// This process writes every page, `sharers` others read it, and this process writes it again: how long that takes.
fn write_shared(group: &mut Group, sharers: usize, gpa: u64, len: u64) -> Result<Samples, BenchError> {
    touch(group, gpa, len, true);
    let order = Order::Work(Work::Sum { gpa, pages: len / PAGE_SIZE });
    for peer in group.peers.iter_mut().take(sharers) {
        peer.ask(&order, PATIENCE)?;
    }
    Ok(touch(group, gpa, len, true))
}

fn report(opts: FanoutOptions, runs: &[Run]) -> FanoutReport {
    let middle = |f: &dyn Fn(&Run) -> f64| median(&mut runs.iter().map(f).collect::<Vec<_>>());
    let cost =
        |n: usize| Cost { p50_us: middle(&|r| r.costs[n].p50_us), p99_us: middle(&|r| r.costs[n].p99_us) };
    FanoutReport {
        bench: "fanout".into(),
        sharers: opts.sharers,
        floor: Floor {
            wp_us: middle(&|r| r.floor.wp_us),
            rtt_one_us: middle(&|r| r.floor.rtt_one_us),
            rtt_all_us: middle(&|r| r.floor.rtt_all_us),
        },
        one: cost(0),
        all: cost(1),
        over_one: middle(&|r| r.costs[1].p50_us / r.costs[0].p50_us),
        rounds: middle(&|r| r.rounds),
        ratio: middle(&|r| r.costs[1].p50_us / (r.floor.wp_us + r.floor.rtt_all_us)),
        is_pinned: opts.is_pinned,
    }
}
