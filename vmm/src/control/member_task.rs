//! The member's side of the control connection: does what the coordinator says, in order, and reports.
//!
//! ```text
//!          Prepare            Join               Run              Stop, or the connection closes
//! (start) --------> prepared ------> joined -----------> running -----------------------------> (end)
//! ```

use super::codec::{self, CodecError, Json};
use super::host::{Guest, Host};
use super::secret::Secret;
use super::wire::{FromMember, Inherit, ToMember};
use crate::config::files;
use crate::config::spec::DiskSpec;
use crate::member::{MemberEvent, MemberPlan, MemberReply, MemberTask};
use dsm::addr::MemberId;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

/// Longest time that ending the guest on this member may take before its process ends anyway. Unit tests have guests that
/// stop at once or never.
pub const STOP_DEADLINE: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 10 });

/// Where a member in the coordinator's own process leaves itself for the coordinator to load and look at.
pub type Slot = Arc<OnceLock<Arc<dyn Guest>>>;

struct Prepared {
    vm: String,
    me: MemberId,
    nonce: [u8; 32],
    listener: TcpListener,
    silence: Duration,
}

struct Task {
    host: Arc<dyn Host>,
    inherit: Inherit,
    slot: Slot,
    out: mpsc::Sender<FromMember>,
    prepared: Option<Prepared>,
    joining: bool,
    /// The last task whose pieces are not wanted any more; 0 for none.
    cancelled: Arc<AtomicU64>,
}

/// Serves one coordinator until it says `Stop` or is gone. After it returns, the process should end: threads
/// of a member that could not be stopped in time may be left.
pub async fn serve<S>(stream: S, host: Arc<dyn Host>, inherit: Inherit, slot: Slot)
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let (mut read, mut write) = tokio::io::split(stream);
    let (in_tx, mut inbox) = mpsc::channel::<Result<ToMember, CodecError>>(16);
    tokio::spawn(async move {
        loop {
            let message = codec::recv(&mut read).await;
            let last = message.is_err();
            if in_tx.send(message).await.is_err() || last {
                return;
            }
        }
    });
    let (out, mut out_rx) = mpsc::channel::<FromMember>(64);
    let writer = tokio::spawn(async move {
        while let Some(message) = out_rx.recv().await {
            if codec::send(&mut write, &message).await.is_err() {
                return;
            }
        }
    });
    let (event_tx, mut events) = mpsc::channel::<MemberEvent>(64);
    let (join_tx, mut joins) = mpsc::channel::<Result<Arc<dyn Guest>, String>>(1);
    let mut task =
        Task { host, inherit, slot, out, prepared: None, joining: false, cancelled: Arc::default() };
    let mut silence = Duration::from_secs(60);
    loop {
        tokio::select! {
            message = inbox.recv() => match message {
                Some(Ok(ToMember::Ping)) => {}
                Some(Ok(ToMember::Stop { reason })) => {
                    task.stop(&reason).await;
                    task.say(FromMember::Stopped).await;
                    break;
                }
                Some(Ok(message)) => {
                    if let Err(last) = task.handle(message, &event_tx, &join_tx).await {
                        task.say(last).await;
                        break;
                    }
                    silence = task.prepared.as_ref().map_or(silence, |p| p.silence);
                }
                Some(Err(e)) => {
                    tracing::info!("coordinator: {e}");
                    task.stop("the coordinator is gone").await;
                    break;
                }
                None => break,
            },
            Some(joined) = joins.recv() => match joined {
                Ok(guest) => {
                    let _ = task.slot.set(guest);
                    task.say(FromMember::Joined).await;
                }
                Err(reason) => {
                    task.say(FromMember::Failed { reason, input: false }).await;
                    break;
                }
            },
            Some(event) = events.recv() => task.say(FromMember::Event(event)).await,
            () = tokio::time::sleep(silence) => {
                tracing::error!("the coordinator has said nothing for {} s", silence.as_secs());
                task.stop("the coordinator is silent").await;
                break;
            }
        }
    }
    drop(task);
    let _ = tokio::time::timeout(Duration::from_secs(2), writer).await;
}

impl Task {
    async fn say(&self, message: FromMember) {
        let _ = self.out.send(message).await;
    }

    /// Does one order; an error is the last message.
    async fn handle(
        &mut self,
        message: ToMember,
        events: &mpsc::Sender<MemberEvent>,
        joins: &mpsc::Sender<Result<Arc<dyn Guest>, String>>,
    ) -> Result<(), FromMember> {
        match message {
            ToMember::Prepare { vm, me, nonce, disks, bind, silence } => {
                let ready = self.prepare(vm, me, nonce, disks, bind, silence).await?;
                self.say(ready).await;
            }
            ToMember::Join(Json(plan)) => self.join(*plan, events.clone(), joins.clone())?,
            ToMember::Run => {
                let guest = self.guest("Run")?;
                blocking(move || guest.run()).await?.map_err(failed)?;
                self.say(FromMember::Started).await;
            }
            ToMember::Stats { id } => {
                // A question may come while the member still joins: there is nothing to count then.
                if let Some(guest) = self.slot.get().cloned() {
                    let stats = Json(Box::new(blocking(move || guest.stats()).await?));
                    self.say(FromMember::Report { id, stats }).await;
                }
            }
            ToMember::Task { id, task: MemberTask::SavePages(request) } => {
                let (guest, out) = (self.slot.get().cloned(), self.out.clone());
                let cancelled = self.cancelled.clone();
                tokio::task::spawn_blocking(move || {
                    let mut send = |bytes| {
                        cancelled.load(Ordering::SeqCst) != id
                            && out.blocking_send(FromMember::Piece { id, bytes }).is_ok()
                    };
                    let result = match guest {
                        Some(guest) => {
                            guest.save(request, &mut send).map(|s| MemberReply::Saved(Box::new(s)))
                        }
                        None => Err("the member has not joined".into()),
                    };
                    let _ = out.blocking_send(FromMember::TaskDone { id, result });
                });
            }
            ToMember::Cancel { id } => self.cancelled.store(id, Ordering::SeqCst),
            ToMember::Task { id, task } => {
                let (guest, out) = (self.slot.get().cloned(), self.out.clone());
                // Not here: it may take seconds, in which the coordinator wants to hear the counters.
                tokio::spawn(async move {
                    let result = match guest {
                        Some(guest) => blocking(move || guest.task(task))
                            .await
                            .unwrap_or_else(|_| Err("internal error".into())),
                        None => Err("the member has not joined".into()),
                    };
                    // A connection that is gone shows elsewhere.
                    let _ = out.send(FromMember::TaskDone { id, result }).await;
                });
            }
            ToMember::Ping | ToMember::Stop { .. } => {}
        }
        Ok(())
    }

    async fn prepare(
        &mut self,
        vm: String,
        me: MemberId,
        nonce: [u8; 32],
        disks: Vec<DiskSpec>,
        bind: Option<IpAddr>,
        silence: Duration,
    ) -> Result<FromMember, FromMember> {
        if self.prepared.is_some() || self.joining {
            return Err(failed("asked to prepare twice".into()));
        }
        let host = self.host.clone();
        let facts = blocking(move || {
            let facts = host.facts().map_err(|e| FromMember::Unfit { reason: super::host::chain(&e) })?;
            check_disks(&disks)?;
            Ok(facts)
        })
        .await??;
        let ip = bind.or(self.inherit.bind).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        let (listener, addr) = listen(ip).map_err(|e| failed(format!("can't listen on {ip}: {e}")))?;
        if self.inherit.secret.is_none() && !ip.to_canonical().is_loopback() {
            return Err(FromMember::Unfit {
                reason: format!("members at {ip} need a secret: use --secret-file"),
            });
        }
        self.prepared = Some(Prepared { vm, me, nonce, listener, silence });
        Ok(FromMember::Ready {
            host: self.inherit.host.clone(),
            pid: std::process::id(),
            facts: Box::new(facts),
            addr,
        })
    }

    /// Joins on a thread of its own: it blocks until all peers are there, and `Stop` must be heard meanwhile.
    fn join(
        &mut self,
        mut plan: MemberPlan,
        events: mpsc::Sender<MemberEvent>,
        joins: mpsc::Sender<Result<Arc<dyn Guest>, String>>,
    ) -> Result<(), FromMember> {
        let Some(prepared) = self.prepared.take() else {
            return Err(failed("asked to join before it was prepared".into()));
        };
        if plan.me != prepared.me || plan.vm != prepared.vm {
            return Err(failed(format!("prepared as {}, the plan says {}", prepared.me, plan.me)));
        }
        let secret = self.inherit.secret.clone().map(Secret::from_bytes);
        plan.secret = secret.map(|secret| secret.mesh_key(&plan.vm, &prepared.nonce));
        self.joining = true;
        let host = self.host.clone();
        let (tx, rx) = std::sync::mpsc::channel();
        let thread = |name: &str, work: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new()
                .name(name.into())
                .spawn(work)
                .map(drop)
                .map_err(|e| failed(format!("no thread: {e}")))
        };
        thread(
            "events",
            Box::new(move || {
                while let Ok(event) = rx.recv() {
                    if events.blocking_send(event).is_err() {
                        return;
                    }
                }
            }),
        )?;
        thread(
            "join",
            Box::new(move || {
                let _ = joins.blocking_send(host.join(plan, prepared.listener, tx));
            }),
        )
    }

    fn guest(&self, order: &str) -> Result<Arc<dyn Guest>, FromMember> {
        self.slot.get().cloned().ok_or_else(|| failed(format!("{order} before it has joined")))
    }

    async fn stop(&self, reason: &str) {
        let Some(guest) = self.slot.get().cloned() else { return };
        let reason = reason.to_string();
        let stop = tokio::task::spawn_blocking(move || guest.stop(&reason));
        if tokio::time::timeout(STOP_DEADLINE, stop).await.is_err() {
            tracing::error!("the guest did not stop within {} s", STOP_DEADLINE.as_secs());
        }
    }
}

fn failed(reason: String) -> FromMember {
    FromMember::Failed { reason, input: false }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, FromMember> {
    tokio::task::spawn_blocking(work).await.map_err(|e| failed(format!("internal error: {e}")))
}

fn listen(ip: IpAddr) -> std::io::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind((ip, 0))?;
    let addr = listener.local_addr()?;
    Ok((listener, addr))
}

/// Disks are paths on their member's host, so only that host can look at them.
fn check_disks(disks: &[DiskSpec]) -> Result<(), FromMember> {
    for disk in disks {
        files::check_disk(Path::new(&disk.path), disk.readonly)
            .map_err(|e| FromMember::Failed { reason: e.to_string(), input: true })?;
    }
    Ok(())
}
