//! The exhaustive check with one seeded fault switched on: does it find the mistake?

use super::{Action, Small, State};
use crate::seeded::{SeededFault, switch_on};
use stateright::{Checker, HasDiscoveries, Model, Property};
use std::time::Duration;

/// No fault that the check finds takes it longer.
const LONGEST: Duration = Duration::from_secs(60);

struct Faulty {
    model: Small,
    fault: SeededFault,
}

impl Model for Faulty {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        self.model.init_states()
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        self.model.actions(state, actions);
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        // The checker has threads of its own.
        switch_on(Some(self.fault));
        let next = self.model.next_state(last, action);
        switch_on(None);
        next
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("safe", |_, s: &State| s.cluster.check().is_ok()),
            Property::always("answered", |_, s: &State| !s.cluster.is_stuck()),
        ]
    }
}

/// What the check finds, with three members, one page and hold times; `None` if it finds nothing.
pub(crate) fn find(fault: SeededFault) -> Option<String> {
    // An eviction multiplies the states: only for the fault that needs it.
    let evictions = u8::from(fault == SeededFault::SilentEviction);
    let model = Small { hold: evictions == 0, evictions, ..Small::ONE_PAGE };
    let checker = Faulty { model, fault }
        .checker()
        .threads(2)
        .timeout(LONGEST)
        .finish_when(HasDiscoveries::Any)
        .spawn_bfs()
        .join();
    let (_, path) = checker.discoveries().into_iter().next()?;
    let state = path.last_state();
    let what = match state.cluster.check() {
        Err(what) => what,
        Ok(()) => "a request is never answered".into(),
    };
    Some(what)
}
