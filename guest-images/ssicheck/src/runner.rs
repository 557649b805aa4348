//! Runs each check in a process of its own, so that a check that hangs can be named, killed and survived.
//!
//! The child prints [`Event`]s as JSON lines; the last sub-check begun and not ended is the one that hung.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::checks::Check;
use crate::failure::{During, Failure};
use crate::options::{Job, Options};
use crate::report::{CheckResult, SubResult, seconds};
use crate::sys;
use crate::topology::Topology;

/// What the child tells the parent.
#[derive(Debug, Serialize, Deserialize)]
pub enum Event {
    /// A sub-check begins.
    Begin(String),
    /// It ended.
    End(SubResult),
    /// Bytes of a disk that are about to be overwritten: put them back if this process dies.
    Saved(crate::checks::io_space::Saved),
    /// The saved bytes are back.
    Restored,
    /// The check ran to its end.
    Done,
}

/// What is known of a running check.
#[derive(Debug, Default)]
struct Progress {
    subs: Vec<SubResult>,
    current: Option<String>,
    saved: Option<crate::checks::io_space::Saved>,
    done: bool,
}

impl Progress {
    fn take(&mut self, event: Event) {
        match event {
            Event::Begin(name) => self.current = Some(name),
            Event::End(sub) => {
                self.current = None;
                self.subs.push(sub);
            }
            Event::Saved(saved) => self.saved = Some(saved),
            Event::Restored => self.saved = None,
            Event::Done => self.done = true,
        }
    }

    fn place(&self) -> String {
        match (&self.current, self.subs.last()) {
            (Some(name), _) => format!("in {name}"),
            (None, Some(last)) => format!("after {}", last.name),
            (None, None) => "before its first sub-check".into(),
        }
    }
}

/// Runs `check` in a child process and waits for it, as long as it tells of progress within its deadline.
pub fn run(check: Check, options: &Options, topology: &Topology) -> CheckResult {
    let start = Instant::now();
    let mut progress = Progress::default();
    let deadline = options.deadline_of(check);
    let problem = match spawn(check, options, topology) {
        Ok(mut child) => {
            let problem = watch(&mut child, &mut progress, deadline);
            crate::context::clean_up(options, child.id());
            problem
        }
        Err(failure) => Some(failure.to_string()),
    };
    if let Some(saved) = progress.saved.take() {
        put_back(saved);
    }
    CheckResult { check, subs: progress.subs, problem, wall_s: seconds(start.elapsed()) }
}

fn spawn(check: Check, options: &Options, topology: &Topology) -> Result<Child, Failure> {
    let job = Job { check, options: options.clone(), topology: topology.clone() };
    let job = serde_json::to_string(&job).map_err(|e| Failure::Other(format!("job: {e}")))?;
    Command::new("/proc/self/exe")
        .args(["--child", &job])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // Its own process group, so that a kill takes its children along.
        .process_group(0)
        .spawn()
        .during("starting the check's process through /proc/self/exe (is /proc mounted?)")
}

/// Reads events until the child is done; `Some(problem)` if it hung or died.
fn watch(child: &mut Child, progress: &mut Progress, limit: Duration) -> Option<String> {
    let Some(stdout) = child.stdout.take() else { return Some("no pipe from the check".into()) };
    let (sender, events) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            let Ok(event) = serde_json::from_str::<Event>(&line) else { continue };
            if sender.send(event).is_err() {
                break;
            }
        }
    });
    // The limit is for one sub-check: a slow machine that gets on is not one that hangs.
    let hung = loop {
        match events.recv_timeout(limit) {
            Ok(event) => progress.take(event),
            Err(RecvTimeoutError::Timeout) => break true,
            Err(RecvTimeoutError::Disconnected) => break false,
        }
    };
    sys::process::kill_group(child.id());
    let status = reap(child);
    if hung {
        return Some(format!("hung {} for more than {} s, killed", progress.place(), limit.as_secs()));
    }
    if progress.done {
        return None;
    }
    let status = status.map_or("and cannot be reaped".into(), |s| s.to_string());
    Some(format!("its process ended {} ({status})", progress.place()))
}

/// Waits for a killed child; a process stuck in the kernel does not hold up the other checks.
fn reap(child: &mut Child) -> Option<ExitStatus> {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(10) {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) => std::thread::sleep(Duration::from_millis(5)),
            Err(_) => return None,
        }
    }
    None
}

/// Puts disk contents back for a check that was killed before it could; never waits for long.
fn put_back(saved: crate::checks::io_space::Saved) {
    let (sender, done) = mpsc::channel();
    let name = saved.path.display().to_string();
    std::thread::spawn(move || {
        let _ = sender.send(saved.restore());
    });
    match done.recv_timeout(Duration::from_secs(10)) {
        Ok(Ok(())) => {}
        Ok(Err(failure)) => eprintln!("ssicheck: {name}: scratch block not restored: {failure}"),
        Err(_) => eprintln!("ssicheck: {name}: scratch block not restored within 10 s"),
    }
}
