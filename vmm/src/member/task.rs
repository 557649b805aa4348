//! What the coordinator asks of a running member. Each task is answered, in bounded time.

use super::travel::Departed;
use dsm::addr::MemberId;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// A task of a running member.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum MemberTask {
    /// See [`super::Member::pause`]. Answer: `Paused`.
    Pause {
        /// Longest time it may take.
        limit: Duration,
    },
    /// See [`super::Member::expect`]. Answer: `Done`.
    Expect {
        /// The vCPUs.
        vcpus: Vec<u32>,
    },
    /// See [`super::Member::depart`]. Answer: `Departed`.
    Depart {
        /// The vCPUs.
        vcpus: Vec<u32>,
        /// Where to.
        to: MemberId,
        /// Placement epoch; this one and the next.
        epoch: u64,
        /// Longest time it may take.
        limit: Duration,
    },
    /// See [`super::Member::placed`]. Answer: `Downtimes`.
    Placed {
        /// vCPU, member, epoch.
        places: Vec<(u32, MemberId, u64)>,
    },
    /// See [`super::Member::traffic`]. Answer: `Traffic`.
    Traffic,
    /// What is the members' common clock? Answer: `Clock`.
    Clock,
    /// See [`super::Member::resume`]. Answer: `Done`.
    Resume {
        /// Ticks for which the VM has been paused in all, since its start.
        stopped: u64,
    },
}

/// The answer to a [`MemberTask`] that worked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum MemberReply {
    /// It is done.
    Done,
    /// The member is quiet.
    Paused {
        /// The members' common clock when it was, in the guest's ticks; `None` where the guest's time can't be stopped.
        clock: Option<u64>,
    },
    /// How each departure went.
    Departed(Vec<(u32, Departed)>),
    /// vCPU, and nanoseconds for which the guest did not have it when it came here.
    Downtimes(Vec<(u32, u64)>),
    /// Messages that can change the guest.
    Traffic {
        /// Sent to peers so far.
        sent: u64,
        /// From peers and carried out so far.
        done: u64,
    },
    /// The members' common clock, in the guest's ticks.
    Clock(u64),
}
