//! Pausing, resuming and moving vCPUs with the real binary, and what happens when a member fails at each step of a move:
//! afterwards every vCPU lives on exactly one member, or the VM is over and says why. Skipped, with the reason printed,
//! where there is no KVM.

mod lab;

use lab::loops::stop;
use lab::{Lab, check, finish, guest};
use serde_json::Value;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// A detached VM of two members with two vCPUs each, running these tests, with faults on purpose.
fn launch(lab: &Lab, kernel: &str, cmdline: &str, fault: &str) {
    let args = ["launch", "--name=t", "--cpus=4", "--members=2", "--memory=64M", "--rng=off", "--detach"];
    let mut command = lab.command(&[&args[..], &["--kernel", kernel, "--cmdline", cmdline]].concat());
    let child = command.env("SPANVM_FAULT", fault).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let output = finish(child.unwrap(), 60);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    // Its CPUs are started one after the other.
    console(lab, "BARE start PASS");
}

fn console(lab: &Lab, line: &str) -> String {
    let since = Instant::now();
    loop {
        let text = String::from_utf8_lossy(&lab.run(&["console", "t", "--dump"]).stdout).into_owned();
        if text.contains(line) {
            return text;
        }
        assert!(since.elapsed() < Duration::from_secs(60), "no {line:?} in {text}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn info(lab: &Lab) -> Option<Value> {
    let output = lab.run(&["info", "t", "--json"]);
    output.status.success().then(|| serde_json::from_slice(&output.stdout).unwrap())
}

fn check_ok(output: &std::process::Output, what: &str) {
    assert!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The loop's passes of the slowest CPU, from its newest beat; waits for a beat later than `after` seconds.
fn beat(lab: &Lab, after: u64) -> (u64, u64) {
    let since = Instant::now();
    loop {
        let text = console(lab, "BARE loop BEAT");
        let last = text.lines().rfind(|l| l.contains("BARE loop BEAT")).unwrap_or_default();
        let number = |key: &str| {
            let value = last.split_whitespace().find_map(|word| word.strip_prefix(key));
            value.and_then(|v| v.parse::<u64>().ok()).unwrap_or_default()
        };
        assert_eq!(number("wrong="), 0, "{last}");
        if number("seconds=") > after {
            return (number("seconds="), number("least="));
        }
        assert!(since.elapsed() < Duration::from_secs(30), "no beat after {after}: {text}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn moved_paused_and_resumed() {
    let Some(kernel) = guest() else { return };
    let lab = Lab::new();
    launch(&lab, kernel, "cpus=4 test=loop", "");
    let seen = info(&lab).unwrap();
    assert_eq!(seen["vcpus"], serde_json::json!([0, 0, 1, 1]));
    let epoch = seen["epoch"].as_u64().unwrap();

    // To and fro, several at once, the first CPU too.
    for (vcpus, to, placed) in [
        (&["1"][..], "1", [0, 1, 1, 1]),
        (&["0"], "1", [1, 1, 1, 1]),
        (&["0", "1", "2", "3"], "0", [0, 0, 0, 0]),
        (&["3", "2"], "1", [0, 0, 1, 1]),
    ] {
        let (at, passes) = beat(&lab, 0);
        let output = lab.run(&[&["vcpu", "migrate", "t", "--to", to, "--json"], vcpus].concat());
        check_ok(&output, "migrate");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["moves"].as_array().unwrap().len(), vcpus.len());
        for moved in report["moves"].as_array().unwrap() {
            assert!(moved["downtime_us"].as_f64().unwrap() > 0.0, "{report}");
            assert!((1000..65536).contains(&moved["state_bytes"].as_u64().unwrap()), "{report}");
        }
        let now = info(&lab).unwrap();
        assert_eq!(now["vcpus"], serde_json::json!(placed));
        assert!(now["epoch"].as_u64().unwrap() > epoch);
        // On a busy machine a CPU may not complete a pass between two beats.
        let mut later = beat(&lab, at + 1);
        while later.1 <= passes {
            assert!(later.0 < at + 20, "a CPU stands still");
            later = beat(&lab, later.0);
        }
    }

    check_ok(&lab.run(&["pause", "t"]), "pause");
    assert_eq!(info(&lab).unwrap()["status"], "paused");
    let ps = lab.run(&["ps", "--json"]);
    assert!(String::from_utf8_lossy(&ps.stdout).contains("\"paused\""));
    let still = console(&lab, "BEAT");
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(console(&lab, "BEAT"), still);
    check(&lab.run(&["vcpu", "migrate", "t", "0", "--to", "1"]), 1, &["paused"], "move while paused");
    check(&lab.run(&["pause", "t"]), 1, &["paused already"], "pause twice");
    check_ok(&lab.run(&["resume", "t"]), "resume");
    check(&lab.run(&["resume", "t"]), 1, &["not paused"], "resume twice");
    let (at, _) = beat(&lab, 0);
    beat(&lab, at + 1);

    // What can't be done changes nothing.
    for (args, code, named) in [
        (&["vcpu", "migrate", "t", "0", "--to", "0"][..], 1, "vCPU 0 is on member 0 already"),
        (&["vcpu", "migrate", "t", "9", "--to", "0"], 2, "no vCPU 9"),
        (&["vcpu", "migrate", "t", "0", "--to", "7"], 2, "no member 7"),
        (&["vcpu", "migrate", "t", "0", "0", "--to", "1"], 2, "named twice"),
        (&["vcpu", "migrate", "nosuch", "0", "--to", "1"], 2, "no VM named"),
        (&["pause", "nosuch"], 2, "no VM named"),
    ] {
        check(&lab.run(args), code, &[named], &args.join(" "));
    }
    assert_eq!(info(&lab).unwrap()["vcpus"], serde_json::json!([0, 0, 1, 1]));
    stop(&lab);
}

/// vCPU 1 goes from member 0 to member 1, with a fault.
fn try_to_move(lab: &Lab, fault: &str) -> std::process::Output {
    let output = lab.run(&["vcpu", "migrate", "t", "1", "--to", "1", "--limit", "2"]);
    assert_ne!(output.status.code(), Some(0), "{fault}: {output:?}");
    output
}

/// After each the VM runs on, with the vCPU on one member, and the command says on which.
#[test]
fn a_member_that_refuses_or_hangs_at_each_step_of_a_move() {
    let Some(kernel) = guest() else { return };
    // A step is counted whenever it is reached, so each attempt meets the next fault.
    let table = [
        ("1:expect:refuse:1", 0, "no vCPU was moved"),
        ("1:arrive:refuse:1", 0, "vCPU 1 stays on member 0"),
        ("1:restore:refuse:1", 0, "vCPU 1 stays on member 0"),
        ("1:confirm:hang:1", 1, "may be on member 1"),
    ];
    let faults: Vec<_> = table.iter().map(|(fault, ..)| *fault).collect();
    let lab = Lab::new();
    launch(&lab, kernel, "cpus=4 test=loop beat=100", &faults.join(","));
    for (fault, member, words) in table {
        let (_, passes) = beat(&lab, 0);
        check(&try_to_move(&lab, fault), 1, &[words], fault);
        let now = info(&lab).unwrap();
        assert_eq!((&now["status"], &now["vcpus"][1]), (&"running".into(), &member.into()), "{fault}");
        if member == 0 {
            let since = Instant::now();
            while beat(&lab, 0).1 <= passes {
                assert!(since.elapsed() < Duration::from_secs(60), "{fault}: a CPU stands still");
            }
            // Nothing is left half done.
            check_ok(&lab.run(&["pause", "t"]), fault);
            check_ok(&lab.run(&["resume", "t"]), fault);
        }
    }
    stop(&lab);
}

/// The VM is over, and nothing is left of it.
#[test]
fn a_member_that_dies_at_each_step_of_a_move() {
    let Some(kernel) = guest() else { return };
    let lanes = [&["1:expect:die", "1:arrive:die", "1:restore:die"][..], &["1:confirm:die", "0:depart:die"]];
    std::thread::scope(|scope| {
        for faults in lanes {
            scope.spawn(move || {
                for fault in faults {
                    let lab = Lab::new();
                    launch(&lab, kernel, "cpus=4 test=loop", fault);
                    try_to_move(&lab, fault);
                    let since = Instant::now();
                    while info(&lab).is_some() {
                        assert!(since.elapsed() < Duration::from_secs(60), "{fault}: the VM is still there");
                        std::thread::sleep(Duration::from_millis(50));
                    }
                    lab.nothing_runs();
                }
            });
        }
    });
}
