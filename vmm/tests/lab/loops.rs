//! The bare-metal guest's loop, in which each page counts up in order, so that at any instant all values are equal but for
//! one step, and the guest itself sees it if a page is older or newer than the rest; and checkpoints of it.

use super::{Lab, finish, processes_with};
use serde_json::Value;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// Longest wait for anything, on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// A detached VM `t` with three CPUs that runs the loop, with faults on purpose.
pub fn launch(lab: &Lab, kernel: &str, members: u16, cmdline: &str, more: &[&str], fault: &str) {
    let members = format!("--members={members}");
    let cmdline = format!("cpus=3 test=loop deadline=300 beat=100 {cmdline}");
    let has = |flag: &str| more.iter().any(|arg| arg.starts_with(flag));
    let members = if has("--on=") || has("--member=") { Vec::new() } else { vec![members.as_str()] };
    let memory = if has("--memory=") { Vec::new() } else { vec!["--memory=64M"] };
    let args = ["launch", "--name=t", "--cpus=3", "--detach", "--kernel", kernel, "--cmdline", &cmdline];
    let mut command = lab.command(&[&args[..], &memory, &members, more].concat());
    let child = command.env("SPANVM_FAULT", fault).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let output = finish(child.unwrap(), 60);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

/// The guest's last heartbeat: least passes of a CPU, wrong values.
fn beat(text: &str) -> Option<(u64, u64)> {
    let line = text.lines().rev().find(|l| l.starts_with("BARE loop BEAT") && l.contains("wrong="))?;
    let number = |key: &str| {
        let word = line.split_whitespace().find_map(|w| w.strip_prefix(key))?;
        word.parse().ok()
    };
    Some((number("least=")?, number("wrong=")?))
}

/// Waits for a beat with more passes than `least`; returns its passes. Nothing may be wrong.
pub fn beats(lab: &Lab, least: u64) -> u64 {
    beats_at(lab, least, &[])
}

/// As [`beats`], of a VM whose coordinator is elsewhere.
pub fn beats_at(lab: &Lab, least: u64, place: &[&str]) -> u64 {
    let since = Instant::now();
    loop {
        let output = lab.run(&[&["console", "t", "--dump"], place].concat());
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if let Some((passes, wrong)) = beat(&text) {
            assert_eq!(wrong, 0, "a page is older or newer than the others:\n{text}");
            if passes > least {
                return passes;
            }
        }
        if since.elapsed() > PATIENCE {
            let info = lab.run(&[&["info", "t", "--json"], place].concat());
            let log = std::fs::read_to_string(lab.path("run/t.log")).unwrap_or_default();
            panic!("no heartbeat above {least}:\n{text}\n{info:?}\nits log:\n{log}");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A checkpoint in `ck`.
pub fn checkpoint(lab: &Lab, more: &[&str]) -> Value {
    let output = lab.run(&[&["checkpoint", "t", "--to", "@/ck", "--json"], more].concat());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let line = String::from_utf8_lossy(&output.stdout).lines().last().unwrap().to_owned();
    serde_json::from_str(&line).unwrap()
}

pub fn restore(lab: &Lab, members: u16) {
    let members = format!("--members={members}");
    let output = lab.run(&["restore", "@/ck", "--detach", &members]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(info(lab).unwrap()["status"], "running");
}

/// Stops the VM; nothing of it is left.
pub fn stop(lab: &Lab) {
    let output = lab.run(&["stop", "t"]);
    assert!(output.status.success(), "{output:?}");
    lab.nothing_runs();
}

pub fn info(lab: &Lab) -> Option<Value> {
    let output = lab.run(&["info", "t", "--json"]);
    output.status.success().then(|| serde_json::from_slice(&output.stdout).unwrap())
}

/// The process of a member.
pub fn pid(lab: &Lab, member: usize) -> u32 {
    u32::try_from(info(lab).unwrap()["members"][member]["pid"].as_u64().unwrap()).unwrap()
}

pub fn kill(pid: u32) {
    // SAFETY: kill takes two numbers; the process is one that this test started.
    unsafe { libc::kill(i32::try_from(pid).unwrap(), libc::SIGKILL) };
}

/// Waits until the VM is no more.
pub fn is_over(lab: &Lab) {
    let since = Instant::now();
    while lab.run(&["ps", "--json"]).stdout != b"[]\n" {
        assert!(since.elapsed() < PATIENCE, "the VM is still there");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Waits until the VM is paused; returns the reason.
pub fn is_paused(lab: &Lab) -> String {
    let since = Instant::now();
    loop {
        let now = info(lab).unwrap_or_default();
        if now["status"] == "paused" {
            return now["reason"].as_str().unwrap_or_default().to_owned();
        }
        assert!(since.elapsed() < PATIENCE, "not paused: {now}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Kills every process of the VM. Its name may be taken for some time yet.
pub fn kill_all(lab: &Lab) {
    for (pid, _) in processes_with(&lab.runtime()) {
        kill(pid);
    }
}
