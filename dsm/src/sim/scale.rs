//! Clusters of up to 64 members in which nothing goes wrong: a record of real traffic to measure the protocol by.

use super::net::Wire;
use super::plan::{MS, Plan, US};
use super::workload::Taste;
use super::world::{Record, World};
use crate::addr::{Epoch, HomeRange, MemberId, PAGE_SIZE};
use crate::layout::Layout;
use crate::protocol::{Core, CoreConfig, Event, MemberSet};
use crate::transport::frame::{Frame, Header, Rules};
use rustix::time::{ClockId, clock_gettime};
use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;
use zerocopy::{FromBytes, IntoBytes};

/// What the members of a cluster do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Load {
    /// Number of members, 2 to 64.
    pub(crate) members: u16,
    /// Pages with their home at each.
    pub(crate) pages: u64,
    /// Accesses of all members together.
    pub(crate) accesses: u32,
    /// Of a thousand accesses, so many are writes.
    pub(crate) writes: u64,
}

/// Everything that the cores of a cluster were told.
#[derive(Debug)]
pub(crate) struct Recording {
    cores: Vec<CoreConfig>,
    events: Vec<Record>,
    layout: Arc<Layout>,
    epoch: Epoch,
    /// Accesses that had to wait for a page.
    pub(crate) faults: u64,
    /// How long they waited in all, in nanoseconds of simulated time.
    pub(crate) waited: u64,
}

/// Runs a cluster over the simulated transport and keeps what its cores were told.
pub(crate) fn record(load: Load, seed: u64) -> Result<Recording, String> {
    let mut world = World::new(seed, |_| plan(load), false).ok_or("such a memory can't be")?;
    world.record = Some(RefCell::default());
    if let Some(verdict) = world.run() {
        return Err(verdict.what);
    }
    let tally = world.tally();
    Ok(Recording {
        events: world.record.take().map(RefCell::into_inner).unwrap_or_default(),
        layout: world.layout.clone(),
        epoch: super::world::EPOCH,
        cores: world.cores,
        faults: tally.waits,
        waited: tally.waited,
    })
}

fn plan(load: Load) -> Plan {
    let range = |n: u16| HomeRange {
        start: u64::from(n) * load.pages * PAGE_SIZE,
        len: load.pages * PAGE_SIZE,
        home: MemberId(n),
    };
    Plan {
        members: load.members,
        threads: 1,
        ops: load.accesses / u32::from(load.members.max(1)),
        memory: (0..load.members).map(range).collect(),
        preload: false,
        hold: crate::protocol::hold::HoldConfig::default(),
        first_touch: 1,
        budget: None,
        slots: None,
        taste: Taste {
            writes: load.writes / 2,
            adds: load.writes / 2,
            clears: 0,
            crowding: 0,
            runs: 0,
            think: 2 * US,
            rests: 0,
            longest_rest: 0,
            softens: 0,
        },
        wire: Wire { fastest: 10 * US, slowest: 20 * US, room: 1 << 18, splits: false },
        step: US,
        pauses: 0,
        longest_pause: 0,
        hiccups: 0,
        chaos: Vec::new(),
        patience: 10_000 * MS,
        most_events: u64::MAX,
    }
}

/// What this thread has computed so far: unlike the time of day, the same whatever else the machine does.
fn cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}

impl Recording {
    /// Number of events that the cores handled.
    pub(crate) fn steps(&self) -> u64 {
        self.events.len() as u64
    }

    /// Number of messages among them.
    pub(crate) fn messages(&self) -> u64 {
        self.events.iter().filter(|(_, _, event)| matches!(event, Event::Message { .. })).count() as u64
    }

    /// Tells it all to fresh cores, and nothing else: what the protocol itself takes.
    pub(crate) fn time_protocol(&self) -> Result<Duration, String> {
        let mut cores: Vec<Core<()>> = self.cores.iter().cloned().map(Core::new).collect();
        let events = self.events.clone();
        let mut out = Vec::new();
        let start = cpu_time();
        for (member, now, event) in events {
            let Some(core) = cores.get_mut(usize::from(member)) else { continue };
            core.handle(now, event, &mut out).map_err(|v| v.to_string())?;
            out.clear();
        }
        Ok(cpu_time().saturating_sub(start))
    }

    /// Encodes and decodes every message, and nothing else: what no protocol can do without.
    pub(crate) fn time_frames(&self) -> Result<Duration, String> {
        let members = MemberSet(u64::MAX);
        let start = cpu_time();
        for (_, _, event) in &self.events {
            let Event::Message { from, page, msg } = event else { continue };
            let header = Header::message(*from, self.epoch, self.layout.gpa_of(*page), msg);
            let bytes = std::hint::black_box(header.as_bytes());
            let header = Header::read_from_bytes(bytes).map_err(|e| e.to_string())?;
            let rules = Rules { peer: *from, epoch: self.epoch, layout: &self.layout, members };
            match header.decode(&rules, || ()).map_err(|e| e.to_string())? {
                Frame::Page(..) => {}
                other => return Err(format!("a message became {other:?}")),
            }
        }
        Ok(cpu_time().saturating_sub(start))
    }
}
