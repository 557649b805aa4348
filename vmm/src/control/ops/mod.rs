//! What can be done to a running VM as a whole, one thing at a time: [`pause`], [`moves`], [`drain`], [`add`]. [`place`] is about who
//! decides where vCPUs live.
//!
//! An operation takes its [`Turn`] first; while one is under way all others are refused with its name, so none ever
//! sees another half done. Operations run as tasks of their own: a client that goes away does not leave one half done.

pub mod add;
pub mod checkpoint;
pub mod console;
pub mod devices;
pub mod drain;
pub mod moves;
pub mod office;
pub mod pause;
pub mod place;
pub mod recruit;
pub mod relocate;
pub mod table;

use super::crew::{AskError, Crew};
use super::recovery::Recorder;
use super::restore::Identity;
use super::shared::Shared;
use crate::member::MemberReply;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use tokio::sync::mpsc;

/// Why an operation was not done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpError {
    /// Another one is under way, or the VM is in no state for it. Nothing was changed.
    #[error("{0}")]
    Refused(String),
    /// It names something that does not exist. Nothing was changed.
    #[error("{0}")]
    NotFound(String),
    /// It was begun and failed; the text says how things stand.
    #[error("{0}")]
    Failed(String),
}

impl From<AskError> for OpError {
    fn from(e: AskError) -> OpError {
        OpError::Failed(e.to_string())
    }
}

fn odd(reply: &MemberReply) -> OpError {
    OpError::Failed(format!("a member gave an answer that does not fit: {reply:?}"))
}

/// State of the operations of one VM.
#[derive(Debug, Default)]
pub struct Ops {
    crew: OnceLock<Crew>,
    /// What is under way.
    turn: Mutex<Option<String>>,
    /// Changed only by who has the turn.
    pauses: Mutex<pause::Pauses>,
    /// Placement epochs given away so far.
    epochs: AtomicU64,
    blueprint: OnceLock<checkpoint::Blueprint>,
    identity: Mutex<Identity>,
    recorder: Mutex<Option<Recorder>>,
    roster: Mutex<Option<table::Roster>>,
    progress: Mutex<drain::Progress>,
    /// Somebody wants an operation on members undone.
    cancelled: AtomicBool,
    office: OnceLock<mpsc::Sender<office::Notice>>,
    recruiter: OnceLock<recruit::Recruiter>,
    far: console::Slot,
    placement: Mutex<place::Placement>,
}

impl Ops {
    /// The VM has these members.
    pub fn staff(&self, crew: Crew) {
        // Once, at the start.
        let _ = self.crew.set(crew);
    }

    /// The members; none while the VM starts.
    pub fn crew(&self) -> Option<&Crew> {
        self.crew.get()
    }

    /// What members that come later need to know of the start.
    pub fn recruit_with(&self, recruiter: recruit::Recruiter) {
        // Once, at the start.
        let _ = self.recruiter.set(recruiter);
    }

    fn recruiter(&self) -> Option<&recruit::Recruiter> {
        self.recruiter.get()
    }

    /// Who is in the VM; `None` while it starts.
    pub fn roster(&self) -> Option<table::Roster> {
        self.roster.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Who is in the VM from now on.
    pub fn set_roster(&self, roster: table::Roster) {
        *self.roster.lock().unwrap_or_else(PoisonError::into_inner) = Some(roster);
    }

    /// How far an operation on members is.
    pub fn progress_now(&self) -> drain::Progress {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn progress(&self, change: impl FnOnce(&mut drain::Progress)) {
        change(&mut self.progress.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn begin_progress(&self, what: String) {
        self.cancelled.store(false, Ordering::SeqCst);
        self.progress(|p| *p = drain::Progress { what, ..drain::Progress::default() });
    }

    fn end_progress(&self) {
        self.progress(|p| *p = drain::Progress::default());
    }

    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }

    /// Undoes the operation on members that is under way, as soon as it can. Returns which.
    ///
    /// # Errors
    /// There is none.
    pub fn cancel(&self) -> Result<String, OpError> {
        let what = self.progress_now().what;
        if what.is_empty() {
            return Err(OpError::Refused("no drain is under way, and nobody is being added".into()));
        }
        self.cancelled.store(true, Ordering::SeqCst);
        Ok(what)
    }

    fn turn(&self) -> MutexGuard<'_, Option<String>> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The operation that is under way.
    pub fn under_way(&self) -> Option<String> {
        self.turn().clone()
    }

    /// So many placement epochs that nobody else has; returns the first.
    fn next_epochs(&self, count: u64) -> u64 {
        self.epochs.fetch_add(count, Ordering::SeqCst) + 1
    }

    /// The last one that was given away; 0 for none.
    fn last_epoch(&self) -> u64 {
        self.epochs.load(Ordering::SeqCst)
    }

    /// What checkpoints say of this VM; known before the guest runs.
    pub fn describe(&self, blueprint: checkpoint::Blueprint, identity: Identity) {
        let _ = self.blueprint.set(blueprint);
        *self.identity.lock().unwrap_or_else(PoisonError::into_inner) = identity;
    }

    fn blueprint(&self) -> Option<checkpoint::Blueprint> {
        self.blueprint.get().cloned()
    }

    fn identity(&self) -> Identity {
        self.identity.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_base(&self, base: Option<(migration::checkpoint::Id, std::path::PathBuf)>) {
        self.identity.lock().unwrap_or_else(PoisonError::into_inner).base = base;
    }

    /// Checkpoints are noted there.
    pub fn record(&self, recorder: Recorder) {
        *self.recorder() = Some(recorder);
    }

    /// The VM runs from the newest checkpoint of this folder.
    pub fn restored(&self, dir: &std::path::Path) {
        if let Some(recorder) = &mut *self.recorder() {
            recorder.restored(dir);
        }
    }

    /// There is a newer checkpoint.
    fn checkpointed(&self, folder: &std::path::Path) {
        tracing::info!("checkpoint {}", folder.display());
        if let Some(recorder) = &mut *self.recorder() {
            recorder.note(folder);
        }
    }

    fn recorder(&self) -> MutexGuard<'_, Option<Recorder>> {
        self.recorder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pauses(&self) -> MutexGuard<'_, pause::Pauses> {
        self.pauses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to change the VM as a whole; until it is dropped, nobody else has it.
#[derive(Debug)]
pub struct Turn {
    shared: Arc<Shared>,
}

impl Turn {
    /// Takes the turn for `what`, such as "a checkpoint", if the VM runs (or is paused) and nobody else has it.
    ///
    /// # Errors
    /// [`OpError::Refused`].
    pub fn take(shared: &Arc<Shared>, what: impl Into<String>) -> Result<Turn, OpError> {
        use super::view::VmStatus;
        if let Some(reason) = shared.loss() {
            return Err(OpError::Refused(reason));
        }
        match shared.info().status {
            VmStatus::Running | VmStatus::Paused => {}
            VmStatus::Starting => return Err(OpError::Refused("the VM is still starting".into())),
            VmStatus::Ending => return Err(OpError::Refused("the VM is ending".into())),
        }
        Self::claim(shared, what)
    }

    /// The turn of what belongs to the start of the VM.
    ///
    /// # Errors
    /// [`OpError::Refused`].
    pub fn claim(shared: &Arc<Shared>, what: impl Into<String>) -> Result<Turn, OpError> {
        let mut turn = shared.ops().turn();
        if let Some(other) = &*turn {
            return Err(OpError::Refused(format!("{other} is under way; try again when it is done")));
        }
        *turn = Some(what.into());
        Ok(Turn { shared: shared.clone() })
    }

    /// What the operation works on.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The members.
    ///
    /// # Errors
    /// The VM is still starting.
    pub fn crew(&self) -> Result<&Crew, OpError> {
        self.shared.ops().crew().ok_or_else(|| OpError::Refused("the VM is still starting".into()))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *self.shared.ops().turn() = None;
    }
}
