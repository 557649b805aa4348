//! Members on hosts of their own, with cables that are pulled, hosts that vanish, connections that are reset and networks
//! that are slow: nothing is lost as long as it heals in time, and who does not come back is named.
//!
//! For minutes instead of seconds:
//!
//! ```text
//! SPANVM_SECONDS=300 cargo test -p spanvm-dsm --test network -- --ignored --nocapture
//! ```
#![allow(missing_docs)]

mod common;

use common::lan::Lan;
use common::usable;
use dsm::addr::{HomeRange, MemberId};
use dsm::bench::BenchError;
use dsm::bench::group::Group;
use dsm::bench::mix::Mix;
use dsm::bench::peer::{Answer, Order, Tuning};
use dsm::bench::work::{Outcome, Work};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const MEMBERS: u16 = 3;
/// Pages homed at each member.
const PAGES: u64 = 16;
const ALL: u64 = MEMBERS as u64 * PAGES;
/// The first pages are for random work, those of the last member for pages that count up, and two for the litmus test.
const MIXED: u64 = 2 * PAGES - 1;
const COUNTED: u64 = 2 * PAGES * 4096;
const TESTED: [u64; 2] = [MIXED * 4096, (ALL - 1) * 4096];
/// For a machine with much else to do.
const PATIENCE: Duration = Duration::from_secs(120);

#[test]
fn member_process() {
    common::member_process();
}

/// A network and a group on it, where this machine can have them.
fn start(tuning: Tuning) -> Option<(Lan, Group)> {
    if !usable() {
        return None;
    }
    let lan = match Lan::new(MEMBERS) {
        Ok(lan) => lan,
        Err(why) => {
            println!("skipped: {why}");
            return None;
        }
    };
    let range =
        |n: u16| HomeRange { start: u64::from(n) * PAGES * 4096, len: PAGES * 4096, home: MemberId(n) };
    let memory: Vec<_> = (0..MEMBERS).map(range).collect();
    let group = Group::start_at(&lan.addrs(), &memory, tuning, &lan.launcher()).unwrap();
    Some((lan, group))
}

fn number(outcome: &Outcome) -> u64 {
    match outcome {
        Outcome::Number(n) => *n,
        Outcome::Values(v) => v.iter().sum(),
    }
}

/// Waits until every process but one reports a failure that names that one; returns their words.
fn all_blame(group: &mut Group, culprit: MemberId) -> Vec<String> {
    let end = Instant::now() + PATIENCE;
    let mut words = Vec::new();
    for peer in group.peers.iter_mut().filter(|p| p.member() != culprit) {
        words.push(loop {
            match peer.ask(&Order::Failure, PATIENCE).unwrap() {
                Answer::Failure(Some((blamed, text))) => {
                    assert_eq!(blamed, Some(culprit), "{text}");
                    break text;
                }
                Answer::Failure(None) if Instant::now() < end => thread::sleep(Duration::from_millis(20)),
                other => panic!("{} does not know that {culprit} is gone: {other:?}", peer.member()),
            }
        });
    }
    words
}

/// The memory has failed, so nobody gets a page that is not here, least of all one of zeros.
fn all_wait(group: &mut Group, culprit: MemberId) {
    let touch = Order::Work(Work::Sum { gpa: 0, pages: ALL });
    let peers = || 0..MEMBERS;
    for n in peers().filter(|n| MemberId(*n) != culprit) {
        group.peers[usize::from(n)].order(&touch).unwrap();
    }
    for n in peers().filter(|n| MemberId(*n) != culprit) {
        match group.peers[usize::from(n)].answer(Duration::from_millis(300)) {
            Err(BenchError::Peer { source, .. }) if source.kind() == ErrorKind::WouldBlock => {}
            other => panic!("member {n} does not wait for pages that are lost: {other:?}"),
        }
    }
    // They would wait for ever.
    group.peers.iter_mut().for_each(|p| p.kill());
}

/// All pages are with member 1 when it goes. `said` is what the others must say of it.
fn lose(lan: &Lan, mut group: Group, go: impl Fn(&Lan, &mut Group), said: &str) {
    group.all(|_| Work::Fill { gpa: 0, pages: ALL, value: 5 }, PATIENCE).unwrap();
    group.peers[1].ask(&Order::Work(Work::Fill { gpa: 0, pages: ALL, value: 9 }), PATIENCE).unwrap();
    let start = Instant::now();
    go(lan, &mut group);
    for text in all_blame(&mut group, MemberId(1)) {
        println!("after {:.1} s: {text}", start.elapsed().as_secs_f64());
        assert!(text.contains("member 1") && text.contains(said), "{text}");
        assert!(text.contains(&format!("only it has {PAGES} pages")), "{text}");
    }
    all_wait(&mut group, MemberId(1));
}

#[test]
fn a_host_that_vanishes_is_named_with_what_only_it_had() {
    let Some((lan, group)) = start(Tuning { deadline_ms: 2000, ..Tuning::default() }) else { return };
    lose(&lan, group, |lan, _| lan.vanish(1), "nothing was heard from it for 2s");
}

#[test]
fn a_host_that_does_not_come_back_in_time_is_named() {
    let tuning = Tuning { deadline_ms: 1000, grace_ms: 3000, ..Tuning::default() };
    let Some((lan, group)) = start(tuning) else { return };
    lose(&lan, group, |lan, _| lan.unplug(1), "cut off; not connected again within 3s");
}

#[test]
fn a_member_that_is_killed_does_not_come_back() {
    let tuning = Tuning { deadline_ms: 1000, grace_ms: 1500, ..Tuning::default() };
    let Some((lan, group)) = start(tuning) else { return };
    lose(&lan, group, |_, group| group.peers[1].kill(), "not connected again within 1.5s");
}

#[test]
fn a_member_that_is_connected_but_silent_is_named() {
    let tuning = Tuning { deadline_ms: 1000, grace_ms: 1500, ..Tuning::default() };
    let Some((lan, group)) = start(tuning) else { return };
    let stop = |_: &Lan, group: &mut Group| signal("-STOP", group.peers[1].pid());
    lose(&lan, group, stop, "not connected again within 1.5s");
}

fn signal(name: &str, pid: u32) {
    assert!(Command::new("kill").args([name, &pid.to_string()]).status().unwrap().success());
}

/// What goes wrong, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Trouble {
    Unplugged,
    Vanished,
    Reset,
    Slow,
    Stopped,
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        // Xorshift64.
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % n
    }

    fn index(&mut self, n: u64) -> usize {
        usize::try_from(self.below(n)).unwrap()
    }
}

/// Trouble of all kinds until the work is over; returns how often which.
fn make_trouble(
    lan: &Lan,
    pids: &[u32],
    random: &mut Random,
    is_over: &AtomicBool,
) -> BTreeMap<Trouble, usize> {
    use Trouble::{Reset, Slow, Stopped, Unplugged, Vanished};
    let mut count = BTreeMap::new();
    // Each kind once, so that a short run has seen what matters most; then as chance will have it.
    let mut first = [(Reset, 0), (Vanished, 1500), (Slow, 250), (Stopped, 250), (Unplugged, 600)].into_iter();
    while !is_over.load(Ordering::SeqCst) {
        let n = u16::try_from(random.below(u64::from(MEMBERS))).unwrap();
        let any = [Unplugged, Vanished, Reset, Reset, Slow, Stopped][random.index(6)];
        // Longer than the deadline now and then: then the silent one's connections are given up.
        let some = [60, 250, 600, 1500][random.index(4)];
        let (kind, millis) = first.next().unwrap_or((any, some));
        let pause = Duration::from_millis(millis);
        let mut times = 1;
        match kind {
            Unplugged => {
                lan.unplug(n);
                thread::sleep(pause);
                lan.plug(n);
            }
            Vanished => {
                lan.vanish(n);
                thread::sleep(pause);
                lan.appear(n);
            }
            Reset if lan.can_reset => times = lan.reset(n).unwrap(),
            Slow if lan.brake.is_some() => {
                lan.slow(n, lan.brake.unwrap()).unwrap();
                thread::sleep(pause);
                lan.fast(n);
            }
            Stopped => {
                let pid = pids[usize::from(n)];
                signal("-STOP", pid);
                thread::sleep(pause);
                signal("-CONT", pid);
            }
            Reset | Slow => continue,
        }
        *count.entry(kind).or_default() += times;
        thread::sleep(Duration::from_millis(100 + random.below(400)));
    }
    count
}

/// Works for so long while there is trouble, and checks everything; again and again.
fn endure(total: Duration, round: Duration, seed: u64) {
    let tuning = Tuning { deadline_ms: 1000, grace_ms: 60_000, ..Tuning::default() };
    let Some((lan, mut group)) = start(tuning) else { return };
    println!("resets: {}, slow: {:?}, seed {seed}", lan.can_reset, lan.brake);
    let pids: Vec<u32> = group.peers.iter().map(|p| p.pid()).collect();
    let mut random = Random(seed | 1);
    let mut seen = BTreeMap::<Trouble, usize>::new();
    let (mut sections, mut rounds) = (0, 0);
    let start = Instant::now();
    let millis = u64::try_from(round.as_millis()).unwrap();
    let mix = |m: MemberId, seed| Mix {
        gpa: 0,
        pages: MIXED,
        me: u64::from(m.0),
        members: u64::from(MEMBERS),
        threads: 2,
        seed,
        millis,
    };
    while start.elapsed() < total {
        rounds += 1;
        let is_over = AtomicBool::new(false);
        let first = random.below(u64::MAX);
        thread::scope(|scope| {
            let trouble = scope.spawn(|| make_trouble(&lan, &pids, &mut random, &is_over));
            let mut work = || -> Result<(), BenchError> {
                let done = group.all(|m| Work::Mix(mix(m, first)), PATIENCE)?;
                sections += done.iter().map(number).sum::<u64>();
                let pages = u64::from(MEMBERS);
                let up = |m: MemberId| Work::CountPages { gpa: COUNTED, pages, own: u64::from(m.0), millis };
                group.all(up, PATIENCE)?;
                let [x, y] = TESTED;
                let sb = |m: MemberId| match m.0 {
                    0 => Work::StoreThenLoad { store: x, load: y },
                    1 => Work::StoreThenLoad { store: y, load: x },
                    _ => Work::Sum { gpa: 0, pages: ALL },
                };
                let outcomes = group.all(sb, PATIENCE)?;
                let [Outcome::Values(a), Outcome::Values(b), _] = outcomes.as_slice() else {
                    panic!("{outcomes:?}");
                };
                assert!(a.iter().zip(b).all(|(a, b)| a + b > 0), "both loads missed both locked stores (SB)");
                Ok(())
            };
            let result = work();
            is_over.store(true, Ordering::SeqCst);
            for (kind, times) in trouble.join().unwrap() {
                *seen.entry(kind).or_default() += times;
            }
            if let Err(e) = result {
                let failures: Vec<_> =
                    group.peers.iter_mut().map(|p| p.ask(&Order::Failure, Duration::from_secs(1))).collect();
                panic!("{e}; {failures:?}");
            }
        });
        // Calm again. Everybody must find the same, exactly.
        for sum in group.all(|m| Work::Sections(mix(m, 0)), PATIENCE).unwrap() {
            assert_eq!(number(&sum), sections);
        }
        // The next round begins with zeros.
        let clear = Work::Clear { gpa: TESTED[0], pages: ALL - MIXED };
        group.peers[0].ask(&Order::Work(clear), PATIENCE).unwrap();
    }
    let snapshots = group.snapshots().unwrap();
    let reconnects: u64 = snapshots.iter().flat_map(|s| &s.peers).map(|p| p.reconnects).sum();
    println!(
        "{rounds} rounds in {:.0} s: {sections} locked sections exact, {reconnects} reconnects; {seen:?}",
        start.elapsed().as_secs_f64()
    );
    assert!(reconnects > 0, "no connection ever broke");
    for peer in &mut group.peers {
        let answer = peer.ask(&Order::Failure, PATIENCE).unwrap();
        assert!(matches!(answer, Answer::Failure(None)), "{answer:?}");
    }
}

#[test]
fn nothing_is_lost_on_a_bad_network() {
    endure(Duration::from_secs(1), Duration::from_millis(1500), 11);
}

#[test]
#[ignore = "minutes; SPANVM_SECONDS says how many seconds, SPANVM_SEED which trouble"]
fn nothing_is_lost_on_a_bad_network_for_long() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let total = Duration::from_secs(number("SPANVM_SECONDS").unwrap_or(300));
    let seed = number("SPANVM_SEED").unwrap_or_else(|| u64::from(std::process::id()));
    endure(total, Duration::from_secs(5), seed);
}
