//! Members leave a running VM, with the real binary: the guest counts on, exactly. And what happens when a member fails at
//! each step: the VM is as it was, or goes on without the member, or is over and says why. Skipped, with the reason printed,
//! where there is no KVM.

mod lab;

use lab::loops::{beats, launch, stop};
use lab::{Lab, check, finish, guest};
use serde_json::Value;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(60);
/// All CPUs count on the same pages in turn, so that no page may be lost or old.
const SHARED: &str = "shared=1 pages=100";

fn ok(output: &Output, what: &str) {
    assert!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
}

fn info(lab: &Lab) -> Option<Value> {
    let output = lab.run(&["info", "t", "--json"]);
    output.status.success().then(|| serde_json::from_slice(&output.stdout).unwrap())
}

/// Numbers, homes in bytes, of the members.
fn members(lab: &Lab) -> Vec<(u64, u64)> {
    let info = info(lab).unwrap();
    let number = |m: &Value, key: &str| m[key].as_u64().unwrap();
    info["members"].as_array().unwrap().iter().map(|m| (number(m, "id"), number(m, "memory_home"))).collect()
}

fn ids(lab: &Lab) -> Vec<u64> {
    members(lab).into_iter().map(|(id, _)| id).collect()
}

#[test]
fn drained_one_after_the_other_under_a_counting_guest() {
    let Some(kernel) = guest() else { return };
    let lab = Lab::new();
    launch(&lab, kernel, 3, SHARED, &["--rng=off"], "");
    let least = beats(&lab, 0);
    for (args, code, named) in [
        (&["member", "drain", "t", "7"][..], 2, "no member 7; the members are 0, 1, 2"),
        (&["member", "drain", "t", "0"], 1, "member 0 is the coordinator"),
        (&["member", "drain", "nosuch", "1"], 2, "no VM named"),
        (&["member", "cancel", "t"], 1, "no drain is under way"),
    ] {
        check(&lab.run(args), code, &[named], &args.join(" "));
    }
    let epoch = info(&lab).unwrap()["epoch"].as_u64().unwrap();

    let output = lab.run(&["member", "drain", "t", "1", "--json"]);
    ok(&output, "drain");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["vcpus"].as_array().unwrap().len(), 1, "{report}");
    let now = info(&lab).unwrap();
    assert_eq!(ids(&lab), [0, 2]);
    assert!(now["epoch"].as_u64().unwrap() > epoch);
    assert_eq!(members(&lab).iter().map(|(_, homes)| homes).sum::<u64>(), 64 << 20);
    assert_eq!(lab::processes_with(&lab.runtime()).len(), 2, "its process has ended");
    let least = beats(&lab, least);
    let twice = lab.run(&["member", "drain", "t", "1"]);
    check(&twice, 2, &["no member 1; the members are 0, 2"], "drained twice");

    // The others are whole: vCPUs move, and all of it pauses.
    let place = now["vcpus"][0].as_u64().unwrap();
    let other = if place == 0 { "2" } else { "0" };
    ok(&lab.run(&["vcpu", "migrate", "t", "0", "--to", other]), "move");
    ok(&lab.run(&["pause", "t"]), "pause");
    check(&lab.run(&["member", "drain", "t", "2"]), 1, &["paused"], "drain while paused");
    ok(&lab.run(&["resume", "t"]), "resume");
    let least = beats(&lab, least);

    ok(&lab.run(&["member", "drain", "t", "2"]), "drain the second");
    assert_eq!(ids(&lab), [0]);
    assert_eq!(info(&lab).unwrap()["vcpus"], serde_json::json!([0, 0, 0]));
    beats(&lab, least);
    check(&lab.run(&["member", "drain", "t", "0"]), 1, &["only one"], "drain the last");
    stop(&lab);
}

/// Each drain fails at another step, or is cancelled, and the VM is as it was; the last one succeeds though the member dies
/// as soon as it has nothing any more.
#[test]
fn whatever_fails_leaves_the_vm_as_it_was() {
    let Some(kernel) = guest() else { return };
    let lab = Lab::new();
    // The fourth drain makes tables 2 and 3, the new homes and the old ones; the fifth 4 and 5; the sixth 6 to 9.
    let faults = "0:expect:refuse:1,2:inherit:refuse:1,1:entries:refuse:1,2:change2:refuse,1:evict:refuse:1,\
                  2:change7:refuse,0:expect:slow:6,1:part:die";
    launch(&lab, kernel, 3, SHARED, &["--rng=off"], faults);
    let mut least = beats(&lab, 0);
    let before = (info(&lab).unwrap()["vcpus"].clone(), members(&lab));
    let as_it_was = |step: &str| {
        assert_eq!((info(&lab).unwrap()["vcpus"].clone(), members(&lab)), before, "{step}");
    };
    for step in ["expect", "inherit", "entries", "change2", "evict", "change7"] {
        let output = lab.run(&["member", "drain", "t", "1"]);
        let words = ["was not drained", "a fault on purpose", step, "the VM is as it was"];
        check(&output, 1, &words, step);
        as_it_was(step);
    }
    least = beats(&lab, least);

    let drain =
        lab.command(&["member", "drain", "t", "1"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let since = Instant::now();
    while !lab.run(&["member", "cancel", "t"]).status.success() {
        assert!(since.elapsed() < LONG, "the drain never begins");
        std::thread::sleep(Duration::from_millis(20));
    }
    check(&finish(drain.unwrap(), 60), 1, &["was not drained", "the VM is as it was"], "cancel");
    as_it_was("cancel");
    least = beats(&lab, least);

    ok(&lab.run(&["member", "drain", "t", "1"]), "drained, and dies when it has left");
    assert_eq!(ids(&lab), [0, 2]);
    beats(&lab, least);
    stop(&lab);
}

#[test]
fn a_member_that_dies_while_it_is_drained_is_a_lost_member() {
    let Some(kernel) = guest() else { return };
    for fault in ["1:evict:die", "2:change2:die"] {
        let lab = Lab::new();
        launch(&lab, kernel, 3, SHARED, &["--rng=off"], fault);
        let output = lab.run(&["member", "drain", "t", "1"]);
        assert_ne!(output.status.code(), Some(0), "{fault}: {output:?}");
        let since = Instant::now();
        while info(&lab).is_some() {
            assert!(since.elapsed() < LONG, "{fault}: the VM is still there");
            std::thread::sleep(Duration::from_millis(100));
        }
        lab.nothing_runs();
    }
}

#[test]
fn a_member_with_devices_stays() {
    let Some(kernel) = guest() else { return };
    let lab = Lab::new();
    std::fs::write(lab.path("disk"), vec![0; 1 << 20]).unwrap();
    launch(&lab, kernel, 2, SHARED, &["--rng=1", "--disk=@/disk,member=1"], "");
    let output = lab.run(&["member", "drain", "t", "1"]);
    check(&output, 1, &["the disk", "disk", "the random-number device"], "devices");
    stop(&lab);
}
