//! What outlives a VM that lost a member: where its newest checkpoint is. A file beside the VM's folder in the runtime
//! directory of the coordinator's host, written with each checkpoint, removed when the VM ends as somebody wanted, or
//! when another VM of its name is launched.

use super::end::End;
use super::node_client;
use super::rundir::{self, RunDir, RunDirError};
use super::secret::Secret;
use super::view::{VmStatus, VmSummary};
use super::wire::NodeRequest;
use crate::config::HostPort;
use migration::checkpoint;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How often a VM is restored by itself from one checkpoint.
pub const MOST_RESTORES: u32 = 3;
/// How long a host may take to say that it is there.
const ANSWER: Duration = Duration::from_secs(5);
/// How long a process that was killed may take to give its VM's name back.
const DYING: Duration = Duration::from_secs(20);

/// Where a VM's checkpoints are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Name of the VM.
    pub vm: String,
    /// Folder of checkpoints, or of one of them.
    pub dir: PathBuf,
    /// Hosts of its members; `None` for those that the launcher started itself.
    pub hosts: Vec<Option<HostPort>>,
    /// The secret's file on the launcher's host.
    pub secret_file: Option<PathBuf>,
    /// How often the newest one has been restored.
    pub restores: u32,
}

fn path(root: &Path, vm: &str) -> PathBuf {
    root.join(format!("{vm}.recover"))
}

impl Record {
    /// Makes it known. The one before is replaced in one step.
    ///
    /// # Errors
    /// The file system's.
    pub fn write(&self, root: &Path) -> io::Result<()> {
        let path = path(root, &self.vm);
        let new = path.with_extension("recover-new");
        std::fs::write(&new, serde_json::to_vec_pretty(self)?)?;
        std::fs::rename(&new, &path)
    }

    /// What is known of a VM of this name.
    ///
    /// # Errors
    /// [`End::BadInput`]: nothing.
    pub fn read(root: &Path, vm: &str) -> Result<Record, End> {
        crate::config::resolve::check_name(vm).map_err(|e| End::BadInput(format!("{vm:?}: {e}")))?;
        let path = path(root, vm);
        match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|e| End::BadInput(format!("{}: {e}; use `spanvm restore DIR`", path.display()))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(End::BadInput(format!(
                "no checkpoint of a VM named {vm} that lost a member is known on this host: use `spanvm restore DIR` if \
                 you have one"
            ))),
            Err(e) => Err(End::BadInput(format!("{}: {e}", path.display()))),
        }
    }

    /// Folder of its newest checkpoint.
    ///
    /// # Errors
    /// There is none.
    pub fn newest(&self) -> Result<PathBuf, checkpoint::CheckpointError> {
        checkpoint::newest(&self.dir)
    }

    /// What to tell the user whose VM is gone.
    pub fn hint(&self) -> String {
        match self.newest() {
            Ok(folder) => format!(
                "its newest checkpoint is {}: `spanvm recover {}` goes on from there",
                folder.display(),
                self.vm
            ),
            Err(e) => format!("it had checkpoints, but {e}"),
        }
    }
}

/// A VM of this name has nothing to recover (any more).
pub fn forget(root: &Path, vm: &str) {
    let _ = std::fs::remove_file(path(root, vm));
}

/// If the VM ended because of a failure, says in `end` where it could go on.
pub fn with_hint(end: End, root: &Path, vm: &str) -> End {
    let Ok(record) = Record::read(root, vm) else { return end };
    match end {
        End::MemberLost { member, host, reason } => {
            End::MemberLost { member, host, reason: format!("{reason}; {}", record.hint()) }
        }
        End::Failed(what) => End::Failed(format!("{what}; {}", record.hint())),
        other => other,
    }
}

/// Those of `hosts` that answer.
pub async fn remaining(hosts: &[Option<HostPort>], secret: Option<&Secret>) -> Vec<Option<HostPort>> {
    let asks = hosts.iter().map(|host| async move {
        let Some(host) = host else { return true };
        let ask = node_client::ask(host, secret, "spanvm", &NodeRequest::List);
        matches!(tokio::time::timeout(ANSWER, ask).await, Ok(Ok(_)))
    });
    let there = super::crew::join_all(asks).await;
    hosts.iter().zip(there).filter(|(_, there)| *there).map(|(host, _)| host.clone()).collect()
}

/// As [`RunDir::claim`], but waits for a VM that is ending, and for a process that holds the name and does not answer: it is
/// most likely being ended by the kernel, which first takes down its memory.
///
/// # Errors
/// As [`RunDir::claim`].
pub async fn claim(root: &Path, vm: &str) -> Result<RunDir, RunDirError> {
    let since = Instant::now();
    loop {
        match RunDir::claim(root, vm) {
            Err(RunDirError::Taken(_)) if since.elapsed() < DYING && !is_alive(root, vm).await => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            claimed => return claimed,
        }
    }
}

async fn is_alive(root: &Path, vm: &str) -> bool {
    let client = super::client::VmClient::new(super::client::Place::Here(root.to_path_buf()), vm);
    let asked = tokio::time::timeout(ANSWER, client.get::<VmSummary>("/vm/summary")).await;
    matches!(asked, Ok(Ok(vm)) if vm.status != VmStatus::Ending)
}

/// Asks a VM that is paused because it lost a member to end. Any other VM of that name says no, and keeps its name.
pub async fn make_way(root: &Path, vm: &str) {
    let client = super::client::VmClient::new(super::client::Place::Here(root.to_path_buf()), vm);
    let since = Instant::now();
    // It may be about to say that it is paused.
    while since.elapsed() < DYING {
        match client.get::<VmSummary>("/vm/summary").await {
            Ok(vm) if vm.status == VmStatus::Ending => tokio::time::sleep(Duration::from_millis(50)).await,
            _ => break,
        }
    }
    if let Ok(Err(e)) = tokio::time::timeout(ANSWER, client.post("/vm/recover", "")).await {
        tracing::info!("{e}");
    }
}

/// Notes the checkpoints of a running VM.
#[derive(Debug)]
pub struct Recorder {
    /// The runtime directory.
    pub root: PathBuf,
    /// What is known; `dir` is that of the last checkpoint.
    pub record: Record,
}

impl Recorder {
    /// There is a newer checkpoint.
    pub fn note(&mut self, folder: &Path) {
        let dir = folder.parent().unwrap_or(folder);
        (self.record.dir, self.record.restores) = (dir.to_path_buf(), 0);
        self.save();
    }

    /// The VM runs from a checkpoint.
    pub fn restored(&mut self, dir: &Path) {
        let before = Record::read(&self.root, &self.record.vm).ok().filter(|r| r.dir == dir);
        self.record.restores = before.map_or(0, |r| r.restores).saturating_add(1);
        self.record.dir = dir.to_path_buf();
        self.save();
    }

    fn save(&self) {
        if let Err(e) = self.record.write(&self.root) {
            tracing::warn!("`spanvm recover` will not know of the checkpoint: {}: {e}", self.root.display());
        }
    }
}

/// The default runtime directory's record.
///
/// # Errors
/// As [`Record::read`].
pub fn here(vm: &str) -> Result<Record, End> {
    Record::read(&rundir::root(), vm)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_and_what_is_not() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let error = |vm: &str| Record::read(root, vm).unwrap_err().to_string();
        assert!(error("t").contains("no checkpoint of a VM named t"));
        assert!(error("../t").contains("../t"));
        let record = Record {
            vm: "t".into(),
            dir: PathBuf::new(),
            hosts: vec![None, Some("h:5".parse().unwrap())],
            secret_file: None,
            restores: 0,
        };
        let mut recorder = Recorder { root: root.into(), record };
        recorder.restored(Path::new("/ck"));
        recorder.restored(Path::new("/ck"));
        assert_eq!(Record::read(root, "t").unwrap().restores, 2);
        recorder.note(Path::new("/ck/00000003"));
        let read = Record::read(root, "t").unwrap();
        assert_eq!((read.dir, read.restores, read.hosts.len()), ("/ck".into(), 0, 2));
        let lost =
            || End::MemberLost { member: dsm::addr::MemberId(1), host: "h".into(), reason: "x".into() };
        assert!(with_hint(lost(), root, "t").to_string().contains("/ck"));
        assert_eq!(with_hint(End::PowerOff, root, "t"), End::PowerOff);
        std::fs::write(path(root, "t"), "{").unwrap();
        assert!(error("t").contains("t.recover"));
        forget(root, "t");
        assert_eq!(with_hint(lost(), root, "t"), lost());
    }

    #[tokio::test]
    async fn a_name_that_is_given_back_late() {
        let root = tempfile::tempdir().unwrap();
        let held = RunDir::claim(root.path(), "t").unwrap();
        let later = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(300)).await;
            drop(held);
        });
        claim(root.path(), "t").await.unwrap();
        later.await.unwrap();
    }
}
