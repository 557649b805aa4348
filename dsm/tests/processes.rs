//! Members in processes of their own: real userfaultfd, real TCP, real crashes.
#![allow(missing_docs)]

mod common;

use common::usable;
use dsm::addr::MemberId;
use dsm::bench::group::Group;
use dsm::bench::mix::Mix;
use dsm::bench::peer::{Answer, Order, Tuning};
use dsm::bench::work::{Outcome, Work};
use std::process::Command;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);
const PAGE: u64 = 4096;

#[test]
fn member_process() {
    common::member_process();
}

fn start(members: u16, pages: u64, tuning: Tuning) -> Group {
    common::processes(members, pages, tuning)
}

fn number(outcome: &Outcome) -> u64 {
    match outcome {
        Outcome::Number(n) => *n,
        Outcome::Values(v) => v.iter().sum(),
    }
}

#[test]
fn shared_counters_are_exact() {
    if !usable() {
        return;
    }
    for members in 2..=4 {
        let mut group = start(members, 2, Tuning::default());
        let pages = u64::from(members) * 2;
        let rounds = 2000;
        group.all(|_| Work::Increment { gpa: 0, pages, rounds, threads: 2 }, PATIENCE).unwrap();
        for sum in group.all(|_| Work::Sum { gpa: 0, pages }, PATIENCE).unwrap() {
            assert_eq!(number(&sum), u64::from(members) * 2 * rounds);
        }
        let snapshots = group.snapshots().unwrap();
        assert!(snapshots.iter().all(|s| s.faults.remote() > 0 && s.replaced == 0), "{snapshots:?}");
    }
}

#[test]
fn one_hot_page_starves_nobody() {
    if !usable() {
        return;
    }
    let mut group = start(3, 1, Tuning::default());
    let work = |_| Work::Increment { gpa: 0, pages: 1, rounds: 20_000, threads: 1 };
    group.all(work, PATIENCE).unwrap();
    let sums = group.all(|_| Work::Sum { gpa: 0, pages: 1 }, PATIENCE).unwrap();
    assert_eq!(number(&sums[0]), 60_000);
}

#[test]
fn pages_that_count_up_never_go_down() {
    if !usable() {
        return;
    }
    let mut group = start(3, 1, Tuning::default());
    let work = |m: MemberId| Work::CountPages { gpa: 0, pages: 3, own: u64::from(m.0), millis: 1500 };
    for count in group.all(work, PATIENCE).unwrap() {
        assert!(number(&count) > 1);
    }
}

#[test]
fn stores_and_loads_are_ordered_as_on_x86() {
    if !usable() {
        return;
    }
    let mut group = start(2, 64, Tuning::default());
    for round in 0..16 {
        let (x, y) = (round * 2 * PAGE, (64 + round * 2) * PAGE);
        let work = |m: MemberId| {
            let (store, load) = if m.0 == 0 { (x, y) } else { (y, x) };
            Work::StoreThenLoad { store, load }
        };
        let outcomes = group.all(work, PATIENCE).unwrap();
        let [Outcome::Values(a), Outcome::Values(b)] = outcomes.as_slice() else { panic!("{outcomes:?}") };
        assert!(a.len() == 512 && b.len() == 512);
        assert!(a.iter().zip(b).all(|(a, b)| a + b > 0), "both loads missed both locked stores (SB)");

        let (data, flag) = (x + PAGE, y + PAGE);
        let work = |m: MemberId| {
            if m.0 == 0 { Work::Publish { data, flag } } else { Work::Observe { data, flag } }
        };
        group.all(work, PATIENCE).unwrap();
    }
}

/// Waits until every surviving process reports a failure that names the peer.
fn all_blame(group: &mut Group, culprit: MemberId, within: Duration, lost: Option<&str>) {
    let end = Instant::now() + within;
    for peer in group.peers.iter_mut().filter(|p| p.member() != culprit) {
        loop {
            match peer.ask(&Order::Failure, PATIENCE).unwrap() {
                Answer::Failure(Some((blamed, text))) => {
                    assert_eq!(blamed, Some(culprit), "{text}");
                    assert!(text.contains(&culprit.to_string()), "{text}");
                    assert!(lost.is_none_or(|lost| text.contains(lost)), "{text}");
                    break;
                }
                Answer::Failure(None) if Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                other => panic!("{} does not know that {culprit} is gone: {other:?}", peer.member()),
            }
        }
    }
}

#[test]
fn a_killed_member_is_named_by_all() {
    if !usable() {
        return;
    }
    let mut group = start(3, 4, Tuning::default());
    group.all(|m| Work::Fill { gpa: 0, pages: 12, value: u64::from(m.0) }, PATIENCE).unwrap();
    // The newest contents of all pages are with one member, and go with it.
    let fill = Order::Work(Work::Fill { gpa: 0, pages: 12, value: 9 });
    group.peers[1].ask(&fill, PATIENCE).unwrap();
    group.peers[1].kill();
    all_blame(&mut group, MemberId(1), Duration::from_secs(5), Some("only it has 4 pages"));
}

#[test]
fn a_member_that_says_nothing_is_named_by_all() {
    if !usable() {
        return;
    }
    let tuning = Tuning { deadline_ms: 600, ..Tuning::default() };
    let mut group = start(3, 4, tuning);
    let pid = group.peers[2].pid().to_string();
    let stop = |signal: &str| {
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    };
    stop("-STOP");
    all_blame(&mut group, MemberId(2), Duration::from_secs(5), None);
    stop("-CONT");
}

#[test]
fn a_member_that_leaves_in_order_is_no_failure() {
    if !usable() {
        return;
    }
    let mut group = start(2, 4, Tuning::default());
    group.all(|_| Work::Increment { gpa: 0, pages: 8, rounds: 100, threads: 1 }, PATIENCE).unwrap();
    drop(group.peers.pop());
    std::thread::sleep(Duration::from_millis(100));
    let answer = group.peers[0].ask(&Order::Failure, PATIENCE).unwrap();
    assert!(matches!(answer, Answer::Failure(None)), "{answer:?}");
}

#[test]
fn members_that_are_stopped_now_and_then_lose_nothing() {
    if !usable() {
        return;
    }
    const MEMBERS: u64 = 3;
    let mut group = start(3, 16, Tuning::default());
    let mix = |m: MemberId| Mix {
        gpa: 0,
        pages: MEMBERS * 16,
        me: u64::from(m.0),
        members: MEMBERS,
        threads: 2,
        seed: 7,
        millis: 3000,
    };
    let pids: Vec<String> = group.peers.iter().map(|p| p.pid().to_string()).collect();
    let stopper = std::thread::spawn(move || {
        let signal = |name: &str, pid: &String| {
            // At the end the process may be gone.
            let _ = Command::new("kill").args([name, pid]).status();
        };
        for round in 0..12 {
            let pid = &pids[round % pids.len()];
            signal("-STOP", pid);
            std::thread::sleep(Duration::from_millis(40 + 20 * (round as u64 % 5)));
            signal("-CONT", pid);
            std::thread::sleep(Duration::from_millis(60));
        }
    });
    let sections: u64 = group.all(|m| Work::Mix(mix(m)), PATIENCE).unwrap().iter().map(number).sum();
    stopper.join().unwrap();
    assert!(sections > 100, "{sections} locked sections");
    for sum in group.all(|m| Work::Sections(mix(m)), PATIENCE).unwrap() {
        assert_eq!(number(&sum), sections);
    }
}
