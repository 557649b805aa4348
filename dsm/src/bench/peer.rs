//! A member process that takes orders over one connection, a line of JSON each.

use super::cpus::{self, Pinned};
use super::work::{Outcome, Work};
use super::{BenchError, io_step};
use crate::addr::{Epoch, HomeRange, MemberId, PAGE_SIZE};
use crate::node::{Dsm, DsmConfig, HoldConfig, Reconnect};
use crate::stats::DsmSnapshot;
use crate::transport::mesh::{self, MeshConfig};
use crate::transport::redial::Redial;
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// Time for members to find each other.
const MESH: Duration = Duration::from_secs(20);

/// What a member is to be.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Membership {
    /// Its number.
    pub me: MemberId,
    /// All members' addresses, by number.
    pub addrs: Vec<SocketAddr>,
    /// The memory.
    pub memory: Vec<HomeRange>,
    /// The knobs.
    pub tuning: Tuning,
}

/// The knobs of a member that experiments turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tuning {
    /// Hold of a page that is not contended, in microseconds.
    pub hold_min_us: u64,
    /// Longest hold, in microseconds.
    pub hold_max_us: u64,
    /// Longest hold of a contended page, in transfer times.
    pub hold_transfers: u32,
    /// Number of userfaultfds.
    pub shards: usize,
    /// A peer that is silent for this long, in milliseconds, is dead.
    pub deadline_ms: u64,
    /// For so long, in milliseconds, a broken connection may be made again; 0 for not at all.
    pub grace_ms: u64,
    /// Pages that a member keeps; 0 for all.
    pub budget_pages: u64,
    /// Each member on a processor of its own ([`super::cpus`]).
    pub is_pinned: bool,
    /// Whether receive threads may look for what comes next instead of sleeping.
    pub busy_poll: bool,
}

impl Default for Tuning {
    fn default() -> Self {
        let hold = HoldConfig::default();
        let us = |d: Duration| u64::try_from(d.as_micros()).unwrap_or(u64::MAX);
        Tuning {
            hold_min_us: us(hold.min),
            hold_max_us: us(hold.max),
            hold_transfers: hold.transfers,
            shards: 1,
            deadline_ms: 10_000,
            grace_ms: 0,
            busy_poll: true,
            budget_pages: 0,
            is_pinned: false,
        }
    }
}

/// An order to a member process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Order {
    /// Open a port for peers at this address.
    Listen(IpAddr),
    /// Become a member.
    Join(Membership),
    /// Answer 64-byte requests on this address with 4096 bytes, in a thread.
    Echo(SocketAddr),
    /// Send back every 48 bytes that come from this address, in a thread.
    Bounce(SocketAddr),
    /// Send so many bytes to this address, in a thread.
    Pour(SocketAddr, u64),
    /// Work with the memory.
    Work(Work),
    /// Tell the most resident memory that the process ever had, in bytes.
    Peak,
    /// Tell the counters.
    Snapshot,
    /// Tell whether the memory has failed.
    Failure,
    /// Leave and end.
    Quit,
}

/// The answer to an order.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Answer {
    /// Done.
    Done,
    /// The port that was opened.
    Listening(SocketAddr),
    /// What came of the work.
    Outcome(Outcome),
    /// The counters.
    Snapshot(Box<DsmSnapshot>),
    /// The failure in words, if there was one, and the peer to blame.
    Failure(Option<(Option<MemberId>, String)>),
    /// It did not work, or something was seen that must never be.
    Error(String),
}

/// This process's member, and the processor that it stays on.
#[derive(Debug)]
pub struct Own {
    /// The member.
    pub dsm: Dsm,
    /// Goes after it.
    _pinned: Option<Pinned>,
}

/// Connects the members of a group and starts this one.
pub fn join(listener: TcpListener, membership: &Membership) -> Result<Own, BenchError> {
    let Membership { me, addrs, memory, tuning } = membership;
    let pinned = tuning.is_pinned.then(|| cpus::pin(*me)).transpose();
    let _pinned = pinned.map_err(io_step("can't choose a processor"))?;
    let all = || (0u16..).map(MemberId).zip(addrs.iter().copied());
    let mesh = MeshConfig {
        me: *me,
        vm: "bench".into(),
        epoch: Epoch(1),
        peers: all().filter(|(id, _)| id != me).collect(),
        secret: None,
        deadline: MESH,
        channels: 1,
    };
    let reconnect = if tuning.grace_ms > 0 {
        let listener = listener.try_clone().map_err(io_step("can't use the listening socket twice"))?;
        let redial = Redial::new(listener, mesh.clone()).map_err(io_step("can't keep the port open"))?;
        let grace = Duration::from_millis(tuning.grace_ms);
        Some(Reconnect { grace, redial: Arc::new(move |peer, end| redial.stream(peer, 0, end)) })
    } else {
        None
    };
    let links = mesh::connect(listener, &mesh)?;
    let links = links.into_iter().filter_map(|l| Some((l.peer, l.streams.into_iter().next()?)));
    let mut cfg = DsmConfig::new(*me, all().map(|(id, _)| id).collect(), Epoch(1), memory.clone());
    cfg.hold = HoldConfig {
        min: Duration::from_micros(tuning.hold_min_us),
        max: Duration::from_micros(tuning.hold_max_us),
        transfers: tuning.hold_transfers,
    };
    cfg.reconnect = reconnect;
    cfg.shards = tuning.shards;
    cfg.busy_poll = tuning.busy_poll;
    cfg.deadline = Duration::from_millis(tuning.deadline_ms);
    cfg.budget = (tuning.budget_pages > 0).then(|| tuning.budget_pages.saturating_mul(PAGE_SIZE));
    Ok(Own { dsm: Dsm::start(cfg, links.collect())?, _pinned })
}

/// Runs a member process until it is told to quit or its commander is gone. `control` is where the commander listens.
pub fn peer_main(control: SocketAddr) -> Result<(), BenchError> {
    serve(TcpStream::connect(control).map_err(io_step("can't reach the benchmark"))?)
}

/// The same for a process that is connected to its commander already.
pub fn serve(stream: TcpStream) -> Result<(), BenchError> {
    let mut writer = stream.try_clone().map_err(io_step("can't use the connection to the benchmark"))?;
    let mut state = State::default();
    for line in BufReader::new(stream).lines() {
        let Ok(line) = line else { break };
        let answer = match serde_json::from_str(&line) {
            Ok(Order::Quit) => Answer::Done,
            Ok(order) => state.obey(order).unwrap_or_else(Answer::Error),
            Err(e) => Answer::Error(e.to_string()),
        };
        let mut text = serde_json::to_string(&answer).unwrap_or_default();
        text.push('\n');
        if writer.write_all(text.as_bytes()).is_err() || matches!(answer, Answer::Done if line == "\"Quit\"")
        {
            break;
        }
    }
    Ok(())
}

/// The most memory that this process has had resident, in bytes.
fn peak() -> Result<u64, String> {
    let status = std::fs::read_to_string("/proc/self/status").map_err(|e| e.to_string())?;
    let kib =
        status.lines().find_map(|l| l.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse::<u64>().ok());
    kib.map(|kib| kib * 1024).ok_or_else(|| "the kernel does not tell".into())
}

#[derive(Default)]
struct State {
    listener: Option<TcpListener>,
    own: Option<Own>,
}

impl State {
    fn obey(&mut self, order: Order) -> Result<Answer, String> {
        match order {
            Order::Listen(at) => {
                let listener = TcpListener::bind((at, 0)).map_err(|e| e.to_string())?;
                let addr = listener.local_addr().map_err(|e| e.to_string())?;
                self.listener = Some(listener);
                Ok(Answer::Listening(addr))
            }
            Order::Join(membership) => {
                let listener = self.listener.take().ok_or("join before listen")?;
                self.own = Some(join(listener, &membership).map_err(|e| e.to_string())?);
                Ok(Answer::Done)
            }
            Order::Echo(addr) => {
                let stream = TcpStream::connect(addr).map_err(|e| e.to_string())?;
                thread::spawn(move || super::floor::echo(stream));
                Ok(Answer::Done)
            }
            Order::Bounce(addr) => {
                let stream = TcpStream::connect(addr).map_err(|e| e.to_string())?;
                thread::spawn(move || super::floor::bounce(stream));
                Ok(Answer::Done)
            }
            Order::Pour(addr, len) => {
                let stream = TcpStream::connect(addr).map_err(|e| e.to_string())?;
                thread::spawn(move || super::floor::pour(stream, len));
                Ok(Answer::Done)
            }
            Order::Work(work) => {
                let own = self.own.as_ref().ok_or("work before join")?;
                super::work::run(own.dsm.memory(), &work).map(Answer::Outcome)
            }
            Order::Snapshot => {
                let own = self.own.as_ref().ok_or("snapshot before join")?;
                Ok(Answer::Snapshot(Box::new(own.dsm.snapshot())))
            }
            Order::Peak => Ok(Answer::Outcome(Outcome::Number(peak()?))),
            Order::Failure => {
                let own = self.own.as_ref().ok_or("failure before join")?;
                Ok(Answer::Failure(own.dsm.failure().map(|f| (f.peer, f.to_string()))))
            }
            Order::Quit => Ok(Answer::Done),
        }
    }
}
