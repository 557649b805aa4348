//! The streams to a member's peers: how they are made, and made again.

use super::plan::MemberPlan;
use super::runtime::MemberError;
use dsm::addr::MemberId;
use dsm::node::Reconnect;
use dsm::transport::mesh::{MeshConfig, connect};
use dsm::transport::redial::Redial;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Channel of the mesh for pages.
const PAGES: u16 = 0;
/// Channel of the mesh for everything else.
const FABRIC: u16 = 1;
/// Between two attempts to meet somebody.
const RETRY: Duration = Duration::from_millis(20);

/// A stream to every peer for pages, and one for the fabric.
#[derive(Debug, Default)]
pub(super) struct Peers {
    pub pages: Vec<(MemberId, TcpStream)>,
    pub fabric: Vec<(MemberId, TcpStream)>,
    door: Option<Door>,
}

/// Where peers that return, and new ones, are met.
#[derive(Clone, Debug)]
pub(super) struct Door {
    grace: Duration,
    redial: Arc<Redial>,
}

impl Door {
    /// Two streams, for pages and for the fabric, to or from somebody who is to become a member.
    ///
    /// # Errors
    /// It is not there by `end`.
    pub fn meet(&self, peer: MemberId, addr: SocketAddr, end: Instant) -> io::Result<(TcpStream, TcpStream)> {
        self.redial.meet(peer, addr);
        Ok((self.stream(peer, PAGES, end)?, self.stream(peer, FABRIC, end)?))
    }

    fn stream(&self, peer: MemberId, channel: u16, end: Instant) -> io::Result<TcpStream> {
        loop {
            match self.redial.stream(peer, channel, end) {
                Err(_) if self.redial.knows(peer) && Instant::now() < end => std::thread::sleep(RETRY),
                done => return done,
            }
        }
    }

    /// It is no peer any more: who waits for it gives up.
    pub fn part(&self, peer: MemberId) {
        self.redial.part(peer);
    }
}

impl Peers {
    /// Connects to all of them. The port stays open afterwards.
    ///
    /// # Errors
    /// Who is missing.
    pub fn connect(plan: &MemberPlan, listener: TcpListener) -> Result<Peers, MemberError> {
        let others = plan.topology.members.iter().filter(|m| m.id != plan.me);
        let peers: Vec<_> = others.map(|m| (m.id, m.addr)).collect();
        let mut all = Peers::default();
        let mesh = MeshConfig {
            me: plan.me,
            vm: plan.vm.clone(),
            epoch: plan.topology.epoch,
            peers,
            secret: plan.secret.clone(),
            deadline: plan.deadline,
            channels: 2,
        };
        let port = || Redial::new(listener.try_clone()?, mesh.clone());
        let redial = port()
            .map_err(|source| MemberError::Start { what: "a socket for peers that come later", source })?;
        all.door =
            Some(Door { grace: Duration::from_secs(plan.pages.reconnect_s), redial: Arc::new(redial) });
        for link in connect(listener, &mesh)? {
            let mut streams = link.streams.into_iter();
            let (Some(a), Some(b)) = (streams.next(), streams.next()) else {
                return Err(MemberError::Plan(format!("{} has no two links", link.peer)));
            };
            all.pages.push((link.peer, a));
            all.fabric.push((link.peer, b));
        }
        Ok(all)
    }

    fn reconnect(&self, channel: u16) -> Option<Reconnect> {
        let Door { grace, redial } = self.door.clone().filter(|door| !door.grace.is_zero())?;
        Some(Reconnect { grace, redial: Arc::new(move |peer, end| redial.stream(peer, channel, end)) })
    }

    /// How page streams that break are made again, if they are.
    pub fn pages_again(&self) -> Option<Reconnect> {
        self.reconnect(PAGES)
    }

    /// Where members that come later are met.
    pub fn door(&self) -> Option<Door> {
        self.door.clone()
    }

    /// The same for the fabric's.
    pub fn fabric_again(&self) -> Option<Reconnect> {
        self.reconnect(FABRIC)
    }
}
