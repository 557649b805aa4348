//! Receiving from a peer, over as many streams as it takes.
//!
//! When a stream breaks, or nothing comes over it for too long, the receive thread makes another one within the grace time.
//! Both sides then say how many bytes they have received, and each goes on with the byte that the other one waits for.
//!
//! ```text
//!  higher member            lower member
//!    | connect, handshake ->|      as the mesh did at the start, channel 1
//!    | WORD, received ----->|
//!    |<----- WORD, received |
//!    | bytes from there on ->|<-
//! ```

use super::link::Link;
use super::wire::{FRAME_LEN, Frame, Message};
use super::{Fabric, Handler, TELL};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};
use zerocopy::FromBytes;

/// What a resumed stream begins with; the count of bytes follows, 64 bits, little-endian.
const WORD: [u8; 8] = *b"fabric 1";
/// A peer that has connected says so within this time.
const PATIENCE: Duration = Duration::from_secs(1);
/// One attempt takes no longer, so that the end of the VM need not wait for the rest of the grace time.
const ATTEMPT: Duration = Duration::from_secs(1);
/// Pause between two attempts.
const RETRY: Duration = Duration::from_millis(20);

/// How a stream ended.
enum End {
    /// It can be made again.
    Broken(String),
    /// The peer sent what no member of ours sends.
    Nonsense(String),
}

/// Bytes that have come and are not used yet: the beginning of a message whose rest may come over the next stream.
struct Inbox {
    buffer: Vec<u8>,
    have: usize,
}

impl Fabric {
    pub(super) fn receive<H: Handler>(&self, link: &Link, handler: &H) {
        let mut inbox = Inbox { buffer: vec![0; FRAME_LEN * 256], have: 0 };
        loop {
            let reason = match self.receive_all(link, handler, &mut inbox) {
                End::Nonsense(what) => what,
                End::Broken(how) => match self.resume(link, how) {
                    Ok(()) => {
                        link.since.store(handler.host_clock(), Ordering::Relaxed);
                        continue;
                    }
                    Err(how) => how,
                },
            };
            return self.lost(link, reason, handler);
        }
    }

    /// Makes the stream again.
    fn resume(&self, link: &Link, broke: String) -> Result<(), String> {
        let Some(reconnect) = self.reconnect.as_ref().filter(|_| !self.is_over(link)) else {
            return Err(broke);
        };
        link.give_up();
        let (peer, grace) = (link.peer, reconnect.grace);
        tracing::warn!("the fabric's connection to {peer} broke ({broke}); trying again for {grace:?}");
        let end = Instant::now() + grace;
        while !self.is_over(link) && Instant::now() < end {
            let made = (reconnect.redial)(peer, end.min(Instant::now() + ATTEMPT)).and_then(|stream| {
                let got = exchange(link, &stream)?;
                link.resume(stream, got, self.now_ms())
            });
            match made {
                Ok(()) => {
                    tracing::warn!("connected to {peer} again (fabric)");
                    return Ok(());
                }
                Err(e) => tracing::debug!("no connection to {peer} yet (fabric): {e}"),
            }
            thread::sleep(RETRY);
        }
        Err(format!("{broke}; not connected again within {grace:?}"))
    }

    fn is_over(&self, link: &Link) -> bool {
        link.is_leaving() || self.is_stranger(link.peer) || self.ending.load(Ordering::SeqCst)
    }

    fn receive_all<H: Handler>(&self, link: &Link, handler: &H, inbox: &mut Inbox) -> End {
        let stream = link.stream();
        let Inbox { buffer, have } = inbox;
        let mut wanted = 0;
        loop {
            let free = buffer.get_mut(*have..).unwrap_or(&mut []);
            let more = match (&*stream).read(free) {
                Ok(0) => return End::Broken("connection closed".into()),
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return End::Broken(format!("connection lost: {e}")),
            };
            *have += more;
            link.heard(self.now_ms());
            if link.count(more) > TELL {
                self.beat(link);
            }
            let mut used = 0;
            while let Some((frame, rest)) =
                buffer.get(used..*have).and_then(|bytes| Frame::read_from_prefix(bytes).ok())
            {
                let message = match Message::decode(&frame, link.peer, self.epoch) {
                    Ok(message) => message,
                    Err(e) => return End::Nonsense(e.to_string()),
                };
                let counts = message.is_for_the_guest();
                let mut taken = FRAME_LEN;
                match message {
                    Message::Image { len } => {
                        let len = usize::try_from(len).unwrap_or(usize::MAX);
                        let Some(image) = rest.get(..len) else {
                            // The rest is still to come.
                            wanted = FRAME_LEN + len;
                            break;
                        };
                        handler.image(link.peer, image);
                        taken += len;
                    }
                    Message::Heartbeat { received } => {
                        if let Err(what) = link.acknowledged(received) {
                            return End::Nonsense(what);
                        }
                    }
                    _ => {}
                }
                self.received.fetch_add(1, Ordering::Relaxed);
                used += taken;
                self.carry_out(link, message, handler);
                if counts {
                    self.traffic.done.fetch_add(1, Ordering::SeqCst);
                }
            }
            buffer.copy_within(used..*have, 0);
            *have -= used;
            if buffer.len() < wanted {
                buffer.resize(wanted, 0);
            }
        }
    }
}

/// Both say how many bytes they have received.
fn exchange(link: &Link, mut stream: &TcpStream) -> io::Result<u64> {
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut own = [0; 16];
    let (word, count) = own.split_at_mut(8);
    word.copy_from_slice(&WORD);
    count.copy_from_slice(&link.tell_received().to_le_bytes());
    stream.write_all(&own)?;
    let (mut word, mut count) = ([0; 8], [0; 8]);
    stream.read_exact(&mut word)?;
    stream.read_exact(&mut count)?;
    if word != WORD {
        return Err(io::Error::other("it did not say how far it is"));
    }
    Ok(u64::from_le_bytes(count))
}
