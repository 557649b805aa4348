//! The member: joins its peers, owns every thread of the VM on this host.

use super::event::MemberEvent;
use super::plan::{BootImages, MemberPlan};
use super::stats::MemberStats;
use crate::devices::ConsoleHandle;
use std::net::TcpListener;
use std::sync::mpsc::Sender;

/// Why a member did not start.
#[derive(Debug, thiserror::Error)]
pub enum MemberError {
    /// The plan contradicts itself.
    #[error("bad plan: {0}")]
    Plan(String),
    /// Not called at the member that boots the guest, or called twice.
    #[error("{0}")]
    Order(&'static str),
}

/// A running (or ready to run) member. Dropping it stops its vCPUs and joins its threads.
#[derive(Debug)]
pub struct Member {
    plan: MemberPlan,
}

impl Member {
    /// Connects to all peers, sets up memory, KVM, devices and vCPUs. Blocks until all peers have joined or
    /// `plan.deadline` has passed; nothing of the guest runs yet.
    ///
    /// # Errors
    /// What went wrong, and with which peer.
    pub fn join(
        plan: MemberPlan,
        listener: TcpListener,
        events: Sender<MemberEvent>,
    ) -> Result<Member, MemberError> {
        let _ = (listener, events);
        Ok(Member { plan })
    }

    /// Puts kernel, initrd, boot parameters and ACPI tables into guest memory. Member 0 only, once, before
    /// [`Member::run`] of any member.
    ///
    /// # Errors
    /// A damaged image, or one that does not fit.
    pub fn load(&self, images: BootImages) -> Result<(), MemberError> {
        let _ = images;
        Ok(())
    }

    /// Lets the vCPUs go: vCPU 0 starts at the kernel's entry, all others wait for their start-up IPI.
    /// Returns at once; what happens then comes over the event channel.
    ///
    /// # Errors
    /// Not loaded yet, or already running.
    pub fn run(&self) -> Result<(), MemberError> {
        Ok(())
    }

    /// Ends the guest on this member: vCPUs leave, threads end, peers are told. Idempotent; waits for the
    /// threads, at most the plan's deadline.
    pub fn stop(&self, reason: &str) {
        let _ = reason;
    }

    /// Everything that is counted, as of now.
    pub fn stats(&self) -> MemberStats {
        MemberStats::default()
    }

    /// The serial console, on the member that has the serial port.
    pub fn console(&self) -> Option<ConsoleHandle> {
        None
    }

    /// The orders this member was started with.
    pub fn plan(&self) -> &MemberPlan {
        &self.plan
    }
}
