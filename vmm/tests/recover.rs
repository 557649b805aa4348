//! Checkpoints when something fails: members that are lost, at each step of a checkpoint and at any other time, disks that
//! are full, operations that meet. Skipped, with the reason printed, where there is no KVM.

mod lab;

use lab::loops::{
    beats, beats_at, checkpoint, info, is_over, is_paused, kill, kill_all, launch, pid, restore, stop,
};
use lab::{Lab, check, guest};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const LOOP: &str = "pages=40 shared=1";
const STEPS: [&str; 6] = ["pause", "quiet", "save", "capture", "release", "resume"];

#[test]
fn a_vm_that_lost_a_member_goes_on_from_its_newest_checkpoint() {
    let Some(kernel) = guest() else { return };
    let lab = Lab::new();
    check(&lab.run(&["recover", "nobody"]), 2, &["no checkpoint of a VM named nobody"], "nobody");
    check(&lab.run(&["recover", "../x"]), 2, &["../x"], "no name");
    launch(&lab, kernel, 2, LOOP, &[], "");
    let mut passes = beats(&lab, 0);
    check(&lab.run(&["recover", "t"]), 2, &["no checkpoint"], "no checkpoint yet");
    checkpoint(&lab, &[]);
    check(&lab.run(&["recover", "t"]), 2, &["runs on this host already"], "it runs");

    // The coordinator's process: nobody is left to say anything.
    kill(pid(&lab, 0));
    let output = lab.run(&["recover", "t", "--detach"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    // It takes the next order at once.
    checkpoint(&lab, &[]);
    passes = beats(&lab, passes - 1);

    // A member: the VM stays paused, and says why.
    kill(pid(&lab, 1));
    let said = ["member 1", "signal 9", "/ck/0000000", "spanvm recover t", "spanvm stop t"];
    let reason = is_paused(&lab);
    assert!(said.iter().all(|words| reason.contains(words)), "{reason}");
    assert!(String::from_utf8_lossy(&lab.run(&["ps"]).stdout).contains("paused"));
    assert!(lab.run(&["console", "t", "--dump"]).stdout.windows(4).any(|w| w == b"BEAT"));
    for args in [
        &["resume", "t"][..],
        &["pause", "t"],
        &["vcpu", "migrate", "t", "0", "--to", "1"],
        &["checkpoint", "t", "--to", "@/ck"],
    ] {
        check(&lab.run(args), 1, &said, &args.join(" "));
    }
    let args = ["launch", "--name=t", "--kernel", kernel];
    check(&lab.run(&args), 2, &["runs on this host already"], "its name is taken");
    let recover = ["recover", "t", "--quiet"];
    let child = lab.command(&recover).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let since = Instant::now();
    while info(&lab).is_none_or(|now| now["status"] != "running") {
        assert!(since.elapsed() < Duration::from_secs(60), "not recovered");
        std::thread::sleep(Duration::from_millis(50));
    }
    passes = beats(&lab, passes - 1);
    beats(&lab, passes);

    // The launcher ends and leaves it behind.
    kill(pid(&lab, 1));
    check(&lab::finish(child.unwrap(), 60), 5, &said, "in the foreground");
    assert!(is_paused(&lab).contains("member 1"));
    stop(&lab);
    check(&lab.run(&["recover", "t"]), 2, &["no checkpoint"], "it was given up");
}

#[test]
fn a_vm_that_is_to_end_with_its_member() {
    let Some(kernel) = guest() else { return };
    let lab = Lab::new();
    launch(&lab, kernel, 2, LOOP, &["--on-member-loss=end"], "");
    let passes = beats(&lab, 0);
    checkpoint(&lab, &[]);
    kill(pid(&lab, 1));
    is_over(&lab);
    lab.nothing_runs();
    let log = std::fs::read_to_string(lab.path("run/t.log")).unwrap();
    assert!(
        log.contains("member 1") && log.contains("ck/0000000") && log.contains("spanvm recover t"),
        "{log}"
    );
    let output = lab.run(&["recover", "t", "--detach", "--members=1"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    beats(&lab, passes - 1);
    stop(&lab);
}

#[test]
fn restored_without_being_asked() {
    let Some(kernel) = guest() else { return };
    let lab = Lab::new();
    let policy = "--on-member-loss=maybe";
    let output = lab.run(&["launch", "--name=t", "--kernel", kernel, policy]);
    check(&output, 2, &["maybe", "pause, end or restore"], "no such policy");
    launch(&lab, kernel, 2, LOOP, &["--on-member-loss=restore"], "");
    let mut passes = beats(&lab, 0);
    checkpoint(&lab, &[]);
    for _ in 0..2 {
        let lost = pid(&lab, 1);
        kill(lost);
        let since = Instant::now();
        while info(&lab).is_none_or(|now| now["status"] != "running" || now["members"][1]["pid"] == lost) {
            assert!(since.elapsed() < Duration::from_secs(60), "not restored");
            std::thread::sleep(Duration::from_millis(100));
        }
        passes = beats(&lab, passes - 1);
    }
    stop(&lab);
}

#[test]
fn over_node_daemons_on_more_and_fewer_hosts() {
    let Some(kernel) = guest() else { return };
    let mut lab = Lab::new();
    let nodes: Vec<String> = ["one", "two", "three"]
        .map(|name| lab.node(&["--secret-file=@/secret", &format!("--name={name}")]).to_string())
        .to_vec();
    let secret = "--secret-file=@/secret";
    let place = format!("--on={}", nodes[0]);
    let at_first = [place.as_str(), secret];
    let on = |count: usize| format!("--on={}", nodes[..count].join(","));
    launch(&lab, kernel, 2, LOOP, &[&on(2), secret], "");
    let mut passes = beats_at(&lab, 0, &at_first);
    for members in [3, 1] {
        let folder = lab.path("ck");
        let save = ["checkpoint", "t", "--to", folder.to_str().unwrap(), "--stop"];
        let output = lab.run(&[&save[..], &at_first].concat());
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        lab.nothing_runs();
        let output = lab.run(&["restore", "@/ck", "--name=t", "--detach", &on(members), secret]);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        passes = beats_at(&lab, passes - 1, &at_first);
        passes = beats_at(&lab, passes, &at_first);
        let seen = lab.run(&[&["info", "t", "--json"], &at_first[..]].concat());
        let seen: serde_json::Value = serde_json::from_slice(&seen.stdout).unwrap();
        assert_eq!(seen["members"].as_array().unwrap().len(), members);
    }
    let output = lab.run(&[&["stop", "t"], &at_first[..]].concat());
    assert!(output.status.success(), "{output:?}");
    lab.nothing_runs();
}

/// Every step in which a member can refuse: the guest runs on, or can be made to, and the next checkpoint is a good one.
#[test]
fn a_member_that_refuses_at_each_step() {
    let Some(kernel) = guest() else { return };
    let lab = Lab::new();
    // A step is counted whenever it is reached, so each attempt meets the next fault.
    let faults: Vec<_> = STEPS.iter().map(|step| format!("1:{step}:refuse:{}", time(step))).collect();
    launch(&lab, kernel, 2, LOOP, &[], &faults.join(","));
    let mut passes = beats(&lab, 0);
    checkpoint(&lab, &[]);
    for step in STEPS {
        let output = lab.run(&["checkpoint", "t", "--to", "@/ck"]);
        if step == "release" {
            // It is tried again.
            assert_eq!(output.status.code(), Some(0), "{step}: {output:?}");
        } else {
            check(&output, 1, &["member 1", &format!("on purpose, at {step}")], step);
        }
        if step == "resume" {
            assert_eq!(info(&lab).unwrap()["status"], "paused");
            assert!(lab.run(&["resume", "t"]).status.success());
        }
        passes = beats(&lab, passes);
        assert_eq!(info(&lab).unwrap()["status"], "running", "{step}");
    }
    let last = checkpoint(&lab, &[]);
    assert_eq!(last["full"], true, "after a failure nobody knows what has changed: {last}");
    kill_all(&lab);
    restore(&lab, 1);
    beats(&lab, passes - 1);
    stop(&lab);
}

/// At which time a step is to fail so that the checkpoint after the first good one fails at the first step, the next at
/// the second, and so on.
fn time(step: &str) -> u32 {
    match step {
        "pause" => 2,
        // Reached by the first, and by all from the second attempt on.
        "quiet" => 2,
        "save" => 2,
        "capture" => 2,
        // Also after the attempts that failed at quiet, save and capture.
        "release" => 5,
        // After every one before: four that failed, and the good ones.
        _ => 7,
    }
}

/// After a member that dies at a step the checkpoint before is the newest, and the VM goes on from it.
#[test]
fn a_member_that_dies_at_each_step() {
    let Some(kernel) = guest() else { return };
    std::thread::scope(|scope| {
        for steps in STEPS.chunks(3) {
            scope.spawn(move || {
                let lab = Lab::new();
                // The first checkpoint is good.
                launch(&lab, kernel, 2, LOOP, &[], &format!("1:{}:die:2", steps[0]));
                let mut passes = beats(&lab, 0);
                checkpoint(&lab, &[]);
                for (n, step) in steps.iter().enumerate() {
                    let output = lab.run(&["checkpoint", "t", "--to", "@/ck"]);
                    check(&output, 1, &["member 1"], step);
                    assert!(is_paused(&lab).contains("member 1"), "{step}");
                    let next = steps.get(n + 1).copied().unwrap_or_default();
                    // A restored VM is resumed once before.
                    let fault = format!("1:{next}:die:{}", if next == "resume" { 2 } else { 1 });
                    let mut recover = lab.command(&["recover", "t", "--detach"]);
                    let recover = recover.env("SPANVM_FAULT", fault);
                    let child = recover.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
                    let output = lab::finish(child.unwrap(), 60);
                    assert_eq!(output.status.code(), Some(0), "{step}: {output:?}");
                    passes = beats(&lab, passes - 1);
                }
                stop(&lab);
            });
        }
    });
}

/// Begins an operation that hangs, and returns when another one has been refused because of it. Whichever asks first has its
/// turn, so the one that is to hang may be the one that is refused: then it is begun again.
fn begin(lab: &Lab, hanging: &[&str], other: &[&str], refusal: &str) -> Child {
    let since = Instant::now();
    loop {
        let mut child = lab.command(hanging).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        while child.try_wait().unwrap().is_none() {
            let output = lab.run(other);
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            if output.status.code() == Some(1) && text.contains(refusal) {
                return child;
            }
            assert!(since.elapsed() < Duration::from_secs(100), "{hanging:?} never began: {output:?}");
        }
    }
}

/// A member that hangs at a step is named, in bounded time, and the VM runs on, or can be made to. Meanwhile nothing else
/// is begun.
#[test]
fn a_member_that_hangs_at_each_step() {
    let Some(kernel) = guest() else { return };
    // Each attempt meets the next fault. Who does not answer when its memory is released is asked once more.
    let first = "1:pause:hang:1,1:quiet:hang:1,1:save:hang:1";
    let second = "1:capture:hang:1,1:release:hang:2,1:release:hang:2,1:resume:hang:3";
    std::thread::scope(|scope| {
        for (steps, faults) in STEPS.chunks(3).zip([first, second]) {
            scope.spawn(move || {
                let lab = Lab::new();
                launch(&lab, kernel, 2, LOOP, &[], faults);
                let mut passes = beats(&lab, 0);
                for step in steps {
                    let checkpoint = ["checkpoint", "t", "--to", "@/ck", "--limit=1"];
                    // Never done, whether the checkpoint has begun or is over.
                    let other = ["vcpu", "migrate", "t", "0", "--to", "0"];
                    let child = begin(&lab, &checkpoint, &other, "a checkpoint is under way");
                    check(&lab::finish(child, 60), 1, &["member 1", "no"], step);
                    if ["release", "resume"].contains(step) {
                        assert!(is_paused(&lab).contains("member 1"), "{step}");
                        assert!(lab.run(&["resume", "t"]).status.success(), "{step}");
                    }
                    passes = beats(&lab, passes);
                    assert_eq!(info(&lab).unwrap()["status"], "running", "{step}");
                }
                checkpoint(&lab, &[]);
                stop(&lab);
            });
        }
    });
}

#[test]
fn a_checkpoint_during_a_move_is_refused() {
    let Some(kernel) = guest() else { return };
    let lab = Lab::new();
    launch(&lab, kernel, 2, LOOP, &[], "1:confirm:hang");
    beats(&lab, 0);
    let migrate = ["vcpu", "migrate", "t", "0", "--to", "1", "--limit", "5"];
    let child = begin(&lab, &migrate, &["checkpoint", "t", "--to", "@/ck"], "a move of vCPUs is under way");
    lab::finish(child, 60);
    kill_all(&lab);
    lab.nothing_runs();
}

/// A disk of 64 KiB, which only the VM's processes see.
#[test]
fn a_disk_that_is_full() {
    let Some(kernel) = guest() else { return };
    let mounts = Command::new("unshare").args(["-m", "true"]).output();
    if !mounts.is_ok_and(|output| output.status.success()) {
        println!("skipped: no mounts of one's own (unshare -m)");
        return;
    }
    let lab = Lab::new();
    let full = lab.path("full");
    std::fs::create_dir(&full).unwrap();
    let script = format!("mount -t tmpfs -o size=64k none {} && exec \"$@\"", full.display());
    let args =
        ["launch", "--name=t", "--cpus=3", "--memory=64M", "--members=2", "--detach", "--kernel", kernel];
    let cmdline = format!("cpus=3 test=loop deadline=300 {LOOP}");
    let inner = lab.command(&[&args[..], &["--cmdline", &cmdline]].concat());
    let child = Command::new("unshare")
        .args(["-m", "sh", "-c", &script, "sh"])
        .arg(inner.get_program())
        .args(inner.get_args())
        .env("SPANVM_RUNTIME_DIR", lab.runtime())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let output = lab::finish(child.unwrap(), 60);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let passes = beats(&lab, 0);
    let output = lab.run(&["checkpoint", "t", "--to", "@/full"]);
    check(&output, 1, &["/full/", "No space left"], "a full disk");
    beats(&lab, passes);
    let made = checkpoint(&lab, &[]);
    assert_eq!(made["full"], true, "{made}");
    kill_all(&lab);
    restore(&lab, 2);
    beats(&lab, passes - 1);
    stop(&lab);
}
