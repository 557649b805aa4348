//! A process that is to become a member of a running VM: started or asked for, compared with the others, and heard.

use super::office::Notice;
use super::{OpError, Turn};
use crate::config::HostPort;
use crate::control::codec::{self, CodecError};
use crate::control::coordinator::Spawner;
use crate::control::coordinator::link::{Inbound, Link, Stream};
use crate::control::coordinator::watch::is_last;
use crate::control::end::End;
use crate::control::fit;
use crate::control::node_client;
use crate::control::secret::Secret;
use crate::control::shared::Shared;
use crate::control::spawn::ChildProcess;
use crate::control::wire::{FromMember, Inherit, NodeRequest, ToMember};
use crate::kvm::cpuid::CpuidTable;
use crate::member::{HostFacts, MemberEvent, PageTuning};
use crate::topology::Topology;
use dsm::addr::MemberId;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};

/// Longest wait for a new process to take its first message.
const FIRST: Duration = Duration::from_secs(20);
/// Longest wait for one that is not wanted to end by itself.
const GRACE: Duration = Duration::from_secs(2);
/// Words on their way from it.
const WORDS: usize = 64;

/// What the coordinator knows of the start of the VM, for members that come later.
pub struct Recruiter {
    /// Name of the VM.
    pub vm: String,
    /// Starts processes on this host.
    pub spawner: Arc<dyn Spawner>,
    /// What they are told first.
    pub orders: Inherit,
    /// Secret of this host's node daemon.
    pub node_secret: Option<Secret>,
    /// The members' key is known to this VM's processes alone: no node daemon has it.
    pub is_private: bool,
    /// Where members' words go.
    pub inbox: mpsc::Sender<Inbound>,
    /// From which all derive the key of the mesh.
    pub nonce: [u8; 32],
    /// Longest silence of the coordinator.
    pub silence: Duration,
    /// Longest time for one step (`--start-timeout`).
    pub limit: Duration,
    /// Knobs of the page engine.
    pub pages: PageTuning,
    /// What the guest sees.
    pub common: fit::Common,
    /// The host that the others are compared with.
    pub first: (String, HostFacts),
    /// Of the start.
    pub topology: Topology,
    /// The memory is shared page by page; not so in a VM that was started as one member.
    pub has_engine: bool,
}

impl std::fmt::Debug for Recruiter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recruiter").field("vm", &self.vm).finish_non_exhaustive()
    }
}

/// What a host says of itself.
#[derive(Debug)]
pub(super) struct Ready {
    pub host: String,
    pub pid: u32,
    pub addr: SocketAddr,
    facts: HostFacts,
}

/// What a member says, or how its connection ended.
type Word = Result<FromMember, CodecError>;

/// A process that is to become a member. What it says is heard here, not by the coordinator, until it is one; if this is
/// dropped before, its connection is closed, and its process ended.
#[derive(Debug)]
pub(super) struct Recruit {
    pub id: MemberId,
    pub link: Link,
    said: mpsc::UnboundedReceiver<Word>,
    admit: oneshot::Sender<Admission>,
}

/// Where its words go from now on, and those that nobody has heard yet.
type Admission = (mpsc::Sender<Inbound>, mpsc::UnboundedReceiver<Word>);

fn failed(what: impl Into<String>) -> OpError {
    OpError::Failed(what.into())
}

/// Hears a recruit: answers go to who has asked, all else to who wants to add it, and after its admission everything to the
/// coordinator.
async fn listen(
    id: MemberId,
    shared: Arc<Shared>,
    mut words: mpsc::Receiver<Inbound>,
    tell: mpsc::UnboundedSender<Word>,
    mut admitted: oneshot::Receiver<Admission>,
) {
    let admission = loop {
        tokio::select! {
            biased;
            admission = &mut admitted => break admission,
            word = words.recv() => {
                let (Some((_, word)), Some(crew)) = (word, shared.ops().crew()) else { return };
                match word {
                    Ok(FromMember::TaskDone { id: task, result }) => crew.done(task, result),
                    word => {
                        if is_last(&word) {
                            // Who waits for it does so no longer.
                            crew.dismiss(id);
                        }
                        // Who does not want it any more does not hear it.
                        let _ = tell.send(word);
                    }
                }
            }
        }
    };
    drop((shared, tell));
    let Ok((inbox, mut unheard)) = admission else { return };
    while let Some(word) = unheard.recv().await {
        // A coordinator that is gone needs no news.
        let _ = inbox.send((id, word)).await;
    }
    while let Some(word) = words.recv().await {
        let _ = inbox.send(word).await;
    }
}

impl Recruit {
    /// Starts a process here, or asks a node daemon for one.
    ///
    /// # Errors
    /// There is none; nothing has changed.
    pub async fn hire(
        turn: &Turn,
        recruiter: &Recruiter,
        id: MemberId,
        host: Option<&HostPort>,
    ) -> Result<Recruit, OpError> {
        let me = &recruiter.orders.host;
        let (stream, child, name): (Box<dyn Stream>, Option<ChildProcess>, String) = match host {
            None => {
                let (mut stream, child) =
                    recruiter.spawner.spawn().map_err(|e| failed(format!("can't start a process: {e}")))?;
                codec::within(FIRST, codec::send(&mut stream, &recruiter.orders))
                    .await
                    .map_err(|e| failed(format!("its process ended before it was told what to be ({e})")))?;
                (stream, child, me.clone())
            }
            Some(host) => {
                let secret = recruiter.node_secret.as_ref();
                let open = node_client::open(host, secret, me, &NodeRequest::Member);
                let stream = open.await.map_err(|end| match end {
                    End::HostRefused { .. } => OpError::Refused(end.to_string()),
                    end => failed(end.to_string()),
                })?;
                (Box::new(stream), None, host.to_string())
            }
        };
        let (inbox, words) = mpsc::channel(WORDS);
        let (tell, said) = mpsc::unbounded_channel();
        let (admit, admitted) = oneshot::channel();
        // How far it is from the others matters to the guest's tables only, which are those of the start.
        let link = Link::new(id, name, None, stream, child, inbox);
        tokio::spawn(listen(id, turn.shared().clone(), words, tell, admitted));
        Ok(Recruit { id, link, said, admit })
    }

    /// Asks it to look at itself, and compares what it says with the others.
    ///
    /// # Errors
    /// It does not fit, and why.
    pub async fn prepare(
        &mut self,
        recruiter: &Recruiter,
        bind: Option<IpAddr>,
        others: &[SocketAddr],
    ) -> Result<Ready, OpError> {
        self.link.order(ToMember::Prepare {
            vm: recruiter.vm.clone(),
            me: self.id,
            nonce: recruiter.nonce,
            disks: Vec::new(),
            bind,
            silence: recruiter.silence,
        });
        let ready = self
            .hear("say what it is", recruiter.limit, |word| match word {
                FromMember::Ready { host, pid, facts, addr } => {
                    Some(Ready { host, pid, addr, facts: *facts })
                }
                _ => None,
            })
            .await?;
        let refused = |what: String| Err(OpError::Refused(what));
        let hosts = [recruiter.first.clone(), (ready.host.clone(), ready.facts.clone())];
        if let Err(end) = fit::compare(&hosts) {
            return refused(end.to_string());
        }
        let seen = &recruiter.common.cpuid;
        if CpuidTable::intersect(&[seen.clone(), ready.facts.cpuid.clone()]) != *seen {
            return refused(format!("the CPU of {} lacks features that the guest has seen", ready.host));
        }
        let local = |addr: &SocketAddr| addr.ip().to_canonical().is_loopback();
        if others.iter().any(|other| local(other) != local(&ready.addr)) {
            return refused(format!(
                "{} listens on {}, and the other members on {}: start the VM so that all can reach each other (--on)",
                ready.host,
                ready.addr.ip(),
                others.first().map_or_else(String::new, |addr| addr.ip().to_string())
            ));
        }
        Ok(ready)
    }

    /// Waits for an answer.
    ///
    /// # Errors
    /// It says that it can't, or nothing.
    pub async fn hear<T>(
        &mut self,
        step: &str,
        limit: Duration,
        mut take: impl FnMut(FromMember) -> Option<T>,
    ) -> Result<T, OpError> {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let word = tokio::time::timeout(left, self.said.recv()).await;
            match word {
                Err(_) => {
                    return Err(failed(format!("asked to {step}, no answer within {} s", limit.as_secs())));
                }
                Ok(None) => return Err(failed("the VM is ending")),
                Ok(Some(Err(e))) => return Err(failed(self.epitaph(&e).await)),
                Ok(Some(Ok(FromMember::Unfit { reason }))) => return Err(OpError::Refused(reason)),
                Ok(Some(Ok(
                    FromMember::Failed { reason, .. }
                    | FromMember::Event(MemberEvent::Failed { text: reason, .. }),
                ))) => return Err(failed(reason)),
                Ok(Some(Ok(FromMember::Event(MemberEvent::Exit(exit))))) => {
                    return Err(failed(exit.to_string()));
                }
                Ok(Some(Ok(word))) => {
                    if let Some(answer) = take(word) {
                        return Ok(answer);
                    }
                }
            }
        }
    }

    /// How its connection ended, if it did so unheard.
    pub async fn end(&mut self) -> Option<String> {
        while let Ok(word) = self.said.try_recv() {
            if let Err(e) = word {
                return Some(self.epitaph(&e).await);
            }
        }
        None
    }

    async fn epitaph(&self, e: &CodecError) -> String {
        self.link.epitaph().await.unwrap_or_else(|| format!("its connection ended: {e}"))
    }

    /// It is a member now: what it says is the coordinator's.
    pub async fn admit(self, turn: &Turn, recruiter: &Recruiter) {
        let Recruit { link, said, admit, .. } = self;
        let (done, heard) = oneshot::channel();
        turn.shared().ops().tell_office(Notice::Admit(link, done)).await;
        // If nobody hears it the VM ends.
        let _ = heard.await;
        let _ = admit.send((recruiter.inbox.clone(), said));
    }

    /// It is not to become a member.
    pub async fn send_away(self) {
        self.link.order(ToMember::Stop { reason: "it has not become a member".into() });
        self.link.finish(GRACE).await;
    }
}
