//! Members inside one process, each with its own mapping: real userfaultfd, real TCP.
#![allow(missing_docs)]

mod common;

use common::{group, ranges, usable};
use std::sync::atomic::Ordering::SeqCst;
use std::thread;

#[test]
fn what_one_writes_the_other_reads() {
    if !usable() {
        return;
    }
    let members = group(2, &ranges(&[0, 1], 16), |_| ());
    let (a, b) = (members[0].memory(), members[1].memory());
    for gpa in (0..33 * 4096).step_by(4096).filter(|gpa| *gpa != 16 * 4096) {
        a.u64_at(gpa).unwrap().store(gpa + 1, SeqCst);
        assert_eq!(b.u64_at(gpa).unwrap().load(SeqCst), gpa + 1);
        b.u64_at(gpa + 8).unwrap().store(gpa + 2, SeqCst);
        assert_eq!(a.u64_at(gpa + 8).unwrap().load(SeqCst), gpa + 2);
        assert_eq!(a.u64_at(gpa).unwrap().load(SeqCst), gpa + 1);
    }
    let snapshot = members[1].snapshot();
    assert!(snapshot.faults.remote() >= 32, "{snapshot:?}");
    assert_eq!(snapshot.replaced, 0);
    println!("{}", serde_json::to_string_pretty(&snapshot).unwrap());
}

#[test]
fn preloaded_memory_is_seen_by_all() {
    if !usable() {
        return;
    }
    let members = group(2, &ranges(&[0, 1], 200), |_| ());
    let bytes: Vec<u8> = (0..600_000u32).map(|n| (n % 253) as u8).collect();
    members[0].preload(100, &bytes[..5000]).unwrap();
    members[0].preload(5100, &bytes[5000..]).unwrap();
    assert_eq!(members[0].snapshot().pages_preloaded, 600_100u64.div_ceil(4096));
    for member in &members {
        let memory = member.memory();
        for (gpa, byte) in (100u64..).zip(&bytes) {
            assert_eq!(memory.u8_at(gpa).unwrap().load(SeqCst), *byte, "{gpa:#x}");
        }
        assert_eq!(memory.u8_at(99).unwrap().load(SeqCst), 0);
        assert_eq!(memory.u8_at(600_100).unwrap().load(SeqCst), 0);
    }
    assert!(members[1].preload(0, &[1]).is_err());
    assert!(members[0].preload(100, &[1]).is_err());
}

#[test]
fn locked_increments_are_exact() {
    if !usable() {
        return;
    }
    const ROUNDS: u64 = 3000;
    for n in 2..=4u16 {
        let homes: Vec<u16> = (0..n).collect();
        let members = group(n, &ranges(&homes, 4), |cfg| cfg.shards = usize::from(n) - 1);
        thread::scope(|scope| {
            for member in &members {
                for thread in 0..2u64 {
                    let memory = member.memory();
                    scope.spawn(move || {
                        for round in 0..ROUNDS {
                            let gpa = (round + thread) % u64::from(n) * 5 * 4096;
                            memory.u64_at(gpa).unwrap().fetch_add(1, SeqCst);
                        }
                    });
                }
            }
        });
        let sum: u64 =
            (0..u64::from(n)).map(|p| members[0].memory().u64_at(p * 5 * 4096).unwrap().load(SeqCst)).sum();
        assert_eq!(sum, u64::from(n) * 2 * ROUNDS);
    }
}

#[test]
fn the_pages_of_a_thread_come_along_to_where_it_goes() {
    if !usable() {
        return;
    }
    let members = group(2, &ranges(&[0], 64), |cfg| cfg.fault_log = 1000);
    let [a, b] = [members[0].memory(), members[1].memory()];
    // Far apart and in no order, so that nothing else brings them.
    let pages: Vec<u64> = (0..10u64).map(|n| n * 37 % 64 * 4096).collect();
    for (n, gpa) in (1..).zip(&pages) {
        b.u64_at(*gpa).unwrap().store(n, SeqCst);
    }
    let thread = members[1].take_fault_log().last().unwrap().thread;
    // A fault is noted once its request is out: the page may be there first.
    let since = std::time::Instant::now();
    let recent = loop {
        let recent = members[1].handle().recent(thread);
        if recent.len() == pages.len() || since.elapsed().as_secs() >= 10 {
            break recent;
        }
        thread::sleep(std::time::Duration::from_millis(1));
    };
    let newest: Vec<u64> = pages.iter().rev().copied().collect();
    assert_eq!(recent.iter().map(|(gpa, _)| *gpa).collect::<Vec<_>>(), newest);
    assert!(recent.iter().all(|(_, write)| *write) && members[1].handle().recent(1).is_empty());

    members[0].handle().want(&recent);
    members[0].handle().want(&[(1 << 40, true)]);
    let since = std::time::Instant::now();
    while members[0].snapshot().pages_modified < 10 {
        assert!(since.elapsed().as_secs() < 10, "{:?}", members[0].snapshot());
        thread::sleep(std::time::Duration::from_millis(5));
    }
    let before = members[0].snapshot().faults.remote();
    for (n, gpa) in (1..).zip(&pages) {
        assert_eq!(a.u64_at(*gpa).unwrap().load(SeqCst), n);
    }
    assert_eq!(members[0].snapshot().faults.remote(), before, "they were there already");
}
