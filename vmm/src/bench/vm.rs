//! VMs that a benchmark makes with this program's own commands, each with processes of its own.

use crate::control::view::VmInfo;
use dsm::addr::MemberId;
use dsm::bench::cpus;
use serde::de::DeserializeOwned;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Longest wait for a guest to fill its memory.
const FILLED: Duration = Duration::from_secs(300);

/// The benchmark could not be run.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// Files, processes.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it did not work.
        source: io::Error,
    },
    /// A command of ours said no.
    #[error("spanvm {command}: {error}")]
    Command {
        /// Its first words.
        command: String,
        /// What it printed.
        error: String,
    },
    /// The guest did nothing.
    #[error("the guest did not fill its memory within {} s", FILLED.as_secs())]
    Guest,
    /// The floor could not be measured.
    #[error("the floor could not be measured")]
    Floor(#[from] dsm::bench::BenchError),
}

pub(super) fn io(what: impl std::fmt::Display) -> impl FnOnce(io::Error) -> BenchError {
    move |source| BenchError::Io { what: what.to_string(), source }
}

pub(super) fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// A folder that goes with this.
pub(super) struct Folder(pub PathBuf);

impl Folder {
    pub fn new(within: &Path) -> Result<Folder, BenchError> {
        let path = within.join(format!("spanvm-bench-{}", std::process::id()));
        let path = std::path::absolute(&path).map_err(io(path.display()))?;
        fs::create_dir(&path).map_err(io(path.display()))?;
        Ok(Folder(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A VM of two members with a CPU each, that ends with this.
pub(super) struct Vm {
    pub name: String,
}

impl Vm {
    /// Launches one with this kernel, whose file is put into `folder`; `what` tells it from others of this process.
    pub fn start(folder: &Path, what: &str, kernel: &[u8], mib: u32) -> Result<Vm, BenchError> {
        let name = format!("bench-{}-{what}", std::process::id());
        let image = folder.join(&name);
        fs::write(&image, kernel).map_err(io(image.display()))?;
        let memory = format!("--memory={mib}M");
        let kernel = format!("--kernel={}", image.display());
        let vm = Vm { name };
        let named = format!("--name={}", vm.name);
        let flags = ["launch", "--members=2", "--cpus=2", "--rng=off", "--detach", "--quiet"];
        spanvm(&[&flags[..], &[&named, &memory, &kernel]].concat())?;
        Ok(vm)
    }

    /// Waits until the guest has printed an F.
    pub fn await_filled(&self) -> Result<(), BenchError> {
        let since = Instant::now();
        while !spanvm(&["console", &self.name, "--dump"])?.contains('F') {
            if since.elapsed() > FILLED {
                return Err(BenchError::Guest);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// How it stands.
    pub fn info(&self) -> Result<VmInfo, BenchError> {
        self.command(&["info", &self.name, "--json"], &[])
    }

    /// Puts each member on a processor of its own.
    pub fn pin(&self) -> Result<(), BenchError> {
        self.info()?.members.iter().try_for_each(|member| {
            cpus::pin_process(member.pid, MemberId(member.id))
                .map_err(io("can't choose a member's processor"))
        })
    }

    /// A command that prints JSON.
    pub fn command<T: DeserializeOwned>(&self, args: &[&str], more: &[&str]) -> Result<T, BenchError> {
        let command = args.first().copied().unwrap_or_default();
        let text = spanvm(&[args, more].concat())?;
        serde_json::from_str(&text)
            .map_err(|e| BenchError::Command { command: command.into(), error: e.to_string() })
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = spanvm(&["stop", &self.name]);
    }
}

/// Runs this program; returns what it printed.
pub(super) fn spanvm(args: &[&str]) -> Result<String, BenchError> {
    let command = args.first().copied().unwrap_or_default();
    let output =
        Command::new("/proc/self/exe").args(args).stdin(Stdio::null()).output().map_err(io(command))?;
    if output.status.success() {
        return String::from_utf8(output.stdout).map_err(|e| io(command)(io::Error::other(e)));
    }
    let error = String::from_utf8_lossy(&output.stderr).trim().into();
    Err(BenchError::Command { command: command.into(), error })
}
