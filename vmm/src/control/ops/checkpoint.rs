//! A checkpoint of the running VM.
//!
//! ```text
//! coordinator                              every member
//!   | draft in DIR                            |
//!   | pause (see [`super::pause`])            |
//!   | QuietMemory                             |
//!   |---------------------------------------->|  no page moves any more
//!   | SavePages                               |
//!   |---------------------------------------->|
//!   |<----------------------------------------|  pieces of its page file .. Saved
//!   | Capture                                 |
//!   |---------------------------------------->|
//!   |<----------------------------------------|  vCPUs, IOAPIC, devices
//!   | ReleaseMemory, resume                   |
//!   |---------------------------------------->|  the guest goes on
//!   | sync, manifest, rename                  |
//!   | remove what is not needed any more      |
//! ```
//!
//! The page files come through the control connections to the coordinator's host, wherever the members are, so DIR needs
//! no shared file system and has all parts. Whatever fails: the draft is gone, the VM runs on, and the checkpoint before is
//! the newest.

use super::{OpError, Turn, pause};
use crate::control::crew::{Crew, GRACE};
use crate::control::restore::{Identity, Machine};
use crate::member::{MemberReply, MemberState, MemberTask, PagesSaved, SaveRequest};
use dsm::addr::MemberId;
use migration::checkpoint::{self, CheckpointError, Draft, Id, Manifest, Parent, Range, Store};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc;

/// Links of a chain before it is made one full checkpoint.
pub const CONSOLIDATE_AT: usize = 16;
/// Longest time without a piece of a page file, in limits.
const STALL: u32 = 3;
/// Pieces that wait for the disk, per member.
const QUEUE: usize = 8;

/// How a checkpoint is to be made.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointBody {
    /// Folder of checkpoints, absolute, on the coordinator's host.
    pub to: PathBuf,
    /// Save everything, even if the newest checkpoint could be built on.
    pub full: bool,
    /// End the VM afterwards, without letting it go on.
    pub stop: bool,
    /// Who wants it.
    pub by: String,
    /// Longest time for each step while the guest stands still, seconds; absent: [`pause::LIMIT`].
    pub limit_s: Option<f64>,
}

/// How it went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckpointReport {
    /// Folder of the new checkpoint.
    pub folder: PathBuf,
    /// All pages, not only those that changed.
    pub full: bool,
    /// Pages with contents that were saved.
    pub pages: u64,
    /// Bytes written.
    pub bytes: u64,
    /// For how long the guest stood still, milliseconds; all of it counts, from the request to leave the guest on.
    pub pause_ms: f64,
    /// Until the checkpoint was safe on disk, milliseconds.
    pub total_ms: f64,
    /// Folders of older checkpoints that were removed.
    pub removed: Vec<String>,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// What a checkpoint needs to know of the VM that does not change.
#[derive(Clone, Debug, PartialEq)]
pub struct Blueprint {
    /// The VM without the state of its members.
    pub machine: Machine,
    /// Its memory.
    pub memory: Vec<Range>,
}

fn failed(e: impl std::fmt::Display) -> OpError {
    OpError::Failed(e.to_string())
}

/// Runs something that waits for the disk.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, OpError> {
    tokio::task::spawn_blocking(work).await.map_err(failed)
}

/// Makes a checkpoint; each step while the guest stands still may take `limit`. On an error the VM runs on (or stays
/// paused, if it was), and the last checkpoint is whole.
///
/// # Errors
/// [`OpError`].
pub async fn checkpoint(
    turn: &Turn,
    body: &CheckpointBody,
    limit: Duration,
) -> Result<CheckpointReport, OpError> {
    if !body.to.is_absolute() {
        return Err(OpError::NotFound(format!("{} is not an absolute path", body.to.display())));
    }
    let ops = turn.shared().ops();
    let blueprint = ops.blueprint().ok_or_else(|| OpError::Refused("the VM is still starting".into()))?;
    let identity = ops.identity();
    let start = Instant::now();
    let root = body.to.clone();
    let (store, base) = blocking(move || open(&root, &identity)).await?.map_err(failed)?;
    let identity = ops.identity();
    let base = base.filter(|_| !body.full && identity.base.is_some());
    let request = SaveRequest {
        guest: identity.guest,
        checkpoint: Id::random(),
        full: base.is_none(),
        track: !body.stop,
    };
    let draft = store.begin().map_err(failed)?;

    let was_paused = pause::is_paused(turn);
    // If this one fails half way, nobody knows any more what has changed since the last.
    ops.set_base(None);
    let since = Instant::now();
    if !was_paused {
        pause::quiesce(turn, limit).await?;
    }
    let taken_ms =
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(0));
    let cut = cut(turn, &draft, request, limit).await;
    let tsc = pause::guest_time(turn);
    // A VM that is to end does not go on only to be stopped, unless there is no checkpoint.
    let is_over = body.stop && cut.is_ok();
    if !was_paused && !is_over {
        pause::go_on(turn, limit, "a checkpoint").await?;
    }
    let pause_ms = since.elapsed().as_secs_f64() * 1e3;
    let (saved, members) = cut?;

    let parent = base.map(|(folder, id)| Parent { folder, id });
    let full = parent.is_none();
    let Blueprint { mut machine, memory } = blueprint;
    machine.members = members;
    machine.tsc = tsc;
    let warnings = warnings(&machine, body.stop || was_paused);
    let manifest = Manifest {
        vm: machine.spec.name.clone(),
        guest: identity.guest,
        id: request.checkpoint,
        parent,
        taken_ms,
        memory,
        parts: saved.iter().map(|s| s.part.clone()).collect(),
        machine,
    };
    let finished = finish(store, draft, manifest).await;
    let (folder, removed, safe) = match finished {
        Ok(done) => done,
        Err(e) => {
            if body.stop && !was_paused {
                pause::go_on(turn, limit, "a checkpoint").await?;
            }
            return Err(e);
        }
    };
    if saved.iter().all(|s| s.tracked) {
        ops.set_base(Some((request.checkpoint, folder.clone())));
    }
    ops.checkpointed(&folder);
    Ok(CheckpointReport {
        folder,
        full,
        pages: saved.iter().map(|s| s.part.data_pages).sum(),
        bytes: saved.iter().map(|s| s.part.length).sum(),
        pause_ms,
        total_ms: safe.duration_since(start).as_secs_f64() * 1e3,
        removed,
        warnings,
    })
}

/// Opens the folder; if its newest checkpoint is the one that an incremental one may build on, says so.
#[allow(clippy::type_complexity)]
fn open(root: &Path, identity: &Identity) -> Result<(Arc<Store>, Option<(String, Id)>), CheckpointError> {
    let store = Arc::new(Store::open(root)?);
    let Ok(newest) = checkpoint::newest(store.root()) else { return Ok((store, None)) };
    let path = newest.join(checkpoint::manifest::MANIFEST);
    let Ok(found) = checkpoint::manifest::read::<serde::de::IgnoredAny>(&path) else {
        // Damaged: a full one goes beside it.
        return Ok((store, None));
    };
    if found.guest != identity.guest {
        return Err(CheckpointError::Mixed {
            path: store.root().to_path_buf(),
            found: format!("VM {} (guest {})", found.vm, found.guest),
            expected: format!("this one (guest {}); give another folder", identity.guest),
        });
    }
    let is_base = identity.base.as_ref().is_some_and(|(id, _)| *id == found.id);
    let name = newest.file_name().map(|n| n.to_string_lossy().into_owned());
    Ok((store, name.filter(|_| is_base).map(|name| (name, found.id))))
}

/// Syncs, renames, and keeps the chain short. Returns when the checkpoint was safe, too.
async fn finish(
    store: Arc<Store>,
    draft: Draft,
    manifest: Manifest<Machine>,
) -> Result<(PathBuf, Vec<String>, Instant), OpError> {
    blocking(move || {
        let folder = draft.finish(&manifest)?;
        let safe = Instant::now();
        // The checkpoint is safe; what follows is housekeeping, and is tried again next time.
        let tidy = || -> Result<(PathBuf, Vec<String>), CheckpointError> {
            let is_long = checkpoint::store::chain_length(store.root())? >= CONSOLIDATE_AT;
            let folder = if is_long { store.consolidate::<Machine>()? } else { folder.clone() };
            Ok((folder, store.prune()?))
        };
        let (folder, removed) = tidy().unwrap_or_else(|e| {
            tracing::warn!("{e}");
            (folder.clone(), Vec::new())
        });
        Ok((folder, removed, safe))
    })
    .await?
    .map_err(|e: CheckpointError| failed(e))
}

/// While the VM is paused: everything that makes up the checkpoint. Ends with the memory free to move again.
async fn cut(
    turn: &Turn,
    draft: &Draft,
    request: SaveRequest,
    limit: Duration,
) -> Result<(Vec<PagesSaved>, Vec<MemberState>), OpError> {
    let crew = turn.crew()?;
    let result = async {
        pause::quiet_memory(turn, limit).await?;
        let members: Vec<MemberId> = crew.members().collect();
        let mut saves = Vec::new();
        for member in &members {
            saves.push(save_part(crew, *member, draft, request, limit * STALL));
        }
        let saved = crate::control::crew::join_all(saves).await.into_iter().collect::<Result<Vec<_>, _>>()?;
        let (answers_for, touched) =
            saved.iter().fold((0, 0), |sum, s| (sum.0 + s.answers_for, sum.1 + s.touched));
        if answers_for != touched {
            return Err(failed(format!(
                "internal error: members answer for {answers_for} pages, and {touched} are in use"
            )));
        }
        let mut states = Vec::new();
        for reply in crew.ask_all(&MemberTask::Capture, limit + GRACE).await? {
            let MemberReply::Captured(state) = reply else { return Err(super::odd(&reply)) };
            states.push(*state);
        }
        Ok((saved, states))
    }
    .await;
    // A member that does not answer is asked again before the VM goes on, and it does not go on without.
    let _ = pause::free_memory(turn, GRACE).await;
    result
}

/// One member's page file, from the member to the disk.
async fn save_part(
    crew: &Crew,
    member: MemberId,
    draft: &Draft,
    request: SaveRequest,
    stall: Duration,
) -> Result<PagesSaved, OpError> {
    let mut sink = draft.part(u32::from(member.0)).map_err(failed)?;
    let (pieces, mut queue) = mpsc::channel::<Vec<u8>>(QUEUE);
    let writer = tokio::task::spawn_blocking(move || {
        while let Some(piece) = queue.blocking_recv() {
            sink.append(&piece)?;
        }
        Ok::<(), CheckpointError>(())
    });
    let asked = crew.ask_for_pieces(member, MemberTask::SavePages(request), pieces, stall).await;
    // A disk that is full is the cause, a member that was told to stop the consequence.
    writer.await.map_err(failed)?.map_err(failed)?;
    match asked? {
        MemberReply::Saved(saved) => Ok(*saved),
        other => Err(super::odd(&other)),
    }
}

fn warnings(machine: &Machine, stands_still: bool) -> Vec<String> {
    let written = machine.spec.disks.iter().filter(|d| !d.readonly && !stands_still);
    written
        .map(|disk| {
            format!(
                "{} is not part of the checkpoint, and the guest goes on writing to it: restore the checkpoint only \
                 together with a copy of the disk as it was",
                disk.path.display()
            )
        })
        .collect()
}
