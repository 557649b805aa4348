//! Exhaustive check: three members and one page, every interleaving of faults, writes, deliveries and hold times.

#[cfg(feature = "seeded-faults")]
pub(super) mod seeded;

use super::cluster::Cluster;
use crate::layout::Page;
use stateright::{Checker, Model, Property};

const PAGE: Page = Page(0);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    cluster: Cluster,
    faults: Vec<u8>,
    stores: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Action {
    Fault { member: u16, write: bool },
    Store { member: u16 },
    Deliver { from: u16, to: u16 },
    Fire { member: u16 },
}

struct OnePage {
    members: u16,
    faults: u8,
    stores: u8,
    hold: bool,
}

impl Model for OnePage {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let members = usize::from(self.members);
        vec![State {
            cluster: Cluster::new(self.members, &[0], self.hold),
            faults: vec![self.faults; members],
            stores: vec![self.stores; members],
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.cluster.wrong.is_some() {
            return;
        }
        for member in 0..self.members {
            let at = usize::from(member);
            for write in [false, true] {
                let waits = state.cluster.waiting.contains(&(member, PAGE, write));
                if state.faults[at] > 0 && !waits && !state.cluster.has(member, PAGE, write) {
                    actions.push(Action::Fault { member, write });
                }
            }
            if state.stores[at] > 0 && state.cluster.has(member, PAGE, true) {
                actions.push(Action::Store { member });
            }
        }
        actions
            .extend(state.cluster.network.keys().map(|(from, to)| Action::Deliver { from: *from, to: *to }));
        actions.extend(state.cluster.timers.keys().map(|(member, _)| Action::Fire { member: *member }));
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Fault { member, write } => {
                state.faults[usize::from(member)] -= 1;
                state.cluster.touch(member, PAGE, write);
            }
            Action::Store { member } => {
                state.stores[usize::from(member)] -= 1;
                state.cluster.store(member, PAGE);
            }
            Action::Deliver { from, to } => state.cluster.deliver(from, to),
            Action::Fire { member } => state.cluster.fire(member, PAGE),
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
            Property::sometimes("three copies at once", |_, s: &State| {
                s.cluster.memory.iter().all(|m| m.contains_key(&PAGE))
            }),
            Property::sometimes("three writes", |_, s: &State| s.cluster.newest[0] >= 3),
        ]
    }
}

fn check(model: OnePage) {
    let checker = model.checker().threads(2).spawn_bfs().join();
    println!("{} states, depth {}", checker.unique_state_count(), checker.max_depth());
    checker.assert_properties();
}

#[test]
fn three_members_one_page() {
    check(OnePage { members: 3, faults: 2, stores: 1, hold: false });
}

#[test]
fn three_members_one_page_with_hold_times() {
    check(OnePage { members: 3, faults: 2, stores: 1, hold: true });
}
