//! Pausing members while the bare-metal guest works: nothing of the guest moves meanwhile, and its results are exact.

mod cluster;

use cluster::Cluster;
use std::time::{Duration, Instant};
use vmm::member::pause::PauseError;
use vmm::member::{Member, MemberEvent, VmExit};

const LIMIT: Duration = Duration::from_secs(5);

/// Pauses all members at once, as the coordinator does.
fn pause(members: &[Member]) {
    std::thread::scope(|scope| {
        let pauses: Vec<_> = members.iter().map(|m| scope.spawn(|| m.pause(LIMIT))).collect();
        for pause in pauses {
            pause.join().unwrap().unwrap_or_else(|e| panic!("pause: {e}"));
        }
    });
    let mut before = None;
    loop {
        let counts: Vec<_> = members.iter().map(Member::traffic).collect();
        let (sent, done): (u64, u64) = counts.iter().fold((0, 0), |sum, c| (sum.0 + c.0, sum.1 + c.1));
        if before == Some(sent) {
            return;
        }
        before = Some(done);
    }
}

fn entries(members: &[Member]) -> Vec<(u64, u64)> {
    let all = members.iter().flat_map(|m| m.stats().vcpus);
    all.map(|v| (v.exits, v.injections)).collect()
}

#[test]
fn a_paused_guest_stands_still_and_goes_on_unharmed() {
    for vcpus in [&[0u16, 0][..], &[0, 1], &[0, 1, 2, 1]] {
        let Some(cluster) = Cluster::start(vcpus) else { return };
        let early = cluster.members[0].pause(LIMIT);
        assert!(matches!(early, Err(PauseError::NotRunning)), "{early:?}");
        let tests = "counter,ipi,ipimodes,timer,tsc,pages,private";
        cluster.boot(&format!(
            "cpus={} deadline=60 test={tests} iterations=500 rounds=5 count=100",
            vcpus.len()
        ));
        let mut longest = Duration::ZERO;
        for round in 0..20 {
            std::thread::sleep(Duration::from_millis(5 + round % 7 * 3));
            let start = Instant::now();
            pause(&cluster.members);
            longest = longest.max(start.elapsed());
            let before = entries(&cluster.members);
            std::thread::sleep(Duration::from_millis(10));
            assert_eq!(entries(&cluster.members), before, "something ran");
            // A second pause changes nothing, a second resume neither.
            pause(&cluster.members);
            cluster.members.iter().chain(&cluster.members).for_each(|m| drop(m.resume(0)));
        }
        eprintln!("{vcpus:?}: longest pause {longest:?}");
        let ended = cluster.wait(Duration::from_secs(100));
        for test in tests.split(',') {
            assert!(
                ended.output.contains(&format!("BARE {test} PASS")),
                "{vcpus:?} {test}:\n{}",
                ended.output
            );
        }
        assert!(ended.last.iter().all(|e| *e == MemberEvent::Exit(VmExit::PowerOff)), "{:?}", ended.last);
    }
}

#[test]
fn a_paused_guest_can_be_stopped() {
    let Some(cluster) = Cluster::start(&[0, 1]) else { return };
    cluster.boot("cpus=2 test=loop shared=1");
    std::thread::sleep(Duration::from_millis(300));
    pause(&cluster.members);
    let start = Instant::now();
    cluster.members[0].stop("enough");
    let ended = cluster.wait(Duration::from_secs(20));
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert!(matches!(ended.last[0], MemberEvent::Exit(VmExit::Stopped { .. })), "{:?}", ended.last);
}
