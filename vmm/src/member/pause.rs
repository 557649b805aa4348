//! Pause and resume of one member. The coordinator makes it cluster-wide ([`crate::control::ops::pause`]): first all
//! members pause, then it waits until no message is under way between them.
//!
//! ```text
//!             pause: vCPUs leave the guest, last exits completed; devices finish what they are at
//!  running ------------------------------------------------------------------------------> paused
//!     ^            |  not in time: all that was stopped goes on                               |
//!     |<-----------+                                                                          |
//!     +---------------------------------------------------------------------------------------+
//!             resume: the guest's clock goes on where it stood; devices, then vCPUs go on
//! ```
//!
//! While paused, the member serves its peers as ever: pages, device registers, interrupts into its local APICs. So a
//! vCPU of another member that is still on its way out of the guest gets what it waits for.

use super::fault;
use super::runtime::{Member, MemberError};
use super::task::{MemberReply, MemberTask};
use crate::kvm::desk::{Order, answer};
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

/// Why a member could not be paused. What was stopped goes on.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// Before the start, or after the end.
    #[error("the guest does not run")]
    NotRunning,
    /// A vCPU has ended.
    #[error("vCPU {0} has ended")]
    Ended(u32),
    /// A vCPU did not come out of the guest.
    #[error("vCPU {vcpu} did not leave the guest within {limit:?}: it waits for a page or for a device")]
    Vcpu {
        /// Which.
        vcpu: u32,
        /// The deadline.
        limit: Duration,
    },
    /// A device did not finish what it was at.
    #[error("{device} did not become quiet within {limit:?}: it waits for a page or for its file")]
    Device {
        /// Which.
        device: String,
        /// The deadline.
        limit: Duration,
    },
}

impl Member {
    /// Stops vCPUs and devices of this member: when it returns, every vCPU is out of the guest with its last exit
    /// completed, and every device worker is idle. Returns the members' common clock at that time, or `None` where the
    /// guest's time can't be stopped. Pausing a paused member changes nothing.
    ///
    /// # Errors
    /// [`PauseError`]; then the member runs on.
    pub fn pause(&self, limit: Duration) -> Result<Option<u64>, PauseError> {
        let end = Instant::now() + limit;
        let paused = self.pause_until(end, limit);
        if paused.is_err() {
            self.go_on();
        }
        paused
    }

    fn pause_until(&self, end: Instant, limit: Duration) -> Result<Option<u64>, PauseError> {
        let machine = self.running_machine().ok_or(PauseError::NotRunning)?;
        self.hold_input(true);
        let mut waits = Vec::new();
        for vcpu in self.switchboard().vcpus() {
            let (done, wait) = answer();
            if !vcpu.order(Order::Park(done)) {
                return Err(PauseError::Ended(vcpu.id()));
            }
            waits.push((vcpu.id(), wait));
        }
        for (vcpu, wait) in waits {
            match wait.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(()) => {}
                Err(RecvTimeoutError::Timeout) => return Err(PauseError::Vcpu { vcpu, limit }),
                Err(RecvTimeoutError::Disconnected) => return Err(PauseError::Ended(vcpu)),
            }
        }
        let stuck = machine.platform.pause(end.saturating_duration_since(Instant::now()));
        if let Some(device) = stuck.into_iter().next() {
            return Err(PauseError::Device { device, limit });
        }
        Ok(self.can_stop_time().then(|| self.clock().common_now()))
    }

    /// Lets a paused member go on. `stopped` is for how many ticks of the members' common clock the VM has been paused
    /// in all, since its start: the guest's clock does not show them.
    ///
    /// # Errors
    /// The guest is over.
    pub fn resume(&self, stopped: u64) -> Result<(), MemberError> {
        if self.running_machine().is_none() {
            return Err(MemberError::Order("the guest does not run"));
        }
        if self.can_stop_time() {
            self.clock().set_stopped(stopped);
            self.switchboard().vcpus().for_each(|v| v.clock_changed());
        }
        self.go_on();
        Ok(())
    }

    fn go_on(&self) {
        if let Some(machine) = self.running_machine() {
            machine.platform.resume();
        }
        for vcpu in self.switchboard().vcpus() {
            vcpu.order(Order::Resume);
        }
        self.hold_input(false);
    }

    /// Messages that can change the guest: sent to peers, and from peers carried out.
    pub fn traffic(&self) -> (u64, u64) {
        self.fabric().traffic()
    }

    /// Does one task.
    ///
    /// # Errors
    /// Why it was not done, in words.
    pub fn task(&self, task: MemberTask) -> Result<MemberReply, String> {
        let words = |e: &dyn std::error::Error| crate::control::host::chain(e);
        let step = match &task {
            MemberTask::Pause { .. } => Some("pause"),
            MemberTask::Resume { .. } => Some("resume"),
            MemberTask::QuietMemory { .. } => Some("quiet"),
            MemberTask::Capture => Some("capture"),
            MemberTask::ReleaseMemory => Some("release"),
            _ => None,
        };
        step.map_or(Ok(()), |step| fault::at(self.plan().me, step))?;
        match task {
            MemberTask::Pause { limit } => {
                let clock = self.pause(limit).map_err(|e| words(&e))?;
                Ok(MemberReply::Paused { clock })
            }
            MemberTask::Expect { vcpus } => {
                self.expect(&vcpus).map_err(|e| words(&e))?;
                Ok(MemberReply::Done)
            }
            MemberTask::Depart { vcpus, to, epoch, limit } => {
                Ok(MemberReply::Departed(self.depart(&vcpus, to, epoch, limit)))
            }
            MemberTask::Placed { places } => Ok(MemberReply::Downtimes(self.placed(&places))),
            MemberTask::Traffic => {
                let (sent, done) = self.traffic();
                Ok(MemberReply::Traffic { sent, done })
            }
            MemberTask::Clock => Ok(MemberReply::Clock(self.clock().common_now())),
            MemberTask::Resume { stopped } => {
                self.resume(stopped).map_err(|e| words(&e))?;
                Ok(MemberReply::Done)
            }
            MemberTask::Table(task) => Ok(MemberReply::Table(self.table_task(task)?)),
            MemberTask::Device(task) => Ok(MemberReply::Device(self.device_task(task)?)),
            MemberTask::ReadConsole { from, wait } => Ok(MemberReply::Said(self.read_console(from, wait)?)),
            MemberTask::TypeIn { bytes } => Ok(MemberReply::Typed(self.type_in(&bytes)?)),
            task => self.checkpoint_task(task),
        }
    }
}
