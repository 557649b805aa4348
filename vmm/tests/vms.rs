//! VMs over the real binary, with the bare-metal guest on the real /dev/kvm: their whole life, and what happens
//! when one of their processes is killed. Skipped, with the reason printed, where there is no KVM.

mod lab;

use lab::{Lab, check, finish, guest};
use serde_json::Value;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// Arguments of a launch of two vCPUs.
fn launch<'a>(kernel: &'a str, tests: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut args =
        vec!["launch", "--name=t", "--cpus=2", "--memory=64M", "--kernel", kernel, "--cmdline", tests];
    args.extend(more);
    args
}

fn start(lab: &Lab, args: &[&str]) -> Child {
    lab.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn info(lab: &Lab, more: &[&str]) -> Option<Value> {
    let output = lab.run(&[&["info", "t", "--json"], more].concat());
    output.status.success().then(|| serde_json::from_slice(&output.stdout).unwrap())
}

/// Waits until the guest runs.
fn running(lab: &Lab, more: &[&str]) -> Value {
    let since = Instant::now();
    loop {
        match info(lab, more) {
            Some(info) if info["status"] == "running" => return info,
            other => assert!(since.elapsed() < Duration::from_secs(60), "does not run: {other:?}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn kill(pid: u64) {
    // SAFETY: kill takes two numbers; the process is one that this test started.
    let done = unsafe { libc::kill(i32::try_from(pid).unwrap(), libc::SIGKILL) };
    assert_eq!(done, 0, "process {pid} is gone already");
}

fn pid(info: &Value, member: usize) -> u64 {
    info["members"][member]["pid"].as_u64().filter(|pid| *pid > 1).unwrap()
}

#[test]
fn the_guest_decides_the_exit_code() {
    let Some(kernel) = guest() else { return };
    let lab = Lab::new();
    let table = [
        ("cpus=2 test=counter,pages", &["--members=2"][..], 0, "BARE pages PASS"),
        ("cpus=2 test=counter", &["--members=1"], 0, "BARE counter PASS"),
        ("cpus=2 test=reset", &["--quiet"], 7, "BARE reset BEGIN"),
    ];
    for (tests, more, code, line) in table {
        let output = lab.run(&launch(kernel, tests, more));
        let (stdout, stderr) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{tests}: {stdout}{stderr}");
        assert!(stdout.contains(line), "{tests}: {stdout}{stderr}");
        assert!(!stderr.contains("error:"), "{tests}: {stderr}");
    }
    let output = lab.run(&launch(kernel, "cpus=2 test=triple", &[]));
    check(&output, 6, &["vCPU 0 triple-faulted", "rip"], "triple");
    lab.nothing_runs();
}

#[test]
fn detached_looked_at_and_stopped() {
    let Some(kernel) = guest() else { return };
    let lab = Lab::new();
    let output = lab.run(&launch(kernel, "cpus=2 test=loop", &["--detach"]));
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let seen = running(&lab, &[]);
    assert_eq!(seen["vcpus"], serde_json::json!([0, 1]));
    assert_eq!(seen["members"].as_array().unwrap().len(), 2);
    let since = Instant::now();
    loop {
        let info = running(&lab, &[]);
        let count = |member: usize, what: &str| info["members"][member][what].as_u64().unwrap();
        let remote = info["members"][1]["faults"]["read_remote"].as_u64().unwrap();
        if count(0, "memory_held") > 0
            && count(1, "memory_held") > 0
            && remote > 0
            && count(0, "ipis_remote") > 0
        {
            break;
        }
        assert!(since.elapsed() < Duration::from_secs(30), "counters stay 0: {info}");
        std::thread::sleep(Duration::from_millis(100));
    }
    let ps = lab.run(&["ps", "--json"]);
    let ps: Value = serde_json::from_slice(&ps.stdout).unwrap();
    assert_eq!((&ps[0]["name"], &ps[0]["status"]), (&"t".into(), &"running".into()));
    assert!(String::from_utf8_lossy(&lab.run(&["info", "t"]).stdout).contains("MEMBER"));
    let console = lab.run(&["console", "t", "--dump"]);
    assert!(String::from_utf8_lossy(&console.stdout).contains("BARE start PASS"));
    check(&lab.run(&launch(kernel, "", &[])), 2, &["named \"t\" runs", "--name"], "second of a name");
    let stop = lab.run(&["stop", "t"]);
    assert_eq!(stop.status.code(), Some(0), "{stop:?}");
    lab.nothing_runs();
    assert_eq!(lab.run(&["ps", "--json"]).stdout, b"[]\n");
}

#[test]
fn a_killed_process_takes_the_vm_along() {
    let Some(kernel) = guest() else { return };
    let lab = Lab::new();
    let args = launch(kernel, "cpus=2 test=loop", &[]);
    for member in [1, 0] {
        let launcher = start(&lab, &args);
        let seen = running(&lab, &[]);
        kill(pid(&seen, member));
        let named = [format!("member {member}"), "signal 9".into()];
        check(&finish(launcher, 40), 5, &[&named[0], &named[1]], "killed member");
        lab.nothing_runs();
    }
    let mut launcher = start(&lab, &args);
    running(&lab, &[]);
    launcher.kill().unwrap();
    launcher.wait().unwrap();
    lab.nothing_runs();
    assert_eq!(lab.run(&["ps", "--json"]).stdout, b"[]\n");
}

#[test]
fn a_member_killed_during_the_start() {
    let Some(kernel) = guest() else { return };
    let lab = Lab::new();
    for delay in [0, 5, 10, 20, 30, 50, 80, 120, 200] {
        let launcher = start(&lab, &launch(kernel, "cpus=2 test=loop", &[]));
        let since = Instant::now();
        // The second `spanvm member-process` to appear is member 1.
        let victim = loop {
            let mut pids: Vec<_> =
                lab::processes_with(&lab.runtime()).into_iter().map(|(pid, _)| pid).collect();
            pids.sort_unstable();
            if let [_, victim] = pids.as_slice() {
                break *victim;
            }
            assert!(since.elapsed() < Duration::from_secs(30), "no member process: {pids:?}");
            std::thread::sleep(Duration::from_millis(2));
        };
        std::thread::sleep(Duration::from_millis(delay));
        kill(victim.into());
        check(&finish(launcher, 60), 5, &["member 1", "lost"], &format!("killed after {delay} ms"));
        lab.nothing_runs();
    }
}

#[test]
fn over_node_daemons() {
    let Some(kernel) = guest() else { return };
    let mut lab = Lab::new();
    let secret = "--secret-file=@/secret";
    let first = lab.node(&[secret, "--name=one"]).to_string();
    let second = lab.node(&[secret, "--name=two"]).to_string();
    let on = format!("--on={first},{second}");
    let output = lab.run(&launch(kernel, "cpus=2 test=counter", &[&on, secret]));
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.contains("BARE counter PASS") && text.contains("on two"), "{text}");
    lab.nothing_runs();

    let at_first = [format!("--on={first}")];
    let at_first = [at_first[0].as_str(), secret];
    let output = lab.run(&launch(kernel, "cpus=2 test=loop", &[&on, secret, "--detach"]));
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let seen = running(&lab, &at_first);
    assert_eq!((&seen["members"][0]["host"], &seen["members"][1]["host"]), (&"one".into(), &"two".into()));
    // The guest runs; when it says something is its own affair.
    let begin = std::time::Instant::now();
    let has_spoken = || {
        let dump = lab.run(&[&["console", "t", "--dump"], &at_first[..]].concat());
        String::from_utf8_lossy(&dump.stdout).contains("BARE start")
    };
    while !has_spoken() {
        assert!(begin.elapsed() < std::time::Duration::from_secs(30), "nothing on the console");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let stop = lab.run(&[&["stop", "t"], &at_first[..]].concat());
    assert_eq!(stop.status.code(), Some(0), "{stop:?}");
    lab.nothing_runs();

    // A daemon that is killed takes its members along, and the launcher says so.
    for victim in [1, 0] {
        let launcher = start(&lab, &launch(kernel, "cpus=2 test=loop", &[&on, secret]));
        running(&lab, &at_first);
        lab.nodes[victim].kill().unwrap();
        lab.nodes[victim].wait().unwrap();
        let code = if victim == 0 { 4 } else { 5 };
        let host = if victim == 0 { &first } else { &second };
        let output = finish(launcher, 60);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(matches!(output.status.code(), Some(4 | 5)), "{code}: {stderr}");
        assert!(stderr.contains(host.as_str()) && !stderr.contains("panicked"), "{stderr}");
        lab.nothing_runs();
        let node = lab.node(&[secret, "--name=two", "--listen", host]).to_string();
        assert_eq!(&node, host);
        let last = lab.nodes.pop().unwrap();
        lab.nodes[victim] = last;
    }
}

#[test]
fn disks_are_looked_at_on_their_own_host() {
    let Some(kernel) = guest() else { return };
    let mut lab = Lab::new();
    let first = lab.node(&[]).to_string();
    let second = lab.node(&["--name=two"]).to_string();
    let on = format!("--on={first},{second}");
    let output = lab.run(&launch(kernel, "cpus=2 test=counter", &[&on, "--disk=/no/such.img,member=1"]));
    check(&output, 2, &["member 1", &second, "/no/such.img", "no such file"], "disk on another host");
    lab.nothing_runs();
}
