//! Starts member processes and gives them orders.

use super::peer::{Answer, Membership, Order, Own, Tuning, join};
use super::work::{Outcome, Work};
use super::{BenchError, io_step};
use crate::addr::{HomeRange, MemberId};
use crate::stats::DsmSnapshot;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// A process that does not connect within this time did not start.
const START: Duration = Duration::from_secs(20);

/// Makes the command that runs [`super::peer_main`] with an address.
pub type Launcher<'a> = &'a dyn Fn(SocketAddr) -> Command;

/// The launcher of a program that has a hidden subcommand for it: itself with `words` and the address.
pub fn self_launcher(words: &'static [&'static str]) -> io::Result<impl Fn(SocketAddr) -> Command> {
    let exe = std::env::current_exe()?;
    Ok(move |addr: SocketAddr| {
        let mut command = Command::new(&exe);
        command.args(words).arg(addr.to_string());
        command
    })
}

/// One member process.
#[derive(Debug)]
pub struct Peer {
    member: MemberId,
    child: Child,
    reader: BufReader<TcpStream>,
    writer: TcpStream,
}

impl Peer {
    fn launch(member: MemberId, launcher: Launcher<'_>) -> Result<Peer, BenchError> {
        let listener = TcpListener::bind("127.0.0.1:0").map_err(io_step("can't listen on loopback"))?;
        let addr = listener.local_addr().map_err(io_step("can't listen on loopback"))?;
        listener.set_nonblocking(true).map_err(io_step("can't listen on loopback"))?;
        let mut child = launcher(addr).stdin(Stdio::null()).spawn().map_err(BenchError::Spawn)?;
        let end = Instant::now() + START;
        let stream = loop {
            match listener.accept() {
                Ok((stream, _)) => break Ok(stream),
                Err(e) if e.kind() != io::ErrorKind::WouldBlock => break Err(e),
                Err(_) if matches!(child.try_wait(), Ok(Some(_))) => {
                    break Err(io::Error::other("the process ended at once"));
                }
                Err(_) if Instant::now() > end => break Err(io::ErrorKind::TimedOut.into()),
                Err(_) => thread::sleep(Duration::from_millis(2)),
            }
        };
        let opened = stream.and_then(|s| {
            s.set_nonblocking(false)?;
            s.set_nodelay(true)?;
            Ok((BufReader::new(s.try_clone()?), s))
        });
        match opened {
            Ok((reader, writer)) => Ok(Peer { member, child, reader, writer }),
            Err(source) => {
                // It may have ended already.
                let _ = child.kill();
                let _ = child.wait();
                Err(BenchError::Peer { member, source })
            }
        }
    }

    /// The member.
    pub fn member(&self) -> MemberId {
        self.member
    }

    /// The process's id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Gives an order without waiting for the answer.
    pub fn order(&mut self, order: &Order) -> Result<(), BenchError> {
        let member = self.member;
        let mut line = serde_json::to_string(order)
            .map_err(|e| BenchError::Peer { member, source: io::Error::other(e) })?;
        line.push('\n');
        self.writer.write_all(line.as_bytes()).map_err(|source| BenchError::Peer { member, source })
    }

    /// Waits for the answer to the oldest order that has none yet.
    pub fn answer(&mut self, deadline: Duration) -> Result<Answer, BenchError> {
        let member = self.member;
        let failed = |source| BenchError::Peer { member, source };
        self.writer.set_read_timeout(Some(deadline)).map_err(failed)?;
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            Ok(0) => return Err(failed(io::ErrorKind::UnexpectedEof.into())),
            Ok(_) => {}
            Err(e) => return Err(failed(e)),
        }
        match serde_json::from_str(&line).map_err(|e| failed(io::Error::other(e)))? {
            Answer::Error(what) => Err(BenchError::Work { member, what }),
            answer => Ok(answer),
        }
    }

    /// Gives an order and waits for its answer.
    pub fn ask(&mut self, order: &Order, deadline: Duration) -> Result<Answer, BenchError> {
        self.order(order)?;
        self.answer(deadline)
    }

    /// Ends the process at once, as a crash would.
    pub fn kill(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.order(&Order::Quit);
        let end = Instant::now() + Duration::from_secs(2);
        while Instant::now() < end {
            if matches!(self.child.try_wait(), Ok(Some(_)) | Err(_)) {
                return;
            }
            thread::sleep(Duration::from_millis(5));
        }
        self.kill();
    }
}

/// Members in processes of their own, and perhaps member 0 in this one.
#[derive(Debug)]
pub struct Group {
    /// Member 0, if it is this process.
    pub own: Option<Own>,
    /// The others, ascending.
    pub peers: Vec<Peer>,
}

impl Group {
    /// Starts a group with a process per address, at which it listens for the others.
    pub fn start_at(
        addrs: &[IpAddr],
        memory: &[HomeRange],
        tuning: Tuning,
        launcher: Launcher<'_>,
    ) -> Result<Group, BenchError> {
        let members = u16::try_from(addrs.len()).unwrap_or(u16::MAX);
        Group::start_with(members, false, &|m| addrs.get(usize::from(m.0)).copied(), memory, tuning, launcher)
    }

    /// Starts a group of `members` on this host; if `inside`, member 0 is in this process.
    pub fn start(
        members: u16,
        inside: bool,
        memory: &[HomeRange],
        tuning: Tuning,
        launcher: Launcher<'_>,
    ) -> Result<Group, BenchError> {
        Group::start_with(members, inside, &|_| None, memory, tuning, launcher)
    }

    /// A member to which `at` gives no address listens on loopback.
    fn start_with(
        members: u16,
        inside: bool,
        at: &dyn Fn(MemberId) -> Option<IpAddr>,
        memory: &[HomeRange],
        tuning: Tuning,
        launcher: Launcher<'_>,
    ) -> Result<Group, BenchError> {
        crate::region::probe()?;
        let first = u16::from(inside);
        let mut peers = Vec::new();
        let mut addrs = Vec::new();
        let listener = TcpListener::bind("127.0.0.1:0").map_err(io_step("can't listen on loopback"))?;
        if inside {
            addrs.push(listener.local_addr().map_err(io_step("can't listen on loopback"))?);
        }
        for id in first..members {
            let mut peer = Peer::launch(MemberId(id), launcher)?;
            let at = at(peer.member).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
            match peer.ask(&Order::Listen(at), START)? {
                Answer::Listening(addr) => addrs.push(addr),
                _ => return Err(BenchError::Answer(peer.member)),
            }
            peers.push(peer);
        }
        let membership = |me| Membership { me, addrs: addrs.clone(), memory: memory.to_vec(), tuning };
        for peer in &mut peers {
            let order = Order::Join(membership(peer.member));
            peer.order(&order)?;
        }
        let own = if inside { Some(join(listener, &membership(MemberId(0)))?) } else { None };
        for peer in &mut peers {
            peer.answer(START)?;
        }
        Ok(Group { own, peers })
    }

    /// Gives each process its order at once, then waits for all. The answers are in the order of the processes.
    pub fn all(
        &mut self,
        work: impl Fn(MemberId) -> Work,
        deadline: Duration,
    ) -> Result<Vec<Outcome>, BenchError> {
        for peer in &mut self.peers {
            let order = Order::Work(work(peer.member));
            peer.order(&order)?;
        }
        let end = Instant::now() + deadline;
        let mut outcomes = Vec::new();
        for peer in &mut self.peers {
            let left = end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            match peer.answer(left)? {
                Answer::Outcome(outcome) => outcomes.push(outcome),
                _ => return Err(BenchError::Answer(peer.member)),
            }
        }
        Ok(outcomes)
    }

    /// The counters of every process.
    pub fn snapshots(&mut self) -> Result<Vec<DsmSnapshot>, BenchError> {
        let mut snapshots = Vec::new();
        for peer in &mut self.peers {
            match peer.ask(&Order::Snapshot, START)? {
                Answer::Snapshot(snapshot) => snapshots.push(*snapshot),
                _ => return Err(BenchError::Answer(peer.member)),
            }
        }
        Ok(snapshots)
    }
}
