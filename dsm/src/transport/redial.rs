//! A second stream between two members that had one: same port, same handshake.

use super::mesh::{MeshConfig, call, receive};
use crate::addr::MemberId;
use std::collections::BTreeMap;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// A handshake takes no longer than this, or the caller is a stranger.
const HANDSHAKE: Duration = Duration::from_secs(2);
/// Pause between two looks for a caller.
const GLANCE: Duration = Duration::from_millis(2);

/// What is needed to find lost members again: the port stays open after the mesh stands. As in [`super::mesh`], the
/// member with the higher number calls.
#[derive(Debug)]
pub struct Redial {
    listener: TcpListener,
    cfg: MeshConfig,
    /// Callers that were let in and that nobody has asked for yet, by member and channel.
    arrived: Mutex<BTreeMap<(MemberId, u16), TcpStream>>,
    /// Held by whoever answers callers, for all.
    door: Mutex<()>,
    never: AtomicBool,
}

impl Redial {
    /// `listener` is a clone of the one that [`super::mesh::connect`] was given with the same configuration.
    pub fn new(listener: TcpListener, cfg: MeshConfig) -> io::Result<Redial> {
        listener.set_nonblocking(true)?;
        let (arrived, door) = (Mutex::default(), Mutex::new(()));
        Ok(Redial { listener, cfg, arrived, door, never: AtomicBool::new(false) })
    }

    /// A new stream of a channel to or from `peer`, by `end`.
    ///
    /// # Errors
    /// Nobody is there, or not who should be. A caller may try again until `end`.
    pub fn stream(&self, peer: MemberId, channel: u16, end: Instant) -> io::Result<TcpStream> {
        if peer > self.cfg.me {
            return self.wait((peer, channel), end);
        }
        let to = self.cfg.peers.iter().find(|(p, _)| *p == peer);
        let (_, addr) = to.ok_or_else(|| io::Error::other("it is no peer"))?;
        let soon = end.min(Instant::now() + HANDSHAKE);
        call(&self.cfg, peer, *addr, channel, soon, &self.never).map_err(io::Error::other)
    }

    fn wait(&self, wanted: (MemberId, u16), end: Instant) -> io::Result<TcpStream> {
        loop {
            let mut arrived = self.arrived.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(stream) = arrived.remove(&wanted) {
                return Ok(stream);
            }
            drop(arrived);
            if Instant::now() >= end {
                return Err(io::ErrorKind::TimedOut.into());
            }
            // Another thread that waits may be at the door: it lets in whoever comes.
            if let Ok(_door) = self.door.try_lock() {
                self.answer()?;
            }
            thread::sleep(GLANCE);
        }
    }

    fn answer(&self) -> io::Result<()> {
        use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
        let mut stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) if matches!(e.kind(), WouldBlock | ConnectionAborted | Interrupted) => return Ok(()),
            Err(e) => return Err(e),
        };
        match receive(&mut stream, &self.cfg, Instant::now() + HANDSHAKE, &self.never) {
            Ok(Ok(caller)) => {
                // The newest counts: its caller has given up those before.
                self.arrived.lock().unwrap_or_else(PoisonError::into_inner).insert(caller, stream);
            }
            Ok(Err(reason)) => tracing::debug!("a caller was refused: {reason}"),
            Err(e) => tracing::debug!("a stranger called: {e}"),
        }
        Ok(())
    }
}
