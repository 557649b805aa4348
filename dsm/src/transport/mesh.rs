//! Connects every member of a VM with every other: one authenticated stream per pair and channel.
//!
//! The member with the lower number listens for the one with the higher. Strangers on the port are refused and
//! forgotten; a member that does not arrive in time is an error that names it.

use super::handshake::{ACCEPTED, Hello, MAGIC, Refusal, Reply, VERSION, proof, proves, vm_hash};
use crate::addr::{Epoch, MAX_MEMBERS, MemberId};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};
use thiserror::Error;
use zerocopy::{FromBytes, IntoBytes};

/// Callers that may be in the middle of a handshake at once; more wait in the backlog.
const MAX_HANDSHAKES: usize = 64;
/// Pause between two attempts to reach a member that is not listening yet.
const RETRY: Duration = Duration::from_millis(20);
/// A caller that says nothing for this long is a stranger.
const STRANGER: Duration = Duration::from_secs(5);

/// How long a handshake waits before it looks whether it is still needed.
const GLANCE: Duration = Duration::from_millis(50);

/// What a member needs to find the others.
#[derive(Clone)]
pub struct MeshConfig {
    /// This member.
    pub me: MemberId,
    /// Name of the VM.
    pub vm: String,
    /// Number of the topology.
    pub epoch: Epoch,
    /// All other members and where they listen.
    pub peers: Vec<(MemberId, SocketAddr)>,
    /// What all members know and nobody else; `None` only where nobody else can connect.
    pub secret: Option<Vec<u8>>,
    /// Time for all of it.
    pub deadline: Duration,
    /// Streams per pair.
    pub channels: u16,
}

impl std::fmt::Debug for MeshConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MeshConfig")
            .field("me", &self.me)
            .field("vm", &self.vm)
            .field("epoch", &self.epoch)
            .field("peers", &self.peers)
            .field("secret", &self.secret.as_ref().map(|_| "..."))
            .field("deadline", &self.deadline)
            .field("channels", &self.channels)
            .finish()
    }
}

/// The streams to one peer; the index is the channel.
#[derive(Debug)]
pub struct PeerLink {
    /// The member at the other end.
    pub peer: MemberId,
    /// One stream per channel, without Nagle's delay.
    pub streams: Vec<TcpStream>,
}

/// A mesh that did not come about.
#[derive(Debug, Error)]
pub enum MeshError {
    /// The configuration names this member as its own peer, a member twice, or one that can't be.
    #[error("the list of peers is wrong: {0} is named twice, is this member, or is not below {MAX_MEMBERS}")]
    Peers(MemberId),
    /// The listening socket broke.
    #[error("can't accept connections: {0}")]
    Listen(io::Error),
    /// A lower member could not be reached in time.
    #[error("can't reach {peer} at {addr} within {within:?}: {source}")]
    Unreachable {
        /// The member.
        peer: MemberId,
        /// Its address.
        addr: SocketAddr,
        /// The deadline.
        within: Duration,
        /// The last attempt's error.
        source: io::Error,
    },
    /// A lower member refused this one.
    #[error("{peer} at {addr} refuses this member: {reason}")]
    Refused {
        /// The member.
        peer: MemberId,
        /// Its address.
        addr: SocketAddr,
        /// Why.
        reason: Refusal,
    },
    /// What answers at a member's address could not prove that it knows the secret.
    #[error("what answers at {addr} is not {peer}: its secret is another one, or it is not spanvm")]
    Impostor {
        /// The member.
        peer: MemberId,
        /// The address.
        addr: SocketAddr,
    },
    /// A higher member did not call in time.
    #[error("{peer} did not connect within {within:?}{}", last.map(|r| format!(" (a caller was refused: {r})")).unwrap_or_default())]
    Missing {
        /// The member.
        peer: MemberId,
        /// The deadline.
        within: Duration,
        /// The last caller's refusal, if any.
        last: Option<Refusal>,
    },
}

enum Outcome {
    Stream(MemberId, u16, TcpStream),
    Refused(Refusal),
    Fatal(MeshError),
}

/// Connects to all peers. Returns one entry per peer, ascending.
pub fn connect(listener: TcpListener, cfg: &MeshConfig) -> Result<Vec<PeerLink>, MeshError> {
    let mut seen = std::collections::BTreeSet::from([cfg.me]);
    for (peer, _) in &cfg.peers {
        if !seen.insert(*peer) || usize::from(peer.0) >= MAX_MEMBERS {
            return Err(MeshError::Peers(*peer));
        }
    }
    listener.set_nonblocking(true).map_err(MeshError::Listen)?;
    let end = Instant::now() + cfg.deadline;
    let stop = AtomicBool::new(false);
    let (tx, rx) = mpsc::channel();
    thread::scope(|scope| {
        for (peer, addr) in cfg.peers.iter().filter(|(p, _)| *p < cfg.me) {
            for channel in 0..cfg.channels {
                let (tx, stop) = (tx.clone(), &stop);
                scope.spawn(move || {
                    let outcome = match call(cfg, *peer, *addr, channel, end, stop) {
                        Ok(stream) => Outcome::Stream(*peer, channel, stream),
                        Err(e) => Outcome::Fatal(e),
                    };
                    // The receiver is gone once the mesh stands or has failed.
                    let _ = tx.send(outcome);
                });
            }
        }
        if cfg.peers.iter().any(|(p, _)| *p > cfg.me) {
            let (tx, stop, listener) = (tx.clone(), &stop, &listener);
            scope.spawn(move || {
                if let Err(e) = accept(listener, cfg, end, stop, &tx) {
                    let _ = tx.send(Outcome::Fatal(MeshError::Listen(e)));
                }
            });
        }
        drop(tx);
        let result = collect(&rx, cfg, end);
        stop.store(true, Ordering::Relaxed);
        result
    })
}

fn collect(rx: &mpsc::Receiver<Outcome>, cfg: &MeshConfig, end: Instant) -> Result<Vec<PeerLink>, MeshError> {
    let mut streams = BTreeMap::new();
    let mut last = None;
    let wanted = || cfg.peers.iter().flat_map(|(p, _)| (0..cfg.channels).map(move |c| (*p, c)));
    let total = wanted().count();
    while streams.len() < total {
        let left = end.saturating_duration_since(Instant::now());
        match rx.recv_timeout(left) {
            // A second stream for the same place replaces the first: its caller has given that one up.
            Ok(Outcome::Stream(peer, channel, stream)) => drop(streams.insert((peer, channel), stream)),
            Ok(Outcome::Refused(reason)) => last = Some(reason),
            Ok(Outcome::Fatal(e)) => return Err(e),
            Err(_) => {
                let missing = wanted().find(|key| !streams.contains_key(key)).map(|(p, _)| p);
                let peer = missing.unwrap_or(cfg.me);
                return Err(MeshError::Missing { peer, within: cfg.deadline, last });
            }
        }
    }
    let mut links = BTreeMap::<MemberId, Vec<TcpStream>>::new();
    for ((peer, _), stream) in streams {
        links.entry(peer).or_default().push(stream);
    }
    Ok(links.into_iter().map(|(peer, streams)| PeerLink { peer, streams }).collect())
}

/// Reads exactly one fixed structure, or fails at the deadline or when the mesh no longer needs it.
fn read<T: FromBytes>(stream: &mut TcpStream, end: Instant, stop: &AtomicBool) -> io::Result<T> {
    let mut bytes = vec![0; size_of::<T>()];
    let mut at = 0;
    while at < bytes.len() {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() || stop.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left.min(GLANCE)))?;
        match stream.read(bytes.get_mut(at..).unwrap_or(&mut [])) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => at += n,
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(e) => return Err(e),
        }
    }
    T::read_from_bytes(&bytes).map_err(|_| io::ErrorKind::InvalidData.into())
}

fn write(stream: &mut TcpStream, bytes: &[u8], end: Instant) -> io::Result<()> {
    let left = end.saturating_duration_since(Instant::now());
    stream.set_write_timeout(Some(left.max(Duration::from_millis(1))))?;
    stream.write_all(bytes)
}

fn ready(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    stream.set_nodelay(true)
}

pub(super) fn call(
    cfg: &MeshConfig,
    peer: MemberId,
    addr: SocketAddr,
    channel: u16,
    end: Instant,
    stop: &AtomicBool,
) -> Result<TcpStream, MeshError> {
    let unreachable = |source| MeshError::Unreachable { peer, addr, within: cfg.deadline, source };
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() || stop.load(Ordering::Relaxed) {
            return Err(unreachable(io::ErrorKind::TimedOut.into()));
        }
        let attempt = TcpStream::connect_timeout(&addr, left.min(Duration::from_secs(1)));
        let error = match attempt {
            Ok(mut stream) => match introduce(&mut stream, cfg, peer, channel, end, stop) {
                Ok(Ok(())) => return Ok(stream),
                Ok(Err(Some(reason))) => return Err(MeshError::Refused { peer, addr, reason }),
                Ok(Err(None)) => return Err(MeshError::Impostor { peer, addr }),
                Err(e) => e,
            },
            Err(e) => e,
        };
        // It may not be listening yet, or its backlog may be full.
        if end.saturating_duration_since(Instant::now()) <= RETRY {
            return Err(unreachable(error));
        }
        thread::sleep(RETRY);
    }
}

/// The caller's half. `Err(None)` inside: the listener can't prove that it knows the secret.
fn introduce(
    stream: &mut TcpStream,
    cfg: &MeshConfig,
    peer: MemberId,
    channel: u16,
    end: Instant,
    stop: &AtomicBool,
) -> io::Result<Result<(), Option<Refusal>>> {
    stream.set_nodelay(true)?;
    let hello = Hello {
        magic: MAGIC,
        version: VERSION.into(),
        from: cfg.me.0.into(),
        to: peer.0.into(),
        channel: channel.into(),
        epoch: cfg.epoch.0.into(),
        vm: vm_hash(&cfg.vm),
        nonce: rand::random(),
    };
    let secret = cfg.secret.as_deref().unwrap_or(&[]);
    write(stream, hello.as_bytes(), end)?;
    let reply: Reply = read(stream, end, stop)?;
    if reply.verdict != ACCEPTED {
        return Ok(Err(Some(Refusal::from_code(reply.verdict))));
    }
    if !proves(secret, b"listener", &hello, &reply.nonce, &reply.proof) {
        return Ok(Err(None));
    }
    write(stream, &proof(secret, b"caller", &hello, &reply.nonce), end)?;
    let verdict: u8 = read(stream, end, stop)?;
    if verdict != ACCEPTED {
        return Ok(Err(Some(Refusal::from_code(verdict))));
    }
    ready(stream)?;
    Ok(Ok(()))
}

fn accept(
    listener: &TcpListener,
    cfg: &MeshConfig,
    end: Instant,
    stop: &AtomicBool,
    tx: &mpsc::Sender<Outcome>,
) -> io::Result<()> {
    let busy = AtomicUsize::new(0);
    thread::scope(|scope| {
        while !stop.load(Ordering::Relaxed) && Instant::now() < end {
            if busy.load(Ordering::Relaxed) >= MAX_HANDSHAKES {
                thread::sleep(RETRY);
                continue;
            }
            let mut stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    thread::sleep(Duration::from_millis(2));
                    continue;
                }
                // A caller that went away before it was accepted, or a signal.
                Err(e)
                    if matches!(e.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted) =>
                {
                    continue;
                }
                Err(e) => return Err(e),
            };
            busy.fetch_add(1, Ordering::Relaxed);
            let (tx, busy) = (tx.clone(), &busy);
            scope.spawn(move || {
                let until = end.min(Instant::now() + STRANGER);
                let outcome = match receive(&mut stream, cfg, until, stop) {
                    Ok(Ok((peer, channel))) => Some(Outcome::Stream(peer, channel, stream)),
                    Ok(Err(reason)) => Some(Outcome::Refused(reason)),
                    Err(e) => {
                        tracing::debug!("a stranger called: {e}");
                        None
                    }
                };
                if let Some(outcome) = outcome {
                    let _ = tx.send(outcome);
                }
                busy.fetch_sub(1, Ordering::Relaxed);
            });
        }
        Ok(())
    })
}

/// The listener's half.
pub(super) fn receive(
    stream: &mut TcpStream,
    cfg: &MeshConfig,
    end: Instant,
    stop: &AtomicBool,
) -> io::Result<Result<(MemberId, u16), Refusal>> {
    // The listener does not block; some systems hand that down.
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    let hello: Hello = read(stream, end, stop)?;
    if hello.magic != MAGIC {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let secret = cfg.secret.as_deref().unwrap_or(&[]);
    let nonce: [u8; 32] = rand::random();
    let from = MemberId(hello.from.get());
    let channel = hello.channel.get();
    let expected = cfg.peers.iter().any(|(p, _)| *p == from && from > cfg.me);
    let refusal = if hello.version.get() != VERSION {
        Some(Refusal::Version)
    } else if hello.vm != vm_hash(&cfg.vm) {
        Some(Refusal::Vm)
    } else if hello.epoch.get() != cfg.epoch.0 {
        Some(Refusal::Epoch)
    } else if !expected || hello.to.get() != cfg.me.0 || channel >= cfg.channels {
        Some(Refusal::Unexpected)
    } else {
        None
    };
    if let Some(reason) = refusal {
        let reply = Reply { verdict: reason.code(), nonce: [0; 32], proof: [0; 32] };
        write(stream, reply.as_bytes(), end)?;
        return Ok(Err(reason));
    }
    let shown = proof(secret, b"listener", &hello, &nonce);
    write(stream, Reply { verdict: ACCEPTED, nonce, proof: shown }.as_bytes(), end)?;
    let answer: [u8; 32] = match read(stream, end, stop) {
        Ok(answer) => answer,
        // A caller with another secret hangs up here, because our proof does not convince it.
        Err(e) if matches!(e.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) => {
            return Ok(Err(Refusal::Secret));
        }
        Err(e) => return Err(e),
    };
    if !proves(secret, b"caller", &hello, &nonce, &answer) {
        write(stream, &[Refusal::Secret.code()], end)?;
        return Ok(Err(Refusal::Secret));
    }
    write(stream, &[ACCEPTED], end)?;
    ready(stream)?;
    Ok(Ok((from, channel)))
}

#[cfg(test)]
#[path = "mesh_tests.rs"]
mod tests;
