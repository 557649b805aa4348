//! Checkpoints over the real binary with the bare-metal guest: each page of its loop counts up in order, so that at any
//! instant all values are equal but for one step, and the guest itself sees it if a page is older or newer than the rest.

mod lab;

use lab::loops::{beats, checkpoint, info, kill_all, launch, restore};
use lab::{Lab, check, guest};
use std::process::{Command, Stdio};
use std::time::Duration;

#[test]
fn a_guest_goes_on_from_the_cut_on_any_number_of_members() {
    let Some(kernel) = guest() else { return };
    for (shared, from) in [(1, 2), (0, 1)] {
        let lab = Lab::new();
        launch(&lab, kernel, from, &format!("pages=40 shared={shared}"), &[], "");
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
            let later = beats(&lab, 0);
            kill_all(&lab);
            restore(&lab, members);
            // Not before the cut; how far it had come when it was killed is another matter.
            let after = beats(&lab, 0);
            assert!(after >= passes, "restored to {after} passes; {passes} before the cut, {later} after it");
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

/// File, contents, exit code, what is wrong, what the error names.
type Bad<'a> = (&'a str, Vec<u8>, i32, &'a str, &'a [&'a str]);

#[test]
fn bad_folders_are_named_and_the_vm_runs_on() {
    let Some(kernel) = guest() else { return };
    let lab = Lab::new();
    check(&lab.run(&["restore", "@/none"]), 2, &["none", "missing"], "no folder");
    check(&lab.run(&["restore", "@/folder"]), 2, &["folder", "no complete checkpoint"], "an empty folder");
    check(&lab.run(&["checkpoint", "nobody", "--to", "@/ck"]), 2, &["nobody"], "no such VM");
    launch(&lab, kernel, 2, "pages=40 shared=1", &[], "");
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
    launch(&lab, kernel, 2, "pages=40 shared=1", &[], "");
    let other = lab.run(&["checkpoint", "t", "--to", "@/ck"]);
    check(&other, 1, &["ck", "belongs to VM t"], "another guest's folder");
    assert!(lab.run(&["checkpoint", "t", "--to", "@/foreign"]).status.success());
    let passes = beats(&lab, 0);
    beats(&lab, passes);
    lab.run(&["stop", "t"]);
    lab.nothing_runs();
    let folder = lab.path("ck/00000001");
    let whole = |name: &str| std::fs::read(folder.join(name)).unwrap();
    let (manifest, pages) = (whole("manifest"), whole("pages-0"));
    let with = |bytes: &[u8], at: usize, flip: u8| {
        let mut bytes = bytes.to_vec();
        bytes[at] ^= flip;
        bytes
    };
    let newer = [&b"spanvm checkpoint 9"[..], &manifest[19..]].concat();
    let foreign = std::fs::read(lab.path("foreign/00000001/pages-0")).unwrap();
    let last = pages.len() - 1;
    let other = whole("pages-1");
    let bad: [Bad; 13] = [
        ("manifest", newer, 2, "a newer version", &["manifest", "9"]),
        ("manifest", with(&manifest, 5, 4), 2, "a flipped bit of its title", &["manifest"]),
        ("manifest", with(&manifest, manifest.len() / 2, 4), 2, "a flipped bit", &["manifest"]),
        ("manifest", manifest[..manifest.len() - 1].to_vec(), 2, "the end is missing", &["manifest"]),
        ("manifest", Vec::new(), 2, "empty", &["manifest"]),
        ("pages-0", with(&pages, 8, 3), 2, "a newer version", &["pages-0", "version 2"]),
        ("pages-0", with(&pages, 20, 1), 2, "a flipped bit of its header", &["pages-0", "damaged"]),
        ("pages-0", with(&pages, last - 60, 4), 2, "a flipped bit of its index", &["pages-0", "damaged"]),
        ("pages-0", with(&pages, last - 20, 4), 2, "a flipped bit of its end", &["pages-0", "damaged"]),
        ("pages-0", pages[..last - 4095].to_vec(), 2, "cut off", &["pages-0"]),
        ("pages-0", other.clone(), 2, "another file of the same checkpoint", &["pages-0"]),
        ("pages-0", foreign, 2, "another guest's file", &["pages-0"]),
        // The guest runs by then.
        ("pages-1", with(&other, 4100, 1), 1, "a flipped bit of a page", &["pages-1", "damaged", "checksum"]),
    ];
    for (name, bytes, code, what, named) in bad {
        let good = whole(name);
        std::fs::write(folder.join(name), bytes).unwrap();
        check(&lab.run(&["restore", "@/ck", "--quiet"]), code, named, &format!("{name}: {what}"));
        lab.nothing_runs();
        std::fs::write(folder.join(name), good).unwrap();
    }
    check(&lab.run(&["restore", "@/ck", "--members=4"]), 2, &["3 vCPUs", "4 members"], "too many members");
    for name in ["pages-0", "pages-1", "manifest"] {
        std::fs::remove_file(folder.join(name)).unwrap();
        check(&lab.run(&["restore", "@/ck"]), 2, &["ck"], name);
    }
}

/// More memory than a process may have, and budgets.
#[test]
fn memory_that_is_scarce() {
    let Some(kernel) = guest() else { return };
    let lab = Lab::new();
    let member = "--member=memory=1G,budget=1100M";
    launch(&lab, kernel, 2, "pages=40 shared=1", &["--memory=2G", member, member], "");
    let passes = beats(&lab, 0);
    checkpoint(&lab, &["--stop"]);
    lab.nothing_runs();
    let restore = lab.command(&["restore", "@/ck", "--quiet"]);
    let limited = Command::new("sh")
        .args(["-c", "ulimit -v 1500000; exec \"$@\"", "sh"])
        .arg(restore.get_program())
        .args(restore.get_args())
        .env("SPANVM_RUNTIME_DIR", lab.runtime())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    check(&lab::finish(limited.unwrap(), 60), 1, &["memory"], "too little memory");
    lab.nothing_runs();
    for (members, budget) in [(3, 734u64), (2, 1100)] {
        self::restore(&lab, members);
        let now = info(&lab).unwrap();
        for member in now["members"].as_array().unwrap() {
            let bytes = member["memory_budget"].as_u64().unwrap_or_default();
            assert!((budget << 20..(budget + 4) << 20).contains(&bytes), "{member}");
        }
        beats(&lab, passes - 1);
        lab.run(&["stop", "t"]);
        lab.nothing_runs();
    }
}

/// Random moments, and a writer that is killed in the middle.
#[test]
fn twenty_times_at_any_moment() {
    let Some(kernel) = guest() else { return };
    let lab = Lab::new();
    launch(&lab, kernel, 2, "pages=200 shared=1", &[], "");
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
