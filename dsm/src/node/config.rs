//! What a member needs to know to start.

use super::DsmError;
use crate::addr::{Epoch, HomeRange, MAX_MEMBERS, MemberId};
use crate::protocol::MemberSet;
pub use crate::protocol::hold::HoldConfig;
use std::fmt;
use std::io;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Makes a new connection to a member, authenticated as the first one was, by the given time.
pub type Redialer = dyn Fn(MemberId, Instant) -> io::Result<TcpStream> + Send + Sync;

/// What to do about a connection that broke.
#[derive(Clone)]
pub struct Reconnect {
    /// After so much time without one the peer is dead.
    pub grace: Duration,
    /// Makes a new one. Called by one thread per peer that is missed.
    pub redial: Arc<Redialer>,
}

impl fmt::Debug for Reconnect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reconnect").field("grace", &self.grace).finish_non_exhaustive()
    }
}

/// One member's view of the shared memory.
#[derive(Clone, Debug)]
pub struct DsmConfig {
    /// This member.
    pub me: MemberId,
    /// All members, this one included.
    pub members: Vec<MemberId>,
    /// Number of the topology.
    pub epoch: Epoch,
    /// The memory, in ascending order of address.
    pub memory: Vec<HomeRange>,
    /// How long a page is kept before it is given up.
    pub hold: HoldConfig,
    /// Number of userfaultfds, each with its thread; at least 1.
    pub shards: usize,
    /// A peer that says nothing, or takes nothing, for this long is dead.
    pub deadline: Duration,
    /// How a connection that broke is made again, and for how long that is tried; the memory stands still meanwhile. `None`
    /// takes every broken connection for a dead peer.
    pub reconnect: Option<Reconnect>,
    /// Pages that the first touch of a page homed here brings along, 1 to 64.
    pub first_touch: u32,
    /// Bytes of the memory that this member keeps; more goes back to where it is homed. `None` for all of it. The budgets of
    /// all members together must hold the memory, with a few percent to spare, and each what is homed with it.
    pub budget: Option<u64>,
    /// Whether a receive thread may look for what a quick peer says next, for up to 100 us, instead of sleeping until it comes.
    pub busy_poll: bool,
    /// How many of the last faults are remembered for [`super::Dsm::take_fault_log`]; 0 for none.
    pub fault_log: usize,
}

impl DsmConfig {
    /// A configuration with defaults for everything that has one.
    pub fn new(me: MemberId, members: Vec<MemberId>, epoch: Epoch, memory: Vec<HomeRange>) -> DsmConfig {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        DsmConfig {
            me,
            members,
            epoch,
            memory,
            hold: HoldConfig::default(),
            shards: (cpus / 4).clamp(1, 8),
            deadline: Duration::from_secs(10),
            reconnect: None,
            first_touch: 8,
            budget: None,
            busy_poll: true,
            fault_log: 0,
        }
    }

    pub(super) fn member_set(&self) -> Result<MemberSet, DsmError> {
        let mut set = MemberSet::EMPTY;
        for member in &self.members {
            if usize::from(member.0) >= MAX_MEMBERS || set.has(*member) {
                return Err(DsmError::Members(*member));
            }
            set = set.with(*member);
        }
        for needed in self.memory.iter().map(|r| r.home).chain([self.me]) {
            if !set.has(needed) {
                return Err(DsmError::Members(needed));
            }
        }
        Ok(set)
    }
}
