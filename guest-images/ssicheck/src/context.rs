//! What a check gets to work with, and how it reports.

use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::failure::{During, Failure};
use crate::options::{Inject, Job, Options};
use crate::report::{SubResult, seconds};
use crate::runner::Event;
use crate::topology::Topology;

/// The longest that a sub-check waits for any one thing. Generous: one remote page costs milliseconds in a slow
/// guest, and starting a process touches hundreds.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// What a sub-check that passed did.
#[derive(Debug, Default)]
pub struct Note {
    text: String,
    data: Value,
}

impl Note {
    /// A note with numbers for tools.
    pub fn with_data(text: String, data: Value) -> Note {
        Note { text, data }
    }
}

impl From<String> for Note {
    fn from(text: String) -> Note {
        Note { text, data: Value::Null }
    }
}

impl From<&str> for Note {
    fn from(text: &str) -> Note {
        Note::from(text.to_string())
    }
}

/// One check's surroundings.
#[derive(Debug)]
pub struct Context {
    /// The order from the parent.
    pub job: Job,
    /// Temporary folder of this run, removed at the end.
    scratch: PathBuf,
}

impl Context {
    /// Makes the scratch folder.
    pub fn new(job: Job) -> Result<Context, Failure> {
        let mut last = Failure::Other("no folder for temporary files".into());
        for dir in scratch_dirs(&job.options, std::process::id()) {
            match std::fs::create_dir(&dir).during(format!("making {}", dir.display())) {
                Ok(()) => return Ok(Context { job, scratch: dir }),
                Err(failure) => last = failure,
            }
        }
        Err(last)
    }

    /// The CPUs.
    pub fn topology(&self) -> &Topology {
        &self.job.topology
    }

    /// How long this check should take if it can choose, divided among `parts` sub-checks.
    pub fn slice(&self, parts: usize) -> Duration {
        let parts = u32::try_from(parts.max(1)).unwrap_or(u32::MAX);
        self.job.options.share(self.job.check) / parts
    }

    /// Whether this fault is to be put in.
    pub fn injects(&self, fault: Inject) -> bool {
        self.job.options.inject == Some(fault)
    }

    /// A path in the temporary folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    /// Runs one sub-check and reports it.
    pub fn sub(&self, name: impl Into<String>, body: impl FnOnce() -> Result<Note, Failure>) {
        let name = name.into();
        emit(&Event::Begin(name.clone()));
        let start = Instant::now();
        let outcome = body();
        let wall_s = seconds(start.elapsed());
        let (ok, note, data) = match outcome {
            Ok(note) => (true, note.text, note.data),
            Err(failure) => (false, failure.to_string(), Value::Null),
        };
        emit(&Event::End(SubResult { name, ok, note, wall_s, data }));
    }
}

/// Where the process `pid` may have its temporary folder, in order of preference.
fn scratch_dirs(options: &Options, pid: u32) -> Vec<PathBuf> {
    let bases = match &options.scratch {
        Some(named) => vec![named.clone()],
        None => vec![PathBuf::from("/tmp"), PathBuf::from("/")],
    };
    bases.into_iter().map(|base| base.join(format!("ssicheck-{pid}"))).collect()
}

/// The name in /dev/shm that the process `pid` may use.
pub fn posix_shm_path(pid: u32) -> PathBuf {
    PathBuf::from(format!("/dev/shm/ssicheck-{pid}"))
}

/// Removes what the process `pid` left behind if it was killed.
pub fn clean_up(options: &Options, pid: u32) {
    // Usually there is nothing, which is no error.
    for dir in scratch_dirs(options, pid) {
        let _ = std::fs::remove_dir_all(dir);
    }
    let _ = std::fs::remove_file(posix_shm_path(pid));
}

impl Drop for Context {
    fn drop(&mut self) {
        // Nothing depends on it: the folder has a name of its own.
        let _ = std::fs::remove_dir_all(&self.scratch);
    }
}

/// Sends one event to the parent. If the parent is gone, there is nobody left to tell.
pub fn emit(event: &Event) {
    let Ok(mut line) = serde_json::to_string(event) else { return };
    line.push('\n');
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(line.as_bytes()).and_then(|()| out.flush());
}

/// Repeats `step` until `slice` has passed, but at least `min` and at most `max` times. Returns the count.
pub fn repeat(
    slice: Duration,
    min: u64,
    max: u64,
    mut step: impl FnMut(u64) -> Result<(), Failure>,
) -> Result<u64, Failure> {
    let start = Instant::now();
    let mut count = 0;
    while count < min || (count < max && start.elapsed() < slice) {
        step(count)?;
        count += 1;
    }
    Ok(count)
}

/// Polls `done` until it is true, with a growing pause; fails after [`PATIENCE`].
pub fn wait_until(what: &str, mut done: impl FnMut() -> Result<bool, Failure>) -> Result<(), Failure> {
    let start = Instant::now();
    let mut pause = Duration::from_micros(50);
    while !done()? {
        if start.elapsed() > PATIENCE {
            return Err(Failure::timeout(what, PATIENCE));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(10));
    }
    Ok(())
}
