//! The launcher's side: finds or starts a coordinator, hands it the VM, and stays until the VM ends or runs on
//! without it.

use super::codec::{self, CodecError};
use super::coordinator::link::Stream;
use super::coordinator::{Processes, Spawner};
use super::end::End;
use super::node_client;
use super::restore::RestoreOrder;
use super::rundir;
use super::secret::{self, Secret};
use super::spawn::ChildProcess;
use super::wire::{FromCoordinator, IMAGE_PIECE, ImageKind, Inherit, NodeRequest, Role, ToCoordinator};
use crate::config::{VmSpec, files};
use std::time::Duration;
use tokio::sync::mpsc;

/// Longest wait for a coordinator to take the next message.
const SEND: Duration = Duration::from_secs(30);

/// What the user sees and does while a VM starts and runs.
pub trait Terminal {
    /// A step of the start.
    fn progress(&mut self, text: &str);
    /// Output of the guest's serial console.
    fn console(&mut self, bytes: &[u8]);
    /// The guest runs.
    fn running(&mut self, pid: u32, host: &str);
}

/// What the user wants while the VM starts and runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Type this.
    Input(Vec<u8>),
    /// End the VM.
    Stop,
}

/// How a launch is to go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Manner {
    /// Return when the guest runs.
    pub detach: bool,
    /// Pass the console's output on.
    pub console: bool,
}

/// How a launch went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Launched {
    /// The VM runs on without the launcher.
    Detached,
    /// It is over, or never was.
    Ended(End),
}

/// Starts a VM and follows it.
pub async fn launch(
    spec: VmSpec,
    manner: Manner,
    terminal: &mut dyn Terminal,
    wishes: mpsc::Receiver<Wish>,
) -> Launched {
    match begin(&spec, manner, terminal).await {
        Ok((stream, child)) => follow(stream, child, &spec, manner, terminal, wishes).await,
        Err(end) => Launched::Ended(end),
    }
}

/// Starts the VM of a checkpoint and follows it. Of `wish` count the name, the secret and the patience.
pub async fn restore(
    wish: VmSpec,
    order: RestoreOrder,
    manner: Manner,
    terminal: &mut dyn Terminal,
    wishes: mpsc::Receiver<Wish>,
) -> Launched {
    let begun = async {
        let (mut stream, child) = coordinator(&wish).await?;
        let console = manner.console && !manner.detach;
        let message = ToCoordinator::Restore { wish: Box::new(wish.clone()), order, console };
        codec::within(SEND, codec::send(&mut stream, &message)).await.map_err(|e| lost(&wish, &e))?;
        Ok((stream, child))
    };
    match begun.await {
        Ok((stream, child)) => follow(stream, child, &wish, manner, terminal, wishes).await,
        Err(end) => Launched::Ended(end),
    }
}

/// From a checked specification to a coordinator that has it all.
async fn begin(
    spec: &VmSpec,
    manner: Manner,
    terminal: &mut dyn Terminal,
) -> Result<(Box<dyn Stream>, Option<ChildProcess>), End> {
    let input = |e: crate::config::ConfigError| End::BadInput(e.to_string());
    let kernel = files::read_image("kernel", &spec.kernel).map_err(input)?;
    files::check_kernel(&spec.kernel, &kernel).map_err(input)?;
    let initrd =
        spec.initrd.as_deref().map(|path| files::read_image("initrd", path)).transpose().map_err(input)?;
    let (mut stream, child) = coordinator(spec).await?;
    if let Some(first) = spec.members.first().and_then(|m| m.host.as_ref()) {
        terminal.progress(&format!("{first} answers"));
    }
    let launch = ToCoordinator::Launch {
        spec: Box::new(spec.clone()),
        kernel_len: kernel.len() as u64,
        initrd_len: initrd.as_ref().map(|image| image.len() as u64),
        console: manner.console && !manner.detach,
    };
    let send = async |stream: &mut Box<dyn Stream>, message: ToCoordinator| {
        codec::within(SEND, codec::send(stream, &message)).await.map_err(|e| lost(spec, &e))
    };
    send(&mut stream, launch).await?;
    for (kind, image) in [(ImageKind::Kernel, Some(kernel)), (ImageKind::Initrd, initrd)] {
        for piece in image.as_deref().unwrap_or_default().chunks(IMAGE_PIECE) {
            send(&mut stream, ToCoordinator::Image(kind, piece.to_vec())).await?;
        }
    }
    Ok((stream, child))
}

/// A new coordinator, on this host or at the first member's node.
async fn coordinator(spec: &VmSpec) -> Result<(Box<dyn Stream>, Option<ChildProcess>), End> {
    match spec.members.first().and_then(|m| m.host.as_ref()) {
        Some(host) => {
            let secret = load_secret(spec)?;
            let stream = node_client::open(host, secret.as_ref(), "launcher", &NodeRequest::Launch).await?;
            Ok((Box::new(stream), None))
        }
        None => {
            let failed = |e: &dyn std::fmt::Display| End::Failed(format!("can't start a process: {e}"));
            let (mut stream, child) = Processes.spawn().map_err(|e| failed(&e))?;
            let inherit = Inherit {
                role: Role::Coordinator,
                secret: None,
                host: hostname(),
                bind: None,
                die_with_parent: false,
            };
            codec::within(SEND, codec::send(&mut stream, &inherit)).await.map_err(|e| failed(&e))?;
            Ok((stream, child))
        }
    }
}

/// The secret that a specification names.
///
/// # Errors
/// A file that can't be used.
pub fn load_secret(spec: &VmSpec) -> Result<Option<Secret>, End> {
    spec.secret_file
        .as_deref()
        .map(|path| {
            secret::load(path)
                .map_err(|e| End::BadInput(format!("--secret-file {}: {e}; {}", path.display(), e.hint())))
        })
        .transpose()
}

/// Name of this host.
pub fn hostname() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|name| name.trim().chars().take(64).collect())
        .unwrap_or_else(|_| "localhost".into())
}

async fn follow(
    stream: Box<dyn Stream>,
    child: Option<ChildProcess>,
    spec: &VmSpec,
    manner: Manner,
    terminal: &mut dyn Terminal,
    mut wishes: mpsc::Receiver<Wish>,
) -> Launched {
    let (mut read, mut write) = tokio::io::split(stream);
    let (in_tx, mut inbox) = mpsc::channel(64);
    tokio::spawn(async move {
        loop {
            let message = codec::recv::<FromCoordinator>(&mut read).await;
            let last = message.is_err();
            if in_tx.send(message).await.is_err() || last {
                return;
            }
        }
    });
    // The coordinator's waits have deadlines of their own; this one is for a coordinator that is stuck itself.
    let mut patience = Some(spec.start_timeout * 3 + Duration::from_secs(60));
    let mut wishing = true;
    loop {
        tokio::select! {
            message = inbox.recv() => match message {
                Some(Ok(FromCoordinator::Progress(text))) => terminal.progress(&text),
                Some(Ok(FromCoordinator::Console(bytes))) => terminal.console(&bytes),
                Some(Ok(FromCoordinator::Running { pid, host })) => {
                    patience = None;
                    terminal.running(pid, &host);
                    if manner.detach {
                        return detach(&mut write, child, spec).await;
                    }
                }
                Some(Ok(FromCoordinator::Ended(end))) => {
                    if let Some(child) = child {
                        child.finish(Duration::from_secs(5)).await;
                    }
                    return Launched::Ended(end);
                }
                Some(Ok(FromCoordinator::Paused(end))) => {
                    if let Some(child) = child {
                        child.release();
                    }
                    return Launched::Ended(end);
                }
                Some(Err(e)) => return Launched::Ended(coordinator_died(spec, child, &e).await),
                None => return Launched::Ended(lost(spec, &CodecError::Closed)),
            },
            wish = wishes.recv(), if wishing => {
                let message = match wish {
                    Some(Wish::Input(bytes)) => ToCoordinator::Input(bytes),
                    Some(Wish::Stop) => ToCoordinator::Stop { by: "the launcher's user".into() },
                    None => { wishing = false; continue }
                };
                if let Err(e) = codec::within(SEND, codec::send(&mut write, &message)).await {
                    return Launched::Ended(lost(spec, &e));
                }
            }
            () = tokio::time::sleep(patience.unwrap_or_default()), if patience.is_some() => {
                let after = patience.unwrap_or_default();
                return Launched::Ended(lost(spec, &CodecError::Timeout(after)));
            }
        }
    }
}

/// Lets go of a VM that runs.
async fn detach(
    write: &mut (impl tokio::io::AsyncWrite + Unpin),
    child: Option<ChildProcess>,
    spec: &VmSpec,
) -> Launched {
    if let Err(e) = codec::within(SEND, codec::send(write, &ToCoordinator::Detach)).await {
        return Launched::Ended(lost(spec, &e));
    }
    if let Some(child) = child {
        child.release();
    }
    Launched::Detached
}

fn first_host(spec: &VmSpec) -> String {
    spec.members.first().and_then(|m| m.host.as_ref()).map_or_else(hostname, ToString::to_string)
}

fn lost(spec: &VmSpec, e: &CodecError) -> End {
    End::Unreachable { host: first_host(spec), reason: format!("the coordinator of {}: {e}", spec.name) }
}

/// The coordinator is gone without a last word: say how, and what its log says.
async fn coordinator_died(spec: &VmSpec, child: Option<ChildProcess>, e: &CodecError) -> End {
    let epitaph = match &child {
        Some(child) => child.epitaph().await,
        None => None,
    };
    let mut reason = epitaph.unwrap_or_else(|| e.to_string());
    if child.is_some() {
        let root = rundir::root();
        let log = std::fs::read_to_string(root.join(&spec.name).join("log")).unwrap_or_default();
        let tail: Vec<_> = log.lines().rev().take(5).collect();
        for line in tail.into_iter().rev() {
            reason = format!("{reason}\n  log: {line}");
        }
        rundir::remove_stale(&root, &spec.name);
    }
    End::MemberLost { member: dsm::addr::MemberId(0), host: first_host(spec), reason }
}
