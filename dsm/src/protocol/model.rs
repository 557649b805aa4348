//! Exhaustive check: three members, one page or two, every interleaving of faults, writes, evictions, deliveries and
//! hold times, with and without a member that crashes and connections that break and are made again.
//!
//! What a connection that is made again has lost is sent again, once and in order: `transport/kept.rs` sees to that, so here
//! a break holds up what is on its way, until it is made again or, if the member crashes, for ever.
//!
//! The tests that run every time take seconds. The larger ones are for an idle machine:
//!
//! ```text
//! cargo test --release -p spanvm-dsm --lib model -- --ignored --nocapture --test-threads 1
//! ```

#[cfg(feature = "seeded-faults")]
pub(super) mod seeded;

use super::cluster::Cluster;
use crate::layout::Page;
use stateright::{Checker, Model, Property};

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    cluster: Cluster,
    faults: Vec<u8>,
    stores: Vec<u8>,
    evictions: u8,
    hints: u8,
    breaks: u8,
    /// The two members between whom there is no connection.
    broken: Option<(u16, u16)>,
    has_evicted: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Action {
    Fault { member: u16, page: Page, write: bool },
    Store { member: u16, page: Page },
    Evict { member: u16, page: Page },
    Hint { member: u16, page: Page, write: bool },
    Deliver { from: u16, to: u16 },
    Fire { member: u16, page: Page },
    Crash { member: u16 },
    Break { a: u16, b: u16 },
    Reconnect,
}

/// What is checked. The numbers bound what the members do, not how it interleaves.
#[derive(Clone, Debug)]
struct Small {
    members: u16,
    /// Home of every page.
    homes: &'static [u16],
    /// Faults of each member.
    faults: &'static [u8],
    /// Writes of each member.
    stores: u8,
    /// Evictions of all members together.
    evictions: u8,
    /// Pages that members ask for without a thread that waits, all together.
    hints: u8,
    hold: bool,
    crash: bool,
    /// Connections that break, one after the other.
    breaks: u8,
}

impl Small {
    const ONE_PAGE: Small = Small {
        members: 3,
        homes: &[0],
        faults: &[2, 2, 2],
        stores: 1,
        evictions: 0,
        hints: 0,
        hold: false,
        crash: false,
        breaks: 0,
    };

    fn pages(&self) -> impl Iterator<Item = Page> {
        (0u32..).zip(self.homes).map(|(n, _)| Page(n))
    }

    fn member_actions(&self, state: &State, member: u16, page: Page, actions: &mut Vec<Action>) {
        let (cluster, at) = (&state.cluster, usize::from(member));
        for write in [false, true] {
            let waits = cluster.waiting.contains(&(member, page, write));
            if state.faults[at] > 0 && !waits && !cluster.has(member, page, write) {
                actions.push(Action::Fault { member, page, write });
            }
            if state.hints > 0 && !cluster.has(member, page, false) && !waits {
                actions.push(Action::Hint { member, page, write });
            }
        }
        if state.stores[at] > 0 && cluster.has(member, page, true) {
            actions.push(Action::Store { member, page });
        }
        if state.evictions > 0 && cluster.has(member, page, false) {
            actions.push(Action::Evict { member, page });
        }
    }
}

impl Model for Small {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            cluster: Cluster::new(self.members, self.homes, self.hold),
            faults: self.faults.to_vec(),
            stores: vec![self.stores; usize::from(self.members)],
            evictions: self.evictions,
            hints: self.hints,
            breaks: self.breaks,
            broken: None,
            has_evicted: false,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let cluster = &state.cluster;
        if cluster.wrong.is_some() {
            return;
        }
        for member in (0..self.members).filter(|m| cluster.crashed != Some(*m)) {
            self.pages().for_each(|page| self.member_actions(state, member, page, actions));
            if self.crash && cluster.crashed.is_none() {
                actions.push(Action::Crash { member });
            }
        }
        let arrives = |(from, to): &&(u16, u16)| state.broken != Some((*from.min(to), *from.max(to)));
        let deliver = |(from, to): &(u16, u16)| Action::Deliver { from: *from, to: *to };
        actions.extend(cluster.network.keys().filter(arrives).map(deliver));
        if state.broken.is_some() {
            actions.push(Action::Reconnect);
        } else if state.breaks > 0 {
            let pairs = (0..self.members).flat_map(|b| (0..b).map(move |a| (a, b)));
            // A break between two who say nothing holds nothing up.
            let busy = |(a, b): &(u16, u16)| {
                [(*a, *b), (*b, *a)].iter().any(|line| cluster.network.contains_key(line))
            };
            actions.extend(pairs.filter(busy).map(|(a, b)| Action::Break { a, b }));
        }
        let fire = |(member, page): &(u16, Page)| Action::Fire { member: *member, page: *page };
        actions.extend(cluster.timers.keys().map(fire));
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        let cluster = &mut state.cluster;
        match action {
            Action::Fault { member, page, write } => {
                state.faults[usize::from(member)] -= 1;
                cluster.touch(member, page, write);
            }
            Action::Store { member, page } => {
                state.stores[usize::from(member)] -= 1;
                cluster.store(member, page);
            }
            Action::Evict { member, page } => {
                state.evictions -= 1;
                cluster.evict(member, page);
            }
            Action::Hint { member, page, write } => {
                state.hints -= 1;
                cluster.hint(member, page, write);
            }
            Action::Deliver { from, to } => {
                let before = cluster.copies(to);
                cluster.deliver(from, to);
                state.has_evicted |= self.evictions > 0 && cluster.copies(to) < before;
            }
            Action::Fire { member, page } => cluster.fire(member, page),
            Action::Crash { member } => {
                cluster.crash(member);
                // It does not come back.
                state.broken = state.broken.filter(|(a, b)| *a != member && *b != member);
            }
            Action::Break { a, b } => {
                state.breaks -= 1;
                state.broken = Some((a, b));
            }
            Action::Reconnect => state.broken = None,
        }
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("single writer or many readers, all with the last write", |_, s: &State| {
                s.cluster.check().is_ok()
            }),
            Property::always("every request is answered", |_, s: &State| !s.cluster.is_stuck()),
            // So that the properties above are not true for want of anything happening.
            Property::sometimes("three copies at once", |m: &Small, s: &State| {
                m.members < 3 || m.pages().any(|page| s.cluster.memory.iter().all(|m| m.contains_key(&page)))
            }),
            Property::sometimes("as many writes as are allowed", |m: &Small, s: &State| {
                let all = usize::from(m.stores) * usize::from(m.members);
                s.cluster.newest.iter().map(|n| usize::from(*n)).sum::<usize>() >= all.min(3)
            }),
            Property::sometimes("a copy is gone", |m: &Small, s: &State| m.evictions == 0 || s.has_evicted),
            Property::sometimes("somebody waits for a connection", |m: &Small, s: &State| {
                let holds_up = |(a, b): (u16, u16)| {
                    s.cluster.network.keys().all(|(f, t)| (*f.min(t), *f.max(t)) == (a, b))
                };
                m.breaks == 0 || (!s.cluster.waiting.is_empty() && s.broken.is_some_and(holds_up))
            }),
            Property::sometimes("somebody waits for a member that has crashed", |m: &Small, s: &State| {
                let c = &s.cluster;
                !m.crash || (c.crashed.is_some() && c.network.is_empty() && !c.waiting.is_empty())
            }),
        ]
    }
}

fn check(model: Small) {
    let what = format!("{model:?}");
    let start = std::time::Instant::now();
    let checker = model.checker().threads(2).spawn_bfs().join();
    let (states, depth) = (checker.unique_state_count(), checker.max_depth());
    println!("{what}: {states} states, depth {depth}, {:.1} s", start.elapsed().as_secs_f64());
    checker.assert_properties();
}

#[test]
fn one_page() {
    check(Small::ONE_PAGE);
}

#[test]
fn one_page_with_hold_times() {
    check(Small { hold: true, ..Small::ONE_PAGE });
}

#[test]
fn one_page_with_evictions() {
    check(Small { evictions: 2, faults: &[1, 2, 2], ..Small::ONE_PAGE });
}

#[test]
fn one_page_with_hints() {
    check(Small { hints: 2, faults: &[1, 2, 1], hold: true, ..Small::ONE_PAGE });
}

#[test]
fn one_page_and_a_crash() {
    check(Small { crash: true, evictions: 1, faults: &[1, 2, 1], ..Small::ONE_PAGE });
}

#[test]
fn one_page_and_a_break() {
    check(Small { breaks: 1, evictions: 1, faults: &[1, 2, 1], ..Small::ONE_PAGE });
}

#[test]
fn one_page_a_break_and_a_crash() {
    check(Small { breaks: 1, crash: true, hold: true, faults: &[1, 1, 1], ..Small::ONE_PAGE });
}

#[test]
fn two_pages() {
    check(Small { homes: &[0, 1], faults: &[2, 1, 1], evictions: 1, ..Small::ONE_PAGE });
}

#[test]
#[ignore = "minutes"]
fn two_pages_with_everything() {
    check(Small {
        homes: &[0, 1],
        faults: &[2, 1, 1],
        evictions: 1,
        hints: 1,
        hold: true,
        crash: true,
        breaks: 1,
        ..Small::ONE_PAGE
    });
}
