//! The thread that decides when the VM is over on this member. Everything that can end it arrives on one
//! channel; the first thing that does wins, and only this thread acts on it:
//!
//! ```text
//!  vCPU ends, platform event, peer stopped or lost, memory failed, stop() called
//!      -> vCPUs told to stop, waiting accesses let go, peers told -> vCPUs have ended (or time is up) -> event
//! ```

use super::event::{Culprit, MemberEvent, VmExit};
use super::switchboard::Switchboard;
use crate::devices::PlatformEvent;
use crate::fabric::Fabric;
use crate::fabric::wire::{Message, StopReason};
use crate::kvm::exec::VcpuEnd;
use crate::topology::Topology;
use dsm::addr::MemberId;
use dsm::node::DsmFailure;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

/// Longest wait for vCPU threads to end: one that waits for a page of a dead peer can't on kernels before 6.2.
pub const VCPU_GRACE: Duration = Duration::from_secs(2);

/// What can end the VM, or be of interest at its end.
#[derive(Debug)]
pub enum Happening {
    /// A vCPU thread runs.
    VcpuStarted(u32),
    /// A vCPU thread ended.
    VcpuEnded(u32, VcpuEnd),
    /// A device ends the VM.
    Platform(PlatformEvent),
    /// A peer ends the VM.
    PeerStopped(MemberId, StopReason),
    /// A peer is gone.
    PeerLost(MemberId, String),
    /// The shared memory failed.
    Memory(DsmFailure),
    /// `Member::stop`.
    Stop(String),
    /// The member is dropped: the thread ends.
    Quit,
}

/// How it ends.
enum Outcome {
    Exit(VmExit),
    Failed { culprit: Culprit, text: String },
}

/// The watching thread's state.
pub(super) struct Watch {
    pub topology: Arc<Topology>,
    pub switchboard: Arc<Switchboard>,
    pub fabric: Arc<Fabric>,
    pub events: Sender<MemberEvent>,
    pub happenings: Receiver<Happening>,
}

impl Watch {
    /// Until `Quit`.
    pub fn run(self) {
        let mut running = BTreeSet::new();
        let mut over = false;
        while let Ok(happening) = self.happenings.recv() {
            match &happening {
                Happening::Quit => return,
                Happening::VcpuStarted(id) => {
                    running.insert(*id);
                }
                Happening::VcpuEnded(id, _) => {
                    running.remove(id);
                }
                _ => {}
            }
            let Some(outcome) = self.judge(happening).filter(|_| !over) else { continue };
            over = true;
            if !self.finish(outcome, &mut running) {
                return;
            }
        }
    }

    /// What a happening means for the VM; `None`: nothing.
    fn judge(&self, happening: Happening) -> Option<(Outcome, StopReason)> {
        let failed = |text: String| Outcome::Failed { culprit: Culprit::Own, text };
        Some(match happening {
            Happening::VcpuStarted(_) | Happening::VcpuEnded(_, VcpuEnd::Stopped) | Happening::Quit => {
                return None;
            }
            Happening::VcpuEnded(_, VcpuEnd::Exit(exit)) => {
                let reason = match &exit {
                    VmExit::PowerOff => StopReason::PowerOff,
                    VmExit::Reset => StopReason::Reset,
                    VmExit::TripleFault { vcpu, .. } => StopReason::TripleFault(*vcpu),
                    VmExit::Stopped { .. } => StopReason::Stopped,
                };
                (Outcome::Exit(exit), reason)
            }
            Happening::VcpuEnded(_, VcpuEnd::Failed(text)) => (failed(text), StopReason::Failed(None)),
            Happening::Platform(PlatformEvent::PowerOff) => {
                (Outcome::Exit(VmExit::PowerOff), StopReason::PowerOff)
            }
            Happening::Platform(PlatformEvent::Reset) => (Outcome::Exit(VmExit::Reset), StopReason::Reset),
            Happening::PeerStopped(peer, reason) => (self.peer_stopped(peer, reason), reason),
            Happening::PeerLost(peer, reason) => {
                let text = format!("{} is lost: {reason}", self.name(peer));
                let culprit = Culprit::Lost { peer, reason };
                (Outcome::Failed { culprit, text }, StopReason::Failed(Some(peer)))
            }
            Happening::Memory(failure) => {
                let text = match failure.peer {
                    Some(peer) => format!(
                        "{} is lost: shared memory: {}{}",
                        self.name(peer),
                        failure.cause,
                        failure.lost
                    ),
                    None => failure.to_string(),
                };
                let culprit = failure
                    .peer
                    .map_or(Culprit::Own, |peer| Culprit::Lost { peer, reason: failure.cause.to_string() });
                (Outcome::Failed { culprit, text }, StopReason::Failed(failure.peer))
            }
            Happening::Stop(reason) => (Outcome::Exit(VmExit::Stopped { reason }), StopReason::Stopped),
        })
    }

    fn peer_stopped(&self, peer: MemberId, reason: StopReason) -> Outcome {
        let name = self.name(peer);
        Outcome::Exit(match reason {
            StopReason::PowerOff => VmExit::PowerOff,
            StopReason::Reset => VmExit::Reset,
            StopReason::TripleFault(vcpu) => {
                VmExit::TripleFault { vcpu, registers: format!("{name} has the registers\n") }
            }
            StopReason::Stopped => VmExit::Stopped { reason: format!("{name} stopped the VM") },
            StopReason::Failed(Some(lost)) => {
                let reason = format!("{name} lost it");
                let text = format!("{} is lost: {reason}", self.name(lost));
                return Outcome::Failed { culprit: Culprit::Lost { peer: lost, reason }, text };
            }
            StopReason::Failed(None) => {
                let text = format!("{name} can't go on; its own message says why");
                return Outcome::Failed { culprit: Culprit::Told { peer }, text };
            }
        })
    }

    /// A member for people.
    fn name(&self, member: MemberId) -> String {
        let desc = self.topology.members.iter().find(|desc| desc.id == member);
        desc.map_or_else(|| member.to_string(), |d| format!("{member} ({} at {})", d.host, d.addr))
    }

    /// Carries the end out. False if `Quit` came meanwhile.
    fn finish(&self, (outcome, reason): (Outcome, StopReason), running: &mut BTreeSet<u32>) -> bool {
        let text = match &outcome {
            Outcome::Exit(exit) => exit.to_string(),
            Outcome::Failed { text, .. } => text.clone(),
        };
        self.fabric.expect_end();
        self.fabric.send_all(&Message::Stop(reason));
        self.switchboard.handles().iter().for_each(|v| v.stop());
        self.fabric.cancel(&text);
        let mut quit = false;
        let end = Instant::now() + VCPU_GRACE;
        while !running.is_empty() && !quit {
            match self.happenings.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(Happening::VcpuStarted(id)) => {
                    running.insert(id);
                }
                Ok(Happening::VcpuEnded(id, _)) => {
                    running.remove(&id);
                }
                Ok(Happening::Quit) => quit = true,
                Ok(_) => {}
                Err(_) => {
                    tracing::warn!("vCPUs {running:?} wait for memory and can't be stopped");
                    break;
                }
            }
        }
        let event = match outcome {
            Outcome::Exit(exit) => MemberEvent::Exit(exit),
            Outcome::Failed { culprit, text } => MemberEvent::Failed { text, culprit },
        };
        // Whoever started the member may have gone.
        let _ = self.events.send(event);
        !quit
    }
}
