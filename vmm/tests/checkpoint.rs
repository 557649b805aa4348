//! Checkpoints over the real binary with the bare-metal guest: each page of its loop counts up in order, so that at any
//! instant all values are equal but for one step, and the guest itself sees it if a page is older or newer than the rest.

mod lab;

use lab::{Lab, check, guest};
use serde_json::Value;
use std::process::Stdio;
use std::time::{Duration, Instant};

fn launch(lab: &Lab, kernel: &str, members: u16, cmdline: &str) {
    let members = format!("--members={members}");
    let args = [
        "launch",
        "--name=t",
        "--cpus=3",
        "--memory=64M",
        "--detach",
        "--kernel",
        kernel,
        &members,
        "--cmdline",
        cmdline,
    ];
    let output = lab.run(&args);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

fn console(lab: &Lab) -> String {
    String::from_utf8_lossy(&lab.run(&["console", "t", "--dump"]).stdout).into_owned()
}

/// The last heartbeat of the guest's loop: seconds, least passes, wrong values.
fn beat(text: &str) -> Option<(u64, u64, u64)> {
    let line = text.lines().rev().find(|l| l.starts_with("BARE loop BEAT") && l.contains("wrong="))?;
    let number = |key: &str| {
        let word = line.split_whitespace().find_map(|w| w.strip_prefix(key))?;
        word.parse().ok()
    };
    Some((number("seconds=")?, number("least=")?, number("wrong=")?))
}

/// Waits for a beat with more passes than `least`; returns its passes. Nothing may be wrong.
fn beats(lab: &Lab, least: u64) -> u64 {
    let since = Instant::now();
    loop {
        let text = console(lab);
        if let Some((_, passes, wrong)) = beat(&text) {
            assert_eq!(wrong, 0, "a page is older or newer than the others:\n{text}");
            if passes > least {
                return passes;
            }
        }
        if since.elapsed() > Duration::from_secs(40) {
            let info = lab.run(&["info", "t", "--json"]);
            panic!("no heartbeat above {least}:\n{text}\n{}", String::from_utf8_lossy(&info.stdout));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn checkpoint(lab: &Lab, more: &[&str]) -> Value {
    let output = lab.run(&[&["checkpoint", "t", "--to", "@/ck", "--json"], more].concat());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let line = String::from_utf8_lossy(&output.stdout).lines().last().unwrap().to_owned();
    serde_json::from_str(&line).unwrap()
}

fn restore(lab: &Lab, members: u16) {
    let members = format!("--members={members}");
    let output = lab.run(&["restore", "@/ck", "--detach", &members]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

fn kill_all(lab: &Lab) {
    for (pid, _) in lab::processes_with(&lab.runtime()) {
        // SAFETY: kill takes two numbers; the process is one that this test started.
        unsafe { libc::kill(i32::try_from(pid).unwrap(), libc::SIGKILL) };
    }
    lab.nothing_runs();
    // A process that is on its way out shows no environment any more, but still holds the VM's name.
    let since = Instant::now();
    while lab.run(&["ps", "--json"]).stdout != b"[]\n" {
        assert!(since.elapsed() < Duration::from_secs(20), "the VM's name stays taken");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_guest_goes_on_from_the_cut_on_any_number_of_members() {
    let Some(kernel) = guest() else { return };
    for (shared, from) in [(1, 2), (0, 1)] {
        let lab = Lab::new();
        launch(&lab, kernel, from, &format!("cpus=3 test=loop pages=40 shared={shared} deadline=120"));
        let mut passes = beats(&lab, 0);
        for members in [3, 2, 1] {
            let first = checkpoint(&lab, &[]);
            assert!(first["pages"].as_u64().unwrap() > 10, "{first}");
            let second = checkpoint(&lab, &[]);
            println!("{first}\n{second}");
            // One member without sharing is always saved in full.
            if from > 1 {
                assert_eq!(second["full"], false, "{second}");
                assert!(second["bytes"].as_u64() <= first["bytes"].as_u64(), "{first} {second}");
            }
            passes = passes.max(beats(&lab, 0));
            kill_all(&lab);
            restore(&lab, members);
            let after = beats(&lab, 0);
            assert!(after + 1 >= passes / 2, "restored to {after} passes of {passes}");
            passes = beats(&lab, after);
        }
        let stopped = checkpoint(&lab, &["--stop"]);
        assert!(stopped["pause_ms"].as_f64().unwrap() > 0.0);
        lab.nothing_runs();
        restore(&lab, 2);
        beats(&lab, passes / 2);
        lab.run(&["stop", "t"]);
        lab.nothing_runs();
    }
}

#[test]
fn bad_folders_are_named_and_the_vm_runs_on() {
    let Some(kernel) = guest() else { return };
    let lab = Lab::new();
    check(&lab.run(&["restore", "@/none"]), 2, &["none", "missing"], "no folder");
    check(&lab.run(&["restore", "@/folder"]), 2, &["folder", "no complete checkpoint"], "an empty folder");
    check(&lab.run(&["checkpoint", "nobody", "--to", "@/ck"]), 2, &["nobody"], "no such VM");
    launch(&lab, kernel, 2, "cpus=3 test=loop pages=40 shared=1 deadline=120");
    let passes = beats(&lab, 0);
    let full = lab.run(&["checkpoint", "t", "--to", "/dev/full/x"]);
    check(&full, 1, &["/dev/full"], "no folder there");
    let file = lab.run(&["checkpoint", "t", "--to", "@/text"]);
    check(&file, 1, &["text"], "a file");
    checkpoint(&lab, &[]);
    beats(&lab, passes);
    lab.run(&["stop", "t"]);
    lab.nothing_runs();
    // Another guest must not write over it.
    launch(&lab, kernel, 2, "cpus=3 test=loop pages=40 shared=1 deadline=120");
    let other = lab.run(&["checkpoint", "t", "--to", "@/ck"]);
    check(&other, 1, &["ck", "belongs to VM t"], "another guest's folder");
    let passes = beats(&lab, 0);
    beats(&lab, passes);
    lab.run(&["stop", "t"]);
    lab.nothing_runs();
    let page_file = std::fs::read_dir(lab.path("ck/00000001")).unwrap().flatten();
    let page_file = page_file.map(|e| e.path()).find(|p| p.to_string_lossy().contains("pages-0")).unwrap();
    std::fs::remove_file(&page_file).unwrap();
    check(&lab.run(&["restore", "@/ck"]), 2, &["pages-0", "missing"], "a missing page file");
}

/// Random moments, and a writer that is killed in the middle.
#[test]
fn twenty_times_at_any_moment() {
    let Some(kernel) = guest() else { return };
    let lab = Lab::new();
    launch(&lab, kernel, 2, "cpus=3 test=loop pages=200 shared=1 deadline=120");
    beats(&lab, 0);
    let mut seed = u64::from(std::process::id());
    for round in 0..20u64 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        std::thread::sleep(Duration::from_millis(seed >> 56));
        checkpoint(&lab, if round % 5 == 0 { &["--full"] } else { &[] });
        let mut writer = lab
            .command(&["checkpoint", "t", "--to", "@/ck", "--full"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis((seed >> 48 & 0xFF) / 4));
        kill_all(&lab);
        writer.wait().unwrap();
        restore(&lab, [2, 3, 1][usize::try_from(round % 3).unwrap()]);
        beats(&lab, 0);
    }
    lab.run(&["stop", "t"]);
    lab.nothing_runs();
}
