//! A seed becomes a cluster, a workload and a list of things that go wrong.

use super::net::Wire;
use super::rng::Rng;
use super::workload::Taste;
use crate::addr::{HomeRange, MemberId, PAGE_SIZE};
use crate::protocol::hold::HoldConfig;
use std::time::Duration;

/// Nanoseconds in a microsecond.
pub(super) const US: u64 = 1000;
/// Nanoseconds in a millisecond.
pub(super) const MS: u64 = 1_000_000;

/// A frame that no honest member sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Forgery {
    /// A request of an earlier epoch.
    StaleGet,
    /// An acknowledgement of an earlier epoch.
    StaleAck,
    /// The end of a transaction that is not the sender's.
    Done,
    /// An acknowledgement that nobody asked for.
    Ack,
    /// A page that nobody asked for.
    Grant,
    /// The order to drop a page, not from its home.
    Invalidate,
    /// The order to grant a page, not from its home.
    Forward,
    /// A request in somebody else's name.
    Sender,
    /// A request for a page of another home.
    Home,
    /// Two pages that nobody asked for, or that do not lie behind each other.
    Run,
}

impl Forgery {
    const ALL: [Forgery; 10] = [
        Forgery::StaleGet,
        Forgery::StaleAck,
        Forgery::Done,
        Forgery::Ack,
        Forgery::Grant,
        Forgery::Invalidate,
        Forgery::Forward,
        Forgery::Sender,
        Forgery::Home,
        Forgery::Run,
    ];
}

/// Something that goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chaos {
    /// Nothing arrives on one way between two members.
    Stall { from: u16, to: u16, until: u64 },
    /// A member does nothing (SIGSTOP).
    Stop { member: u16, until: u64 },
    /// A member takes its time for everything.
    Slow { member: u16, factor: u64 },
    /// A member dies; what it sent last may be lost.
    Crash { member: u16, broken: bool },
    /// The connection of two members breaks.
    Cut { a: u16, b: u16, broken: bool },
    /// The connection of two members breaks, what is on its way is lost, and they connect again.
    Blip { a: u16, b: u16, until: u64 },
    /// Pages get other homes.
    Rehome,
    /// A member asks all its pages to go.
    PushOut { member: u16 },
    /// A member sends a frame that it should not.
    Forge { from: u16, to: u16, what: Forgery },
}

impl Chaos {
    /// Whether the memory can't go on after it.
    pub(super) fn is_fatal(self) -> bool {
        matches!(self, Chaos::Crash { .. } | Chaos::Cut { .. } | Chaos::Forge { .. })
    }
}

/// Everything about a run but its order of events.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) members: u16,
    pub(super) threads: u16,
    /// Accesses per thread.
    pub(super) ops: u32,
    pub(super) memory: Vec<HomeRange>,
    pub(super) preload: bool,
    pub(super) hold: HoldConfig,
    pub(super) first_touch: u32,
    /// Pages that a member may keep.
    pub(super) budget: Option<u64>,
    /// Length of a time slot, as a power of two of nanoseconds, if there are slots.
    pub(super) slots: Option<u8>,
    pub(super) taste: Taste,
    pub(super) wire: Wire,
    /// Longest time that a thread of a member takes between two steps of its own work, in nanoseconds.
    pub(super) step: u64,
    /// How often, per mille, the world goes on between two steps of one command, and for how long at most.
    pub(super) pauses: u64,
    pub(super) longest_pause: u64,
    /// How often, per mille, the kernel answers a copy or a protection with EAGAIN or EEXIST.
    pub(super) hiccups: u64,
    pub(super) chaos: Vec<(u64, Chaos)>,
    /// An access that takes longer than this after everything has healed is taken for lost, in nanoseconds.
    pub(super) patience: u64,
    /// A run with more events than this is going round in circles.
    pub(super) most_events: u64,
}

impl Plan {
    pub(super) fn random(rng: &Rng) -> Plan {
        let members = 2 + rng.member(4);
        let mut plan = Plan {
            members,
            threads: 1 + rng.member(3),
            ops: u32::try_from(rng.range(15, 60)).unwrap_or(15),
            memory: memory(rng, members),
            preload: rng.chance(300),
            hold: hold(rng),
            first_touch: [1, 1, 2, 8][rng.index(4)],
            budget: [None, Some(rng.range(1, 4))][rng.index(2)],
            slots: [None, Some(u8::try_from(rng.range(18, 21)).unwrap_or(18))][rng.index(2)],
            taste: taste(rng),
            wire: wire(rng),
            step: rng.range(200, 4 * US),
            pauses: [0, 50, 200, 500][rng.index(4)],
            longest_pause: [US, 10 * US, 300 * US][rng.index(3)],
            hiccups: [0, 5, 100][rng.index(3)],
            chaos: Vec::new(),
            patience: 400 * MS,
            most_events: 3_000_000,
        };
        plan.add_chaos(rng);
        plan
    }

    fn add_chaos(&mut self, rng: &Rng) {
        let members = self.members;
        let pair = || {
            let a = rng.member(members);
            (a, (a + 1 + rng.member(members - 1)) % members)
        };
        if rng.chance(500) {
            for _ in 0..rng.range(1, 6) {
                let at = rng.below(4 * MS);
                let until = at + rng.skewed(20 * MS);
                let (from, to) = pair();
                self.chaos.push(match rng.below(4) {
                    3 => (at, Chaos::Blip { a: from, b: to, until }),
                    0 => (at, Chaos::Stall { from, to, until }),
                    1 => (at, Chaos::Stop { member: from, until }),
                    _ => (at, Chaos::Slow { member: from, factor: rng.range(2, 50) }),
                });
            }
        }
        if rng.chance(300) {
            for _ in 0..rng.range(1, 4) {
                self.chaos.push((rng.below(3 * MS), Chaos::Rehome));
                self.chaos.push((rng.below(3 * MS), Chaos::PushOut { member: rng.member(members) }));
            }
        }
        if rng.chance(250) {
            let at = rng.below(3 * MS);
            let (from, to) = pair();
            let broken = rng.chance(500);
            self.chaos.push(match rng.below(3) {
                0 => (at, Chaos::Crash { member: from, broken }),
                1 => (at, Chaos::Cut { a: from, b: to, broken }),
                _ => (at, Chaos::Forge { from, to, what: Forgery::ALL[rng.index(Forgery::ALL.len())] }),
            });
        }
    }

    /// The time by which nothing new goes wrong and everything that heals has healed.
    pub(super) fn healed(&self) -> u64 {
        let ends = self.chaos.iter().map(|(at, chaos)| match chaos {
            Chaos::Stall { until, .. } | Chaos::Stop { until, .. } | Chaos::Blip { until, .. } => *until,
            _ => *at,
        });
        ends.max().unwrap_or(0)
    }

    /// When the memory fails for good, if it does.
    pub(super) fn fatal(&self) -> Option<(u64, Chaos)> {
        self.chaos.iter().find(|(_, chaos)| chaos.is_fatal()).copied()
    }
}

/// One to three ranges of one to three pages, or a few more; every run has at least one page.
fn memory(rng: &Rng, members: u16) -> Vec<HomeRange> {
    let mut start = 0;
    let longest = [3, 3, 10][rng.index(3)];
    (0..rng.range(1, 3))
        .map(|_| {
            let len = rng.range(1, longest) * PAGE_SIZE;
            let range = HomeRange { start, len, home: MemberId(rng.member(members)) };
            start += len + rng.below(2) * PAGE_SIZE;
            range
        })
        .collect()
}

fn hold(rng: &Rng) -> HoldConfig {
    let us = Duration::from_micros;
    match rng.below(4) {
        0 => HoldConfig::NONE,
        1 => HoldConfig { min: us(rng.range(5, 50)), max: us(2000), transfers: 0 },
        2 => HoldConfig { min: us(rng.range(100, 500)), max: us(2000), transfers: 4 },
        _ => HoldConfig { min: us(20), max: us(rng.range(100, 5000)), transfers: 4 },
    }
}

fn taste(rng: &Rng) -> Taste {
    let think = [0, 200, 3 * US, 30 * US][rng.index(4)];
    Taste {
        writes: rng.range(50, 300),
        adds: rng.range(50, 400),
        clears: [0, 0, 20, 100][rng.index(4)],
        crowding: [0, 300, 900][rng.index(3)],
        runs: [0, 0, 700][rng.index(3)],
        think,
        rests: [0, 0, 100, 500][rng.index(4)],
        longest_rest: [30 * US, MS][rng.index(2)],
        softens: [0, 0, 100][rng.index(3)],
    }
}

fn wire(rng: &Rng) -> Wire {
    let fastest = rng.range(500, 20 * US);
    let spread = [1, 2, 10, 50][rng.index(4)];
    let room = [5000, 9000, 1 << 18][rng.index(3)];
    Wire { fastest, slowest: fastest * spread, room, splits: rng.chance(500) }
}
