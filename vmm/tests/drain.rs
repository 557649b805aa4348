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

/// The drain of member 1 fails, and the VM ends with who died in it.
fn drain_ends_the_vm(lab: &Lab, fault: &str) {
    let output = lab.run(&["member", "drain", "t", "1"]);
    assert_ne!(output.status.code(), Some(0), "{fault}: {output:?}");
    let since = Instant::now();
    while info(lab).is_some() {
        assert!(since.elapsed() < LONG, "{fault}: the VM is still there");
        std::thread::sleep(Duration::from_millis(100));
    }
    lab.nothing_runs();
}

#[test]
fn a_member_that_dies_while_it_is_drained_is_a_lost_member() {
    let Some(kernel) = guest() else { return };
    for fault in ["1:evict:die", "2:change2:die"] {
        let lab = Lab::new();
        launch(&lab, kernel, 3, SHARED, &["--rng=off"], fault);
        drain_ends_the_vm(&lab, fault);
    }
}

/// The launch's flags for a guest that writes to a disk of member 1.
const DISK: [&str; 2] = ["--rng=1", "--disk=@/disk,member=1"];

/// A guest that writes numbers to its disk and finds them again, with an interrupt for each request.
fn launch_with_disk(lab: &Lab, kernel: &str, members: u16, fault: &str) {
    std::fs::write(lab.path("disk"), vec![0; 1 << 20]).unwrap();
    launch(lab, kernel, members, "pages=4 disk=0xD0000000 beat=20", &DISK, fault);
}

/// Whether somebody has the lock of the disk's image.
fn is_locked(lab: &Lab) -> bool {
    use rustix::fs::{FlockOperation, flock};
    let file = std::fs::File::open(lab.path("disk")).unwrap();
    let locked = flock(&file, FlockOperation::NonBlockingLockShared).is_err();
    drop(file);
    locked
}

/// Waits until the guest has written more numbers than `least` to its disk, and has found all; returns how many.
fn entries(lab: &Lab, least: u64) -> u64 {
    let since = Instant::now();
    loop {
        beats(lab, 0);
        let output = lab.run(&["console", "t", "--dump"]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let last = text.lines().rev().find(|l| l.starts_with("BARE loop BEAT") && l.contains("wrong="));
        let word = last.and_then(|l| l.split_whitespace().find_map(|w| w.strip_prefix("disk=")));
        match word.map(|number| number.parse().unwrap()) {
            Some(now) if now > least => return now,
            _ => assert!(since.elapsed() < LONG, "the disk stands still at {word:?}, {least}: {text}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The largest number in the image.
fn written(lab: &Lab) -> u64 {
    let bytes = std::fs::read(lab.path("disk")).unwrap();
    let numbers = bytes.chunks(512).map(|sector| u64::from_le_bytes(sector[..8].try_into().unwrap()));
    numbers.max().unwrap()
}

#[test]
fn a_member_leaves_with_its_devices_under_a_guest_that_uses_them() {
    let Some(kernel) = guest() else { return };
    let lab = Lab::new();
    launch_with_disk(&lab, kernel, 3, "");
    // More than the sectors that it uses, so that it looks at old ones.
    let mut least = entries(&lab, 10);
    let output = lab.run(&["member", "drain", "t", "1", "--json"]);
    ok(&output, "drain");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let devices = report["devices"].as_array().unwrap();
    let named = |what: &str| devices.iter().any(|d| d[0].as_str().unwrap().contains(what));
    assert!(devices.len() == 2 && named("the disk") && named("the random-number device"), "{report}");
    assert_eq!(ids(&lab), [0, 2]);
    assert!(is_locked(&lab));
    least = entries(&lab, least + 4);
    // To somebody who came later, and to one member.
    ok(&lab.run(&["member", "add", "t", "local"]), "add");
    ok(&lab.run(&["vcpu", "migrate", "t", "0", "--to", "1"]), "move");
    least = entries(&lab, least);
    ok(&lab.run(&["member", "drain", "t", "2"]), "drain another");
    least = entries(&lab, least + 4);
    ok(&lab.run(&["member", "drain", "t", "1"]), "drain the last but one");
    least = entries(&lab, least + 4);
    stop(&lab);
    assert!(written(&lab) >= least && !is_locked(&lab));
}

/// Each drain fails at another step of the devices, and they and the lock are where they were; the last one succeeds.
#[test]
fn whatever_fails_while_devices_go_leaves_them_where_they_were() {
    let Some(kernel) = guest() else { return };
    let lab = Lab::new();
    // Member 2 has the fewest devices, so it is asked first. From the fifth drain on each makes tables.
    let faults = "1:describe:refuse:1,0:inspect:refuse:1,2:inspect:refuse:1,1:give:refuse:1,2:take:refuse:1,\
                  2:change2:refuse,1:evict:refuse:1";
    launch_with_disk(&lab, kernel, 3, faults);
    let mut least = entries(&lab, 0);
    let before = (info(&lab).unwrap()["vcpus"].clone(), members(&lab));
    for step in ["describe", "inspect", "give", "take", "change2", "evict"] {
        let output = lab.run(&["member", "drain", "t", "1"]);
        check(&output, 1, &["a fault on purpose", step], step);
        assert_eq!((info(&lab).unwrap()["vcpus"].clone(), members(&lab)), before, "{step}");
        assert!(is_locked(&lab), "{step}");
        least = entries(&lab, least);
    }
    // The file is gone: nobody else can have it, and whoever has it goes on.
    std::fs::rename(lab.path("disk"), lab.path("gone")).unwrap();
    std::fs::write(lab.path("disk"), vec![0; 1 << 20]).unwrap();
    let output = lab.run(&["member", "drain", "t", "1"]);
    check(
        &output,
        1,
        &["has the disk", "no other member can take it", "not known to be the same file"],
        "gone",
    );
    std::fs::rename(lab.path("gone"), lab.path("disk")).unwrap();
    least = entries(&lab, least);
    ok(&lab.run(&["member", "drain", "t", "1"]), "drain");
    assert_eq!(ids(&lab), [0, 2]);
    least = entries(&lab, least);
    stop(&lab);
    assert!(written(&lab) >= least);
}

/// Who dies while it gives or takes devices is a lost member, and nobody writes to the disk any more.
#[test]
fn a_member_that_dies_while_devices_go_is_a_lost_member() {
    let Some(kernel) = guest() else { return };
    for fault in ["1:give:die", "2:take:die", "1:reclaim:die,2:change2:refuse"] {
        let lab = Lab::new();
        launch_with_disk(&lab, kernel, 3, fault);
        drain_ends_the_vm(&lab, fault);
        assert!(!is_locked(&lab), "{fault}");
    }
}

/// Member 0 leaves with the serial port, the interrupt controller and the rest of the board: the guest goes on writing to its
/// console, and its disk interrupts it, from wherever they are.
#[test]
fn member_0_leaves_with_the_board() {
    let Some(kernel) = guest() else { return };
    let lab = Lab::new();
    let faults = "0:give:refuse:1,2:take:refuse:1,2:change2:refuse,0:evict:refuse:1";
    launch_with_disk(&lab, kernel, 3, faults);
    let mut least = entries(&lab, 0);
    let before = (info(&lab).unwrap()["vcpus"].clone(), members(&lab));
    for step in ["give", "take", "change2", "evict"] {
        let output = lab.run(&["member", "drain", "t", "0"]);
        check(&output, 1, &["was not drained", "a fault on purpose", step, "the VM is as it was"], step);
        assert_eq!((info(&lab).unwrap()["vcpus"].clone(), members(&lab)), before, "{step}");
        least = entries(&lab, least);
    }
    let output = lab.run(&["member", "drain", "t", "0", "--json"]);
    ok(&output, "drain");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["devices"].to_string().contains("the serial port"), "{report}");
    assert_eq!(ids(&lab), [1, 2]);
    least = entries(&lab, least + 4);
    // Everything still works: a pause, a member that comes, and the board goes on.
    ok(&lab.run(&["pause", "t"]), "pause");
    ok(&lab.run(&["resume", "t"]), "resume");
    ok(&lab.run(&["console", "t", "--send", "nobody reads this"]), "type");
    ok(&lab.run(&["member", "add", "t", "local"]), "add");
    assert_eq!(ids(&lab), [1, 2, 3], "number 0 is the coordinator's");
    for member in ["2", "1"] {
        ok(&lab.run(&["member", "drain", "t", member]), member);
        least = entries(&lab, least + 4);
    }
    assert_eq!(ids(&lab), [3]);
    whole_console(&lab);
    stop(&lab);
    assert!(written(&lab) >= least);
}

/// No line of the guest's is missing, none came twice, whoever had the port.
fn whole_console(lab: &Lab) {
    let output = lab.run(&["console", "t", "--dump"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let beats = text.lines().filter(|l| l.starts_with("BARE loop BEAT") && l.contains("wrong="));
    let number =
        |line: &str| line.split_whitespace().find_map(|w| w.strip_prefix("disk=")?.parse::<u64>().ok());
    let numbers: Vec<u64> = beats.filter_map(number).collect();
    assert!(numbers.len() > 8, "{text}");
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "{text}");
    assert_eq!(numbers.first(), Some(&1), "{text}");
}
