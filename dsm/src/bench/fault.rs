//! What one remote page fault costs, over the floor measured in the same run.

use super::floor::{LocalFaults, Samples, local_faults, nanos, round_trips};
use super::group::{Group, Launcher};
use super::peer::{Order, Tuning};
use super::work::Work;
use super::{BenchError, io_step};
use crate::addr::{HomeRange, MemberId, PAGE_SIZE};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::TcpListener;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

/// Between two runs.
const REST: Duration = Duration::from_millis(500);
/// The peer answers an order within this time or is given up.
const PATIENCE: Duration = Duration::from_secs(60);

/// How much to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultOptions {
    /// Pages of each run, at least 10; half of them have their home here, half at the peer.
    pub pages: u32,
    /// Runs; the figures are medians over them.
    pub runs: u32,
    /// The members' knobs.
    pub tuning: Tuning,
}

impl Default for FaultOptions {
    fn default() -> Self {
        FaultOptions { pages: 2000, runs: 5, tuning: Tuning::default() }
    }
}

/// The floor, in microseconds, p50.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Floor {
    /// A fault on an absent page that a thread of the process fills at once.
    pub uffd_us: f64,
    /// The same for a write: before it asks anybody the kernel makes a page ready that it then does not need.
    pub uffd_write_us: f64,
    /// 64 bytes there, 4096 back, over TCP on loopback between two processes.
    pub rtt_us: f64,
    /// A write to a protected page that a thread of the process unprotects at once.
    pub wp_us: f64,
}

/// One kind of fault, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Median.
    pub p50_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
}

/// p50 over the floor: uffd (for a write uffd_write, for an upgrade wp) plus one round trip.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ratios {
    /// Of a read fault.
    pub read: f64,
    /// Of a write fault.
    pub write: f64,
    /// Of an upgrade.
    pub upgrade: f64,
}

/// The result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FaultReport {
    /// Name of the benchmark: `fault`.
    pub bench: String,
    /// The floor.
    pub floor: Floor,
    /// A read of a page that the peer has modified.
    pub read: Cost,
    /// A write to a page that the peer has modified.
    pub write: Cost,
    /// A write to a page that both have.
    pub upgrade: Cost,
    /// Over the floor.
    pub ratio: Ratios,
    /// Whether each member had a processor of its own.
    pub is_pinned: bool,
    /// Whether the processors were kept from sleeping.
    pub is_awake: bool,
}

impl fmt::Display for FaultReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Floor { uffd_us, uffd_write_us, rtt_us, wp_us } = self.floor;
        writeln!(
            f,
            "floor    local fault: read {uffd_us:.1} us, write {uffd_write_us:.1} us, write-protected {wp_us:.1} us; \
             round trip {rtt_us:.1} us"
        )?;
        writeln!(f, "{:<8} {:>9} {:>9} {:>9} {:>7}", "fault", "p50 us", "p99 us", "floor us", "ratio")?;
        for (name, cost, floor, ratio) in [
            ("read", self.read, uffd_us + rtt_us, self.ratio.read),
            ("write", self.write, uffd_write_us + rtt_us, self.ratio.write),
            ("upgrade", self.upgrade, wp_us + rtt_us, self.ratio.upgrade),
        ] {
            writeln!(f, "{name:<8} {:>9.1} {:>9.1} {floor:>9.1} {ratio:>7.2}", cost.p50_us, cost.p99_us)?;
        }
        if self.is_pinned && !self.is_awake {
            writeln!(f, "the processors may sleep between two steps: /dev/cpu_dma_latency can't be written")?;
        }
        Ok(())
    }
}

/// The value below which `percent` of the samples lie, in microseconds.
pub(super) fn percentile(samples: &mut Samples, percent: usize) -> f64 {
    samples.sort_unstable();
    let at = (samples.len().saturating_sub(1) * percent) / 100;
    // Nanoseconds of a page fault are exact in an f64.
    #[allow(clippy::cast_precision_loss)]
    let ns = samples.get(at).copied().unwrap_or(0) as f64;
    ns / 1000.0
}

pub(super) fn median(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// What one run measured.
#[derive(Clone, Copy)]
struct Run {
    floor: Floor,
    costs: [Cost; 3],
    ratios: [f64; 3],
}

/// Starts a second process and measures. `progress` is told of every run that has ended.
pub fn run(
    opts: FaultOptions,
    launcher: Launcher<'_>,
    mut progress: impl FnMut(u32, u32),
) -> Result<FaultReport, BenchError> {
    if opts.pages < 10 || opts.runs == 0 {
        return Err(BenchError::Options("at least 10 pages and one run are needed"));
    }
    let mut is_awake = opts.tuning.is_pinned;
    let half = u64::from(opts.pages / 2) * PAGE_SIZE;
    let memory = [
        HomeRange { start: 0, len: half, home: MemberId(0) },
        HomeRange { start: half, len: half, home: MemberId(1) },
    ];
    let mut group = Group::start(2, true, &memory, opts.tuning, launcher)?;
    let listener = TcpListener::bind("127.0.0.1:0").map_err(io_step("can't listen on loopback"))?;
    let addr = listener.local_addr().map_err(io_step("can't listen on loopback"))?;
    let peer = group.peers.first_mut().ok_or(BenchError::Options("there is no peer"))?;
    peer.ask(&Order::Echo(addr), PATIENCE)?;
    let (mut stream, _) = listener.accept().map_err(io_step("the peer did not connect"))?;

    let mut runs = Vec::new();
    for n in 0..opts.runs {
        // A virtual machine whose processors never sleep may soon use up what its host allows it.
        if n > 0 && opts.tuning.is_pinned {
            std::thread::sleep(REST);
        }
        let awake = opts.tuning.is_pinned.then(super::cpus::Awake::start);
        let count = usize::try_from(opts.pages).unwrap_or(usize::MAX);
        let (mut rtt, mut local) = (Samples::new(), LocalFaults::default());
        // The peer writes, so that it has every page. The floor is measured before anybody takes them from it: a page that is
        // asked for right after it came counts as contended and is held, which is no cost of a fault.
        let mut peer_writes = |group: &mut Group, value| -> Result<(), BenchError> {
            let pages = u64::from(opts.pages / 2) * 2;
            group.all(|_| Work::Fill { gpa: 0, pages, value }, PATIENCE)?;
            rtt.extend(round_trips(&mut stream, count)?);
            local.extend(local_faults(opts.pages)?);
            Ok(())
        };
        let value = u64::from(n) * 2 + 1;
        peer_writes(&mut group, value)?;
        let mut read = touch(&group, 0, 2 * half, false);
        let mut upgrade = touch(&group, 0, 2 * half, true);
        peer_writes(&mut group, value + 1)?;
        let mut write = touch(&group, 0, 2 * half, true);

        let floor = Floor {
            uffd_us: percentile(&mut local.read, 50),
            uffd_write_us: percentile(&mut local.write, 50),
            rtt_us: percentile(&mut rtt, 50),
            wp_us: percentile(&mut local.protected, 50),
        };
        let costs = [&mut read, &mut write, &mut upgrade]
            .map(|s| Cost { p50_us: percentile(s, 50), p99_us: percentile(s, 99) });
        let [r, w, u] = costs.map(|c| c.p50_us);
        let floors = [floor.uffd_us, floor.uffd_write_us, floor.wp_us].map(|local| local + floor.rtt_us);
        runs.push(Run { floor, costs, ratios: [r / floors[0], w / floors[1], u / floors[2]] });
        is_awake &= awake.is_some_and(|awake| awake.is_on());
        progress(n + 1, opts.runs);
    }
    Ok(report(&runs, opts.tuning.is_pinned, is_awake))
}

/// Times one access to the first word of every page, here and there: neighbours would come along.
pub(super) fn touch(group: &Group, first: u64, bytes: u64, write: bool) -> Samples {
    let Some(own) = &group.own else { return Vec::new() };
    let memory = own.dsm.memory();
    let mut samples = Vec::new();
    for page in super::scattered(bytes / PAGE_SIZE) {
        let gpa = first + page * PAGE_SIZE;
        let Some(word) = memory.u64_at(gpa) else { continue };
        let start = Instant::now();
        if write {
            word.store(99, SeqCst);
        } else {
            word.load(SeqCst);
        }
        samples.push(nanos(start));
    }
    samples
}

fn report(runs: &[Run], is_pinned: bool, is_awake: bool) -> FaultReport {
    let middle = |f: &dyn Fn(&Run) -> f64| median(&mut runs.iter().map(f).collect::<Vec<_>>());
    let cost =
        |n: usize| Cost { p50_us: middle(&|r| r.costs[n].p50_us), p99_us: middle(&|r| r.costs[n].p99_us) };
    FaultReport {
        bench: "fault".into(),
        floor: Floor {
            uffd_us: middle(&|r| r.floor.uffd_us),
            uffd_write_us: middle(&|r| r.floor.uffd_write_us),
            rtt_us: middle(&|r| r.floor.rtt_us),
            wp_us: middle(&|r| r.floor.wp_us),
        },
        read: cost(0),
        write: cost(1),
        upgrade: cost(2),
        ratio: Ratios {
            read: middle(&|r| r.ratios[0]),
            write: middle(&|r| r.ratios[1]),
            upgrade: middle(&|r| r.ratios[2]),
        },
        is_pinned,
        is_awake,
    }
}
