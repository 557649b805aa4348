//! A second stream between two members that had one: same port, same handshake.

use super::mesh::{MeshConfig, call, receive};
use crate::addr::MemberId;
use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// A handshake takes no longer than this, or the caller is a stranger.
const HANDSHAKE: Duration = Duration::from_secs(2);
/// Callers that may be in the middle of a handshake at once; more wait in the backlog.
const MOST: usize = 64;
/// Pause between two looks for a caller.
const GLANCE: Duration = Duration::from_millis(2);

/// What is needed to find lost members again: the port stays open after the mesh stands. As in [`super::mesh`], the
/// member with the higher number calls.
#[derive(Debug)]
pub struct Redial {
    listener: TcpListener,
    shared: Arc<Shared>,
}

/// What the threads that answer callers need.
#[derive(Debug)]
struct Shared {
    /// Peers come and go. Held for a look-up only.
    cfg: Mutex<Arc<MeshConfig>>,
    /// Callers that were let in and that nobody has asked for yet, by member and channel.
    arrived: Mutex<BTreeMap<(MemberId, u16), TcpStream>>,
    busy: AtomicUsize,
    never: AtomicBool,
}

impl Shared {
    fn cfg(&self) -> Arc<MeshConfig> {
        self.cfg.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Where a peer is from now on, if it is one.
    fn change(&self, peer: MemberId, addr: Option<SocketAddr>) {
        let mut slot = self.cfg.lock().unwrap_or_else(PoisonError::into_inner);
        let mut cfg = MeshConfig::clone(&slot);
        cfg.peers.retain(|(known, _)| *known != peer);
        cfg.peers.extend(addr.map(|addr| (peer, addr)));
        *slot = Arc::new(cfg);
        drop(slot);
        // Streams of who had the number before.
        self.arrived().retain(|(from, _), _| *from != peer);
    }

    fn arrived(&self) -> MutexGuard<'_, BTreeMap<(MemberId, u16), TcpStream>> {
        self.arrived.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Redial {
    /// `listener` is a clone of the one that [`super::mesh::connect`] was given with the same configuration.
    pub fn new(listener: TcpListener, cfg: MeshConfig) -> io::Result<Redial> {
        listener.set_nonblocking(true)?;
        let (arrived, busy) = (Mutex::default(), AtomicUsize::new(0));
        let cfg = Mutex::new(Arc::new(cfg));
        let shared = Shared { cfg, arrived, busy, never: AtomicBool::new(false) };
        Ok(Redial { listener, shared: Arc::new(shared) })
    }

    /// There is a (new) peer, at this address.
    pub fn meet(&self, peer: MemberId, addr: SocketAddr) {
        self.shared.change(peer, Some(addr));
    }

    /// It is no peer any more; who waits for it gives up.
    pub fn part(&self, peer: MemberId) {
        self.shared.change(peer, None);
    }

    /// Whether this is a peer.
    pub fn knows(&self, peer: MemberId) -> bool {
        self.shared.cfg().peers.iter().any(|(known, _)| *known == peer)
    }

    /// A new stream of a channel to or from `peer`, by `end`.
    ///
    /// # Errors
    /// Nobody is there, or not who should be. A caller may try again until `end`.
    pub fn stream(&self, peer: MemberId, channel: u16, end: Instant) -> io::Result<TcpStream> {
        let (cfg, never) = (self.shared.cfg(), &self.shared.never);
        if peer > cfg.me {
            return self.wait((peer, channel), end);
        }
        let to = cfg.peers.iter().find(|(p, _)| *p == peer);
        let (_, addr) = to.ok_or_else(|| io::Error::other("it is no peer"))?;
        let soon = end.min(Instant::now() + HANDSHAKE);
        call(&cfg, peer, *addr, channel, soon, never).map_err(io::Error::other)
    }

    fn wait(&self, wanted: (MemberId, u16), end: Instant) -> io::Result<TcpStream> {
        loop {
            let arrived = self.shared.arrived().remove(&wanted);
            if let Some(stream) = arrived {
                return Ok(stream);
            }
            if Instant::now() >= end {
                return Err(io::ErrorKind::TimedOut.into());
            }
            if !self.knows(wanted.0) {
                return Err(io::Error::other("it is no peer"));
            }
            self.answer()?;
            thread::sleep(GLANCE);
        }
    }

    /// Lets in whoever is at the door. Each caller has a thread of its own, so that a stranger who says nothing holds
    /// nobody up.
    fn answer(&self) -> io::Result<()> {
        use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
        while self.shared.busy.load(Ordering::Relaxed) < MOST {
            let mut stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) if matches!(e.kind(), WouldBlock | ConnectionAborted | Interrupted) => return Ok(()),
                Err(e) => return Err(e),
            };
            let shared = self.shared.clone();
            shared.busy.fetch_add(1, Ordering::Relaxed);
            let thread = thread::Builder::new().name("dsm-door".into());
            let greeter = thread.spawn(move || {
                match receive(&mut stream, &shared.cfg(), Instant::now() + HANDSHAKE, &shared.never) {
                    Ok(Ok(caller)) => {
                        // The newest counts: its caller has given up those before.
                        shared.arrived().insert(caller, stream);
                    }
                    Ok(Err(reason)) => tracing::debug!("a caller was refused: {reason}"),
                    Err(e) => tracing::debug!("a stranger called: {e}"),
                }
                shared.busy.fetch_sub(1, Ordering::Relaxed);
            });
            if let Err(e) = greeter {
                self.shared.busy.fetch_sub(1, Ordering::Relaxed);
                return Err(e);
            }
        }
        Ok(())
    }
}
