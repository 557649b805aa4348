//! Bad input and sudden deaths, over the real binary. Nothing here needs /dev/kvm.

mod lab;

use lab::{Lab, check};
use std::fs;
use std::net::TcpListener;

#[test]
fn bad_input_is_refused() {
    let lab = Lab::new();
    let k = "--kernel=@/kernel";
    let table: &[(&[&str], &[&str])] = &[
        (&["launch"], &["--kernel is missing"]),
        (&["launch", "--kernel=@/none"], &["--kernel", "none", "no such file"]),
        (&["launch", "--kernel=@/folder"], &["--kernel", "is a directory"]),
        (&["launch", "--kernel=@/text"], &["--kernel", "neither a bzImage"]),
        (&["launch", "--kernel=@/truncated"], &["--kernel", "truncated"]),
        (&["launch", k, "--initrd=@/none"], &["--initrd", "no such file"]),
        (&["launch", k, "--initrd=@/folder"], &["--initrd", "is a directory"]),
        (&["launch", k, "--cpus=0"], &["--cpus 0"]),
        (&["launch", k, "--cpus=1", "--members=2"], &["--cpus 1", "2 members"]),
        (&["launch", k, "--cpus=x"], &["--cpus"]),
        (&["launch", k, "--memory=0M"], &["--memory 0M"]),
        (&["launch", k, "--memory=512"], &["--memory 512", "unit"]),
        (&["launch", k, "--members=2", "--on=a,b,c"], &["--members 2", "--on a,b,c"]),
        (&["launch", k, "--on=a,a"], &["--on a", "given twice"]),
        (&["launch", k, "--member=host=a", "--on=a"], &["--member", "--on"]),
        (&["launch", k, "--member=cpu=1"], &["--member", "\"cpu\""]),
        (&["launch", k, "--disk=@/none"], &["--disk", "no such file"]),
        (&["launch", k, "--disk=@/folder"], &["--disk", "is a directory"]),
        (&["launch", k, "--disk=@/text,member=2"], &["--disk", "member=2"]),
        (&["launch", k, "--rng=9"], &["--rng", "9"]),
        (&["launch", k, "--secret-file=@/open"], &["--secret-file", "open to other users"]),
        (&["launch", k, "--name=../x"], &["--name"]),
        (&["launch", "--config=@/none"], &["--config", "no such file"]),
        (&["launch", "--config=@/bad.toml"], &["--config", "kernle"]),
        (&["launch", k, "--unknown"], &["--unknown"]),
        (&["info", "none"], &["\"none\"", "no VM"]),
        (&["info", "../x"], &["no VM"]),
        (&["stop", "none"], &["no VM"]),
        (&["console", "none"], &["no VM"]),
        (&["console", "none", "--send", "x"], &["no VM"]),
        (&["console", "none", "--send", "x", "--dump"], &["cannot be used with"]),
        (&["launch", k, "--policy=best"], &["--policy best", "balance"]),
        (&["launch", k, "--members=1", "--policy=follow"], &["--policy follow", "one member"]),
        (&["vcpu", "place", "none", "--policy=follow"], &["no VM"]),
        (&["vcpu", "place", "none", "--policy=best"], &["\"best\"", "balance"]),
        (&["events", "none"], &["no VM"]),
        (&["events", "none", "--follow"], &["no VM"]),
        (&["ps", "--on=:x"], &["--on"]),
        (&["node", "--listen=nowhere"], &["--listen nowhere"]),
        (&["node", "--listen=0.0.0.0:0"], &["--secret-file"]),
        (&["node", "--listen=127.0.0.1:0", "--secret-file=@/open"], &["--secret-file", "chmod 600"]),
        (&["node", "--listen=127.0.0.1:0", "--secret-file=@/none"], &["--secret-file"]),
    ];
    for (args, named) in table {
        check(&lab.run(args), 2, named, &args.join(" "));
    }
    lab.nothing_runs();
    assert!(!lab.runtime().exists() || fs::read_dir(lab.runtime()).unwrap().next().is_none());
}

#[test]
fn hosts_that_do_not_answer() {
    let mut lab = Lab::new();
    let good = lab.node(&["--secret-file=@/secret"]).to_string();
    let open = lab.node(&[]).to_string();
    // Takes connections and says nothing; and a port on which nobody listens.
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let mute = mute.local_addr().unwrap().to_string();
    let closed = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().to_string()
    };
    let secret = "--secret-file=@/secret";
    let table: &[(&str, &[&str], &[&str])] = &[
        (&closed, &[], &["refused", "spanvm node"]),
        (&mute, &[], &["said nothing", "spanvm node"]),
        (&good, &["--secret-file=@/other"], &["same secret"]),
        (&good, &[], &["asks for a secret"]),
        (&open, &[secret], &["without --secret-file"]),
        ("203.0.113.1:1", &[], &["not a loopback address", "--secret-file"]),
        ("no.such.host.invalid", &[], &["can't be resolved"]),
    ];
    for (host, flags, named) in table {
        let on = format!("--on={host}");
        let mut args = vec!["launch", "--kernel=@/kernel", on.as_str()];
        args.extend(*flags);
        check(&lab.run(&args), 4, &[&[*host], *named].concat(), &args.join(" "));
    }
    // The second host is called by the coordinator, which says the same.
    let on = format!("--on={good},{closed}");
    check(&lab.run(&["launch", "--kernel=@/kernel", &on, secret]), 4, &[&closed, "refused"], &on);
    check(&lab.run(&["ps", "--on", &good]), 4, &["asks for a secret"], "ps without secret");
    check(&lab.run(&["info", "x", "--on", &good, secret]), 3, &["no VM named"], "info elsewhere");
    let ps = lab.run(&["ps", "--json", "--on", &good, secret]);
    assert_eq!((ps.status.code(), ps.stdout.as_slice()), (Some(0), &b"[]\n"[..]));
    lab.nothing_runs();
}

#[test]
fn what_a_killed_vm_left_is_cleaned() {
    let lab = Lab::new();
    let folder = lab.runtime().join("dead");
    fs::create_dir_all(&folder).unwrap();
    for name in ["lock", "api.sock", "log"] {
        fs::write(folder.join(name), "").unwrap();
    }
    let ps = lab.run(&["ps", "--json"]);
    assert_eq!((ps.status.code(), ps.stdout.as_slice()), (Some(0), &b"[]\n"[..]));
    assert!(!folder.exists());
}

#[test]
fn a_member_needs_its_parent() {
    let lab = Lab::new();
    let output = lab.run(&["member"]);
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn doctor_and_help() {
    let lab = Lab::new();
    let doctor = lab.run(&["doctor", "--json"]);
    assert!(matches!(doctor.status.code(), Some(0 | 3)));
    assert!(String::from_utf8_lossy(&doctor.stdout).contains("\"usable\""));
    let help = lab.run(&["launch", "--help"]);
    assert!(String::from_utf8_lossy(&help.stdout).contains("Exit codes"));
}
