//! Whole members on the real /dev/kvm, running the bare-metal guest. The guest checks itself and reports on COM1.

mod cluster;

use cluster::{Cluster, Ended};
use std::time::{Duration, Instant};
use vmm::member::{MemberEvent, VmExit};

fn passes(vcpus: &[u16], tests: &str, more: &str) -> Option<Ended> {
    let cluster = Cluster::start(vcpus)?;
    let mhz = cluster.members[0].plan().tsc_khz / 1000;
    cluster.boot(&format!("cpus={} deadline=20 timer_mhz={mhz} test={tests} {more}", vcpus.len()));
    let ended = cluster.wait(Duration::from_secs(100));
    for test in tests.split(',') {
        let want = format!("BARE {test} PASS");
        assert!(ended.output.contains(&want), "no {want:?} in\n{}\n{:?}", ended.output, ended.last);
    }
    for event in &ended.last {
        assert_eq!(*event, MemberEvent::Exit(VmExit::PowerOff), "{}", ended.output);
    }
    eprintln!("{}", ended.output);
    Some(ended)
}

#[test]
fn one_member_runs_the_guest() {
    passes(&[0, 0], "counter,ipi,ipimodes,timer,pages", "iterations=1000 rounds=10 count=20");
}

#[test]
fn timer_modes_on_one_member() {
    for mode in ["oneshot", "periodic"] {
        passes(&[0], "timer", &format!("mode={mode} count=20"));
    }
}

#[test]
fn xapic_mode_on_one_member() {
    passes(&[0, 0], "counter,ipi,ipimodes,timer", "apic=xapic iterations=500 rounds=5 count=10");
}

#[test]
fn two_members_are_one_machine() {
    let tests = "counter,pages,private,ipi,ipimodes,timer,tsc,litmus";
    let Some(ended) = passes(&[0, 1], tests, "iterations=1000 rounds=10 count=20") else { return };
    let remote: u64 = ended.stats.iter().map(|s| s.memory.faults.remote()).sum();
    assert!(remote > 0, "no page moved: {:#?}", ended.stats);
    assert!(ended.stats[0].vcpus[0].ipis_remote > 0 && ended.stats[1].vcpus[0].remote_accesses == 0);
}

#[test]
fn three_members_with_four_vcpus() {
    passes(&[0, 0, 1, 2], "counter,ipi,ipimodes,pages", "iterations=300 rounds=5");
}

#[test]
fn a_triple_fault_and_a_reset_end_all_members_with_their_name() {
    for (test, cpu) in [("triple", 1), ("reset", 1)] {
        let Some(cluster) = Cluster::start(&[0, 1]) else { return };
        cluster.boot(&format!("cpus=2 deadline=20 test={test} cpu={cpu}"));
        let ended = cluster.wait(Duration::from_secs(60));
        for event in &ended.last {
            let as_expected = match event {
                MemberEvent::Exit(VmExit::TripleFault { vcpu, .. }) => test == "triple" && *vcpu == cpu,
                MemberEvent::Exit(VmExit::Reset) => test == "reset",
                _ => false,
            };
            assert!(as_expected, "{test}: {event:?}\n{}", ended.output);
        }
    }
}

#[test]
fn stop_ends_a_running_guest_everywhere() {
    let Some(cluster) = Cluster::start(&[0, 1]) else { return };
    cluster.boot("cpus=2 test=loop shared=1");
    std::thread::sleep(Duration::from_millis(500));
    let start = Instant::now();
    cluster.members[1].stop("enough");
    let ended = cluster.wait(Duration::from_secs(20));
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    let MemberEvent::Exit(VmExit::Stopped { reason }) = &ended.last[1] else { panic!("{:?}", ended.last) };
    assert_eq!(reason, "enough");
    let MemberEvent::Exit(VmExit::Stopped { reason }) = &ended.last[0] else { panic!("{:?}", ended.last) };
    assert!(reason.contains("member 1 (host1"), "{reason}");
}
