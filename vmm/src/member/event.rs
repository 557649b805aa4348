//! What a member reports to whoever started it.

use dsm::addr::MemberId;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Why the guest as a whole is over. Each has its own words and its own exit code.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmExit {
    /// The guest powered off (ACPI S5).
    PowerOff,
    /// The guest asked for a reset (ACPI reset register).
    Reset,
    /// A vCPU shut down: a fault while it delivered a double fault (SDM vol. 3, 7.15).
    TripleFault {
        /// The vCPU.
        vcpu: u32,
        /// Its registers at that moment, for people.
        registers: String,
    },
    /// [`crate::member::Member::stop`] was called.
    Stopped {
        /// The reason given there.
        reason: String,
    },
}

impl fmt::Display for VmExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VmExit::PowerOff => write!(f, "the guest powered off"),
            VmExit::Reset => write!(f, "the guest asked for a reset"),
            VmExit::TripleFault { vcpu, .. } => write!(f, "vCPU {vcpu} triple-faulted"),
            VmExit::Stopped { reason } => write!(f, "stopped: {reason}"),
        }
    }
}

/// What a running member reports, over the channel given to [`crate::member::Member::join`]. After `Exit` or
/// `Failed` no vCPU of this member runs any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemberEvent {
    /// The vCPUs of this member entered the guest (or wait for their start-up IPI).
    Running,
    /// The guest is over.
    Exit(VmExit),
    /// The VM cannot go on.
    Failed {
        /// One line that names what failed and who.
        text: String,
        /// Whose fault it is, as far as this member knows.
        culprit: Culprit,
    },
}

/// Who makes a VM end that should go on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Culprit {
    /// The member that says so, or its host.
    Own,
    /// A peer died, was cut off or misbehaved.
    Lost {
        /// The peer.
        peer: MemberId,
        /// What was seen.
        reason: String,
    },
    /// A peer said that it can't go on. Why, it says itself.
    Told {
        /// The peer.
        peer: MemberId,
    },
}
