//! What the protocol costs as members grow, up to 64, all in this process over the simulated transport.
//!
//! A simulated cluster of every size runs the same number of accesses over the same number of pages per member; what its
//! cores were told is kept, and then told to fresh cores with nothing else around: that is the protocol's own
//! time, with real traffic. The floor is to encode and decode the frames of that traffic, which no protocol can
//! do without.

use super::{BenchError, float};
use crate::addr::{HomeRange, MAX_MEMBERS, MemberId, PAGE_SIZE};
use crate::layout::{Layout, Page};
use crate::protocol::hold::HoldConfig;
use crate::protocol::{Core, CoreConfig, Event, Msg, Token, pages::Share};
use crate::sim::scale::{Load, Recording, record};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// Smallest cluster that is measured, unless fewer members are asked for.
const SMALLEST: u16 = 8;
/// Pages of the memory whose directory is weighed: 16 GiB. Its table is larger than what an allocator keeps for itself,
/// so that it is seen in the size of the process.
const WEIGHED_PAGES: u32 = 1 << 22;

/// How much to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ManyOptions {
    /// Members of the largest cluster, 2 to 64.
    pub members: u16,
    /// Accesses per cluster, of all members together.
    pub accesses: u32,
    /// Pages per member under the mixed load; pages of all members together under the read-mostly one.
    pub pages: u64,
    /// Times that every measurement is made; the figures are medians.
    pub runs: u32,
}

impl Default for ManyOptions {
    fn default() -> Self {
        ManyOptions { members: 64, accesses: 100_000, pages: 64, runs: 5 }
    }
}

/// What every message costs whatever the protocol is, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Floor {
    /// To encode and decode one frame.
    pub frame_ns: f64,
    /// To encode and decode the frames of one fault in the largest cluster.
    pub fault_ns: f64,
}

/// One size of cluster under one load.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Size {
    /// Members.
    pub members: u16,
    /// Accesses that had to wait for a page.
    pub faults: u64,
    /// Messages between members per fault.
    pub messages_per_fault: f64,
    /// Events handled by cores (faults, messages, hold times) per fault.
    pub steps_per_fault: f64,
    /// The protocol's time for one event, all members together.
    pub step_ns: f64,
    /// The protocol's time for one fault, all members together.
    pub fault_ns: f64,
    /// Events per second on one processor.
    pub steps_per_s: f64,
    /// The floor of one fault: its frames encoded and decoded.
    pub floor_ns: f64,
    /// Mean time that a fault waits, in simulated microseconds; a message takes 10 to 20.
    pub wait_us: f64,
}

/// A load over all sizes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// Share of writes among the accesses, in percent.
    pub writes_percent: f64,
    /// Smallest cluster first.
    pub sizes: Vec<Size>,
    /// Time per fault in the largest cluster over the smallest.
    pub growth: f64,
    /// Time per message and event in the largest cluster over the smallest: what growth is left when more messages
    /// are not counted.
    pub step_growth: f64,
}

/// The result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ManyReport {
    /// Name of the benchmark: `many`.
    pub bench: String,
    /// The floor.
    pub floor: Floor,
    /// Time per fault over the floor, in the largest cluster.
    pub ratio: f64,
    /// Resident memory of the directory per page in use.
    pub directory_bytes_per_page: f64,
    /// Events per second on one processor, in the largest cluster.
    pub steps_per_s: f64,
    /// Half of the accesses write, and every member brings pages of its own: the number of sharers stays small.
    pub mixed: Series,
    /// One access of fifty writes, all to the same few pages: the number of sharers that a write has to invalidate, and
    /// with it the number of messages, grows with the cluster.
    pub read_mostly: Series,
}

impl fmt::Display for ManyReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "directory {:.1} bytes per page", self.directory_bytes_per_page)?;
        writeln!(f, "floor     {:.0} ns per frame to encode and decode", self.floor.frame_ns)?;
        for (name, series) in [("mixed", &self.mixed), ("read-mostly", &self.read_mostly)] {
            writeln!(f, "\n{name}: {:.0} % writes", series.writes_percent)?;
            writeln!(
                f,
                "{:>7} {:>8} {:>10} {:>8} {:>9} {:>9} {:>12} {:>8}",
                "members", "faults", "msg/fault", "step ns", "fault ns", "floor ns", "steps/s", "wait us"
            )?;
            for s in &series.sizes {
                writeln!(
                    f,
                    "{:>7} {:>8} {:>10.2} {:>8.0} {:>9.0} {:>9.0} {:>12.0} {:>8.1}",
                    s.members,
                    s.faults,
                    s.messages_per_fault,
                    s.step_ns,
                    s.fault_ns,
                    s.floor_ns,
                    s.steps_per_s,
                    s.wait_us
                )?;
            }
            writeln!(f, "growth: {:.2} per fault, {:.2} per event", series.growth, series.step_growth)?;
        }
        write!(f, "\nratio over the floor, mixed load, largest cluster: {:.2}", self.ratio)
    }
}

fn ns(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e9
}

/// 8, 16, 32 and so on up to `members`.
fn sizes(members: u16) -> Vec<u16> {
    let mut sizes = vec![];
    let mut size = SMALLEST;
    while size < members {
        sizes.push(size);
        size *= 2;
    }
    sizes.push(members);
    sizes
}

/// Measures. `progress` is told of every cluster that has been run, and of how many there are.
pub fn run(opts: ManyOptions, mut progress: impl FnMut(u32, u32)) -> Result<ManyReport, BenchError> {
    if opts.members < 2 || usize::from(opts.members) > MAX_MEMBERS {
        return Err(BenchError::Options("there can be 2 to 64 members"));
    }
    if opts.pages == 0 || opts.runs == 0 || opts.accesses < 1000 {
        return Err(BenchError::Options("at least one page, one run and 1000 accesses are needed"));
    }
    let all = u32::try_from(2 * sizes(opts.members).len()).unwrap_or(0);
    let mut done = 0;
    let mut step = || {
        done += 1;
        progress(done, all);
    };
    let directory_bytes_per_page = weigh(opts.members)?;
    let mixed = series(opts, 500, |_| opts.pages, &mut step)?;
    let read_mostly = series(opts, 20, |members| (opts.pages / u64::from(members)).max(1), &mut step)?;
    let largest = mixed.sizes.last().ok_or(BenchError::Options("there is no size"))?;
    Ok(ManyReport {
        bench: "many".into(),
        floor: Floor { frame_ns: largest.floor_ns / largest.messages_per_fault, fault_ns: largest.floor_ns },
        ratio: largest.fault_ns / largest.floor_ns,
        directory_bytes_per_page,
        steps_per_s: largest.steps_per_s,
        mixed,
        read_mostly,
    })
}

fn series(
    opts: ManyOptions,
    writes: u64,
    pages: impl Fn(u16) -> u64,
    step: &mut impl FnMut(),
) -> Result<Series, BenchError> {
    let mut measured = Vec::new();
    for members in sizes(opts.members) {
        let load = Load { members, pages: pages(members), accesses: opts.accesses, writes };
        let failed = |what| BenchError::Simulation { members, what };
        let recording = record(load, u64::from(members)).map_err(failed)?;
        measured.push(measure(members, &recording, opts.runs).map_err(failed)?);
        step();
    }
    let over = |f: fn(&Size) -> f64| match (measured.first(), measured.last()) {
        (Some(first), Some(last)) => f(last) / f(first),
        _ => 1.0,
    };
    Ok(Series {
        writes_percent: float(writes) / 10.0,
        growth: over(|s| s.fault_ns),
        step_growth: over(|s| s.step_ns),
        sizes: measured,
    })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

fn measure(members: u16, recording: &Recording, runs: u32) -> Result<Size, String> {
    let times = |time: fn(&Recording) -> Result<Duration, String>| {
        (0..runs).map(|_| time(recording).map(ns)).collect::<Result<Vec<f64>, String>>().map(median)
    };
    let protocol = times(Recording::time_protocol)?;
    let frames = times(Recording::time_frames)?;
    let faults = float(recording.faults.max(1));
    let steps = float(recording.steps().max(1));
    Ok(Size {
        members,
        faults: recording.faults,
        messages_per_fault: float(recording.messages()) / faults,
        steps_per_fault: steps / faults,
        step_ns: protocol / steps,
        fault_ns: protocol / faults,
        steps_per_s: steps * 1e9 / protocol,
        floor_ns: frames / faults,
        wait_us: float(recording.waited) / faults / 1000.0,
    })
}

/// Resident bytes of the directory per page, of a home all of whose pages are in use by the other members.
fn weigh(members: u16) -> Result<f64, BenchError> {
    let len = u64::from(WEIGHED_PAGES) * PAGE_SIZE;
    let range = HomeRange { start: 0, len, home: MemberId(0) };
    let layout = Layout::new(&[range]).map_err(|_| BenchError::Options("such a memory can't be"))?;
    let mut core: Core<()> = Core::new(CoreConfig {
        me: MemberId(0),
        layout: Arc::new(layout),
        share: Share::WHOLE,
        hold: HoldConfig::NONE,
        token_key: 0,
        first_touch: 1,
    });
    let before = resident()?;
    let mut out = Vec::new();
    for n in 0..WEIGHED_PAGES {
        let from = MemberId(1 + u16::try_from(n % u32::from(members - 1)).unwrap_or(0));
        let msg = Msg::Get { write: true, token: Token(u64::from(n)), hint: false };
        let event = Event::Message { from, page: Page(n), msg };
        core.handle(1 << 30, event, &mut out)
            .map_err(|v| BenchError::Simulation { members, what: v.to_string() })?;
        out.clear();
    }
    let after = resident()?;
    drop(core);
    Ok(float(after.saturating_sub(before)) / f64::from(WEIGHED_PAGES))
}

/// Resident bytes of this process.
fn resident() -> Result<u64, BenchError> {
    let statm = std::fs::read_to_string("/proc/self/statm")
        .map_err(super::io_step("can't read this process's memory use"))?;
    let pages = statm.split_ascii_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok());
    Ok(pages.unwrap_or(0) * PAGE_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_steps_of_a_fault_do_not_grow_with_the_number_of_members() {
        let opts = ManyOptions { members: 64, accesses: 6400, pages: 8, runs: 1 };
        let report = run(opts, |_, _| ()).unwrap();
        println!("{report}");
        assert_eq!(report.mixed.sizes.len(), 4);
        // Steps, not times or resident bytes: those are shared with the tests that run meanwhile.
        // Few members with few pages call gangs of up to 64 pages, and many faults are neighbours by chance.
        let steps: Vec<f64> = report.mixed.sizes.iter().map(|s| s.steps_per_fault).collect();
        assert!(steps.iter().all(|s| (3.0..300.0).contains(s)), "{steps:?}");
        assert!(steps.last().is_some_and(|s| *s < 30.0), "{steps:?}");
        // The most that a write can take: request, forward, 62 invalidations and their acknowledgements, grant, done.
        let most = report.read_mostly.sizes.iter().map(|s| s.messages_per_fault).fold(0.0, f64::max);
        assert!(most < 128.0, "{most}");
    }
}
