//! The streams to a member's peers: how they are made, and made again.

use super::plan::MemberPlan;
use super::runtime::MemberError;
use dsm::addr::MemberId;
use dsm::node::Reconnect;
use dsm::transport::mesh::{MeshConfig, connect};
use dsm::transport::redial::Redial;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

/// Channel of the mesh for pages.
const PAGES: u16 = 0;
/// Channel of the mesh for everything else.
const FABRIC: u16 = 1;

/// A stream to every peer for pages, and one for the fabric.
#[derive(Debug, Default)]
pub(super) struct Peers {
    pub pages: Vec<(MemberId, TcpStream)>,
    pub fabric: Vec<(MemberId, TcpStream)>,
    redial: Option<(Duration, Arc<Redial>)>,
}

impl Peers {
    /// Connects to all of them. If the plan says so the port stays open afterwards.
    ///
    /// # Errors
    /// Who is missing.
    pub fn connect(plan: &MemberPlan, listener: TcpListener) -> Result<Peers, MemberError> {
        let others = plan.topology.members.iter().filter(|m| m.id != plan.me);
        let peers: Vec<_> = others.map(|m| (m.id, m.addr)).collect();
        let mut all = Peers::default();
        if peers.is_empty() {
            return Ok(all);
        }
        let mesh = MeshConfig {
            me: plan.me,
            vm: plan.vm.clone(),
            epoch: plan.topology.epoch,
            peers,
            secret: plan.secret.clone(),
            deadline: plan.deadline,
            channels: 2,
        };
        let grace = Duration::from_secs(plan.pages.reconnect_s);
        if !grace.is_zero() {
            let port = || Redial::new(listener.try_clone()?, mesh.clone());
            let redial = port()
                .map_err(|source| MemberError::Start { what: "a socket for peers that return", source })?;
            all.redial = Some((grace, Arc::new(redial)));
        }
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
        let (grace, redial) = self.redial.clone()?;
        Some(Reconnect { grace, redial: Arc::new(move |peer, end| redial.stream(peer, channel, end)) })
    }

    /// How page streams that break are made again, if they are.
    pub fn pages_again(&self) -> Option<Reconnect> {
        self.reconnect(PAGES)
    }

    /// The same for the fabric's.
    pub fn fabric_again(&self) -> Option<Reconnect> {
        self.reconnect(FABRIC)
    }
}
