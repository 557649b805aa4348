//! The placement policy with the real binary: two vCPUs of the bare-metal guest that count up the same pages from two
//! members meet, and stay; two that compute on one host while another has nothing to do part. Skipped, with the reason printed, where there is no KVM.

mod lab;

use lab::loops::{beats, info, stop};
use lab::{Lab, check, finish, guest};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read};
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

/// Longest wait for anything, on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// A detached VM of two members with a vCPU each, which take turns at the same pages.
fn launch(lab: &Lab, kernel: &str, more: &[&str]) {
    let cmdline = "cpus=2 test=loop shared=1 pages=4 deadline=300 beat=100";
    let args = ["launch", "--name=t", "--cpus=2", "--memory=64M", "--rng=off", "--detach"];
    let members = if more.iter().any(|arg| arg.starts_with("--on=")) { &[][..] } else { &["--members=2"] };
    let guest = ["--kernel", kernel, "--cmdline", cmdline];
    let mut command = lab.command(&[&args[..], members, more, &guest].concat());
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let output = finish(child.unwrap(), 60);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

/// Two node daemons that say to be different hosts.
fn two_hosts(lab: &mut Lab) -> String {
    let secret = "--secret-file=@/secret";
    let hosts = ["--name=one", "--name=two"].map(|name| lab.node(&[secret, name]).to_string());
    format!("--on={}", hosts.join(","))
}

/// The guest, where a member may have both vCPUs.
fn guest_with_room() -> Option<&'static str> {
    if std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() < 2) {
        println!("skipped: one processor has no room for a second vCPU");
        return None;
    }
    guest()
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn events(lab: &Lab, kind: &str) -> Vec<Value> {
    let all = json(&lab.run(&["events", "t", "--json"]));
    all.as_array().unwrap().iter().filter(|e| e["kind"] == kind).cloned().collect()
}

/// Polls until there is something.
fn until<T>(what: &str, lab: &Lab, mut look: impl FnMut() -> Option<T>) -> T {
    let since = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        if since.elapsed() > PATIENCE {
            let events = lab.run(&["events", "t"]);
            panic!("{what}: {}\n{:?}", String::from_utf8_lossy(&events.stdout), info(lab));
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn two_that_share_pages_meet() {
    let Some(kernel) = guest_with_room() else { return };
    let lab = Lab::new();
    launch(&lab, kernel, &[]);
    beats(&lab, 0);

    // What it would do, which changes nothing.
    let place = ["vcpu", "place", "t", "--policy", "follow"];
    let report = until("nobody waits for anybody", &lab, || {
        let report = json(&lab.run(&[&place[..], &["--explain", "--json"]].concat()));
        let found = report["round"]["candidates"].as_array().is_some_and(|all| !all.is_empty());
        found.then_some(report)
    });
    let first = &report["round"]["candidates"][0];
    assert!(first["gain"].as_f64().unwrap() > 0.0, "{report}");
    assert_eq!((&report["active"], &report["policy"]), (&json!("static"), &json!("follow")));
    let text = lab.run(&[&place[..], &["--explain"]].concat());
    assert!(String::from_utf8_lossy(&text.stdout).contains("VERDICT"), "{text:?}");
    let now = info(&lab).unwrap();
    assert_eq!((&now["vcpus"], &now["policy"]), (&json!([0, 1]), &json!("static")));
    assert!(events(&lab, "decision").is_empty());

    // They meet, and it is written down why.
    let report = json(&lab.run(&[&place[..], &["--json"]].concat()));
    assert_eq!(report["active"], "follow");
    until("they do not meet", &lab, || {
        let now = info(&lab)?;
        assert_eq!(now["policy"], "follow");
        (now["vcpus"][0] == now["vcpus"][1]).then_some(())
    });
    let judged = until("no judgement", &lab, || events(&lab, "judgement").pop());
    assert_eq!(judged["data"]["paid"], true, "{judged}");
    let decisions = events(&lab, "decision");
    let made = &decisions.last().unwrap()["data"]["round"]["candidates"][0];
    assert!(made["gain"].as_f64().unwrap() >= 0.05 && made["cost_s"].as_f64().unwrap() > 0.0, "{made}");
    assert_eq!(made["verdict"]["is"], "move");
    assert_eq!(events(&lab, "policy").len(), 1);

    // They stay, and nothing was lost on the way.
    let passes = beats(&lab, 0);
    beats(&lab, passes);
    let now = info(&lab).unwrap();
    assert_eq!(now["vcpus"][0], now["vcpus"][1]);
    assert_eq!(events(&lab, "decision").len(), decisions.len());

    // Its moves and other operations don't get in each other's way.
    json(&lab.run(&["pause", "t", "--json"]));
    check(&lab.run(&[&place[..], &["--explain"]].concat()), 1, &["paused"], "explain while paused");
    json(&lab.run(&["resume", "t", "--json"]));
    json(&lab.run(&["vcpu", "place", "t", "--policy", "static", "--json"]));
    let kinds: Vec<Value> = json(&lab.run(&["events", "t", "--json"]))
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["kind"].clone())
        .collect();
    assert_eq!(kinds[kinds.len() - 3..], [json!("pause"), json!("resume"), json!("policy")]);

    // With one member there is nothing to place.
    let here = now["vcpus"][0].as_u64().unwrap();
    if here == 1 {
        json(&lab.run(&["vcpu", "migrate", "t", "0", "1", "--to", "0", "--json"]));
    }
    let drained = lab.run(&["member", "drain", "t", "1"]);
    assert!(drained.status.success(), "{drained:?}");
    check(&lab.run(&place), 1, &["nothing to place"], "one member");
    assert_eq!(events(&lab, "drain").len(), 1);
    stop(&lab);
}

#[test]
fn from_the_start() {
    let Some(kernel) = guest_with_room() else { return };
    let lab = Lab::new();
    launch(&lab, kernel, &["--policy=follow"]);
    assert_eq!(info(&lab).unwrap()["policy"], "follow");
    until("they do not meet", &lab, || {
        let now = info(&lab)?;
        (now["vcpus"][0] == now["vcpus"][1]).then_some(())
    });
    let passes = beats(&lab, 0);
    beats(&lab, passes);
    // Who watches sees the end.
    let args = ["events", "t", "--follow", "--json"];
    let mut watch = lab.command(&args).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap());
    let mut text = String::new();
    lines.read_line(&mut text).unwrap();
    stop(&lab);
    lines.read_to_string(&mut text).unwrap();
    assert!(finish(watch, 60).status.success());
    let kinds: Vec<Value> =
        text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["kind"].clone()).collect();
    assert!(kinds.contains(&json!("decision")) && kinds.contains(&json!("move")), "{kinds:?}");
}

#[test]
fn a_crowded_host_gives_one_away() {
    let Some(kernel) = guest_with_room() else { return };
    let mut lab = Lab::new();
    let on = two_hosts(&mut lab);
    launch(&lab, kernel, &[&on, "--secret-file=@/secret"]);
    beats(&lab, 0);
    json(&lab.run(&["vcpu", "migrate", "t", "1", "--to", "0", "--json"]));
    assert_eq!(info(&lab).unwrap()["vcpus"], json!([0, 0]));

    let place = ["vcpu", "place", "t", "--policy", "balance"];
    let report = json(&lab.run(&[&place[..], &["--json"]].concat()));
    assert_eq!(report["active"], "balance");
    until("nobody leaves", &lab, || {
        let now = info(&lab)?;
        (now["vcpus"][0] != now["vcpus"][1]).then_some(())
    });
    let decisions = events(&lab, "decision");
    let made = &decisions.last().unwrap()["data"]["round"]["candidates"][0];
    assert_eq!((&made["from"], &made["to"]), (&json!(0), &json!(1)), "{made}");
    assert!(made["gain"].as_f64().unwrap() > 0.0, "{made}");
    let passes = beats(&lab, 0);
    beats(&lab, passes);
    stop(&lab);
    lab.nothing_runs();
}
