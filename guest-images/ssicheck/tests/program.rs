//! The program as a user runs it, on the machine's own CPUs: it passes here, and each oracle goes red when the fault that
//! it is there for is put in.

use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;

/// Runs ssicheck with `args`, split at blanks.
fn ssicheck(args: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ssicheck"))
        .args(args.split_whitespace())
        .output()
        .expect("ssicheck starts")
}

/// Runs ssicheck --json with `args` and returns (exit code, JSON).
fn json(args: &str) -> (Option<i32>, Value) {
    let output = ssicheck(&format!("--json {args}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("not JSON ({e}): {text}"));
    (output.status.code(), value)
}

/// A file of this test's own, removed when dropped.
struct TestFile(PathBuf);

impl TestFile {
    fn new(name: &str, contents: &[u8]) -> TestFile {
        let path = std::env::temp_dir().join(format!("ssicheck-test-{}-{name}", std::process::id()));
        std::fs::write(&path, contents).expect("a test file");
        TestFile(path)
    }
}

impl Drop for TestFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn everything_passes_on_one_machine() {
    let contents: Vec<u8> = (0..256u32 * 1024).map(|i| (i % 253).to_le_bytes()[0]).collect();
    let disk = TestFile::new("disk", &contents);
    let console = TestFile::new("console", b"");
    let (code, json) =
        json(&format!("--budget 6 --disk {} --console {}", disk.0.display(), console.0.display()));
    assert_eq!(code, Some(0), "{json:#}");
    let rows = json["conformance"].as_object().expect("rows");
    assert_eq!(rows.len(), 8);
    assert!(rows.values().all(|v| v == "pass"), "{json:#}");
    assert_eq!(std::fs::read(&disk.0).ok(), Some(contents), "the disk is as it was");
    let lines = std::fs::read_to_string(&console.0).expect("the console file");
    assert!(lines.lines().count() >= 2, "{lines}");
}

#[test]
fn torn_increments_are_caught() {
    let (code, json) = json("--only atomics --budget 20 --inject torn-atomics");
    assert_eq!(code, Some(1));
    assert_eq!(json["conformance"]["atomics"], "fail");
}

#[test]
fn reordered_stores_are_caught() {
    let (code, json) = json("--only memory_model --budget 60 --inject reordered-stores");
    assert_eq!(code, Some(1));
    let subs = json["details"]["memory_model"]["subs"].as_array().cloned().unwrap_or_default();
    let failed = |prefix: &str| {
        subs.iter().any(|s| s["ok"] == false && s["name"].as_str().is_some_and(|n| n.starts_with(prefix)))
    };
    assert!(failed("MP/"), "{json:#}");
    assert!(!failed("SB/") && !failed("LB/"), "only programs with two stores in a row: {json:#}");
}

#[test]
fn full_runs_demand_a_hundred_thousand_iterations() {
    let (code, json) = json("--only memory_model --budget 1 --full");
    assert_eq!(code, Some(0), "{json:#}");
    let subs = json["details"]["memory_model"]["subs"].as_array().cloned().unwrap_or_default();
    assert_eq!(subs.len(), 33);
    assert!(subs.iter().all(|s| s["data"]["iterations"].as_u64() >= Some(100_000)), "{json:#}");
}

#[test]
fn a_late_clock_is_caught() {
    let (code, json) = json("--only time --budget 20 --inject late-clock");
    assert_eq!(code, Some(1));
    let subs = json["details"]["time"]["subs"].as_array().cloned().unwrap_or_default();
    assert_eq!(subs.len(), 4);
    assert!(subs.iter().all(|s| s["ok"] == false), "{json:#}");
}

#[test]
fn a_hang_is_named_and_does_not_stop_the_others() {
    let (code, json) = json("--only atomics,time --deadline 0.5 --inject hang");
    assert_eq!(code, Some(1));
    for check in ["atomics", "time"] {
        let problem = json["details"][check]["problem"].as_str().unwrap_or_default();
        assert!(problem.starts_with("hung in injected"), "{problem}");
    }
}

#[test]
fn a_named_disk_must_be_there_and_be_a_disk() {
    let console = TestFile::new("console2", b"");
    let tiny = TestFile::new("tiny", b"less than a block");
    let tiny = tiny.0.display().to_string();
    for (disk, why) in [("/nonexistent/disk", "No such file"), ("/tmp", "directory"), (&tiny, "less than")] {
        let (code, json) =
            json(&format!("--only io_space --budget 2 --disk {disk} --console {}", console.0.display()));
        assert_eq!(code, Some(1), "{disk}");
        let text = json["details"]["io_space"]["subs"].to_string();
        assert!(text.contains(why), "{disk}: {text}");
    }
}

#[test]
fn what_cannot_run_is_refused_with_code_2() {
    for (args, why) in [
        ("--only nothing", "nothing"),
        ("--cpus 60000", "60000"),
        ("--min-nodes 4000", "4000"),
        ("--frobnicate", "--frobnicate"),
    ] {
        let output = ssicheck(args);
        assert_eq!(output.status.code(), Some(2), "{args}");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains(why), "{args}: {text}");
    }
}

#[test]
fn rounds_end_in_time_and_each_prints_its_object() {
    let output = ssicheck("--json --only atomics --budget 1 --loop --for 0.3");
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8_lossy(&output.stdout);
    for (number, line) in text.lines().enumerate() {
        let value: Value = serde_json::from_str(line).expect("one object per line");
        assert_eq!(value["round"], number as u64 + 1);
    }
    assert!(text.lines().count() >= 1);
}
