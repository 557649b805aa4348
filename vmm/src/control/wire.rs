//! What the control plane says. All of it goes through [`super::codec`].
//!
//! ```text
//! launcher --(socketpair, or through the first host's node)--> coordinator = process of member 0
//! coordinator --(socketpair, or through another host's node)--> member 1, 2, ...
//!
//! launcher      coordinator        members
//!    | Launch, Image.. |               |
//!    |---------------->| Prepare       |     probe the host, look at its disks, bind a port
//!    |  Progress       |-------------->|
//!    |<----------------|<--------------| Ready
//!    |                 | Join(plan)    |     connect to each other, set up memory, vCPUs, devices
//!    |                 |-------------->|
//!    |                 |<--------------| Joined
//!    |                 | Run           |     (member 0 has loaded the kernel)
//!    |                 |-------------->|
//!    |  Running        |<--------------| Started
//!    |<----------------|               |
//!    |  Console..      | Stats / Report, once a second: also the heartbeat
//!    |<----------------|<------------->|
//!    |                 | Task / TaskDone: pause, resume, move a vCPU, ...
//!    |                 |<------------->|
//!    |  Ended          | Stop          |     the guest ended, a member is lost, somebody stopped it
//!    |<----------------|-------------->|
//!    |                 |<--------------| Stopped
//! ```
//!
//! Whoever finds its connection closed ends at once: a launcher that dies takes its VM along unless it sent
//! `Detach`, a coordinator that dies takes its members along.

use super::codec::Json;
use super::end::End;
use super::restore::RestoreOrder;
use super::view::VmSummary;
use crate::config::VmSpec;
use crate::config::spec::DiskSpec;
use crate::member::{HostFacts, MemberEvent, MemberPlan, MemberReply, MemberStats, MemberTask};
use dsm::addr::MemberId;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// Pieces of boot images are at most this long, bytes.
pub const IMAGE_PIECE: usize = 1 << 20;

/// The first message to a child, from the process that spawned it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Inherit {
    /// What it is to be.
    pub role: Role,
    /// Secret of the node, or of all members of a local VM.
    pub secret: Option<Vec<u8>>,
    /// Name of this host for people.
    pub host: String,
    /// Address at which the other members reach this host, if that is known already.
    pub bind: Option<IpAddr>,
    /// Be killed when the process that spawned this one ends.
    pub die_with_parent: bool,
}

/// What a child process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// Member 0 and the coordinator.
    Coordinator,
    /// Any other member.
    Member,
}

/// A boot image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageKind {
    /// The kernel.
    Kernel,
    /// The initial RAM disk.
    Initrd,
}

/// Launcher to coordinator.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToCoordinator {
    /// Start this VM; its images follow.
    Launch {
        /// Already checked by the launcher.
        spec: Box<VmSpec>,
        /// Bytes of the kernel.
        kernel_len: u64,
        /// Bytes of the initrd, if there is one.
        initrd_len: Option<u64>,
        /// Send the console's output.
        console: bool,
    },
    /// Start the VM of a checkpoint. Of the specification count the name, the secret and the patience.
    Restore {
        /// As above.
        wish: Box<VmSpec>,
        /// What is to be restored, and where.
        order: RestoreOrder,
        /// Send the console's output.
        console: bool,
    },
    /// The next piece of an image.
    Image(ImageKind, #[serde(with = "super::codec::blob")] Vec<u8>),
    /// Bytes typed at the console.
    Input(#[serde(with = "super::codec::blob")] Vec<u8>),
    /// Go on without the launcher.
    Detach,
    /// End the VM.
    Stop {
        /// Who wants it.
        by: String,
    },
}

/// Coordinator to launcher.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum FromCoordinator {
    /// A step of the start is done.
    Progress(String),
    /// The guest runs.
    Running {
        /// Process of the coordinator.
        pid: u32,
        /// Its host.
        host: String,
    },
    /// Output of the guest's serial console.
    Console(#[serde(with = "super::codec::blob")] Vec<u8>),
    /// The last message.
    Ended(End),
    /// The last message of a VM that lost a member: it stays paused, without the launcher.
    Paused(End),
}

/// Coordinator to member.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToMember {
    /// Look at yourself and bind a port for your peers.
    Prepare {
        /// Name of the VM.
        vm: String,
        /// Number of this member.
        me: MemberId,
        /// From which both sides derive the key of the mesh.
        nonce: [u8; 32],
        /// Disks that are to be on this host.
        disks: Vec<DiskSpec>,
        /// Address to bind, where the coordinator knows it better than the member.
        bind: Option<IpAddr>,
        /// Give up when the coordinator says nothing for so long.
        silence: Duration,
    },
    /// Connect to the others and set everything up. The plan's secret is empty: the member derives it.
    Join(Json<Box<MemberPlan>>),
    /// The pieces of this task are not wanted any more.
    Cancel {
        /// The task.
        id: u64,
    },
    /// Let the guest run.
    Run,
    /// The coordinator is there; sent when it has nothing else to say.
    Ping,
    /// Something to do while the guest runs; several may be under way.
    Task {
        /// Names the task in its answer.
        id: u64,
        /// What.
        task: MemberTask,
    },
    /// Report; also the heartbeat.
    Stats {
        /// Number of the question.
        id: u64,
    },
    /// End the guest and yourself.
    Stop {
        /// Why.
        reason: String,
    },
}

/// Member to coordinator.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum FromMember {
    /// Answer to `Prepare`.
    Ready {
        /// Name of the host.
        host: String,
        /// Process id there.
        pid: u32,
        /// What the host can do.
        facts: Box<HostFacts>,
        /// Where peers connect.
        addr: SocketAddr,
    },
    /// Answer to `Join`.
    Joined,
    /// Answer to `Run`.
    Started,
    /// Something happened.
    Event(MemberEvent),
    /// Answer to `Stats`.
    Report {
        /// Number of the question.
        id: u64,
        /// Counters.
        stats: Json<Box<MemberStats>>,
    },
    /// A piece of what a task asks for; `TaskDone` follows.
    Piece {
        /// The task.
        id: u64,
        /// The bytes, in order.
        #[serde(with = "super::codec::blob")]
        bytes: Vec<u8>,
    },
    /// Answer to `Task`.
    TaskDone {
        /// The task.
        id: u64,
        /// Its answer, or why it was not done.
        result: Result<MemberReply, String>,
    },
    /// Answer to `Stop`; nothing follows.
    Stopped,
    /// This host can't be a member of this VM; nothing follows.
    Unfit {
        /// Why, and what to do.
        reason: String,
    },
    /// A step did not work; nothing follows.
    Failed {
        /// Why.
        reason: String,
        /// True when a file or value that the user gave is to blame.
        input: bool,
    },
}

/// To a node daemon, after authentication. One request per connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeRequest {
    /// Spawn a coordinator; then the connection is its launcher's.
    Launch,
    /// Spawn a member; then the connection is its coordinator's.
    Member,
    /// Connect to a VM's HTTP socket; then the connection is HTTP.
    Api {
        /// Name of the VM.
        vm: String,
    },
    /// What VMs run here?
    List,
    /// What can this host do?
    Facts,
}

/// From a node daemon.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum NodeReply {
    /// What follows comes from the other end that was asked for.
    Relay,
    /// The VMs whose coordinator is here.
    Vms(Json<Vec<VmSummary>>),
    /// What the host can do, or why it can't.
    Facts(Result<Box<HostFacts>, String>),
    /// No.
    Refused(String),
}
