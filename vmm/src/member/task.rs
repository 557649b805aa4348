//! What the coordinator asks of a running member. Each task is answered, in bounded time.

use super::devices::{DeviceReply, DeviceTask, Said};
use super::saved::{MemberState, PagesSaved, SaveRequest};
use super::table::{TableReply, TableTask};
use super::travel::Departed;
use dsm::addr::MemberId;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
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
    /// See [`super::Member::quiet_memory`]. Answer: `Done`.
    QuietMemory {
        /// Longest time it may take.
        limit: Duration,
    },
    /// See [`super::Member::release_memory`]. Answer: `Done`.
    ReleaseMemory,
    /// See [`super::Member::state`]. Answer: `Captured`.
    Capture,
    /// See [`super::Member::save_pages`]: pieces of a page file come before the answer. Answer: `Saved`.
    SavePages(SaveRequest),
    /// See [`super::Member::open_image`]. Answer: `Done`.
    OpenImage {
        /// Folder of the checkpoint.
        folder: PathBuf,
    },
    /// See [`super::Member::adopt`]. Answer: `Done`.
    Adopt {
        /// Address and number of pages.
        runs: Vec<(u64, u32)>,
    },
    /// See [`super::Member::restore`]. Answer: `Done`.
    Restore {
        /// What to become.
        state: Box<MemberState>,
    },
    /// See [`super::Member::prefetch`]. Answer: `Done`.
    Prefetch,
    /// See [`super::Member::table_task`]. Answer: `Table`.
    Table(TableTask),
    /// See [`super::Member::device_task`]. Answer: `Device`.
    Device(DeviceTask),
    /// See [`super::Member::read_console`]. Answer: `Said`.
    ReadConsole {
        /// Where.
        from: u64,
        /// Longest wait for output.
        wait: Duration,
    },
    /// See [`super::Member::type_in`]. Answer: `Typed`.
    TypeIn {
        /// What.
        bytes: Vec<u8>,
    },
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
    /// What is not memory.
    Captured(Box<MemberState>),
    /// How saving went.
    Saved(Box<PagesSaved>),
    /// Messages that can change the guest.
    Traffic {
        /// Sent to peers so far.
        sent: u64,
        /// From peers and carried out so far.
        done: u64,
    },
    /// The members' common clock, in the guest's ticks.
    Clock(u64),
    /// See [`super::Member::table_task`].
    Table(TableReply),
    /// See [`super::Member::device_task`].
    Device(DeviceReply),
    /// A piece of the console's output.
    Said(Said),
    /// How many bytes the console took.
    Typed(usize),
}
