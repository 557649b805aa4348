//! While the guest runs: heartbeats, counters, events, and which of many symptoms is the cause.

use super::Coordinator;
use super::link::Link;
use crate::control::codec::{CodecError, Json};
use crate::control::end::End;
use crate::control::ops::office::Notice;
use crate::control::wire::{FromMember, ToMember};
use crate::member::watch::VCPU_GRACE;
use crate::member::{Culprit, MemberEvent, VmExit};
use dsm::addr::MemberId;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// A member, or a coordinator, that says nothing for so long, and for the time to reconnect in, is gone.
pub const SILENCE: Duration = Duration::from_secs(20);
/// How often members report.
const TICK: Duration = Duration::from_secs(1);
/// Longest wait for the process of a member that has left.
const FAREWELL: Duration = Duration::from_secs(5);
/// When one thing goes wrong, others follow: so long to hear of the first cause.
const SETTLE: Duration = Duration::from_millis(400);

/// How close a symptom is to its cause; the smallest one wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    /// The guest did it.
    Guest,
    /// The guest did it, says a member that was only told.
    GuestElsewhere,
    /// A member says what is wrong with its own host.
    Own,
    /// A process is gone.
    Gone,
    /// A member can't go on and blames nobody else.
    Here,
    /// A member says what is wrong with another.
    Hearsay,
    /// A member is over for a reason that is a consequence.
    Consequence,
    /// A member is over because another can't go on, which says itself why, as soon as its vCPUs have ended.
    Told,
}

impl Coordinator {
    /// Watches until the VM is over.
    pub(super) async fn watch(&mut self) -> End {
        let mut heard: BTreeMap<MemberId, Instant> =
            self.links.iter().map(|link| (link.id, Instant::now())).collect();
        let mut answered: BTreeMap<MemberId, u64> = self.links.iter().map(|link| (link.id, 0)).collect();
        let mut waiting: Vec<(u64, oneshot::Sender<()>)> = Vec::new();
        let mut asked = 0;
        let mut tick = tokio::time::interval(TICK);
        loop {
            tokio::select! {
                Some((id, message)) = self.inbox.recv() => {
                    if let Some(heard) = heard.get_mut(&id) {
                        *heard = Instant::now();
                    }
                    let Some(message) = self.of_member(id, message) else { continue };
                    if let Ok(FromMember::Report { id: question, stats: Json(stats) }) = message {
                        self.shared.counted(id.0, *stats);
                        if let Some(answered) = answered.get_mut(&id) {
                            *answered = question;
                        }
                        let all = answered.values().min().copied().unwrap_or(0);
                        let (done, open): (Vec<_>, Vec<_>) =
                            waiting.into_iter().partition(|(question, _)| *question <= all);
                        waiting = open;
                        for (_, done) in done {
                            let _ = done.send(());
                        }
                    } else if let Ok(FromMember::Piece { id: task, bytes }) = message {
                        let wanted = match self.shared.ops().crew() {
                            Some(crew) => crew.piece(task, bytes).await,
                            None => false,
                        };
                        if let Some(link) = self.link(id).filter(|_| !wanted) {
                            link.order(ToMember::Cancel { id: task });
                        }
                    } else if let Ok(FromMember::TaskDone { id: task, result }) = message {
                        if let Some(crew) = self.shared.ops().crew() {
                            crew.done(task, result);
                        }
                    } else if let Some(end) = self.trouble(id, message).await {
                        return end;
                    }
                }
                _ = tick.tick() => {
                    if let Some(end) = self.silent(&heard) {
                        return end;
                    }
                    self.ask(&mut asked);
                }
                Some(notice) = self.notices.recv() => match notice {
                    Notice::Excuse(id) => {
                        heard.remove(&id);
                        answered.remove(&id);
                        self.excuse(id);
                    }
                    Notice::Dismiss(id, done) => self.dismiss(id, done),
                    Notice::Admit(link, done) => {
                        heard.insert(link.id, Instant::now());
                        answered.insert(link.id, asked);
                        self.admit(link);
                        let _ = done.send(());
                    }
                },
                Some(done) = self.counts.recv() => {
                    self.ask(&mut asked);
                    waiting.push((asked, done));
                }
            }
        }
    }

    fn ask(&self, asked: &mut u64) {
        *asked += 1;
        for link in &self.links {
            link.order(ToMember::Stats { id: *asked });
        }
    }

    fn link(&self, id: MemberId) -> Option<&Link> {
        self.links.iter().find(|link| link.id == id)
    }

    /// There is one more member.
    fn admit(&mut self, link: Link) {
        self.gone.retain(|gone| *gone != link.id);
        // One that had the number before, and has not ended in time.
        self.leaving.retain(|(old, _)| old.id != link.id);
        self.links.push(link);
        self.links.sort_by_key(|link| link.id);
    }

    /// This member has nothing any more.
    fn excuse(&mut self, id: MemberId) {
        if let Some(at) = self.links.iter().position(|link| link.id == id) {
            let link = self.links.remove(at);
            self.leaving.push((link, None));
        }
    }

    /// It is to end; `done` hears when it has.
    fn dismiss(&mut self, id: MemberId, done: oneshot::Sender<()>) {
        match self.leaving.iter_mut().find(|(link, _)| link.id == id) {
            Some((link, tell)) => {
                link.order(ToMember::Stop { reason: "it has been drained".into() });
                *tell = Some(done);
            }
            // It has ended before it was told to.
            None => drop(done.send(())),
        }
    }

    /// What a member says; of one that leaves only its answers and its end count.
    fn of_member(
        &mut self,
        id: MemberId,
        message: Result<FromMember, CodecError>,
    ) -> Option<Result<FromMember, CodecError>> {
        let Some(at) = self.leaving.iter().position(|(link, _)| link.id == id) else { return Some(message) };
        if is_last(&message) {
            let (link, done) = self.leaving.remove(at);
            tokio::spawn(async move {
                link.finish(FAREWELL).await;
                if let Some(done) = done {
                    let _ = done.send(());
                }
            });
            self.gone.push(id);
            return None;
        }
        Some(message).filter(|message| matches!(message, Ok(FromMember::TaskDone { .. })))
    }

    fn silent(&self, heard: &BTreeMap<MemberId, Instant>) -> Option<End> {
        let limit = self.patience();
        let is_silent = |link: &&Link| heard.get(&link.id).is_some_and(|heard| heard.elapsed() > limit);
        let link = self.links.iter().find(is_silent)?;
        Some(End::MemberLost {
            member: link.id,
            host: link.host.clone(),
            reason: format!("it has not answered for {} s", limit.as_secs()),
        })
    }

    /// Longest silence of a member: what its peers forgive it is forgiven here, too.
    pub(super) fn patience(&self) -> Duration {
        SILENCE + Duration::from_secs(self.spec.pages.reconnect_s)
    }

    /// If this message means the end: waits a moment for what else comes, and returns the cause.
    pub(super) async fn trouble(
        &mut self,
        id: MemberId,
        message: Result<FromMember, CodecError>,
    ) -> Option<End> {
        let first = self.diagnose(id, message).await?;
        Some(self.settle(first).await)
    }

    /// What a step that failed here comes from: a member that is lost makes others fail, too.
    pub(super) async fn cause(&mut self, symptom: End) -> End {
        self.settle((Rank::Consequence, symptom)).await
    }

    async fn settle(&mut self, mut worst: (Rank, End)) -> End {
        let began = Instant::now();
        while worst.0 != Rank::Guest {
            let patience = if worst.0 == Rank::Told { VCPU_GRACE + SETTLE } else { SETTLE };
            let left = patience.saturating_sub(began.elapsed());
            let Ok(Some((id, message))) = tokio::time::timeout(left, self.inbox.recv()).await else { break };
            match self.diagnose(id, message).await {
                Some(other) if other.0 < worst.0 => worst = other,
                _ => {}
            }
        }
        worst.1
    }

    async fn diagnose(
        &mut self,
        id: MemberId,
        message: Result<FromMember, CodecError>,
    ) -> Option<(Rank, End)> {
        // Of one that leaves it is no news.
        self.link(id)?;
        if is_last(&message) {
            // A connection that closes after a last word is no news.
            if self.gone.contains(&id) {
                return None;
            }
            self.gone.push(id);
        }
        let host = self.host_of(id);
        let named = |reason: String| format!("{id} on {host}: {reason}");
        Some(match message {
            Err(e) => {
                let epitaph = match self.link(id) {
                    Some(link) => link.epitaph().await,
                    None => None,
                };
                let reason = epitaph.unwrap_or_else(|| match e {
                    CodecError::Closed => "its process ended, or its host or node went down".into(),
                    e => e.to_string(),
                });
                (Rank::Gone, End::MemberLost { member: id, host, reason })
            }
            Ok(FromMember::Event(MemberEvent::Exit(VmExit::Stopped { reason }))) => {
                (Rank::Consequence, End::Stopped { by: reason })
            }
            Ok(FromMember::Event(MemberEvent::Exit(exit))) => {
                // Only the member that had the vCPU has its registers.
                let told =
                    matches!(exit, VmExit::TripleFault { vcpu, .. } if !self.shared.has_vcpu(id, vcpu));
                (if told { Rank::GuestElsewhere } else { Rank::Guest }, End::from_exit(exit))
            }
            Ok(FromMember::Event(MemberEvent::Failed { text, culprit })) => match culprit {
                Culprit::Own => (Rank::Here, End::Failed(named(text))),
                Culprit::Lost { peer, reason } => {
                    let host = self.host_of(peer);
                    (Rank::Hearsay, End::MemberLost { member: peer, host, reason })
                }
                Culprit::Told { peer } => {
                    let reason = format!("it told {id} that it can't go on, and nobody why");
                    (Rank::Told, End::MemberLost { member: peer, host: self.host_of(peer), reason })
                }
            },
            Ok(FromMember::Unfit { reason }) => (Rank::Own, End::HostRefused { host, reason }),
            Ok(FromMember::Failed { reason, input: true }) => (Rank::Own, End::BadInput(named(reason))),
            Ok(FromMember::Failed { reason, input: false }) => (Rank::Hearsay, End::Failed(named(reason))),
            Ok(FromMember::Stopped) => {
                (Rank::Consequence, End::Failed(named("it stopped without being told to".into())))
            }
            Ok(
                FromMember::Event(MemberEvent::Running)
                | FromMember::Ready { .. }
                | FromMember::Joined
                | FromMember::TaskDone { .. }
                | FromMember::Piece { .. }
                | FromMember::Started
                | FromMember::Report { .. },
            ) => return None,
        })
    }

    fn host_of(&self, id: MemberId) -> String {
        self.link(id).map_or_else(|| "?".into(), |link| link.host.clone())
    }
}

/// True for what a member says last, and for the end of its connection.
pub(in crate::control) fn is_last(message: &Result<FromMember, CodecError>) -> bool {
    matches!(message, Err(_) | Ok(FromMember::Stopped | FromMember::Unfit { .. } | FromMember::Failed { .. }))
}
