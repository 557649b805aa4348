//! One host's part of a VM: wires memory, vCPUs, interrupts and devices together.
//!
//! [`facts`] says what the host can do, [`plan`] what this member is to be, [`event`] what it reports,
//! [`stats`] what it counts; [`runtime`] is the member itself. Inside: [`ram`] (guest memory), [`switchboard`]
//! (where interrupts go), [`machine`] (what vCPUs and peers can access), [`watch`] (when it is over). While it runs, the coordinator gives it
//! [`task`]s, such as to [`pause`], or to let vCPUs [`travel`].

pub mod devices;
pub mod event;
pub mod facts;
mod fault;
pub mod machine;
pub mod pause;
mod peers;
pub mod placement;
pub mod plan;
pub mod ram;
mod rest;
pub mod runtime;
pub mod saved;
pub mod stats;
pub mod switchboard;
pub mod table;
pub mod task;
pub mod travel;
pub mod watch;

pub use crate::devices::ConsoleHandle;
pub use event::{Culprit, MemberEvent, VmExit};
pub use facts::{HostError, HostFacts, Virtualization};
pub use plan::{BootImages, MemberPlan, Origin, PageTuning, Standing};
pub use runtime::{Member, MemberError};
pub use saved::{MemberState, PagesSaved, SaveRequest};
pub use stats::{MemberStats, VcpuStats};
pub use task::{MemberReply, MemberTask};
