//! Where interrupts go on one member: its vCPUs, its IOAPIC if it is the one that has it, and the way to the
//! other members. No lock is held while anything is sent.

use crate::devices::spec::BOARD_MEMBER;
use crate::fabric::Fabric;
use crate::fabric::wire::Message;
use crate::interrupts::ioapic::IoApic;
use crate::interrupts::routing::{Targets, targets};
use crate::interrupts::{DeliveryMode, Destination, InterruptMessage, IrqLines};
use crate::kvm::handle::{VcpuHandle, count};
use dsm::addr::MemberId;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// An interrupt whose target has moved is handed on this often.
const MAX_FORWARDS: u16 = 1;

/// Interrupt routing of a member.
#[derive(Debug)]
pub struct Switchboard {
    me: MemberId,
    placement: Vec<MemberId>,
    /// Members that have vCPUs or are on the way round for lowest priority.
    members: u16,
    vcpus: Vec<Arc<VcpuHandle>>,
    ioapic: Option<Mutex<IoApic>>,
    fabric: Arc<Fabric>,
}

impl Switchboard {
    /// `vcpus` are those that live here.
    pub fn new(
        me: MemberId,
        placement: Vec<MemberId>,
        members: u16,
        vcpus: Vec<Arc<VcpuHandle>>,
        fabric: Arc<Fabric>,
    ) -> Switchboard {
        let ioapic = (me == BOARD_MEMBER).then(Mutex::default);
        Switchboard { me, placement, members, vcpus, ioapic, fabric }
    }

    /// The member with the IOAPIC.
    pub fn ioapic_member(&self) -> MemberId {
        BOARD_MEMBER
    }

    /// The IOAPIC, if it is here.
    pub fn ioapic(&self) -> Option<MutexGuard<'_, IoApic>> {
        Some(self.ioapic.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The vCPUs that live here.
    pub fn vcpus(&self) -> &[Arc<VcpuHandle>] {
        &self.vcpus
    }

    fn local(&self, id: u32) -> Option<&Arc<VcpuHandle>> {
        self.vcpus.iter().find(|v| v.id() == id)
    }

    /// An IPI of a vCPU here. Returns whether it went to another member.
    pub fn send_ipi(&self, from: &VcpuHandle, x2apic: bool, message: &InterruptMessage) -> bool {
        let (local, remote) = self.route(message, x2apic);
        from.counters.ipis_local.fetch_add(local, std::sync::atomic::Ordering::Relaxed);
        from.counters.ipis_remote.fetch_add(remote, std::sync::atomic::Ordering::Relaxed);
        remote > 0
    }

    /// A message of a device or of the IOAPIC.
    pub fn send(&self, message: &InterruptMessage) {
        self.route(message, false);
    }

    /// Delivers; returns how many vCPUs here and how many other members it went to.
    fn route(&self, message: &InterruptMessage, x2apic: bool) -> (u64, u64) {
        match targets(message, &self.placement, self.me, x2apic) {
            Targets::One(id, member) if member == self.me => match self.local(id) {
                Some(vcpu) => {
                    vcpu.deliver(message);
                    (1, 0)
                }
                None => (0, 0),
            },
            Targets::One(id, member) => {
                let message = InterruptMessage { destination: Destination::Physical(id), ..*message };
                self.fabric.send(member, &Message::Interrupt { message, hops: 0 });
                (0, 1)
            }
            Targets::Members(members) => {
                let mut counts = (0, 0);
                for member in members {
                    if member == self.me {
                        counts.0 += self.deliver_matching(message);
                    } else {
                        self.fabric.send(member, &Message::Interrupt { message: *message, hops: 0 });
                        counts.1 += 1;
                    }
                }
                counts
            }
            Targets::OneOfMatching(mda) => self.one_of_matching(message, mda, 0),
            Targets::Nobody => (0, 0),
        }
    }

    /// To all vCPUs here that the message means.
    fn deliver_matching(&self, message: &InterruptMessage) -> u64 {
        let mut delivered = 0;
        for vcpu in &self.vcpus {
            let meant = match message.destination {
                Destination::All | Destination::Physical(u32::MAX) => true,
                Destination::AllButSelf => Some(vcpu.id()) != message.source,
                Destination::Physical(id) => vcpu.id() == id,
                Destination::Logical(mda) => vcpu.matches_logical(mda),
            };
            if meant {
                vcpu.deliver(message);
                delivered += 1;
            }
        }
        delivered
    }

    /// Lowest priority to a logical xAPIC destination: the first match here, or on to the next member, once
    /// around.
    fn one_of_matching(&self, message: &InterruptMessage, mda: u32, hops: u16) -> (u64, u64) {
        if let Some(vcpu) = self.vcpus.iter().find(|v| v.matches_logical(mda)) {
            vcpu.deliver(message);
            return (1, 0);
        }
        if hops + 1 < self.members {
            let next = MemberId((self.me.0 + 1) % self.members);
            self.fabric.send(next, &Message::Interrupt { message: *message, hops: hops + 1 });
            return (0, 1);
        }
        (0, 0)
    }

    /// A message that came from a peer.
    pub fn from_peer(&self, message: &InterruptMessage, hops: u16) {
        match message.destination {
            Destination::Logical(mda) if message.mode == DeliveryMode::LowestPriority => {
                self.one_of_matching(message, mda, hops.min(self.members));
            }
            Destination::Physical(id) if id != u32::MAX && self.local(id).is_none() => {
                // The sender's placement is old: hand it on, once.
                let target = usize::try_from(id).ok().and_then(|i| self.placement.get(i));
                match target.filter(|member| **member != self.me && hops < MAX_FORWARDS) {
                    Some(member) => {
                        let message = Message::Interrupt { message: *message, hops: hops + 1 };
                        self.fabric.send(*member, &message);
                    }
                    None => tracing::warn!("an interrupt for vCPU {id}, which is not here, was dropped"),
                }
            }
            _ => {
                self.deliver_matching(message);
            }
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
