//! The coordinator's connection to one member, wherever its process runs.

use crate::control::codec::{self, CodecError};
use crate::control::spawn::ChildProcess;
use crate::control::wire::{FromMember, ToMember};
use dsm::addr::MemberId;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

/// How often a member hears from an idle coordinator.
const PING: Duration = Duration::from_secs(2);

/// What came from a member, or how its connection ended.
pub type Inbound = (MemberId, Result<FromMember, CodecError>);

/// A byte stream to a member or a launcher.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// One member, seen from the coordinator.
#[derive(Debug)]
pub struct Link {
    /// The member.
    pub id: MemberId,
    /// Its host, for messages.
    pub host: String,
    /// Shortest round trip to it, microseconds, if it was measured.
    pub round_trip: Option<u64>,
    orders: mpsc::Sender<ToMember>,
    child: Option<ChildProcess>,
    reader: AbortHandle,
}

impl Drop for Link {
    /// Its number may be given to another member: what still comes is not from that one.
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Link {
    /// Takes over a connection: what comes goes to `inbox`, and pings go out when nothing else does.
    pub fn new(
        id: MemberId,
        host: String,
        round_trip: Option<u64>,
        stream: Box<dyn Stream>,
        child: Option<ChildProcess>,
        inbox: mpsc::Sender<Inbound>,
    ) -> Link {
        let (mut read, mut write) = tokio::io::split(stream);
        let (orders, mut queue) = mpsc::channel::<ToMember>(64);
        let reader = tokio::spawn(async move {
            loop {
                let message = codec::recv::<FromMember>(&mut read).await;
                let last = message.is_err();
                if inbox.send((id, message)).await.is_err() || last {
                    return;
                }
            }
        });
        let reader = reader.abort_handle();
        tokio::spawn(async move {
            loop {
                let message = match tokio::time::timeout(PING, queue.recv()).await {
                    Ok(Some(message)) => message,
                    Ok(None) => return,
                    Err(_) => ToMember::Ping,
                };
                // A failure shows at the reading side, which says so.
                if codec::send(&mut write, &message).await.is_err() {
                    return;
                }
            }
        });
        Link { id, host, round_trip, orders, child, reader }
    }

    /// Queues an order. A connection that takes none shows as a closed one, or by the missing answer.
    pub fn order(&self, order: ToMember) {
        let _ = self.orders.try_send(order);
    }

    /// The way to it, for tasks.
    pub fn orders(&self) -> mpsc::Sender<ToMember> {
        self.orders.clone()
    }

    /// How its process ended, where it is a child of this one and has.
    pub async fn epitaph(&self) -> Option<String> {
        self.child.as_ref()?.epitaph().await
    }

    /// Sees its process off: waits for a child a little, then kills it. A member elsewhere is killed by its
    /// node when the connection closes.
    pub async fn finish(mut self, grace: Duration) {
        self.reader.abort();
        if let Some(child) = self.child.take() {
            child.finish(grace).await;
        }
    }
}
