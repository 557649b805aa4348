//! Homes move, a member gives everything back and leaves, and it comes again, while threads count in the memory.
#![allow(missing_docs)]

mod common;

use common::{group, ranges, usable};
use dsm::addr::{Epoch, HomeRange, MemberId};
use dsm::node::{Dsm, HomeRun, Table};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(60);
const PAGES: u64 = 96;

fn with_homes(memory: &[HomeRange], homes: &[u16]) -> Vec<HomeRange> {
    memory.iter().zip(homes).map(|(range, home)| HomeRange { home: MemberId(*home), ..*range }).collect()
}

/// Nobody may use the memory meanwhile. What the coordinator of a VM does.
fn change(members: &[&Dsm], old: &[HomeRange], table: &Table) {
    for _ in 0..2 {
        members.iter().for_each(|m| m.quiesce(LONG).unwrap());
    }
    let moved = || table.memory.iter().zip(old).filter(|(new, old)| new.home != old.home);
    for heir in &table.members {
        let Some(heir_of) = members.get(usize::from(heir.0)) else { continue };
        let ranges: Vec<_> =
            moved().filter(|(r, _)| r.home == *heir).map(|(r, _)| (r.start, r.len)).collect();
        heir_of.handle().begin_inherit(&ranges);
    }
    for (new, old) in moved() {
        let (from, to) =
            (members[usize::from(old.home.0)].handle(), members[usize::from(new.home.0)].handle());
        let mut at = Some(new.start);
        while let Some(start) = at {
            // A small number, so that it takes several.
            let (runs, next) = from.entries(start, 3);
            let ours: Vec<HomeRun> =
                runs.into_iter().filter(|run| (new.start..new.end()).contains(&run.start)).collect();
            to.inherit(&ours).unwrap();
            at = next.filter(|next| *next < new.end());
        }
    }
    members.iter().for_each(|m| m.handle().change_table(table).unwrap());
    members.iter().for_each(|m| m.handle().release());
}

/// Each thread adds one to every page, round after round, until it is told to stop; returns the rounds.
fn count_in(member: &Dsm, memory: &[HomeRange], stop: &AtomicBool) -> u64 {
    let mut rounds = 0;
    while !stop.load(Ordering::Relaxed) {
        for gpa in memory.iter().flat_map(|r| (r.start..r.end()).step_by(4096)) {
            member.memory().u64_at(gpa).unwrap().fetch_add(1, Ordering::Relaxed);
        }
        rounds += 1;
    }
    rounds
}

fn rounds(members: &[&Dsm], memory: &[HomeRange], time: Duration) -> u64 {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let threads: Vec<_> = members.iter().map(|m| scope.spawn(|| count_in(m, memory, &stop))).collect();
        std::thread::sleep(time);
        stop.store(true, Ordering::Relaxed);
        threads.into_iter().map(|t| t.join().unwrap()).sum()
    })
}

fn check(member: &Dsm, memory: &[HomeRange], total: u64) {
    for gpa in memory.iter().flat_map(|r| (r.start..r.end()).step_by(4096)) {
        assert_eq!(member.memory().u64_at(gpa).unwrap().load(Ordering::Relaxed), total, "page {gpa:#x}");
    }
}

#[test]
fn a_member_gives_its_homes_and_pages_away_leaves_and_comes_back() {
    if !usable() {
        return;
    }
    let memory = ranges(&[0, 1, 2], PAGES);
    let mut all = group(3, &memory, |_| {});
    let ids = |ids: &[u16]| ids.iter().copied().map(MemberId).collect::<Vec<_>>();
    let time = Duration::from_millis(300);
    let refs: Vec<&Dsm> = all.iter().collect();
    let mut total = rounds(&refs, &memory, time);
    check(refs[1], &memory, total);

    // Member 1's homes go to the others, and nobody uses the memory there any more.
    let drained = with_homes(&memory, &[0, 2, 2]);
    change(&refs, &memory, &Table { epoch: Epoch(2), memory: drained.clone(), members: ids(&[0, 1, 2]) });
    check(refs[1], &memory, total);
    let before = refs[1].snapshot();
    assert!(before.pages_shared + before.pages_modified > 0);
    let stop = AtomicBool::new(false);
    total += std::thread::scope(|scope| {
        let threads = [0, 2].map(|n| {
            let (member, memory, stop) = (refs[n], &memory, &stop);
            scope.spawn(move || count_in(member, memory, stop))
        });
        let end = Instant::now() + LONG;
        while !refs[1].handle().evict_all(Duration::from_millis(100)).is_empty {
            assert!(Instant::now() < end, "it has {:?}", refs[1].snapshot());
        }
        stop.store(true, Ordering::Relaxed);
        threads.into_iter().map(|t| t.join().unwrap()).sum::<u64>()
    });
    let gone = Table { epoch: Epoch(3), memory: drained.clone(), members: ids(&[0, 2]) };
    change(&refs, &drained, &gone);
    drop(refs);
    // It goes without a word: nobody minds.
    drop(all.remove(1));
    for member in &all {
        member.handle().disconnect(MemberId(1)).unwrap();
    }
    let [a, b] = &all[..] else { panic!() };
    total += rounds(&[a, b], &memory, time);
    check(a, &memory, total);

    // Another process could come now; here it is another member 1.
    let mut cfg = dsm::node::DsmConfig::new(MemberId(1), ids(&[0, 1, 2]), Epoch(3), drained.clone());
    cfg.deadline = LONG;
    let connect = |old: &Dsm| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let theirs = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        old.handle().connect(MemberId(1), listener.accept().unwrap().0).unwrap();
        theirs
    };
    let links = vec![(MemberId(0), connect(a)), (MemberId(2), connect(b))];
    let new = Dsm::start(cfg, links).unwrap();
    let refs = [a, &new, b];
    change(&refs, &drained, &Table { epoch: Epoch(4), memory: memory.clone(), members: ids(&[0, 1, 2]) });
    total += rounds(&refs, &memory, time);
    for member in refs {
        check(member, &memory, total);
        // At once: the next one that reads a contended page may take it for itself alone.
        let held = member.snapshot();
        assert!(held.pages_modified + held.pages_shared > 0);
        assert_eq!(member.failure(), None);
    }
}

#[test]
fn a_peer_that_is_no_member_yet_may_go_without_harm() {
    if !usable() {
        return;
    }
    let memory = ranges(&[0, 1], 8);
    let all = group(2, &memory, |_| {});
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let theirs = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    all[0].handle().connect(MemberId(2), listener.accept().unwrap().0).unwrap();
    assert!(all[0].handle().connect(MemberId(1), theirs.try_clone().unwrap()).is_err());
    drop(theirs);
    let refs: Vec<&Dsm> = all.iter().collect();
    let total = rounds(&refs, &memory, Duration::from_millis(50));
    check(&all[0], &memory, total);
    assert_eq!(all[0].failure(), None);
}
