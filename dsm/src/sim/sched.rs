//! Simulated time: what happens next, and the only source of chance.

use super::rng::Rng;
use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Something that one thread of one member does next. Members and threads by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Event {
    /// A thread of the workload takes a step.
    Step { member: u16, thread: u16 },
    /// The fault thread looks at its userfaultfd, or goes on with what it read there.
    Faults { member: u16 },
    /// The receive thread of `member` for `from` looks at its stream.
    Receive { member: u16, from: u16 },
    /// Some thread writes what is queued for a peer.
    Flush { member: u16, to: u16 },
    /// The keeper: a hold time has run out.
    Timer { member: u16, page: u32 },
    /// A thread of the workload begins or ends to rest: the node is told whether all of them do.
    Rest { member: u16 },
    /// A thread of the workload is about to wait for another member.
    Soften { member: u16 },
    /// A member learns how long slots are, as a power of two of nanoseconds, and how far its clock is off.
    Slots { member: u16, shift: u8, offset: i64 },
    /// The world does the n-th thing of its plan.
    Chaos(usize),
    /// Two members connect again.
    Heal { a: u16, b: u16 },
    /// Homes are to change: another look whether all is quiet.
    Rehome,
    /// A member takes the new table of homes.
    Switch { member: u16 },
    /// Everybody who waits is looked at.
    Watch,
}

impl Event {
    pub(super) fn member(self) -> Option<u16> {
        match self {
            Event::Step { member, .. }
            | Event::Faults { member }
            | Event::Receive { member, .. }
            | Event::Flush { member, .. }
            | Event::Timer { member, .. }
            | Event::Rest { member }
            | Event::Soften { member }
            | Event::Switch { member }
            | Event::Slots { member, .. } => Some(member),
            Event::Chaos(_) | Event::Heal { .. } | Event::Rehome | Event::Watch => None,
        }
    }
}

/// The clock, in nanoseconds, and the events to come.
#[derive(Debug)]
pub(super) struct Sched {
    now: Cell<u64>,
    count: Cell<u64>,
    heap: RefCell<BinaryHeap<Reverse<(u64, u64, Event)>>>,
    pub(super) rng: Rng,
}

impl Sched {
    pub(super) fn new(seed: u64) -> Sched {
        Sched {
            // Not 0: the core takes a stamp of 0 for "never".
            now: Cell::new(1 << 20),
            count: Cell::new(0),
            heap: RefCell::new(BinaryHeap::new()),
            rng: Rng::new(seed),
        }
    }

    pub(super) fn now(&self) -> u64 {
        self.now.get()
    }

    pub(super) fn advance(&self, to: u64) {
        self.now.set(self.now.get().max(to));
    }

    /// An event at a time, or now if that is past. Events of the same time happen in the order they were set.
    pub(super) fn at(&self, time: u64, event: Event) {
        let count = self.count.get();
        self.count.set(count + 1);
        self.heap.borrow_mut().push(Reverse((time.max(self.now()), count, event)));
    }

    pub(super) fn after(&self, delay: u64, event: Event) {
        self.at(self.now().saturating_add(delay), event);
    }

    /// Takes the next event that is due by `limit` and moves the clock there.
    pub(super) fn next(&self, limit: u64) -> Option<Event> {
        let mut heap = self.heap.borrow_mut();
        match heap.peek() {
            Some(Reverse((time, _, _))) if *time <= limit => {}
            _ => return None,
        }
        let Reverse((time, _, event)) = heap.pop()?;
        self.advance(time);
        Some(event)
    }

    /// Number of events set so far.
    pub(super) fn count(&self) -> u64 {
        self.count.get()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.heap.borrow().is_empty()
    }
}
