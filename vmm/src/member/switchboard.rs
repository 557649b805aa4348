//! Where interrupts go on one member: its vCPUs, its IOAPIC if it is the one that has it, and the way to the
//! other members.
//!
//! Every message names the vCPUs that it is for, so that it reaches each of them exactly once while they move: whoever
//! has the vCPU delivers, whoever has it no longer hands the message on to where it went. No lock is held while
//! anything is sent, except that of a vCPU at the moment when it leaves.

use super::placement::Placement;
use crate::fabric::Fabric;
use crate::fabric::wire::{Message, VcpuGroup};
use crate::interrupts::ioapic::IoApic;
use crate::interrupts::routing::{Targets, targets};
use crate::interrupts::{DeliveryMode, Destination, InterruptMessage, IrqLines};
use crate::kvm::handle::{Delivery, VcpuHandle, count};
use dsm::addr::MemberId;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A message that follows a vCPU was handed on so often that something is wrong. Each hand-over takes as long as a
/// message takes, so a vCPU would have to move that often, that fast.
const MAX_HOPS: u16 = 1000;
/// Looks at a vCPU that is neither here nor elsewhere, which lasts for as long as a few instructions of another thread.
const MAX_LOOKS: u32 = 100_000;
/// A vCPU that is between two members matches nothing for a moment: so many times around for lowest priority.
const ROUNDS: u16 = 8;

/// Interrupt routing of a member.
#[derive(Debug)]
pub struct Switchboard {
    me: MemberId,
    placement: Placement,
    /// All vCPUs of the VM, by id.
    handles: Vec<Arc<VcpuHandle>>,
    /// The VM's at the member that has the board; elsewhere it is nobody's.
    ioapic: Mutex<IoApic>,
    /// Number of the member that has it.
    board: AtomicU16,
    fabric: Arc<Fabric>,
}

impl Switchboard {
    /// `handles` are those of all vCPUs of the VM, by id; `board` is the member with the IOAPIC.
    pub fn new(
        me: MemberId,
        placement: Placement,
        handles: Vec<Arc<VcpuHandle>>,
        fabric: Arc<Fabric>,
        board: MemberId,
    ) -> Switchboard {
        let board = AtomicU16::new(board.0);
        Switchboard { me, placement, handles, ioapic: Mutex::default(), board, fabric }
    }

    /// The member with the IOAPIC.
    pub fn ioapic_member(&self) -> MemberId {
        MemberId(self.board.load(Ordering::SeqCst))
    }

    /// Another member has the IOAPIC, or this one. While the VM is paused.
    pub fn set_ioapic_member(&self, member: MemberId) {
        self.board.store(member.0, Ordering::SeqCst);
    }

    /// The IOAPIC that is to come here, as it was at the member that has it. While the VM is paused.
    pub fn bring_ioapic(&self, ioapic: IoApic) {
        *self.ioapic.lock().unwrap_or_else(PoisonError::into_inner) = ioapic;
    }

    /// The IOAPIC, if it is here.
    pub fn ioapic(&self) -> Option<MutexGuard<'_, IoApic>> {
        let here = self.ioapic_member() == self.me;
        here.then(|| self.ioapic.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Where the vCPUs live.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// All vCPUs of the VM, by id.
    pub fn handles(&self) -> &[Arc<VcpuHandle>] {
        &self.handles
    }

    /// A vCPU of the VM.
    pub fn handle(&self, id: u32) -> Option<&Arc<VcpuHandle>> {
        self.handles.get(usize::try_from(id).ok()?)
    }

    /// The vCPUs that live here.
    pub fn vcpus(&self) -> impl Iterator<Item = &Arc<VcpuHandle>> {
        self.handles.iter().filter(|v| v.is_here())
    }

    /// An IPI of a vCPU here. Returns whether it went to another member.
    pub fn send_ipi(&self, from: &VcpuHandle, x2apic: bool, message: &InterruptMessage) -> bool {
        let (local, remote) = self.route(message, x2apic);
        from.counters.ipis_local.fetch_add(local, Ordering::Relaxed);
        from.counters.ipis_remote.fetch_add(remote, Ordering::Relaxed);
        remote > 0
    }

    /// A message of a device or of the IOAPIC.
    pub fn send(&self, message: &InterruptMessage) {
        self.route(message, false);
    }

    /// Delivers; returns how many vCPUs here and how many other members it went to.
    fn route(&self, message: &InterruptMessage, x2apic: bool) -> (u64, u64) {
        match targets(message, self.placement.len(), |id| self.placement.get(id), self.me, x2apic) {
            Targets::One(id) => {
                let message = InterruptMessage { destination: Destination::Physical(id), ..*message };
                self.deliver([id].into_iter(), &message, 0)
            }
            Targets::Each(ids) => self.deliver(ids.into_iter(), message, 0),
            Targets::OneOfMatching => self.one_of_matching(message, 0),
            Targets::Nobody => (0, 0),
        }
    }

    /// To each of these vCPUs, wherever it is.
    fn deliver(&self, ids: impl Iterator<Item = u32>, message: &InterruptMessage, hops: u16) -> (u64, u64) {
        let mut delivered = 0;
        let mut away: Vec<(MemberId, VcpuGroup)> = Vec::new();
        for id in ids {
            match self.deliver_here(id, message) {
                None => delivered += 1,
                Some(member) => match away.iter_mut().find(|(m, group)| *m == member && group.fits(id)) {
                    Some((_, group)) => group.add(id),
                    None => away.push((member, VcpuGroup::of(id))),
                },
            }
        }
        for (member, group) in &away {
            self.fabric.send(*member, &Message::Interrupt { message: *message, group: *group, hops });
        }
        (delivered, u64::try_from(away.len()).unwrap_or(u64::MAX))
    }

    /// Delivers if the vCPU is here (or nowhere), else says where to send it.
    fn deliver_here(&self, id: u32, message: &InterruptMessage) -> Option<MemberId> {
        let handle = self.handle(id)?;
        for _ in 0..MAX_LOOKS {
            if handle.deliver(message) != Delivery::Away {
                return None;
            }
            match self.placement.get(id) {
                Some(member) if member != self.me => return Some(member),
                // It came between the two looks.
                _ => std::hint::spin_loop(),
            }
        }
        tracing::error!("vCPU {id} is nowhere; an interrupt for it was dropped");
        None
    }

    /// Lowest priority to a logical xAPIC destination: the first match here, or on to the next member.
    fn one_of_matching(&self, message: &InterruptMessage, hops: u16) -> (u64, u64) {
        if self.handles.iter().any(|v| v.deliver(message) == Delivery::Taken) {
            return (1, 0);
        }
        let members = u16::try_from(self.fabric.peers().count() + 1).unwrap_or(u16::MAX);
        if let Some(next) = self.fabric.next_member().filter(|_| hops + 1 < members.saturating_mul(ROUNDS)) {
            let group = VcpuGroup::default();
            self.fabric.send(next, &Message::Interrupt { message: *message, group, hops: hops + 1 });
            return (0, 1);
        }
        (0, 0)
    }

    /// A message that came from a peer.
    pub fn from_peer(&self, message: &InterruptMessage, group: VcpuGroup, hops: u16) {
        if matches!(message.destination, Destination::Logical(_))
            && message.mode == DeliveryMode::LowestPriority
        {
            self.one_of_matching(message, hops);
        } else if hops < MAX_HOPS {
            self.deliver(group.ids(), message, hops + 1);
        } else {
            tracing::error!("an interrupt for {group:?} was handed on {hops} times and is dropped");
        }
    }

    /// A level-triggered vector was serviced by a vCPU here or, at the IOAPIC's member, anywhere.
    pub fn end_of_interrupt(&self, vector: u8) {
        let Some(mut ioapic) = self.ioapic() else {
            self.fabric.send(self.ioapic_member(), &Message::Eoi { vector });
            return;
        };
        let messages = ioapic.end_of_interrupt(vector);
        drop(ioapic);
        messages.iter().for_each(|m| self.send(m));
    }
}

impl IrqLines for Switchboard {
    fn set_level(&self, gsi: u32, high: bool) {
        let Some(mut ioapic) = self.ioapic() else {
            self.fabric.send(self.ioapic_member(), &Message::SetLevel { gsi, high });
            return;
        };
        let message = ioapic.set_level(gsi, high);
        drop(ioapic);
        if let Some(message) = message {
            self.send(&message);
        }
    }
}

/// Counts an access that another member answered.
pub(super) fn count_remote(vcpu: &VcpuHandle) {
    count(&vcpu.counters.remote_accesses);
}
