//! Checkpoints over the real binary with the bare-metal guest: each page of its loop counts up in order, so that at any
//! instant all values are equal but for one step, and the guest itself sees it if a page is older or newer than the rest.

mod lab;

use lab::loops::{beats, checkpoint, kill_all, launch, restore};
use lab::{Lab, check, guest};
use std::process::Stdio;
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
    let passes = beats(&lab, 0);
    beats(&lab, passes);
    lab.run(&["stop", "t"]);
    lab.nothing_runs();
    // Each line: the file, what happens to it, what the error names.
    let folder = lab.path("ck/00000001");
    let whole = |name: &str| std::fs::read(folder.join(name)).unwrap();
    let (manifest, pages) = (whole("manifest"), whole("pages-0"));
    let newer = [&b"spanvm checkpoint 9"[..], &manifest[19..]].concat();
    let mut flipped = manifest.clone();
    flipped[manifest.len() / 2] ^= 4;
    let mut index = pages.clone();
    index[pages.len() - 60] ^= 4;
    let bad: [(&str, &[u8], &str, &[&str]); 6] = [
        ("manifest", &newer, "a newer version", &["manifest", "9"]),
        ("manifest", &flipped, "a flipped bit", &["manifest"]),
        ("manifest", &manifest[..manifest.len() - 1], "the end is missing", &["manifest"]),
        ("pages-0", &pages[..pages.len() - 4096], "cut off", &["pages-0"]),
        ("pages-0", &index, "a flipped bit", &["pages-0"]),
        ("pages-0", &whole("pages-1"), "another file of the same checkpoint", &["pages-0"]),
    ];
    for (name, bytes, what, named) in bad {
        let good = whole(name);
        std::fs::write(folder.join(name), bytes).unwrap();
        check(&lab.run(&["restore", "@/ck"]), 2, named, &format!("{name}: {what}"));
        std::fs::write(folder.join(name), good).unwrap();
    }
    check(&lab.run(&["restore", "@/ck", "--members=4"]), 2, &["3 vCPUs", "4 members"], "too many members");
    std::fs::remove_file(folder.join("pages-0")).unwrap();
    check(&lab.run(&["restore", "@/ck"]), 2, &["pages-0", "missing"], "a missing page file");
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
