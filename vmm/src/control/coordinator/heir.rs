//! What the launcher says, and to whom: to the VM of this process, or, when that has lost a member and is restored by
//! itself, to the coordinator that came after it. This process stays between the two, so the launcher sees one VM.
//!
//! ```text
//! launcher <----> coordinator (its VM is over) <----> a new coordinator, which restores the newest checkpoint
//! ```

use super::{Launcher, Spawner};
use crate::config::{HostPort, OnMemberLoss, VmSpec};
use crate::control::codec;
use crate::control::end::End;
use crate::control::recovery::{self, MOST_RESTORES, Record};
use crate::control::restore::RestoreOrder;
use crate::control::secret::Secret;
use crate::control::shared::Shared;
use crate::control::wire::{FromCoordinator, Inherit, Role, ToCoordinator};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Mutex;

/// Longest wait for a new process to take a message.
const SEND: Duration = Duration::from_secs(10);

/// Who hears the launcher.
enum To {
    Vm(Arc<Shared>),
    Next(Box<dyn AsyncWrite + Send + Unpin>),
    Nobody,
}

/// The launcher's words, until it detaches or goes.
#[derive(Clone)]
pub(super) struct Ear(Arc<Mutex<State>>);

struct State {
    to: To,
    detached: bool,
}

impl Ear {
    /// Listens from now on.
    pub fn new(mut read: impl AsyncRead + Send + Unpin + 'static, shared: Arc<Shared>) -> Ear {
        let ear = Ear(Arc::new(Mutex::new(State { to: To::Vm(shared), detached: false })));
        let heard = ear.clone();
        tokio::spawn(async move { while heard.take(codec::recv(&mut read).await).await {} });
        ear
    }

    /// False when nothing more will come.
    async fn take(&self, message: Result<ToCoordinator, codec::CodecError>) -> bool {
        let mut state = self.0.lock().await;
        state.detached |= matches!(message, Ok(ToCoordinator::Detach));
        let goes_on = !state.detached && message.is_ok();
        match (&mut state.to, message) {
            (To::Vm(shared), message) => return tell(shared, message).await && goes_on,
            // When it is gone its other half ends, too.
            (To::Next(next), Ok(message)) => {
                let _ = codec::within(SEND, codec::send(next, &message)).await;
            }
            (To::Next(_), Err(_)) => state.to = To::Nobody,
            (To::Nobody, _) => {}
        }
        goes_on
    }

    /// Nobody hears it any more.
    pub async fn close(&self) {
        self.0.lock().await.to = To::Nobody;
    }

    /// A launcher that has gone without detaching wants no VM.
    async fn follow(&self, next: Box<dyn AsyncWrite + Send + Unpin>) {
        let mut state = self.0.lock().await;
        let over = std::mem::replace(&mut state.to, To::Next(next));
        std::thread::spawn(move || drop(over));
    }

    /// The new VM runs.
    async fn running(&self) {
        let mut state = self.0.lock().await;
        if let (true, To::Next(next)) = (state.detached, &mut state.to) {
            let _ = codec::within(SEND, codec::send(next, &ToCoordinator::Detach)).await;
        }
    }
}

/// Tells the VM of this process. False when the launcher has nothing more to say.
async fn tell(shared: &Arc<Shared>, message: Result<ToCoordinator, codec::CodecError>) -> bool {
    match message {
        Ok(ToCoordinator::Input(bytes)) => super::type_in(shared, bytes).await,
        Ok(ToCoordinator::Detach) => return false,
        Ok(ToCoordinator::Stop { by }) => shared.stop(End::Stopped { by }),
        Ok(message) => {
            tracing::error!("the launcher sent something unexpected: {message:?}");
            shared.stop(End::Failed("the launcher sent something unexpected".into()));
            return false;
        }
        Err(e) => {
            tracing::info!("launcher: {e}");
            shared.stop(End::Stopped { by: "the launcher is gone".into() });
            return false;
        }
    }
    true
}

/// The checkpoint from which a VM that ended so is to go on by itself.
pub(super) fn wanted(end: &End, spec: &VmSpec, root: &Path) -> Option<Record> {
    if spec.on_member_loss != OnMemberLoss::Restore || !matches!(end, End::MemberLost { .. }) {
        return None;
    }
    match Record::read(root, &spec.name) {
        Ok(record) if record.restores < MOST_RESTORES => Some(record),
        Ok(_) => {
            tracing::warn!("restored {MOST_RESTORES} times from this checkpoint: not again");
            None
        }
        Err(e) => {
            tracing::warn!("{e}");
            None
        }
    }
}

/// Restores the VM in a new process and stands between it and the launcher until it is over.
pub(super) async fn restore(
    record: Record,
    wish: VmSpec,
    inherit: &Inherit,
    console: bool,
    spawner: &dyn Spawner,
    (launcher, ear): (&Launcher, &Ear),
) -> End {
    let secret = inherit.secret.clone().map(Secret::from_bytes);
    let hosts: Vec<Option<HostPort>> = recovery::remaining(&record.hosts, secret.as_ref()).await;
    if hosts.is_empty() {
        return End::Failed("no host of the VM answers".into());
    }
    launcher.progress(format!("restoring {} on {} members", record.dir.display(), hosts.len())).await;
    let failed = |e: &dyn std::fmt::Display| End::Failed(format!("the VM could not be restored: {e}"));
    let (mut stream, child) = match spawner.spawn() {
        Ok(started) => started,
        Err(e) => return failed(&e),
    };
    let inherit = Inherit { role: Role::Coordinator, ..inherit.clone() };
    let order = RestoreOrder { dir: Some(record.dir), hosts };
    let message = ToCoordinator::Restore { wish: Box::new(wish), order, console };
    let told = async {
        codec::within(SEND, codec::send(&mut stream, &inherit)).await?;
        codec::within(SEND, codec::send(&mut stream, &message)).await
    };
    if let Err(e) = told.await {
        return failed(&e);
    }
    let (mut read, write) = tokio::io::split(stream);
    ear.follow(Box::new(write)).await;
    let end = loop {
        match codec::recv(&mut read).await {
            Ok(FromCoordinator::Ended(end) | FromCoordinator::Paused(end)) => break end,
            Ok(message) => {
                if matches!(message, FromCoordinator::Running { .. }) {
                    ear.running().await;
                }
                launcher.say(message).await;
            }
            Err(e) => break failed(&e),
        }
    };
    if let Some(child) = child {
        child.finish(Duration::from_secs(5)).await;
    }
    end
}
