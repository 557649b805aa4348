//! Asking the members of a running VM to do something, and hearing from each in bounded time.

use super::wire::ToMember;
use crate::member::{MemberReply, MemberTask};
use dsm::addr::MemberId;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// What a task may take beyond its own limit before its member counts as silent.
pub const GRACE: Duration = Duration::from_secs(2);

/// A member did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{member} on {host}: {reason}")]
pub struct AskError {
    /// Which.
    pub member: MemberId,
    /// Its host.
    pub host: String,
    /// Why; what the member said, or that it said nothing.
    pub reason: String,
}

#[derive(Clone, Debug)]
struct Seat {
    id: MemberId,
    host: String,
    orders: mpsc::Sender<ToMember>,
}

type Answer = Result<MemberReply, String>;

/// The members of a running VM.
#[derive(Debug)]
pub struct Crew {
    /// Members come and go. Held for a look-up only.
    seats: Mutex<Vec<Seat>>,
    next: AtomicU64,
    /// Tasks under way. Held for a look-up only.
    open: Mutex<HashMap<u64, (MemberId, oneshot::Sender<Answer>)>>,
    /// Where the pieces go that a task sends before its answer.
    streams: Mutex<HashMap<u64, mpsc::Sender<Vec<u8>>>>,
    closed: AtomicBool,
}

impl Crew {
    /// A crew: number, host and the way to each member.
    pub fn new(seats: impl IntoIterator<Item = (MemberId, String, mpsc::Sender<ToMember>)>) -> Crew {
        let seats = seats.into_iter().map(|(id, host, orders)| Seat { id, host, orders });
        Crew {
            seats: Mutex::new(seats.collect()),
            next: AtomicU64::new(1),
            open: Mutex::default(),
            streams: Mutex::default(),
            closed: AtomicBool::new(false),
        }
    }

    /// All members.
    pub fn members(&self) -> impl Iterator<Item = MemberId> + use<> {
        self.seats().iter().map(|seat| seat.id).collect::<Vec<_>>().into_iter()
    }

    fn seats(&self) -> MutexGuard<'_, Vec<Seat>> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn seat(&self, member: MemberId) -> Option<Seat> {
        self.seats().iter().find(|seat| seat.id == member).cloned()
    }

    /// One leaves, or is gone. Who waits for it does so no longer.
    pub fn dismiss(&self, member: MemberId) {
        self.seats().retain(|seat| seat.id != member);
        self.open().retain(|_, (of, _)| *of != member);
    }

    /// One more.
    pub fn admit(&self, id: MemberId, host: String, orders: mpsc::Sender<ToMember>) {
        let mut seats = self.seats();
        seats.retain(|seat| seat.id != id);
        seats.push(Seat { id, host, orders });
        seats.sort_by_key(|seat| seat.id);
    }

    /// `member 1 on hostB`.
    pub fn name(&self, member: MemberId) -> String {
        let seat = self.seat(member);
        seat.map_or_else(|| member.to_string(), |seat| format!("{member} on {}", seat.host))
    }

    fn open(&self) -> MutexGuard<'_, HashMap<u64, (MemberId, oneshot::Sender<Answer>)>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An answer came. One that nobody waits for any more is dropped.
    pub fn done(&self, id: u64, answer: Answer) {
        if let Some((_, waiting)) = self.open().remove(&id) {
            let _ = waiting.send(answer);
        }
    }

    /// The members are gone: nobody waits for them any longer.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.open().clear();
        self.streams().clear();
    }

    /// Asks one member. The member's own limit should be in the task; `limit` is when it counts as silent.
    ///
    /// # Errors
    /// It said no, or nothing.
    pub async fn ask(
        &self,
        member: MemberId,
        task: MemberTask,
        limit: Duration,
    ) -> Result<MemberReply, AskError> {
        self.ask_as(member, task, limit, None).await
    }

    async fn ask_as(
        &self,
        member: MemberId,
        task: MemberTask,
        limit: Duration,
        pieces: Option<mpsc::Sender<Vec<u8>>>,
    ) -> Result<MemberReply, AskError> {
        let seat = self.seat(member);
        let host = seat.as_ref().map_or("?", |s| &s.host).to_string();
        let error = |reason: String| AskError { member, host, reason };
        let Some(seat) = seat else {
            return Err(error("there is no such member".into()));
        };
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (tell, told) = oneshot::channel();
        self.open().insert(id, (member, tell));
        if self.closed.load(Ordering::SeqCst) {
            self.open().remove(&id);
        }
        if let Some(pieces) = pieces {
            self.streams().insert(id, pieces);
        }
        let exchange = async {
            let gone = || "its connection is closed".to_string();
            seat.orders.send(ToMember::Task { id, task }).await.map_err(|_| gone())?;
            told.await.map_err(|_| gone())?
        };
        let answer = tokio::time::timeout(limit, exchange).await;
        self.open().remove(&id);
        self.streams().remove(&id);
        match answer {
            Ok(answer) => answer.map_err(error),
            Err(_) => Err(error(format!("no answer within {:.1} s", limit.as_secs_f32()))),
        }
    }

    fn streams(&self) -> MutexGuard<'_, HashMap<u64, mpsc::Sender<Vec<u8>>>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A piece came. Waits while its receiver is busy; false when nobody wants it any more.
    pub async fn piece(&self, id: u64, bytes: Vec<u8>) -> bool {
        let Some(to) = self.streams().get(&id).cloned() else { return false };
        let wanted = to.send(bytes).await.is_ok();
        if !wanted {
            self.streams().remove(&id);
        }
        wanted
    }

    /// Asks one member for something that comes in pieces. It counts as silent when no piece and no answer comes for
    /// `stall`.
    ///
    /// # Errors
    /// It said no, or nothing.
    pub async fn ask_for_pieces(
        &self,
        member: MemberId,
        task: MemberTask,
        pieces: mpsc::Sender<Vec<u8>>,
        stall: Duration,
    ) -> Result<MemberReply, AskError> {
        let (between, mut came) = mpsc::channel::<Vec<u8>>(1);
        let ask = self.ask_as(member, task, Duration::from_secs(24 * 3600), Some(between));
        let pump = async {
            loop {
                match tokio::time::timeout(stall, came.recv()).await {
                    Ok(Some(piece)) => {
                        if pieces.send(piece).await.is_err() {
                            // The member is told by the next piece that is refused.
                            came.close();
                        }
                    }
                    Ok(None) => return true,
                    Err(_) => return false,
                }
            }
        };
        tokio::pin!(ask, pump);
        tokio::select! {
            biased;
            done = &mut pump => match done {
                true => ask.await,
                false => Err(AskError {
                    member,
                    host: self.seat(member).map_or_else(|| "?".into(), |s| s.host),
                    reason: format!("nothing came for {:.0} s", stall.as_secs_f32()),
                }),
            },
            answer = &mut ask => {
                // What came before the answer is still on its way to the disk.
                pump.await;
                answer
            }
        }
    }

    /// Asks all members at once, and returns their answers by member.
    ///
    /// # Errors
    /// The first that failed. All have been heard, or were given up, by then.
    pub async fn ask_all(&self, task: &MemberTask, limit: Duration) -> Result<Vec<MemberReply>, AskError> {
        let asks = self.members().map(|member| self.ask(member, task.clone(), limit));
        let answers = join_all(asks).await;
        answers.into_iter().collect()
    }
}

/// Polls all to their end.
pub async fn join_all<F: Future>(futures: impl IntoIterator<Item = F>) -> Vec<F::Output> {
    let mut open: Vec<_> = futures.into_iter().map(Box::pin).collect();
    let mut results: Vec<Option<F::Output>> = open.iter().map(|_| None).collect();
    std::future::poll_fn(|cx| {
        for (future, result) in open.iter_mut().zip(&mut results) {
            if result.is_none() {
                if let std::task::Poll::Ready(value) = future.as_mut().poll(cx) {
                    *result = Some(value);
                }
            }
        }
        if results.iter().all(Option::is_some) {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
    results.into_iter().flatten().collect()
}
