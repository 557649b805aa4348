//! Who is in the VM and what lives where: the table that every member has, numbered by its epoch.

use dsm::addr::{Epoch, HomeRange, MemberId};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// One member of the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberDesc {
    /// Its number; equals its index in [`Topology::members`].
    pub id: MemberId,
    /// Name of its host, for people.
    pub host: String,
    /// Where its peers connect for pages and interrupts.
    pub addr: SocketAddr,
}

/// Members, homes and vCPU placement of a VM at one epoch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// Number of this topology.
    pub epoch: Epoch,
    /// All members, by number.
    pub members: Vec<MemberDesc>,
    /// Member of each vCPU; the index is the vCPU's id and its APIC id.
    pub vcpus: Vec<MemberId>,
    /// All RAM in ascending order; a member is a NUMA node and its node's memory is what has its home there.
    pub memory: Vec<HomeRange>,
    /// Distances between members for the SLIT: `distances[from][to]`, 10 = local.
    pub distances: Vec<Vec<u8>>,
}

impl Topology {
    /// The member on which a vCPU lives, or `None` for an id that the VM does not have.
    pub fn member_of(&self, vcpu: u32) -> Option<MemberId> {
        self.vcpus.get(usize::try_from(vcpu).ok()?).copied()
    }

    /// The vCPUs that live on `member`, ascending.
    pub fn vcpus_of(&self, member: MemberId) -> impl Iterator<Item = u32> + '_ {
        (0u32..).zip(&self.vcpus).filter(move |(_, m)| **m == member).map(|(id, _)| id)
    }
}
