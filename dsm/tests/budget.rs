//! Members that may keep only half of the memory: what they see must be exact, and what they keep must stay within bounds.
#![allow(missing_docs)]

mod common;

use common::{Processes, usable};
use dsm::addr::MemberId;
use dsm::bench::mix::Mix;
use dsm::bench::peer::{Answer, Order, Tuning};
use dsm::bench::work::{Outcome, Work};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(100);
const PAGE: u64 = 4096;
const MEMBERS: u16 = 3;

#[test]
fn member_process() {
    common::member_process();
}

fn peaks(group: &mut Processes) -> Vec<u64> {
    let peak = |peer: &mut dsm::bench::group::Peer| match peer.ask(&Order::Peak, PATIENCE).unwrap() {
        Answer::Outcome(Outcome::Number(bytes)) => bytes,
        other => panic!("{other:?}"),
    };
    group.peers.iter_mut().map(peak).collect()
}

fn number(outcome: &Outcome) -> u64 {
    match outcome {
        Outcome::Number(n) => *n,
        Outcome::Values(v) => v.iter().sum(),
    }
}

#[test]
fn twice_the_budget_of_each() {
    if !usable() {
        return;
    }
    let home = 4096;
    let pages = home * u64::from(MEMBERS);
    let budget = pages / 2;
    let tuning = Tuning { budget_pages: budget, ..Tuning::default() };
    let mut group = common::processes(MEMBERS, home, tuning);
    let before = peaks(&mut group);

    // Everybody uses all of it, at random.
    let mix = |m: MemberId| Mix {
        gpa: 0,
        pages,
        me: u64::from(m.0),
        members: u64::from(MEMBERS),
        threads: 2,
        seed: 1,
        millis: 3000,
    };
    let sections: u64 = group.all(|m| Work::Mix(mix(m)), PATIENCE).unwrap().iter().map(number).sum();
    for sum in group.all(|m| Work::Sections(mix(m)), PATIENCE).unwrap() {
        assert_eq!(number(&sum), sections);
    }
    group.all(|_| Work::Fill { gpa: 0, pages, value: 0 }, PATIENCE).unwrap();

    // Everybody writes all of it, in order: the worst for a hand that goes round.
    let rounds = pages / 2;
    group.all(|_| Work::Increment { gpa: 0, pages, rounds, threads: 2 }, PATIENCE).unwrap();
    for sum in group.all(|_| Work::Sum { gpa: 0, pages }, PATIENCE).unwrap() {
        assert_eq!(number(&sum), u64::from(MEMBERS) * 2 * rounds);
    }

    for ((peak, before), snapshot) in peaks(&mut group).iter().zip(before).zip(group.snapshots().unwrap()) {
        let used = peak - before;
        println!(
            "budget {} kept {} resident {used} evictions {}",
            budget * PAGE,
            snapshot.peak_bytes,
            snapshot.evictions
        );
        // What the process has beside pages does not grow with the budget: a mebibyte for tables and page buffers, and half
        // of one for each connection, whose buffers hold runs of 64 pages.
        let most = budget * PAGE * 105 / 100;
        let fixed = (1 << 20) + (u64::from(MEMBERS) - 1) * (1 << 19);
        assert!(snapshot.evictions > 0 && snapshot.peak_bytes <= most, "{snapshot:?}");
        assert!(used <= most + fixed, "{used} bytes more than at the start, budget {}", budget * PAGE);
        assert_eq!(snapshot.replaced, 0);
    }
}
