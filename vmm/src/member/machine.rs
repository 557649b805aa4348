//! What a vCPU sees around it on this member, and what peers may ask of this member. Both come down to the
//! switchboard for interrupts and to the platform for devices.

use super::fault;
use super::rest::Rest;
use super::switchboard::{Switchboard, count_remote};
use super::travel::Travels;
use super::watch::Happening;
use crate::devices::spec::BOARD_WINDOW;
use crate::devices::{Platform, Route, Space};
use crate::fabric::wire::{StopReason, VcpuGroup};
use crate::fabric::{Fabric, Handler};
use crate::interrupts::{InterruptMessage, IrqLines};
use crate::kvm::exec::Machine;
use crate::kvm::gate::Gate;
use crate::kvm::handle::VcpuHandle;
use crate::kvm::image::Ticket;
use crate::layout::{IOAPIC_SIZE, IOAPIC_START};
use crate::time::discipline::Discipline;
use crate::time::filter::Sample;
use crate::time::tsc::GuestClock;
use dsm::addr::MemberId;
use std::sync::Arc;
use std::sync::mpsc::Sender;

/// One member's machine.
#[derive(Debug)]
pub struct MemberMachine {
    pub(super) switchboard: Arc<Switchboard>,
    pub(super) platform: Platform,
    pub(super) fabric: Arc<Fabric>,
    pub(super) clock: Arc<GuestClock>,
    /// Of all vCPUs here.
    pub(super) gate: Arc<Gate>,
    /// `None` at member 0, which leads until it leaves, and where the clock can't be set.
    pub(super) discipline: Option<Discipline>,
    pub(super) happenings: Sender<Happening>,
    pub(super) rest: Rest,
    pub(super) travels: Travels,
}

/// Offset in the IOAPIC's window, if the address is there.
fn ioapic_offset(space: Space, addr: u64) -> Option<u64> {
    let offset = addr.checked_sub(IOAPIC_START)?;
    (space == Space::Mmio && offset < IOAPIC_SIZE).then_some(offset)
}

impl MemberMachine {
    fn local_read(&self, space: Space, addr: u64, data: &mut [u8]) {
        match ioapic_offset(space, addr) {
            Some(offset) => match self.switchboard.ioapic() {
                Some(ioapic) => ioapic.mmio_read(offset, data),
                None => data.fill(0xFF),
            },
            // The IOAPIC is not locked here: devices raise interrupts while they are accessed.
            None => self.platform.read(space, addr, data),
        }
    }

    fn local_write(&self, space: Space, addr: u64, data: &[u8]) {
        let Some(offset) = ioapic_offset(space, addr) else {
            self.platform.write(space, addr, data);
            return;
        };
        let messages = self.switchboard.ioapic().map(|mut ioapic| ioapic.mmio_write(offset, data));
        messages.iter().flatten().for_each(|m| self.switchboard.send(m));
    }

    /// The member to ask, and whether a write needs no answer; `None` if the access is local or nowhere.
    fn remote(&self, space: Space, addr: u64, len: usize) -> Option<(MemberId, bool)> {
        if ioapic_offset(space, addr).is_some() {
            return self.switchboard.ioapic().is_none().then(|| (self.switchboard.ioapic_member(), false));
        }
        match self.platform.route(space, addr, len) {
            Route::Remote { member, posted } => Some((member, posted)),
            Route::Local(..) | Route::Unmapped => None,
        }
    }

    fn access_read(&self, vcpu: &VcpuHandle, space: Space, addr: u64, data: &mut [u8]) -> Result<(), String> {
        let Some((member, _)) = self.remote(space, addr, data.len()) else {
            self.local_read(space, addr, data);
            return Ok(());
        };
        count_remote(vcpu);
        self.fabric.read(member, space, addr, data).map_err(|e| e.to_string())
    }

    fn access_write(&self, vcpu: &VcpuHandle, space: Space, addr: u64, data: &[u8]) -> Result<(), String> {
        let Some((member, posted)) = self.remote(space, addr, data.len()) else {
            self.local_write(space, addr, data);
            return Ok(());
        };
        count_remote(vcpu);
        self.fabric.write(member, space, addr, data, posted).map_err(|e| e.to_string())
    }

    /// The board is where the table says, and this member's clock follows the leader's. While the VM is paused.
    pub(super) fn take_board(&self, devices: &[MemberId], leader: MemberId) {
        if let Some(member) = devices.get(BOARD_WINDOW) {
            self.switchboard.set_ioapic_member(*member);
        }
        if self.fabric.set_leader(leader) {
            self.discipline.iter().for_each(Discipline::forget);
        }
    }

    /// Which member this is.
    pub(super) fn me(&self) -> MemberId {
        self.fabric.me()
    }

    fn tell(&self, happening: Happening) {
        // Nobody listens any more once the member is being dropped.
        let _ = self.happenings.send(happening);
    }
}

impl Machine for MemberMachine {
    fn rest(&self, resting: bool) {
        self.rest.change(resting);
    }

    fn port_read(&self, vcpu: &VcpuHandle, port: u16, data: &mut [u8]) -> Result<(), String> {
        self.access_read(vcpu, Space::Pio, u64::from(port), data)
    }

    fn port_write(&self, vcpu: &VcpuHandle, port: u16, data: &[u8]) -> Result<(), String> {
        self.access_write(vcpu, Space::Pio, u64::from(port), data)
    }

    fn memory_read(&self, vcpu: &VcpuHandle, addr: u64, data: &mut [u8]) -> Result<(), String> {
        self.access_read(vcpu, Space::Mmio, addr, data)
    }

    fn memory_write(&self, vcpu: &VcpuHandle, addr: u64, data: &[u8]) -> Result<(), String> {
        self.access_write(vcpu, Space::Mmio, addr, data)
    }

    fn send_vcpu(&self, to: MemberId, ticket: &Ticket, image: &[u8]) {
        if let Err(e) = fault::at(self.me(), "depart") {
            tracing::error!("{e}");
        }
        self.dispatch(to, ticket, image);
    }

    fn confirm(&self, ticket: &Ticket) {
        if let Err(e) = fault::at(self.me(), "confirm") {
            tracing::error!("{e}");
        }
        self.confirm_move(ticket);
    }

    fn population(&self, more: bool) {
        self.rest.population(more);
    }

    fn recent_pages(&self, vcpu: &VcpuHandle) -> Vec<(u64, bool)> {
        self.rest.recent_pages(vcpu.thread())
    }

    fn refuses_arrival(&self) -> Option<String> {
        fault::at(self.me(), "restore").err()
    }

    fn send_ipi(&self, from: &VcpuHandle, x2apic: bool, message: &InterruptMessage) {
        if self.switchboard.send_ipi(from, x2apic, message) {
            self.rest.expect_answer();
        }
    }

    fn end_of_interrupt(&self, vector: u8) {
        self.switchboard.end_of_interrupt(vector);
    }
}

impl Handler for MemberMachine {
    fn interrupt(&self, message: InterruptMessage, group: VcpuGroup, hops: u16) {
        self.switchboard.from_peer(&message, group, hops);
    }

    fn image(&self, peer: MemberId, image: &[u8]) {
        self.admit(peer, image);
    }

    fn moved(&self, peer: MemberId, token: u64, _vcpu: u32) {
        self.confirmed(peer, token);
    }

    fn read(&self, space: Space, addr: u64, data: &mut [u8]) {
        self.local_read(space, addr, data);
    }

    fn write(&self, space: Space, addr: u64, data: &[u8]) {
        self.local_write(space, addr, data);
    }

    fn set_level(&self, gsi: u32, high: bool) {
        // Only for the IOAPIC's member; elsewhere it would travel back and forth.
        if self.switchboard.ioapic().is_some() {
            self.switchboard.set_level(gsi, high);
        }
    }

    fn end_of_interrupt(&self, vector: u8) {
        if self.switchboard.ioapic().is_some() {
            self.switchboard.end_of_interrupt(vector);
        }
    }

    fn guest_tsc(&self) -> u64 {
        self.clock.common_now()
    }

    fn host_clock(&self) -> u64 {
        self.clock.scaled_now()
    }

    fn clock_sample(&self, sample: Sample) {
        if let Some(discipline) = &self.discipline {
            discipline.sample(sample);
        }
    }

    fn steer_clock(&self) {
        if let Some(discipline) = &self.discipline {
            discipline.steer(self.clock.scaled_now(), |hold, apply| {
                self.gate.together(self.switchboard.handles(), hold, apply);
            });
        }
    }

    fn clock_is_settled(&self) -> bool {
        self.discipline.as_ref().is_none_or(Discipline::is_settled)
    }

    fn stopped(&self, peer: MemberId, reason: StopReason) {
        self.tell(Happening::PeerStopped(peer, reason));
    }

    fn peer_lost(&self, peer: MemberId, reason: String) {
        self.tell(Happening::PeerLost(peer, reason));
    }
}
