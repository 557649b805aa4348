//! What crosses members besides pages: interrupts, device accesses, queue notifies, clock samples, signs of life.
//!
//! Channel 1 of the mesh, one stream per peer. [`wire`] is the messages, `link` the sending half (never
//! waits), [`requests`] the accesses that wait for an answer. Per peer one receive thread, which carries
//! messages out through [`Handler`], and one writer thread, which sleeps unless the socket is full; one
//! thread in all for heartbeats and clock samples. A stream that breaks is made again within the grace time, if there is one
//! ([`resume`]), and nothing is lost or done twice.

mod link;
pub mod requests;
mod resume;
#[cfg(test)]
mod tests;
pub mod wire;

use crate::devices::Space;
use crate::interrupts::InterruptMessage;
use crate::time::filter::Sample;
use arc_swap::ArcSwapOption;
use dsm::addr::{Epoch, MAX_MEMBERS, MemberId};
use dsm::node::Reconnect;
use link::Link;
use requests::{NoAnswer, Requests};
use std::io;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use wire::{Message, StopReason, VcpuGroup};
use zerocopy::IntoBytes;

/// Between clock samples once the clock is known, and between looks at the peers' signs of life.
const TICK: Duration = Duration::from_millis(100);
/// Between clock samples until then.
const FAST_TICK: Duration = Duration::from_millis(2);

/// Received bytes after which the peer is told at the latest.
const TELL: u64 = 256 << 10;

/// What the fabric's threads do with what comes. None of it may wait for a peer.
pub trait Handler: Send + Sync {
    /// For these vCPUs, which the sender takes to be here.
    fn interrupt(&self, message: InterruptMessage, group: VcpuGroup, hops: u16);
    /// A vCPU comes from a peer.
    fn image(&self, peer: MemberId, image: &[u8]);
    /// A vCPU that left for a peer is set up there.
    fn moved(&self, peer: MemberId, token: u64, vcpu: u32);
    /// Of a device here; all ones where none is.
    fn read(&self, space: Space, addr: u64, data: &mut [u8]);
    /// To a device here.
    fn write(&self, space: Space, addr: u64, data: &[u8]);
    /// To the IOAPIC, which is here.
    fn set_level(&self, gsi: u32, high: bool);
    /// To the IOAPIC, which is here.
    fn end_of_interrupt(&self, vector: u8);
    /// The members' common clock, in the guest's ticks, as this member has it.
    fn guest_tsc(&self) -> u64;
    /// This host's TSC in the guest's units.
    fn host_clock(&self) -> u64;
    /// An answered clock sample.
    fn clock_sample(&self, sample: Sample);
    /// Time to correct the clock, if it is off. May take a millisecond.
    fn steer_clock(&self);
    /// The clock is known well enough for samples at leisure.
    fn clock_is_settled(&self) -> bool;
    /// A peer ends the VM.
    fn stopped(&self, peer: MemberId, reason: StopReason);
    /// A peer is gone or misbehaves. At most once per peer.
    fn peer_lost(&self, peer: MemberId, reason: String);
}

/// Why an access to another member's device failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AccessError {
    /// The member does not exist.
    #[error("there is no {0}")]
    NoMember(MemberId),
    /// No answer in time.
    #[error("{peer} did not answer an access to {addr:#x} within {within:?}")]
    TimedOut {
        /// Who.
        peer: MemberId,
        /// Which register.
        addr: u64,
        /// The deadline.
        within: Duration,
    },
    /// The VM is ending.
    #[error("{0}")]
    Cancelled(String),
}

/// A member's links to all others.
#[derive(Debug)]
pub struct Fabric {
    me: MemberId,
    epoch: Epoch,
    deadline: Duration,
    reconnect: Option<Reconnect>,
    /// By member: peers come and go.
    links: Vec<ArcSwapOption<Link>>,
    /// The thread for heartbeats and clock samples has been started.
    ticks: AtomicBool,
    requests: Requests,
    started: Instant,
    /// The links that broke before a handler was there, or in `send`; reported by the tick thread.
    broken: Mutex<Vec<(MemberId, String)>>,
    ending: AtomicBool,
    wake: Condvar,
    wake_lock: Mutex<()>,
    /// Messages to peers.
    pub sent: AtomicU64,
    /// Messages from peers.
    pub received: AtomicU64,
    traffic: Traffic,
    /// Number of the member whose clock all follow.
    leader: AtomicU16,
    /// Peers that are no members (yet, or any more), one bit each: nothing of the guest goes to them, and that they go is no
    /// news.
    strangers: AtomicU64,
}

/// Messages that can change the guest (all but clock samples and signs of life), for [`Fabric::traffic`].
#[derive(Debug, Default)]
struct Traffic {
    sent: AtomicU64,
    /// Counted when the message has been carried out, and with it whatever it caused has been sent.
    done: AtomicU64,
}

impl Fabric {
    /// Takes the streams over; nothing is received before [`Fabric::start`]. `deadline` is the longest silence
    /// of a peer and, without `reconnect`, the longest wait for an answer; with it a broken stream is looked for again, and the
    /// wait is as much longer.
    ///
    /// # Errors
    /// A socket option can't be set.
    pub fn new(
        me: MemberId,
        epoch: Epoch,
        deadline: Duration,
        reconnect: Option<Reconnect>,
        streams: Vec<(MemberId, TcpStream)>,
    ) -> io::Result<Fabric> {
        let links: Vec<_> = (0..MAX_MEMBERS).map(|_| ArcSwapOption::empty()).collect();
        for (peer, stream) in streams {
            let link = Link::new(peer, stream, reconnect.is_some())?;
            let slot = links.get(usize::from(peer.0)).ok_or(io::ErrorKind::InvalidInput)?;
            slot.store(Some(Arc::new(link)));
        }
        Ok(Fabric {
            me,
            epoch,
            deadline,
            reconnect,
            links,
            ticks: AtomicBool::new(false),
            requests: Requests::default(),
            started: Instant::now(),
            broken: Mutex::default(),
            ending: AtomicBool::new(false),
            wake: Condvar::new(),
            wake_lock: Mutex::new(()),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            traffic: Traffic::default(),
            leader: AtomicU16::new(0),
            strangers: AtomicU64::new(0),
        })
    }

    /// Starts the threads; they end after [`Fabric::close`].
    ///
    /// # Errors
    /// A thread can't be had.
    pub fn start<H: Handler + 'static>(
        self: &Arc<Fabric>,
        handler: &Arc<H>,
    ) -> io::Result<Vec<JoinHandle<()>>> {
        let mut threads = Vec::new();
        for link in self.links() {
            self.serve(&link, handler, &mut threads)?;
        }
        Ok(threads)
    }

    /// Starts the threads of a link, and the one for all links if it is the first.
    fn serve<H: Handler + 'static>(
        self: &Arc<Fabric>,
        link: &Arc<Link>,
        handler: &Arc<H>,
        threads: &mut Vec<JoinHandle<()>>,
    ) -> io::Result<()> {
        for (name, run) in [("recv", Fabric::receive as fn(&Fabric, &Link, &H)), ("send", Fabric::drain)] {
            let (fabric, link, handler) = (self.clone(), link.clone(), handler.clone());
            let builder = thread::Builder::new().name(format!("fabric-{name}-{}", link.peer.0));
            threads.push(builder.spawn(move || {
                dsm::priority::raise();
                run(&fabric, &link, &*handler);
            })?);
        }
        if !self.ticks.swap(true, Ordering::SeqCst) {
            let (fabric, handler) = (self.clone(), handler.clone());
            let tick = thread::Builder::new().name("fabric-tick".into());
            threads.push(tick.spawn(move || {
                dsm::priority::raise();
                fabric.tick(&*handler);
            })?);
        }
        Ok(())
    }

    /// There is a stream to somebody who is to become a member ([`Fabric::set_members`]); until then nothing of the guest
    /// goes there, and what happens to it harms nobody. Returns the threads that serve it.
    ///
    /// # Errors
    /// It is a member, or can't be one; or no thread can be had.
    pub fn admit<H: Handler + 'static>(
        self: &Arc<Fabric>,
        peer: MemberId,
        stream: TcpStream,
        handler: &Arc<H>,
    ) -> io::Result<Vec<JoinHandle<()>>> {
        let known = peer == self.me || self.peers().any(|member| member == peer);
        let slot = self.links.get(usize::from(peer.0)).filter(|_| !known);
        let slot = slot.ok_or_else(|| io::Error::other(format!("{peer} is a member, or can't be one")))?;
        let link = Arc::new(Link::new(peer, stream, self.reconnect.is_some())?);
        link.heard(self.now_ms());
        self.strangers.fetch_or(1 << (peer.0 % 64), Ordering::SeqCst);
        if let Some(old) = slot.swap(Some(link.clone())) {
            old.set_leaving();
            old.close();
        }
        let mut threads = Vec::new();
        self.serve(&link, handler, &mut threads)?;
        Ok(threads)
    }

    fn links(&self) -> impl Iterator<Item = Arc<Link>> {
        self.links.iter().filter_map(ArcSwapOption::load_full)
    }

    fn link(&self, peer: MemberId) -> Option<Arc<Link>> {
        self.links.get(usize::from(peer.0))?.load_full()
    }

    /// A peer sent what no member of ours sends: its link is cut, and it is reported lost.
    pub fn cut_off(&self, peer: MemberId, what: &str) {
        if let Some(link) = self.link(peer) {
            self.check(&link, Err(format!("it sent nonsense: {what}")));
        }
    }

    /// The member whose clock all others follow; member 0 unless somebody says otherwise. True if it was another before.
    pub fn set_leader(&self, leader: MemberId) -> bool {
        self.leader.swap(leader.0, Ordering::SeqCst) != leader.0
    }

    fn leader(&self) -> MemberId {
        MemberId(self.leader.load(Ordering::SeqCst))
    }

    /// This member.
    pub fn me(&self) -> MemberId {
        self.me
    }

    /// The other members.
    pub fn peers(&self) -> impl Iterator<Item = MemberId> + '_ {
        self.links().map(|l| l.peer).filter(|peer| !self.is_stranger(*peer))
    }

    fn is_stranger(&self, peer: MemberId) -> bool {
        self.strangers.load(Ordering::SeqCst) >> (peer.0 % 64) & 1 != 0
    }

    /// Which peers are members from now on. To be said at all members, while the VM is paused.
    pub fn set_members(&self, is_member: impl Fn(MemberId) -> bool) {
        // To who is no member all are strangers.
        let strangers = self.links().map(|l| l.peer).filter(|peer| !is_member(*peer) || !is_member(self.me));
        let bits = strangers.fold(0, |bits, peer| bits | 1 << (peer.0 % 64));
        self.strangers.store(bits, Ordering::SeqCst);
        // Nothing is under way, at any member: all begin anew, or the sums would lack what a member that has left counted.
        self.traffic.sent.store(0, Ordering::SeqCst);
        self.traffic.done.store(0, Ordering::SeqCst);
    }

    /// Ends the link to a peer that is no member.
    pub fn part(&self, peer: MemberId) {
        if let Some(link) = self.link(peer).filter(|_| self.is_stranger(peer)) {
            link.set_leaving();
            link.close();
        }
    }

    /// The member after this one, in a ring of all.
    pub fn next_member(&self) -> Option<MemberId> {
        self.peers().filter(|peer| *peer > self.me).min().or_else(|| self.peers().min())
    }

    /// The link for one message more, if there is one; what is for the guest goes to members only.
    fn way(&self, to: MemberId, is_for_the_guest: bool) -> Option<Arc<Link>> {
        let link = self.link(to)?;
        if is_for_the_guest {
            if self.is_stranger(to) {
                return None;
            }
            self.traffic.sent.fetch_add(1, Ordering::SeqCst);
        }
        self.sent.fetch_add(1, Ordering::Relaxed);
        Some(link)
    }

    /// Sends to one member. A broken link is reported through the handler, not here.
    pub fn send(&self, to: MemberId, message: &Message) {
        let Some(link) = self.way(to, message.is_for_the_guest()) else { return };
        self.check(&link, link.send(message.encode(self.me, self.epoch).as_bytes()));
    }

    /// As [`Fabric::send`], in order with it, but by another thread.
    pub fn send_later(&self, to: MemberId, message: &Message) {
        let Some(link) = self.way(to, message.is_for_the_guest()) else { return };
        self.check(&link, link.send_later(message.encode(self.me, self.epoch).as_bytes()));
    }

    /// Sends a vCPU to one member, as [`Fabric::send`] sends messages, and in order with them.
    pub fn send_image(&self, to: MemberId, image: &[u8]) {
        let Ok(len) = u32::try_from(image.len()) else { return };
        let Some(link) = self.way(to, true) else { return };
        let mut bytes = Message::Image { len }.encode(self.me, self.epoch).as_bytes().to_vec();
        bytes.extend(image);
        self.check(&link, link.send(&bytes));
    }

    fn check(&self, link: &Link, sent: Result<(), String>) {
        if let Err(reason) = sent {
            // Of one that said so, or that is known to be gone, it is no news.
            let expected = link.is_leaving();
            link.close();
            if expected {
                return;
            }
            self.broken.lock().unwrap_or_else(PoisonError::into_inner).push((link.peer, reason));
            self.wake.notify_all();
        }
    }

    /// How many messages that can change the guest were sent to peers, and how many from peers have been carried out.
    /// When nothing in the VM produces any, and the sums over all members are equal and stay so from one look to the
    /// next, then none is under way (Mattern 1987, four-counter method).
    pub fn traffic(&self) -> (u64, u64) {
        let done = self.traffic.done.load(Ordering::SeqCst);
        (self.traffic.sent.load(Ordering::SeqCst), done)
    }

    /// Sends to all members.
    pub fn send_all(&self, message: &Message) {
        self.links().for_each(|l| self.send(l.peer, message));
    }

    /// Reads from a device of `to`; waits for the answer.
    ///
    /// # Errors
    /// No answer.
    pub fn read(&self, to: MemberId, space: Space, addr: u64, data: &mut [u8]) -> Result<(), AccessError> {
        let size = u8::try_from(data.len()).unwrap_or(0);
        let value = self.ask(to, addr, |token| Message::Read { token, space, addr, size })?;
        data.iter_mut().zip(value.to_le_bytes()).for_each(|(to, from)| *to = from);
        Ok(())
    }

    /// Writes to a device of `to`; waits until it is done unless `posted`. Writes of one thread keep their order.
    ///
    /// # Errors
    /// No answer; never for a posted write.
    pub fn write(
        &self,
        to: MemberId,
        space: Space,
        addr: u64,
        bytes: &[u8],
        posted: bool,
    ) -> Result<(), AccessError> {
        let size = u8::try_from(bytes.len()).unwrap_or(0);
        let mut data = [0; 8];
        data.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        let data = u64::from_le_bytes(data);
        if posted {
            self.send(to, &Message::Write { token: None, space, addr, size, data });
            return Ok(());
        }
        self.ask(to, addr, |token| Message::Write { token: Some(token), space, addr, size, data }).map(|_| ())
    }

    fn ask(&self, to: MemberId, addr: u64, message: impl Fn(u64) -> Message) -> Result<u64, AccessError> {
        if !self.peers().any(|p| p == to) {
            return Err(AccessError::NoMember(to));
        }
        let token = self.requests.open(to);
        self.send(to, &message(token));
        let within = self.deadline + self.grace();
        self.requests.wait(token, within).map_err(|e| match e {
            NoAnswer::TimedOut => AccessError::TimedOut { peer: to, addr, within },
            NoAnswer::Cancelled(reason) => AccessError::Cancelled(reason),
        })
    }

    fn grace(&self) -> Duration {
        self.reconnect.as_ref().map_or(Duration::ZERO, |r| r.grace)
    }

    /// How often streams to peers that broke were made again.
    pub fn reconnects(&self) -> u64 {
        self.links().map(|link| link.resumed()).sum()
    }

    /// Lets all accesses go that wait for an answer.
    pub fn cancel(&self, reason: &str) {
        self.requests.cancel(reason);
    }

    /// The VM is over here: from now on peers may leave. Links stay open for messages under way.
    pub fn expect_end(&self) {
        self.ending.store(true, Ordering::SeqCst);
    }

    /// True when a peer is gone or has said that it ends.
    pub fn any_leaving(&self) -> bool {
        self.links().any(|link| link.is_leaving())
    }

    /// True when every peer has said that it ends, or is gone.
    pub fn all_leaving(&self) -> bool {
        self.links().all(|link| link.is_leaving())
    }

    /// Ends all threads.
    pub fn close(&self) {
        self.expect_end();
        self.requests.cancel("the VM is over");
        self.links().for_each(|link| link.close());
        self.wake.notify_all();
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn lost<H: Handler>(&self, link: &Link, reason: String, handler: &H) {
        let expected = link.is_leaving() || self.is_stranger(link.peer) || self.ending.load(Ordering::SeqCst);
        link.close();
        if !expected {
            handler.peer_lost(link.peer, reason);
        }
    }

    fn drain<H: Handler>(&self, link: &Link, handler: &H) {
        if let Err(reason) = link.drain(self.deadline) {
            self.lost(link, reason, handler);
        }
    }

    fn carry_out<H: Handler>(&self, link: &Link, message: Message, handler: &H) {
        match message {
            Message::Interrupt { message, group, hops } => handler.interrupt(message, group, hops),
            // Its bytes are taken off the stream, and the message carried out, by `receive_all`.
            Message::Image { .. } => {}
            Message::Moved { token, vcpu } => handler.moved(link.peer, token, vcpu),
            Message::Read { token, space, addr, size } => {
                let mut data = [0; 8];
                if let Some(data) = data.get_mut(..usize::from(size)) {
                    handler.read(space, addr, data);
                }
                self.send(link.peer, &Message::Done { token, data: u64::from_le_bytes(data) });
            }
            Message::Write { token, space, addr, size, data } => {
                if let Some(bytes) = data.to_le_bytes().get(..usize::from(size)) {
                    handler.write(space, addr, bytes);
                }
                if let Some(token) = token {
                    self.send(link.peer, &Message::Done { token, data: 0 });
                }
            }
            Message::Done { token, data } => self.requests.complete(link.peer, token, data),
            Message::SetLevel { gsi, high } => handler.set_level(gsi, high),
            Message::Eoi { vector } => handler.end_of_interrupt(vector),
            Message::Ping { sent } => {
                let received = handler.guest_tsc();
                let answered = handler.guest_tsc();
                self.send(link.peer, &Message::Pong { sent, received, answered });
            }
            // Of one that led before.
            Message::Pong { .. } if link.peer != self.leader() => {}
            // One that waited for a new stream says nothing, and many of them would crowd out those that do.
            Message::Pong { sent, .. } if sent < link.since.load(Ordering::Relaxed) => {}
            Message::Pong { sent, received, answered } => handler.clock_sample(Sample {
                sent,
                remote_received: received,
                remote_sent: answered,
                received: handler.host_clock(),
            }),
            // Looked at by `receive_all`.
            Message::Heartbeat { .. } => {}
            Message::Stop(_) if self.is_stranger(link.peer) => link.set_leaving(),
            Message::Stop(reason) => {
                link.set_leaving();
                handler.stopped(link.peer, reason);
            }
        }
    }

    /// Heartbeats, clock samples, and who has been silent for too long.
    fn tick<H: Handler>(&self, handler: &H) {
        let limit = u64::try_from(self.deadline.as_millis()).unwrap_or(u64::MAX);
        let mut last_beat = None;
        loop {
            if self.all_leaving() && self.ending.load(Ordering::SeqCst) {
                return;
            }
            let leader = self.leader();
            let pause = if self.me == leader || handler.clock_is_settled() { TICK } else { FAST_TICK };
            let guard = self.wake_lock.lock().unwrap_or_else(PoisonError::into_inner);
            let woken = self.wake.wait_timeout(guard, pause);
            drop(woken);
            let broken = std::mem::take(&mut *self.broken.lock().unwrap_or_else(PoisonError::into_inner));
            for (peer, reason) in broken {
                if !self.ending.load(Ordering::SeqCst) && !self.is_stranger(peer) {
                    handler.peer_lost(peer, reason);
                }
            }
            if self.me != leader {
                handler.steer_clock();
                self.send(leader, &Message::Ping { sent: handler.host_clock() });
            }
            if last_beat.is_none_or(|at: Instant| at.elapsed() >= TICK) {
                self.links().for_each(|link| self.beat(&link));
                last_beat = Some(Instant::now());
            }
            let now = self.now_ms();
            for link in self.links().filter(|l| !l.is_leaving() && !l.is_broken()) {
                if now.saturating_sub(link.heard_ms.load(Ordering::Relaxed)) <= limit {
                    continue;
                }
                if link.keeps() {
                    // Half open, perhaps.
                    link.give_up();
                } else {
                    self.lost(&link, format!("nothing was heard from it for {:?}", self.deadline), handler);
                }
            }
        }
    }

    /// Tells a peer that this member lives and how much has come from it.
    fn beat(&self, link: &Link) {
        self.send(link.peer, &Message::Heartbeat { received: link.tell_received() });
    }
}
