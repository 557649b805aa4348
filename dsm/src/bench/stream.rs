//! Reading much that another member has: page after page, and here and there for contrast.

use super::fault::median;
use super::floor::warm_up;
use super::group::{Group, Launcher};
use super::peer::{Order, Tuning};
use super::work::Work;
use super::{BenchError, float, io_step};
use crate::addr::{HomeRange, MemberId, PAGE_SIZE};
use crate::layout::{Layout, Page};
use crate::region::{Kernel, Region, Wake};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

/// The peer answers an order within this time or is given up.
const PATIENCE: Duration = Duration::from_secs(120);
/// Pages that the straight-line program receives and copies at once.
const RUN: usize = 64;
const MIB: u64 = 1 << 20;

/// How much to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamOptions {
    /// Mebibytes that are read in order.
    pub mib: u32,
    /// Pages that are read at random, of a quarter as many mebibytes.
    pub random: u32,
    /// Runs; the figures are medians over them.
    pub runs: u32,
    /// Each member on a processor of its own ([`super::cpus`]).
    pub is_pinned: bool,
}

impl Default for StreamOptions {
    fn default() -> Self {
        StreamOptions { mib: 256, random: 4000, runs: 5, is_pinned: true }
    }
}

/// The floor.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Floor {
    /// A program that does nothing but receive pages from one TCP connection and put them in place with UFFDIO_COPY, 64 at
    /// a time, in MiB per second.
    pub mib_per_s: f64,
}

/// The result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StreamReport {
    /// Name of the benchmark: `stream`.
    pub bench: String,
    /// Mebibytes that were read in order.
    pub mib: u32,
    /// The floor.
    pub floor: Floor,
    /// Reading in order, in MiB per second.
    pub mib_per_s: f64,
    /// Faults that waited for another member, per thousand pages.
    pub faults_per_1000: f64,
    /// Reading at random, in MiB per second.
    pub random_mib_per_s: f64,
    /// Reading at random, microseconds per page.
    pub random_us: f64,
    /// Our speed over that of the floor: 1 would be the straight line.
    pub ratio: f64,
    /// Whether each member had a processor of its own.
    pub is_pinned: bool,
}

impl fmt::Display for StreamReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<28} {:>9} {:>7}", format!("{} MiB", self.mib), "MiB/s", "ratio")?;
        writeln!(f, "{:<28} {:>9.0} {:>7.2}", "floor: TCP and bulk copies", self.floor.mib_per_s, 1.0)?;
        writeln!(f, "{:<28} {:>9.0} {:>7.2}", "in order", self.mib_per_s, self.ratio)?;
        let random = self.random_mib_per_s;
        writeln!(f, "{:<28} {random:>9.0} {:>7.2}", "at random", random / self.floor.mib_per_s)?;
        write!(
            f,
            "{:.0} faults per 1000 pages in order; {:.1} us per page at random",
            self.faults_per_1000, self.random_us
        )
    }
}

#[derive(Clone, Copy)]
struct Run {
    floor: f64,
    sequential: f64,
    faults: f64,
    random_us: f64,
}

/// Starts a second process and measures. `progress` is told of every run that has ended.
pub fn run(
    opts: StreamOptions,
    launcher: Launcher<'_>,
    mut progress: impl FnMut(u32, u32),
) -> Result<StreamReport, BenchError> {
    if !(1..=16_384).contains(&opts.mib) || opts.runs == 0 || opts.random == 0 {
        return Err(BenchError::Options("1 to 16384 MiB, at least one random page and one run are needed"));
    }
    let mut runs = Vec::new();
    for n in 0..opts.runs {
        // New processes: every run begins with nothing learned.
        runs.push(measure(opts, launcher)?);
        progress(n + 1, opts.runs);
    }
    let middle = |f: fn(&Run) -> f64| median(&mut runs.iter().map(f).collect::<Vec<_>>());
    let random_us = middle(|r| r.random_us);
    Ok(StreamReport {
        bench: "stream".into(),
        mib: opts.mib,
        floor: Floor { mib_per_s: middle(|r| r.floor) },
        mib_per_s: middle(|r| r.sequential),
        faults_per_1000: middle(|r| r.faults),
        random_mib_per_s: 1e6 / random_us / float(MIB / PAGE_SIZE),
        random_us,
        ratio: middle(|r| r.sequential / r.floor),
        is_pinned: opts.is_pinned,
    })
}

/// The floor alone, in MiB per second, over so many; `is_pinned` as in [`StreamOptions`].
///
/// # Errors
/// It could not be measured.
pub fn floor(mib: u32, is_pinned: bool, launcher: Launcher<'_>) -> Result<f64, BenchError> {
    let memory = [HomeRange { start: 0, len: MIB, home: MemberId(1) }];
    let tuning = Tuning { is_pinned, ..Tuning::default() };
    let mut group = Group::start(2, true, &memory, tuning, launcher)?;
    straight_line(&mut group, u64::from(mib.max(1)) * MIB)
}

fn measure(opts: StreamOptions, launcher: Launcher<'_>) -> Result<Run, BenchError> {
    let len = u64::from(opts.mib) * MIB;
    let random_len = (len / 4).max(PAGE_SIZE);
    let memory = [HomeRange { start: 0, len: len + random_len, home: MemberId(1) }];
    let tuning = Tuning { is_pinned: opts.is_pinned, ..Tuning::default() };
    let mut group = Group::start(2, true, &memory, tuning, launcher)?;
    let before = straight_line(&mut group, len)?;
    let fill = Work::Fill { gpa: 0, pages: (len + random_len) / PAGE_SIZE, value: 5 };
    group.all(|_| fill.clone(), PATIENCE)?;

    let own = &group.own.as_ref().ok_or(BenchError::Options("this process is no member"))?.dsm;
    warm_up(len);
    let faults = own.snapshot().faults.remote();
    let start = Instant::now();
    read(own, (0..len / PAGE_SIZE).map(|page| page * PAGE_SIZE))?;
    let took = start.elapsed().as_secs_f64();
    let faults = own.snapshot().faults.remote() - faults;

    let pages = random_len / PAGE_SIZE;
    let count = u64::from(opts.random).min(pages);
    let start = Instant::now();
    let some = super::scattered(pages).take(usize::try_from(count).unwrap_or(0));
    read(own, some.map(|page| len + page * PAGE_SIZE))?;
    let random = start.elapsed().as_secs_f64();
    // The floor again, so that a disturbance at one moment does not make it look high or low.
    let after = straight_line(&mut group, len)?;
    Ok(Run {
        floor: f64::midpoint(before, after),
        sequential: f64::from(opts.mib) / took,
        faults: float(faults) * 1000.0 / float(len / PAGE_SIZE),
        random_us: random * 1e6 / float(count),
    })
}

/// Reads a word of each page and sees that it is what the peer wrote.
fn read(own: &crate::node::Dsm, pages: impl Iterator<Item = u64>) -> Result<(), BenchError> {
    let memory = own.memory();
    for gpa in pages {
        if memory.u64_at(gpa).map(|word| word.load(SeqCst)) != Some(5) {
            return Err(BenchError::Options("a page does not hold what the peer wrote"));
        }
    }
    Ok(())
}

/// The straight-line program, in MiB per second.
fn straight_line(group: &mut Group, len: u64) -> Result<f64, BenchError> {
    let listener = TcpListener::bind("127.0.0.1:0").map_err(io_step("can't listen on loopback"))?;
    let addr = listener.local_addr().map_err(io_step("can't listen on loopback"))?;
    let layout = Layout::new(&[HomeRange { start: 0, len, home: MemberId(0) }])
        .map_err(|_| BenchError::Options("such a memory can't be"))?;
    let region = Region::new(&layout, 1)?;
    warm_up(len);
    let peer = group.peers.first_mut().ok_or(BenchError::Options("there is no peer"))?;
    peer.ask(&Order::Pour(addr, len), PATIENCE)?;
    let (mut stream, _) = listener.accept().map_err(io_step("the peer did not connect"))?;
    let start = Instant::now();
    receive(&mut stream, &region, layout.pages())?;
    let took = start.elapsed().as_secs_f64();
    Ok(float(len) / float(MIB) / took)
}

fn receive(stream: &mut TcpStream, region: &Region, pages: u32) -> Result<(), BenchError> {
    let mut buf = vec![0; RUN * 4096];
    let mut page = 0;
    while page < pages {
        let count = usize::try_from(pages - page).unwrap_or(RUN).min(RUN);
        let room = buf.get_mut(..count * 4096).unwrap_or(&mut []);
        stream.read_exact(room).map_err(io_step("the stream of pages ended"))?;
        region.fill_run(Page(page), room, true, Wake::Later)?;
        page += u32::try_from(count).unwrap_or(0);
    }
    Ok(())
}
