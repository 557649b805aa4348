//! What a vCPU thread does when it is asked: park, go on, leave for another member; and how one comes from there.
//!
//! ```text
//!             Park                    Depart: complete, capture, cut + send
//!  running ---------> parked   running ------------------------------------> absent
//!     ^                 |         ^                                             |
//!     +-----------------+         +---------------------------------------------+
//!             Resume                  an image comes: restore, confirm (else: back to where it came from)
//! ```

use super::{IDLE_WAIT, Machine, Runner, VcpuEnd};
use crate::kvm::desk::{Departure, Order};
use crate::kvm::handle::mail;
use crate::kvm::image::{self, Body, ImageError, Inbox, Ticket, VcpuImage};
use crate::kvm::vm::KvmError;
use migration::vcpu::VcpuState;

impl<M: Machine> Runner<M> {
    /// Carries out orders until none is left and the vCPU runs.
    pub(super) fn obey(&mut self) -> Result<Option<VcpuEnd>, KvmError> {
        loop {
            while let Some(order) = self.handle.next_order() {
                match order {
                    Order::Park(answer) => {
                        if let Some(end) = self.complete()? {
                            return Ok(Some(end));
                        }
                        self.park(true);
                        // Who asked may have given up.
                        let _ = answer.send(());
                    }
                    Order::Resume => self.park(false),
                    Order::Capture(answer) => drop(answer.send(self.still())),
                    Order::Depart(departure) => {
                        if let Some(end) = self.depart(departure)? {
                            return Ok(Some(end));
                        }
                    }
                }
            }
            if let Some(image) = self.handle.take_arrival() {
                if let Err(end) = self.arrive(*image) {
                    return Ok(Some(end));
                }
            }
            if !self.parked && !self.absent {
                return Ok(None);
            }
            self.handle.wait(Some(IDLE_WAIT));
            let mail = self.handle.take_mail();
            if mail & mail::STOP != 0 {
                self.park(false);
                return Ok(Some(VcpuEnd::Stopped));
            }
            self.held |= mail & !mail::ORDER;
        }
    }

    fn park(&mut self, parked: bool) {
        if std::mem::replace(&mut self.parked, parked) != parked && !self.absent {
            self.machine.rest(parked);
        }
    }

    /// Gives the guest the result of its last access, which the kernel still owes it, without running it. Afterwards
    /// the registers are those between two instructions.
    pub(super) fn complete(&mut self) -> Result<Option<VcpuEnd>, KvmError> {
        while self.unfinished {
            self.vcpu.run.set_immediate_exit(1);
            let result = self.vcpu.fd.run().map(|_| ());
            self.vcpu.run.set_immediate_exit(0);
            // An access wider than the bus goes on in pieces: each is one more exit.
            if let Some(end) = self.handle_exit(result.err().map(|e| e.errno()))? {
                return Ok(Some(end));
            }
        }
        Ok(None)
    }

    /// Leaves for another member. If that does not work the vCPU stays and runs on, and who asked is told why.
    fn depart(&mut self, departure: Departure) -> Result<Option<VcpuEnd>, KvmError> {
        if let Some(end) = self.complete()? {
            return Ok(Some(end));
        }
        let Departure { to, epoch, origin, token, claim, answer } = departure;
        let result = if self.absent {
            Err(format!("vCPU {} is not here", self.handle.id()))
        } else if self.parked {
            Err(format!("vCPU {} is paused", self.handle.id()))
        } else if !claim.take() {
            // Nobody waits for it any more.
            return Ok(None);
        } else {
            let ticket = Ticket { vcpu: self.handle.id(), epoch, origin, token, returned: None };
            self.body()
                .map_err(ImageError::from)
                .and_then(|body| self.send_away(to, &ticket, &body))
                .map_err(|e| crate::control::host::chain(&e))
        };
        let _ = answer.send(result);
        Ok(None)
    }

    fn body(&self) -> Result<Body, migration::vcpu::StateError> {
        let state = VcpuState::capture(&self.vcpu.fd, self.vcpu.msrs())?;
        Ok(Body {
            state,
            halted: self.halted,
            waits_for_startup: self.waits_for_startup,
            nmi: self.nmi,
            tsc: self.now(),
            left: self.left_at.wrapping_add(self.clock.common_offset()),
            pages: self.machine.recent_pages(&self.handle),
        })
    }

    /// The cut: from one moment to the next the vCPU is no longer here but on its way, with all that was delivered to it
    /// until then. Returns the bytes sent.
    fn send_away(
        &mut self,
        to: dsm::addr::MemberId,
        ticket: &Ticket,
        body: &Body,
    ) -> Result<usize, ImageError> {
        let mut bytes = image::encode_body(ticket, body)?;
        let held = self.held;
        let machine = &self.machine;
        self.handle
            .cut(|inbox| {
                let inbox = Inbox { mail: inbox.mail | mail::travelling(held), ..inbox };
                bytes.extend(image::encode_inbox(&inbox)?);
                machine.send_vcpu(to, ticket, &bytes);
                Ok(bytes.len())
            })
            .inspect(|_| {
                self.held = 0;
                self.absent = true;
                self.armed = None;
                machine.population(false);
            })
    }

    /// Becomes the vCPU of an image. If that does not work the image goes back to where it came from; if it came back
    /// already, the vCPU is lost, and the VM with it.
    fn arrive(&mut self, image: VcpuImage) -> Result<(), VcpuEnd> {
        let VcpuImage { ticket, body, .. } = image;
        self.absent = false;
        let restored = self.restore(&body);
        match (restored, &ticket.returned) {
            (Ok(()), _) => {
                self.arrived = Some(body.left);
                self.note_downtime();
                self.machine.confirm(&ticket);
                Ok(())
            }
            (Err(e), None) => {
                let why = crate::control::host::chain(&e);
                let back = Ticket { epoch: ticket.epoch + 1, returned: Some(why.clone()), ..ticket };
                self.send_away(back.origin, &back, &body).map(drop).map_err(|e| {
                    self.failed(&format!("could not be set up here ({why}), nor sent back: {e}"))
                })
            }
            (Err(e), Some(why)) => Err(self.failed(&format!(
                "could not be set up at the target of its move ({why}), nor here again: {e}"
            ))),
        }
    }

    fn restore(&mut self, body: &Body) -> Result<(), ImageError> {
        if let Some(reason) = self.machine.refuses_arrival() {
            return Err(ImageError::Refused(reason));
        }
        body.state.restore(&self.vcpu.fd)?;
        self.vcpu.run.entered_anew(body.state.regs.rflags);
        self.halted = body.halted;
        self.waits_for_startup = body.waits_for_startup;
        self.nmi = body.nmi;
        self.unfinished = false;
        self.armed = None;
        // The clocks of two members differ by less than a message takes, but the guest must not depend on that.
        let target = self.clock.offset();
        let scaled = self.clock.scaled_now();
        let behind = body.tsc.wrapping_sub(scaled.wrapping_add(target));
        let offset = if behind < 1 << 63 { target.wrapping_add(behind) } else { target };
        if offset != self.vcpu.clock.applied() {
            self.vcpu.set_tsc_offset(offset, &self.clock)?;
        }
        self.clock_behind = offset != target;
        self.left_at = scaled;
        Ok(())
    }

    /// How long the guest has not had this vCPU, as of now.
    pub(super) fn note_downtime(&self) {
        if let Some(left) = self.arrived {
            let ticks = self.clock.common_now().saturating_sub(left);
            self.handle.set_downtime(self.clock.ticks_to_ns(ticks));
        }
    }
}
