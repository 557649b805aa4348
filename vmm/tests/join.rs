//! Members join a running VM, with the real binary: the guest counts on, exactly, and uses them. And what happens when
//! something fails at each step: the VM is as it was. Skipped, with the reason printed, where there is no KVM.

mod lab;

use lab::loops::{beats, beats_at, checkpoint, info, is_over, launch, restore, stop};
use lab::{Lab, check, finish, guest};
use serde_json::Value;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

/// All CPUs count on the same pages in turn, so that no page may be lost or old.
const SHARED: &str = "shared=1 pages=100";

fn ok(output: &Output, what: &str) {
    assert!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
}

fn json(output: &Output, what: &str) -> Value {
    ok(output, what);
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Number, home in bytes, and number of vCPUs of each member.
fn members(info: &Value) -> Vec<(u64, u64, usize)> {
    let row = |m: &Value| {
        let number = |key: &str| m[key].as_u64().unwrap();
        (number("id"), number("memory_home"), m["vcpus"].as_array().unwrap().len())
    };
    info["members"].as_array().unwrap().iter().map(row).collect()
}

fn ids(lab: &Lab) -> Vec<u64> {
    members(&info(lab).unwrap()).iter().map(|m| m.0).collect()
}

#[test]
fn drained_and_added_again_under_a_counting_guest() {
    let Some(kernel) = guest() else { return };
    let lab = Lab::new();
    launch(&lab, kernel, 3, SHARED, &["--rng=off"], "");
    let mut least = beats(&lab, 0);
    ok(&lab.run(&["member", "drain", "t", "1"]), "drain");
    least = beats(&lab, least);
    for (args, code, named) in [
        (["member", "add", "nosuch", "local"], 2, "no VM named"),
        (["member", "add", "t", "127.0.0.1:1"], 1, "started without node daemons"),
        (["member", "add", "t", "two words"], 2, "not a host name"),
        (["migrate", "t", "--to", "local,"], 2, "not a host name"),
    ] {
        check(&lab.run(&args), code, &[named], &args.join(" "));
    }
    ok(&lab.run(&["pause", "t"]), "pause");
    check(&lab.run(&["member", "add", "t", "local"]), 1, &["paused"], "added while paused");
    ok(&lab.run(&["resume", "t"]), "resume");

    let report = json(&lab.run(&["member", "add", "t", "local", "--json"]), "add");
    assert_eq!(report["member"], 1, "the number is free again: {report}");
    let rows = members(&info(&lab).unwrap());
    assert_eq!(rows.iter().map(|m| m.0).collect::<Vec<_>>(), [0, 1, 2]);
    assert_eq!(rows.iter().map(|m| m.1).sum::<u64>(), 64 << 20);
    assert_eq!((rows[1].1, rows[1].2), (report["memory_home"].as_u64().unwrap(), 0));
    assert!(rows[1].1 > 16 << 20, "{rows:?}");
    assert_eq!(lab::processes_with(&lab.runtime()).len(), 3);
    least = beats(&lab, least);

    // It is a member like the others: vCPUs go there, all of it pauses, others can leave.
    ok(&lab.run(&["vcpu", "migrate", "t", "0", "2", "--to", "1"]), "move");
    let held = || info(&lab).unwrap()["members"][1]["memory_held"].as_u64().unwrap();
    let since = Instant::now();
    while held() < 100 << 12 {
        assert!(since.elapsed() < Duration::from_secs(60), "its vCPUs do not count: {:?}", info(&lab));
        least = beats(&lab, least);
    }
    ok(&lab.run(&["pause", "t"]), "pause");
    ok(&lab.run(&["resume", "t"]), "resume");
    ok(&lab.run(&["member", "drain", "t", "2"]), "drain another");
    least = beats(&lab, least);
    assert!(members(&info(&lab).unwrap())[1].2 >= 2);
    ok(&lab.run(&["member", "drain", "t", "1"]), "drain it");
    // To one member, and to more.
    ok(&lab.run(&["member", "add", "t", "local"]), "add to one");
    ok(&lab.run(&["vcpu", "migrate", "t", "1", "--to", "1"]), "move");
    least = beats(&lab, least);
    // What is there now is what a checkpoint has.
    checkpoint(&lab, &["--stop"]);
    is_over(&lab);
    restore(&lab, 3);
    beats(&lab, least);
    stop(&lab);
}

/// Each addition fails at another step, and the VM is as it was; the last one succeeds.
#[test]
fn whoever_fails_while_somebody_joins_the_vm_is_as_it_was() {
    let Some(kernel) = guest() else { return };
    let lab = Lab::new();
    // The newcomer is member 2. From the second on each addition makes two tables, the new one and the old one again.
    let faults = "1:meet:refuse:1,2:change2:die,2:change4:refuse,1:change6:refuse,2:change8:hang";
    launch(&lab, kernel, 2, SHARED, &["--rng=off"], faults);
    let mut least = beats(&lab, 0);
    let before = members(&info(&lab).unwrap());
    for step in ["meet", "was killed", "change4", "change6", "no answer within"] {
        let output = lab.run(&["member", "add", "t", "local"]);
        check(&output, 1, &["this host was not added", step, "the VM is as it was"], step);
        assert_eq!(members(&info(&lab).unwrap()), before, "{step}");
        assert_eq!(lab::processes_with(&lab.runtime()).len(), 2, "{step}");
        least = beats(&lab, least);
    }
    ok(&lab.run(&["member", "add", "t", "local"]), "add");
    assert_eq!(ids(&lab), [0, 1, 2]);
    ok(&lab.run(&["vcpu", "migrate", "t", "0", "--to", "2"]), "move");
    beats(&lab, least);
    stop(&lab);
}

#[test]
fn one_at_a_time_until_it_is_cancelled_or_the_newcomer_dies() {
    let Some(kernel) = guest() else { return };
    let lab = Lab::new();
    launch(&lab, kernel, 2, SHARED, &["--rng=off"], "2:join:slow,3:join:die");
    let mut least = beats(&lab, 0);
    let before = members(&info(&lab).unwrap());
    let add =
        lab.command(&["member", "add", "t", "local"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let since = Instant::now();
    let is_under_way = |args: &[&str]| {
        String::from_utf8_lossy(&lab.run(args).stderr).contains("the addition of a member is under way")
    };
    // Without the addition this is refused for another reason: it is there.
    while !is_under_way(&["vcpu", "migrate", "t", "0", "--to", "0"]) {
        assert!(since.elapsed() < Duration::from_secs(60), "the addition never begins");
    }
    assert!(is_under_way(&["member", "add", "t", "local"]), "two at once");
    ok(&lab.run(&["member", "cancel", "t"]), "cancel");
    check(&finish(add.unwrap(), 60), 1, &["was not added", "cancelled", "the VM is as it was"], "cancelled");
    assert_eq!(members(&info(&lab).unwrap()), before);
    least = beats(&lab, least);

    ok(&lab.run(&["member", "add", "t", "local"]), "slow");
    let output = lab.run(&["member", "add", "t", "local"]);
    check(&output, 1, &["was not added", "was killed", "the VM is as it was"], "dies");
    assert_eq!(ids(&lab), [0, 1, 2]);
    beats(&lab, least);
    stop(&lab);
}

#[test]
fn members_on_other_hosts_join_and_the_whole_vm_goes_there_and_back() {
    let Some(kernel) = guest() else { return };
    let mut lab = Lab::new();
    let nodes = [0; 3].map(|_| lab.node(&["--secret-file", "@/secret"]).to_string());
    let stranger = lab.node(&["--secret-file", "@/other"]).to_string();
    let on = format!("--on={},{}", nodes[0], nodes[1]);
    let place = [&*format!("--on={}", nodes[0]), "--secret-file", "@/secret"];
    let run = |args: &[&str]| lab.run(&[args, &place[..]].concat());
    launch(&lab, kernel, 2, SHARED, &[&on, "--rng=off", "--secret-file", "@/secret"], "");
    let least = beats_at(&lab, 0, &place);
    for (host, named) in [("127.0.0.1:1", "127.0.0.1:1"), (&stranger, "secret")] {
        let output = run(&["member", "add", "t", host]);
        check(&output, 1, &["was not added", named, "the VM is as it was"], host);
    }
    check(&run(&["member", "add", "t", &nodes[1]]), 1, &["has member 1 already"], "twice");

    let report = json(&run(&["member", "add", "t", &nodes[2], "--json"]), "add");
    assert_eq!(report["member"], 2);
    ok(&run(&["vcpu", "migrate", "t", "1", "--to", "2"]), "move");
    let least = beats_at(&lab, least, &place);
    // Everything goes there, the serial port as well. The coordinator's process stays, with nothing of the guest.
    let report = json(&run(&["migrate", "t", "--to", &nodes[2], "--json"]), "migrate");
    let added = report["added"].as_array().unwrap().len();
    assert_eq!((report["stays"].as_bool(), added), (Some(true), 0), "{report}");
    let now = json(&run(&["info", "t", "--json"]), "info");
    assert_eq!(members(&now), [(2, 64 << 20, 3)]);
    let least = beats_at(&lab, least, &place);
    // And back, to two.
    let to = format!("local,{}", nodes[1]);
    let report = json(&run(&["migrate", "t", "--to", &to, "--json"]), "back");
    let moved = |what: &str| report[what].as_array().unwrap().len();
    assert_eq!(
        (report["stays"].as_bool(), moved("added"), moved("drained")),
        (Some(false), 2, 1),
        "{report}"
    );
    let now = json(&run(&["info", "t", "--json"]), "info");
    assert_eq!(members(&now).iter().map(|m| m.0).collect::<Vec<_>>(), [1, 3]);
    beats_at(&lab, least, &place);
    ok(&run(&["stop", "t"]), "stop");
}
