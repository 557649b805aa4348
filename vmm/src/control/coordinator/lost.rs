//! A VM that has lost a member and has a checkpoint: what the other members have of its memory is worth nothing without that
//! member, so their processes are ended. The coordinator stays, so the VM is seen as paused, with the reason.
//!
//! ```text
//!               a member is lost                      spanvm recover
//!  running ----------------------> paused for good --------------------> (gone; a new VM goes on from the checkpoint)
//!                                        |                spanvm stop
//!                                        +-----------------------------> (gone)
//! ```

use super::Launcher;
use super::heir::Ear;
use crate::config::{OnMemberLoss, VmSpec};
use crate::control::end::End;
use crate::control::recovery::Record;
use crate::control::shared::Shared;
use crate::control::wire::FromCoordinator;
use std::path::Path;
use std::sync::Arc;
use tokio::sync::mpsc;

/// If a VM that ended so is to stay paused: why, and what can be done.
pub(super) fn wanted(end: &End, spec: &VmSpec, root: &Path) -> Option<End> {
    let End::MemberLost { member, host, reason } = end else { return None };
    if spec.on_member_loss != OnMemberLoss::Pause {
        return None;
    }
    let vm = &spec.name;
    let newest = Record::read(root, vm).ok()?.newest().ok()?;
    let reason = format!(
        "{reason}; the VM is paused: `spanvm recover {vm}` goes on from its newest checkpoint, {}; `spanvm stop {vm}` gives \
         it up",
        newest.display()
    );
    Some(End::MemberLost { member: *member, host: host.clone(), reason })
}

/// Waits until somebody wants the VM to end, or another one to take its place; returns what it ends with.
pub(super) async fn stay(
    lost: End,
    shared: &Arc<Shared>,
    stops: &mut mpsc::Receiver<End>,
    (launcher, ear): (&Launcher, &Ear),
) -> End {
    tracing::error!("{lost}");
    shared.lost(lost.clone());
    if let Some(crew) = shared.ops().crew() {
        crew.close();
    }
    // It hears of it and goes.
    ear.close().await;
    launcher.say(FromCoordinator::Paused(lost.clone())).await;
    let end = stops.recv().await.unwrap_or(lost);
    shared.ending(&end);
    end
}
