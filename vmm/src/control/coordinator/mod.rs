//! The coordinator: member 0's process, which brings the members together, watches over them, and ends the VM
//! everywhere when it is over. [`start`] is the way up, [`watch`] the time in between and what goes wrong,
//! [`link`] a connection to a member; `placer` moves vCPUs where a policy wants them, `lost` and `heir` are what comes
//! after a member is lost.

mod heir;
pub mod link;
mod lost;
mod placer;
pub mod start;
pub mod watch;

#[cfg(test)]
pub(super) mod tests;

use super::api;
use super::codec::{self, CodecError};
use super::end::End;
use super::host::Host;
use super::member_task::{STOP_DEADLINE, Slot};
use super::ops::office::Notice;
use super::recovery::{self, Record, Recorder};
use super::restore::{self, Opened, RestoreOrder};
use super::shared::Shared;
use super::spawn::ChildProcess;
use super::wire::{FromCoordinator, ImageKind, Inherit, ToCoordinator};
use crate::config::{VmSpec, files};
use crate::devices::ConsoleHandle;
use crate::member::BootImages;
use dsm::addr::MemberId;
use heir::Ear;
use link::{Inbound, Link, Stream};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// Longest wait for the next piece of a launch request.
const LAUNCH_PIECE: Duration = Duration::from_secs(30);
/// Longest wait for a slow reader of the console when the VM has ended.
const DRAIN: Duration = Duration::from_secs(2);

/// Starts processes for members on this host.
pub trait Spawner: Send + Sync + 'static {
    /// A process (or what stands for one) whose first message will be an `Inherit`.
    ///
    /// # Errors
    /// It can't be started.
    fn spawn(&self) -> io::Result<(Box<dyn Stream>, Option<ChildProcess>)>;
}

/// Spawns `spanvm member-process`.
#[derive(Clone, Copy, Debug)]
pub struct Processes;

impl Spawner for Processes {
    fn spawn(&self) -> io::Result<(Box<dyn Stream>, Option<ChildProcess>)> {
        let (child, stream) = ChildProcess::spawn()?;
        stream.set_nonblocking(true)?;
        Ok((Box::new(tokio::net::UnixStream::from_std(stream)?), Some(child)))
    }
}

/// What a coordinator works with.
pub struct Surroundings {
    /// This host.
    pub host: Arc<dyn Host>,
    /// How members on this host are started.
    pub spawner: Arc<dyn Spawner>,
    /// The runtime directory.
    pub root: PathBuf,
    /// Send this process's standard error to the VM's log.
    pub redirect_log: bool,
}

impl std::fmt::Debug for Surroundings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Surroundings").field("root", &self.root).finish_non_exhaustive()
    }
}

/// Everything the coordinator knows while it brings a VM up and watches over it.
struct Coordinator {
    spec: VmSpec,
    inherit: Inherit,
    host: Arc<dyn Host>,
    spawner: Arc<dyn Spawner>,
    slot: Slot,
    shared: Arc<Shared>,
    launcher: Launcher,
    links: Vec<Link>,
    /// Members that have said their last word or are gone: nothing more comes from them.
    gone: Vec<MemberId>,
    inbox: mpsc::Receiver<Inbound>,
    inbox_tx: mpsc::Sender<Inbound>,
    counts: mpsc::Receiver<oneshot::Sender<()>>,
    /// Members that come and go, as long as the VM runs.
    notices: mpsc::Receiver<Notice>,
    /// What processes of members on this host are told first.
    orders: Option<Inherit>,
    /// Those that have nothing any more and have not ended yet.
    leaving: Vec<(Link, Option<oneshot::Sender<()>>)>,
}

/// The sending side of the launcher's connection; what is said after it has gone is lost, as it should be.
#[derive(Clone)]
struct Launcher(mpsc::Sender<FromCoordinator>);

impl Launcher {
    async fn say(&self, message: FromCoordinator) {
        let _ = self.0.send(message).await;
    }

    async fn progress(&self, text: impl Into<String>) {
        let text = text.into();
        tracing::info!("{text}");
        self.say(FromCoordinator::Progress(text)).await;
    }
}

/// Serves one launcher: receives a VM, runs it to its end, and says how it ended.
pub async fn run(stream: Box<dyn Stream>, inherit: Inherit, around: Surroundings) -> End {
    let (mut read, mut write) = tokio::io::split(stream);
    let (out, mut queue) = mpsc::channel::<FromCoordinator>(64);
    let writer = tokio::spawn(async move {
        while let Some(message) = queue.recv().await {
            if codec::send(&mut write, &message).await.is_err() {
                return;
            }
        }
    });
    let launcher = Launcher(out);
    let end = match receive(&mut read, &around.root).await {
        Ok(Ok(request)) => launched(request, read, inherit, around, &launcher).await,
        Ok(Err(end)) => end,
        Err(e) => End::Failed(format!("the launch request did not arrive: {e}")),
    };
    launcher.say(FromCoordinator::Ended(end.clone())).await;
    drop(launcher);
    let _ = tokio::time::timeout(DRAIN, writer).await;
    end
}

struct Request {
    spec: VmSpec,
    source: Source,
    console: bool,
}

/// Where the guest comes from.
enum Source {
    Boot(BootImages),
    Checkpoint(Box<Opened>),
}

/// Receives a launch request with its images.
async fn receive(
    read: &mut (impl tokio::io::AsyncRead + Unpin),
    root: &Path,
) -> Result<Result<Request, End>, CodecError> {
    let malformed = |what: &str| CodecError::Malformed(what.to_string());
    let first = codec::within(LAUNCH_PIECE, codec::recv(read)).await?;
    let (spec, kernel_len, initrd_len, console) = match first {
        ToCoordinator::Launch { spec, kernel_len, initrd_len, console } => {
            (spec, kernel_len, initrd_len, console)
        }
        ToCoordinator::Restore { wish, order, console } => {
            return Ok(restore(&wish, order, console, root).await);
        }
        _ => return Err(malformed("no launch request")),
    };
    let length = |len: u64| match usize::try_from(len) {
        Ok(len) if len as u64 <= files::MAX_IMAGE => Ok(len),
        _ => Err(malformed("an image of absurd length")),
    };
    let kernel_len = length(kernel_len)?;
    let initrd_len = initrd_len.map(length).transpose()?;
    let mut kernel = Vec::new();
    let mut initrd = Vec::new();
    while kernel.len() < kernel_len || initrd.len() < initrd_len.unwrap_or(0) {
        match codec::within(LAUNCH_PIECE, codec::recv(read)).await? {
            ToCoordinator::Image(_, piece) if piece.is_empty() => return Err(malformed("an empty piece")),
            ToCoordinator::Image(ImageKind::Kernel, piece) => kernel.extend(piece),
            ToCoordinator::Image(ImageKind::Initrd, piece) => initrd.extend(piece),
            _ => return Err(malformed("no piece of an image")),
        }
        if kernel.len() > kernel_len || initrd.len() > initrd_len.unwrap_or(0) {
            return Err(malformed("more of an image than announced"));
        }
    }
    let images =
        BootImages { kernel, initrd: initrd_len.is_some().then_some(initrd), cmdline: spec.cmdline.clone() };
    Ok(Ok(Request { spec: *spec, source: Source::Boot(images), console }))
}

/// Opens the checkpoint, and makes the VM of it that is wished for.
async fn restore(wish: &VmSpec, order: RestoreOrder, console: bool, root: &Path) -> Result<Request, End> {
    let recovers = order.dir.is_none();
    let dir = match order.dir {
        Some(dir) => dir,
        None => Record::read(root, &wish.name)?.dir,
    };
    let opened = tokio::task::spawn_blocking(move || restore::open(&dir)).await;
    let opened = opened.map_err(|e| End::Failed(format!("internal error: {e}")))??;
    let spec = restore::respecify(&opened.manifest.machine.spec, wish, &order.hosts)?;
    if recovers {
        recovery::make_way(root, &wish.name).await;
    }
    Ok(Request { spec, source: Source::Checkpoint(Box::new(opened)), console })
}

async fn launched(
    request: Request,
    read: impl tokio::io::AsyncRead + Send + Unpin + 'static,
    inherit: Inherit,
    around: Surroundings,
    launcher: &Launcher,
) -> End {
    let Request { spec, source, console } = request;
    if crate::config::resolve::check_name(&spec.name).is_err() || spec.members.is_empty() {
        return End::BadInput("the launch request names no VM or no member".into());
    }
    let rundir = match recovery::claim(&around.root, &spec.name).await {
        Ok(rundir) => rundir,
        Err(e) => return End::BadInput(e.to_string()),
    };
    if matches!(source, Source::Boot(_)) {
        recovery::forget(&around.root, &spec.name);
    }
    if around.redirect_log {
        if let Err(e) = super::child::log_to(&rundir.log()) {
            launcher.progress(format!("no log: {e}")).await;
        }
    }
    let slot = Slot::default();
    let (stop_tx, mut stops) = mpsc::channel(4);
    let (count_tx, counts) = mpsc::channel(16);
    let shared = Arc::new(Shared::new(&spec, &inherit.host, slot.clone(), stop_tx, count_tx));
    let api = match api::serve(&rundir.socket(), shared.clone()) {
        Ok(api) => api,
        Err(e) => return End::Failed(format!("{}: {e}", rundir.socket().display())),
    };
    let ear = Ear::new(read, shared.clone());
    shared.ops().record(recorder(&around.root, &spec));
    let (office, notices) = mpsc::channel(4);
    shared.ops().open_office(office);
    super::child::on_termination({
        let shared = Arc::downgrade(&shared);
        move || {
            if let Some(shared) = shared.upgrade() {
                shared.stop(End::Stopped { by: "a signal to the coordinator's process".into() });
            }
        }
    });
    tokio::spawn(placer::drive(Arc::downgrade(&shared)));
    let (inbox_tx, inbox) = mpsc::channel(256);
    let (root, spawner) = (around.root, around.spawner.clone());
    let (saved, child) = (spec.clone(), inherit.clone());
    let mut coordinator = Coordinator {
        host: around.host,
        spawner: around.spawner,
        slot: slot.clone(),
        shared: shared.clone(),
        launcher: launcher.clone(),
        links: Vec::new(),
        gone: Vec::new(),
        notices,
        orders: None,
        leaving: Vec::new(),
        inbox,
        inbox_tx,
        counts,
        spec,
        inherit,
    };
    let ending = Arc::new(AtomicBool::new(false));
    let pump = console.then(|| pump_console(slot, launcher.0.clone(), ending.clone()));
    let end = tokio::select! {
        end = coordinator.live(source) => end,
        Some(end) = stops.recv() => end,
    };
    tracing::info!("ending: {end}");
    shared.ending(&end);
    coordinator.finish(&end).await;
    ending.store(true, Ordering::Release);
    if let Some(pump) = pump {
        let _ = tokio::time::timeout(DRAIN, pump).await;
    }
    if let Some(lost) = lost::wanted(&end, &saved, &root) {
        let end = lost::stay(lost, &shared, &mut stops, (launcher, &ear)).await;
        api.abort();
        rundir.keep_log();
        if end.is_regular() {
            recovery::forget(&root, &saved.name);
        }
        return end;
    }
    api.abort();
    if end.is_regular() {
        recovery::forget(&root, &saved.name);
        return end;
    }
    let hinted = recovery::with_hint(end.clone(), &root, &saved.name);
    // A VM without a launcher has nobody else to tell.
    tracing::error!("{hinted}");
    rundir.keep_log();
    drop(rundir);
    let Some(record) = heir::wanted(&end, &saved, &root) else { return hinted };
    launcher.progress(end.to_string()).await;
    // The memory of the guest that is over; its threads may take their time.
    std::thread::spawn(move || drop((coordinator, shared)));
    heir::restore(record, saved, &child, console, &*spawner, (launcher, &ear)).await
}

/// Notes the VM's checkpoints for `spanvm recover`.
fn recorder(root: &Path, spec: &VmSpec) -> Recorder {
    let record = Record {
        vm: spec.name.clone(),
        dir: PathBuf::new(),
        hosts: spec.members.iter().map(|m| m.host.clone()).collect(),
        secret_file: spec.secret_file.clone(),
        restores: 0,
    };
    Recorder { root: root.to_path_buf(), record }
}

impl Coordinator {
    /// From nothing to the end of the guest.
    async fn live(&mut self, source: Source) -> End {
        match self.start(source).await {
            Ok(()) => self.watch().await,
            Err(end) => end,
        }
    }

    /// Ends the guest on every member, then their processes.
    async fn finish(&mut self, end: &End) {
        self.links.extend(self.leaving.drain(..).map(|(link, _)| link));
        for link in &self.links {
            link.order(super::wire::ToMember::Stop { reason: end.to_string() });
        }
        let mut open: Vec<_> =
            self.links.iter().map(|link| link.id).filter(|id| !self.gone.contains(id)).collect();
        let deadline = tokio::time::sleep(STOP_DEADLINE + Duration::from_secs(1));
        tokio::pin!(deadline);
        while !open.is_empty() {
            tokio::select! {
                Some((id, message)) = self.inbox.recv() => {
                    if watch::is_last(&message) {
                        open.retain(|open| *open != id);
                    }
                }
                () = &mut deadline => {
                    for id in &open {
                        tracing::error!("{id} did not stop in time and is killed");
                    }
                    break;
                }
            }
        }
        let grace = if open.is_empty() { Duration::from_secs(3) } else { Duration::ZERO };
        let goodbyes: Vec<_> = self.links.drain(..).map(|link| tokio::spawn(link.finish(grace))).collect();
        for goodbye in goodbyes {
            let _ = goodbye.await;
        }
    }
}

async fn type_in(shared: &Arc<Shared>, bytes: Vec<u8>) {
    let Some(console) = shared.console() else { return };
    let typed = tokio::task::spawn_blocking(move || console.input(&bytes, Duration::from_secs(1)));
    if let Ok(Err(e)) = typed.await {
        tracing::warn!("console: {e}");
    }
}

/// Copies the console's output to the launcher from a thread of its own; a launcher that does not read makes
/// this reader fall behind, never the guest.
fn pump_console(
    slot: Slot,
    to: mpsc::Sender<FromCoordinator>,
    ending: Arc<AtomicBool>,
) -> tokio::task::JoinHandle<()> {
    tokio::task::spawn_blocking(move || {
        let mut reader = None;
        loop {
            let over = ending.load(Ordering::Acquire);
            let Some(reader) = reader.as_mut() else {
                reader = slot
                    .get()
                    .and_then(|guest| guest.console())
                    .map(|console: ConsoleHandle| console.reader());
                if reader.is_none() {
                    if over || to.is_closed() {
                        return;
                    }
                    std::thread::sleep(Duration::from_millis(20));
                }
                continue;
            };
            let chunk = reader.read(64 << 10, Duration::from_millis(100));
            let done = chunk.closed || (over && chunk.bytes.is_empty());
            if chunk.lost > 0 {
                let note = format!("\r\n[{} bytes of console output lost]\r\n", chunk.lost);
                let _ = to.blocking_send(FromCoordinator::Console(note.into_bytes()));
            }
            if !chunk.bytes.is_empty() && to.blocking_send(FromCoordinator::Console(chunk.bytes)).is_err() {
                return;
            }
            if done || to.is_closed() {
                return;
            }
        }
    })
}
