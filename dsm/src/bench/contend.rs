//! Members that all write to one page, and work on pages of their own in between: what the hold time does.

use super::fault::{median, percentile};
use super::floor::{local_faults, round_trips};
use super::group::{Group, Launcher};
use super::peer::{Order, Tuning};
use super::plot::{Chart, Line};
use super::work::{Outcome, Work};
use super::{BenchError, float, io_step};
use crate::addr::{HomeRange, MemberId, PAGE_SIZE};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::TcpListener;
use std::time::Duration;

/// A process answers an order within this time or is given up.
const PATIENCE: Duration = Duration::from_secs(60);
/// Hold times that are tried, in microseconds.
const HOLDS: [u64; 8] = [0, 20, 50, 100, 200, 500, 1000, 2000];
/// Pages with their home at each member; the first of all is the shared one, a member works on the last of its own.
const PAGES: u64 = 4;

/// How much to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContendOptions {
    /// The largest group, 2 to 16 members; every smaller one is measured as well.
    pub members: u16,
    /// Increments of a private word after each of the shared one.
    pub privately: u64,
    /// Time of each measurement, in milliseconds.
    pub millis: u64,
    /// Measurements of each kind; the figures are medians over them.
    pub runs: u32,
}

impl Default for ContendOptions {
    fn default() -> Self {
        ContendOptions { members: 4, privately: 100, millis: 400, runs: 3 }
    }
}

/// The floor.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Floor {
    /// Time per increment (and the private work after it) of a member that is alone, in microseconds.
    pub alone_us: f64,
    /// What the kernel takes for one move of a page: a local fault and a round trip with a page, in microseconds.
    pub move_us: f64,
}

/// One group with one hold time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// The hold time in microseconds; `None` for the adaptive one.
    pub hold_us: Option<u64>,
    /// Shared increments per second, all members together.
    pub per_s: f64,
    /// Increments of the slowest member over those of the fastest.
    pub fairness: f64,
    /// Increments per move of the page.
    pub per_move: f64,
}

/// One group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// Members.
    pub members: u16,
    /// The adaptive hold, which is what members use.
    pub adaptive: Point,
    /// Fixed holds.
    pub fixed: Vec<Point>,
}

/// The result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ContendReport {
    /// Name of the benchmark: `contend`.
    pub bench: String,
    /// Increments of a private word after each of the shared one.
    pub privately: u64,
    /// The floor.
    pub floor: Floor,
    /// The groups, smallest first.
    pub groups: Vec<Series>,
    /// The least fair of the groups with the adaptive hold.
    pub fairness: f64,
    /// Time per increment of the smallest group, adaptive hold, over that of a member alone.
    pub ratio: f64,
}

impl fmt::Display for ContendReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Floor { alone_us, move_us } = self.floor;
        writeln!(f, "floor    alone {alone_us:.2} us per increment, move of a page {move_us:.1} us")?;
        writeln!(
            f,
            "{:>7} {:>9} {:>12} {:>10} {:>9}",
            "members", "hold us", "increments/s", "per move", "fairness"
        )?;
        for group in &self.groups {
            for point in [&group.adaptive].into_iter().chain(&group.fixed) {
                let hold = point.hold_us.map_or("adaptive".into(), |us| us.to_string());
                let Point { per_s, fairness, per_move, .. } = point;
                writeln!(f, "{:>7} {hold:>9} {per_s:>12.0} {per_move:>10.1} {fairness:>9.2}", group.members)?;
            }
        }
        write!(
            f,
            "time per increment over that of a member alone: {:.2}; fairness at least {:.2}",
            self.ratio, self.fairness
        )
    }
}

impl ContendReport {
    /// Throughput against hold time, as a PNG.
    pub fn plot(&self) -> std::io::Result<Vec<u8>> {
        let line = |g: &Series| {
            let fixed = g.fixed.iter().filter_map(|p| {
                let hold = u32::try_from(p.hold_us?).ok()?;
                Some((f64::from(hold), p.per_s))
            });
            let name = format!("{} members", g.members);
            let last = f64::from(u32::try_from(HOLDS[HOLDS.len() - 1]).unwrap_or(1));
            let adaptive = [(5.0, g.adaptive.per_s), (last, g.adaptive.per_s)];
            [
                Line { name: name.clone(), points: fixed.collect() },
                Line { name: format!("{name}, adaptive"), points: adaptive.to_vec() },
            ]
        };
        let chart = Chart {
            title: "increments of one shared page".into(),
            x: "hold time in us".into(),
            y: "increments/s".into(),
            lines: self.groups.iter().flat_map(line).collect(),
        };
        chart.png()
    }
}

/// Starts the groups, one after the other, and measures. `progress` is told of every measurement that has ended.
pub fn run(
    opts: ContendOptions,
    launcher: Launcher<'_>,
    mut progress: impl FnMut(u32, u32),
) -> Result<ContendReport, BenchError> {
    if !(2..=16).contains(&opts.members) || opts.millis == 0 || opts.runs == 0 {
        return Err(BenchError::Options("2 to 16 members, at least one millisecond and one run are needed"));
    }
    let all = u32::from(opts.members - 1) * u32::try_from(HOLDS.len() + 1).unwrap_or(0);
    let mut done = 0;
    let floor = measure_floor(opts, launcher)?;
    let mut groups = Vec::new();
    for members in 2..=opts.members {
        let mut point = |hold| {
            let point = measure(opts, members, hold, launcher);
            done += 1;
            progress(done, all);
            point
        };
        let adaptive = point(None)?;
        let fixed = HOLDS.into_iter().map(|hold| point(Some(hold))).collect::<Result<_, _>>()?;
        groups.push(Series { members, adaptive, fixed });
    }
    let us = groups.first().map_or(0.0, |g| 1e6 / g.adaptive.per_s);
    Ok(ContendReport {
        bench: "contend".into(),
        privately: opts.privately,
        floor,
        fairness: groups.iter().map(|g| g.adaptive.fairness).fold(1.0, f64::min),
        ratio: us / floor.alone_us,
        groups,
    })
}

fn memory(members: u16) -> Vec<HomeRange> {
    let range = |n: u16| HomeRange {
        start: u64::from(n) * PAGES * PAGE_SIZE,
        len: PAGES * PAGE_SIZE,
        home: MemberId(n),
    };
    (0..members).map(range).collect()
}

fn work(opts: ContendOptions, member: MemberId) -> Work {
    let own = (u64::from(member.0) * PAGES + PAGES - 1) * PAGE_SIZE;
    Work::Contend { shared: 0, own, privately: opts.privately, millis: opts.millis }
}

fn count(outcome: &Outcome) -> u64 {
    match outcome {
        Outcome::Number(n) => *n,
        Outcome::Values(values) => values.iter().sum(),
    }
}

fn measure_floor(opts: ContendOptions, launcher: Launcher<'_>) -> Result<Floor, BenchError> {
    let mut group = Group::start(2, false, &memory(2), Tuning::default(), launcher)?;
    let mut alone = Vec::new();
    for _ in 0..opts.runs {
        let peer = group.peers.first_mut().ok_or(BenchError::Options("there is no peer"))?;
        let order = Order::Work(work(opts, MemberId(0)));
        match peer.ask(&order, PATIENCE)? {
            super::peer::Answer::Outcome(outcome) => {
                alone.push(float(opts.millis) * 1000.0 / float(count(&outcome).max(1)));
            }
            _ => return Err(BenchError::Answer(MemberId(0))),
        }
    }
    let listener = TcpListener::bind("127.0.0.1:0").map_err(io_step("can't listen on loopback"))?;
    let addr = listener.local_addr().map_err(io_step("can't listen on loopback"))?;
    let peer = group.peers.first_mut().ok_or(BenchError::Options("there is no peer"))?;
    peer.ask(&Order::Echo(addr), PATIENCE)?;
    let (mut stream, _) = listener.accept().map_err(io_step("the peer did not connect"))?;
    let mut rtt = round_trips(&mut stream, 2000)?;
    let mut uffd = local_faults(2000)?.read;
    Ok(Floor { alone_us: median(&mut alone), move_us: percentile(&mut rtt, 50) + percentile(&mut uffd, 50) })
}

fn measure(
    opts: ContendOptions,
    members: u16,
    hold: Option<u64>,
    launcher: Launcher<'_>,
) -> Result<Point, BenchError> {
    let tuning = match hold {
        None => Tuning::default(),
        Some(us) => Tuning { hold_min_us: us, hold_max_us: us, hold_transfers: 0, ..Tuning::default() },
    };
    let mut group = Group::start(members, false, &memory(members), tuning, launcher)?;
    let (mut per_s, mut fairness, mut per_move) = (Vec::new(), Vec::new(), Vec::new());
    let mut total = 0;
    for _ in 0..opts.runs {
        let moves = |group: &mut Group| -> Result<u64, BenchError> {
            Ok(group.snapshots()?.iter().map(|s| s.faults.write_remote + s.faults.ahead).sum())
        };
        let before = moves(&mut group)?;
        let counts: Vec<u64> = group.all(|m| work(opts, m), PATIENCE)?.iter().map(count).collect();
        let moved = moves(&mut group)? - before;
        let sum: u64 = counts.iter().sum();
        total += sum;
        let (least, most) = (counts.iter().min().copied(), counts.iter().max().copied());
        per_s.push(float(sum) * 1000.0 / float(opts.millis));
        fairness.push(float(least.unwrap_or(0)) / float(most.unwrap_or(1).max(1)));
        per_move.push(float(sum) / float(moved.max(1)));
    }
    for sum in group.all(|_| Work::Sum { gpa: 0, pages: 1 }, PATIENCE)? {
        if count(&sum) != total {
            return Err(BenchError::Options("increments of the shared page were lost"));
        }
    }
    let (per_s, fairness, per_move) = (median(&mut per_s), median(&mut fairness), median(&mut per_move));
    Ok(Point { hold_us: hold, per_s, fairness, per_move })
}
