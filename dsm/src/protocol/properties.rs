//! Random schedules over more members and pages than the model checker can take, to the end: everything that was
//! asked for is answered, and every member can read every last write.

use super::cluster::Cluster;
use crate::layout::Page;
use proptest::prelude::*;

#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    Touch { member: u16, page: u32, write: bool },
    Store { member: u16, page: u32 },
    Deliver { line: usize },
    Fire { timer: usize },
}

pub(super) fn step(members: u16, pages: u32) -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0..members, 0..pages, any::<bool>())
            .prop_map(|(member, page, write)| Step::Touch { member, page, write }),
        2 => (0..members, 0..pages).prop_map(|(member, page)| Step::Store { member, page }),
        8 => any::<prop::sample::Index>().prop_map(|i| Step::Deliver { line: i.index(1 << 16) }),
        2 => any::<prop::sample::Index>().prop_map(|i| Step::Fire { timer: i.index(1 << 16) }),
    ]
}

pub(super) fn apply(cluster: &mut Cluster, step: Step) {
    match step {
        Step::Touch { member, page, write } => cluster.touch(member, Page(page), write),
        Step::Store { member, page } => {
            if cluster.has(member, Page(page), true) {
                cluster.store(member, Page(page));
            }
        }
        Step::Deliver { line } => {
            let lines: Vec<_> = cluster.network.keys().copied().collect();
            if let Some((from, to)) = lines.get(line % lines.len().max(1)) {
                cluster.deliver(*from, *to);
            }
        }
        Step::Fire { timer } => {
            let timers: Vec<_> = cluster.timers.keys().copied().collect();
            if let Some((member, page)) = timers.get(timer % timers.len().max(1)) {
                cluster.fire(*member, *page);
            }
        }
    }
}

/// Delivers everything and fires every timer until nothing is left to do.
pub(super) fn settle(cluster: &mut Cluster) -> Result<(), String> {
    for _ in 0..100_000 {
        cluster.check()?;
        if let Some((from, to)) = cluster.network.keys().next().copied() {
            cluster.deliver(from, to);
        } else if let Some((member, page)) = cluster.timers.keys().next().copied() {
            cluster.fire(member, page);
        } else {
            return if cluster.waiting.is_empty() { Ok(()) } else { Err("somebody waits for ever".into()) };
        }
    }
    Err("it never ends".into())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn every_schedule_is_coherent_and_ends(
        hold in any::<bool>(),
        steps in prop::collection::vec(step(5, 3), 1..400),
    ) {
        let mut cluster = Cluster::new(5, &[0, 1, 4], hold);
        for step in steps {
            apply(&mut cluster, step);
            prop_assert!(cluster.check().is_ok(), "{:?}", cluster.check());
        }
        prop_assert_eq!(settle(&mut cluster), Ok(()));
        for member in 0..5 {
            for page in 0..3 {
                cluster.touch(member, Page(page), false);
                prop_assert_eq!(settle(&mut cluster), Ok(()));
                prop_assert!(cluster.has(member, Page(page), false));
            }
        }
    }
}
