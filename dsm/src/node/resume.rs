//! After a connection broke: a new one within the grace time, and every frame that the peer has not got is sent again.
//!
//! The receive thread does it. Until it has succeeded whatever is for the peer is queued, and who needs something of it
//! waits; nobody's rights change. If it fails the peer is dead.

use super::failure::Cause;
use super::shard::Env;
use super::shell::Shell;
use crate::transport::frame::{Frame, HEADER_LEN, Header, Rules};
use crate::transport::link::Link;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};
use zerocopy::{FromBytes, IntoBytes};

/// A peer that has connected says how far it is within this time.
const WORD: Duration = Duration::from_secs(2);
/// One attempt takes no longer, so that a member that stops meanwhile need not wait for the rest of the grace time.
const ATTEMPT: Duration = Duration::from_secs(1);
/// Pause between two attempts.
const RETRY: Duration = Duration::from_millis(20);

/// Makes the connection again. Returns the stream to read from, or why the peer is taken for dead.
pub(super) fn resume(shell: &Shell, link: &Link, rules: &Rules<'_>, broke: Cause) -> Result<(), Cause> {
    let Some(reconnect) = &shell.config().reconnect else { return Err(broke) };
    let broke = if link.was_given_up() { Cause::Silent(shell.config().deadline) } else { broke };
    link.set_broken();
    link.close();
    let peer = link.peer();
    tracing::warn!("the connection to {peer} broke ({broke}); trying again for {:?}", reconnect.grace);
    let end = Instant::now() + reconnect.grace;
    while shell.is_running() && shell.members().has(peer) && Instant::now() < end {
        let made = (reconnect.redial)(peer, end.min(Instant::now() + ATTEMPT)).and_then(|stream| {
            let got = exchange(shell, link, rules, &stream)?;
            link.resume(stream, got, shell.now()).map_err(io::Error::other)
        });
        match made {
            Ok(()) => {
                tracing::warn!("connected to {peer} again");
                shell.flush(crate::protocol::MemberSet::only(peer), shell.now());
                return Ok(());
            }
            Err(e) => tracing::debug!("no connection to {peer} yet: {e}"),
        }
        std::thread::sleep(RETRY.min(end.saturating_duration_since(Instant::now())));
    }
    Err(Cause::Gone { broke: broke.to_string(), grace: reconnect.grace })
}

/// Both say how many frames they have received.
fn exchange(shell: &Shell, link: &Link, rules: &Rules<'_>, mut stream: &TcpStream) -> io::Result<u64> {
    let own = Header::resume(shell.config().me, rules.epoch, link.received());
    stream.set_write_timeout(Some(WORD))?;
    stream.write_all(own.as_bytes())?;
    stream.set_read_timeout(Some(WORD))?;
    let mut bytes = [0; HEADER_LEN];
    stream.read_exact(&mut bytes)?;
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    let header = Header::read_from_bytes(&bytes).map_err(|_| io::ErrorKind::InvalidData)?;
    match header.decode(rules, || ()) {
        Ok(Frame::Resume(got)) => Ok(got),
        Ok(_) => Err(io::Error::other("it did not say how far it is")),
        Err(e) => Err(io::Error::other(e)),
    }
}

/// Whether a peer may reconnect: who is no member (any more) has nothing to lose.
pub(super) fn is_enabled(shell: &Shell, link: &Link) -> bool {
    shell.config().reconnect.is_some() && shell.members().has(link.peer()) && !link.has_left()
}
