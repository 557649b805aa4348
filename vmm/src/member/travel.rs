//! Moving vCPUs between members: this member as the target, and as the source.
//!
//! ```text
//! coordinator            source                      target                   all others
//!   | Expect               |                            |
//!   |--------------------------------------------------->|  KVM vCPU and thread, absent
//!   | Depart               |                            |
//!   |--------------------->|  complete, capture         |
//!   |                      |  cut; Image (one message)  |
//!   |                      |--------------------------->|  APIC, placement; then registers
//!   |                      |  forwards interrupts ----->|  runs
//!   |                      |<--------------- Moved -----|
//!   |<---------------------|                            |
//!   | Placed               |                            |
//!   |----------------------------------------------------------------------->|  placement
//! ```
//!
//! Whatever fails before the cut leaves the vCPU where it is. A target that can't set it up sends it back, with what was
//! delivered to it meanwhile. A target that dies with it takes the VM along, as any member does that dies.

use super::fault;
use super::machine::MemberMachine;
use super::runtime::{Member, MemberError};
use crate::control::host::chain;
use crate::kvm::cpuid::CpuidTable;
use crate::kvm::desk::{Claim, Departure, Order, answer};
use crate::kvm::image::{self, Ticket, encode_body, encode_inbox};
use dsm::addr::MemberId;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Pages that are asked for when a vCPU comes.
const MOST_PAGES: usize = 64;
/// Longest wait for a thread that has begun to send a vCPU to say that it has.
const SENDING: Duration = Duration::from_secs(2);

/// Where a vCPU went, and who waits to hear that it is set up there.
type Open = (MemberId, Sender<Result<(), String>>);

/// Moves from this member that wait for their confirmation.
#[derive(Debug, Default)]
pub(super) struct Travels {
    next: AtomicU64,
    open: Mutex<HashMap<u64, Open>>,
}

impl Travels {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, to: MemberId) -> (u64, Receiver<Result<(), String>>) {
        let token = self.next.fetch_add(1, Ordering::Relaxed);
        let (tell, told) = answer();
        self.lock().insert(token, (to, tell));
        (token, told)
    }

    /// The move is over. News from a member that it did not go to are no news.
    fn end(&self, from: MemberId, token: u64, result: Result<(), String>) {
        let mut open = self.lock();
        if open.get(&token).is_some_and(|(to, _)| *to == from) {
            if let Some((_, tell)) = open.remove(&token) {
                let _ = tell.send(result);
            }
        }
    }

    fn forget(&self, token: u64) {
        self.lock().remove(&token);
    }
}

/// How the departure of one vCPU went.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Departed {
    /// It lives at the target; its image was so long.
    Moved {
        /// Bytes of state.
        bytes: u64,
    },
    /// It lives here, and why.
    Stayed(String),
    /// It was sent, and the target has said nothing.
    Unknown(String),
}

impl Member {
    /// Gets ready to take these vCPUs, by the deadline of whoever asks. Nothing is changed that anybody could see.
    ///
    /// # Errors
    /// This host can't run them.
    pub fn expect(&self, vcpus: &[u32]) -> Result<(), MemberError> {
        fault::at(self.plan().me, "expect").map_err(MemberError::Plan)?;
        if self.running_machine().is_none() {
            return Err(MemberError::Order("the guest does not run"));
        }
        let facts = super::HostFacts::probe().map_err(|e| MemberError::Plan(chain(&e)))?;
        let common = CpuidTable::intersect(&[self.plan().cpuid.clone(), facts.cpuid]);
        if let Some(leaf) = self.plan().cpuid.0.iter().find(|leaf| !common.0.contains(leaf)) {
            return Err(MemberError::Plan(format!(
                "this host's CPU lacks a feature that the guest sees (CPUID {:#x})",
                leaf.function
            )));
        }
        for id in vcpus {
            self.make_vcpu(*id)?;
        }
        Ok(())
    }

    /// Sends these vCPUs to another member, which expects them. Returns how it went with each, after at most about
    /// `limit`.
    pub fn depart(&self, vcpus: &[u32], to: MemberId, epoch: u64, limit: Duration) -> Vec<(u32, Departed)> {
        let end = Instant::now() + limit;
        let Some(machine) = self.running_machine() else {
            let why = Departed::Stayed("the guest does not run".into());
            return vcpus.iter().map(|id| (*id, why.clone())).collect();
        };
        if to == self.plan().me || !self.fabric().peers().any(|peer| peer == to) {
            let why = Departed::Stayed(format!("{to} is no other member"));
            return vcpus.iter().map(|id| (*id, why.clone())).collect();
        }
        let leaving: Vec<_> = vcpus
            .iter()
            .map(|id| {
                let (token, told) = machine.travels.begin(to);
                let claim = Arc::new(Claim::default());
                let (tell, sent) = answer();
                let order = Order::Depart(Departure {
                    to,
                    epoch,
                    origin: self.plan().me,
                    token,
                    claim: claim.clone(),
                    answer: tell,
                });
                let here = self.switchboard().handle(*id).filter(|h| h.is_here());
                let taken = here.is_some_and(|handle| handle.order(order));
                (*id, token, taken, claim, sent, told)
            })
            .collect();
        let mut results = Vec::new();
        for (id, token, taken, claim, sent, told) in leaving {
            let departed = if taken {
                wait(&claim, &sent, &told, end)
            } else {
                Departed::Stayed("it is not here".into())
            };
            machine.travels.forget(token);
            results.push((id, departed));
        }
        results
    }

    /// Learns where vCPUs live. Returns how long the guest was without each of those that live here now, since they came.
    pub fn placed(&self, places: &[(u32, MemberId, u64)]) -> Vec<(u32, u64)> {
        let board = self.switchboard();
        for (id, member, epoch) in places {
            board.placement().set(*id, *member, *epoch);
        }
        let here = places.iter().filter_map(|(id, ..)| board.handle(*id)).filter(|h| h.is_here());
        here.map(|handle| (handle.id(), handle.downtime_ns())).collect()
    }
}

fn wait(
    claim: &Claim,
    sent: &Receiver<Result<usize, String>>,
    told: &Receiver<Result<(), String>>,
    end: Instant,
) -> Departed {
    let left = || end.saturating_duration_since(Instant::now());
    let mut answer = sent.recv_timeout(left());
    if answer.is_err() {
        if claim.take() {
            return Departed::Stayed(
                "it did not leave the guest in time: it waits for a page or a device".into(),
            );
        }
        answer = sent.recv_timeout(SENDING);
    }
    match answer {
        Ok(Ok(bytes)) => match told.recv_timeout(left().max(Duration::from_millis(1))) {
            Ok(Ok(())) => Departed::Moved { bytes: u64::try_from(bytes).unwrap_or(u64::MAX) },
            Ok(Err(why)) => Departed::Stayed(why),
            Err(_) => Departed::Unknown("it was sent, and the target has not confirmed it".into()),
        },
        Ok(Err(why)) => Departed::Stayed(why),
        Err(_) => Departed::Stayed("its thread has ended".into()),
    }
}

impl MemberMachine {
    /// A vCPU leaves: see [`crate::kvm::exec::Machine::send_vcpu`].
    pub(super) fn dispatch(&self, to: MemberId, ticket: &Ticket, bytes: &[u8]) {
        self.switchboard.placement().set(ticket.vcpu, to, ticket.epoch);
        self.fabric.send_image(to, bytes);
    }

    /// A vCPU comes.
    pub(super) fn admit(&self, from: MemberId, bytes: &[u8]) {
        let image = match image::decode(bytes) {
            Ok(image) => Box::new(image),
            Err(e) => return self.fabric.cut_off(from, &chain(&e)),
        };
        let ticket = image.ticket.clone();
        let Some(handle) = self.switchboard.handle(ticket.vcpu) else {
            return self.fabric.cut_off(from, "a vCPU that the VM does not have");
        };
        let placed = || self.switchboard.placement().set(ticket.vcpu, self.me(), ticket.epoch);
        let (image, why) = match fault::at(self.me(), "arrive") {
            Err(why) if ticket.returned.is_none() => (image, why),
            _ => {
                let mut pages = image.body.pages.clone();
                pages.truncate(MOST_PAGES);
                match handle.arrive(image, placed) {
                    None => {
                        self.rest.population(true);
                        return self.rest.want(&pages);
                    }
                    Some(image) => (image, "the target did not expect it".to_string()),
                }
            }
        };
        if ticket.returned.is_some() {
            // It left from here, so there is a thread, and it is not here: this can't be.
            return self.fabric.cut_off(from, "a vCPU came back that had not left");
        }
        let back = Ticket { epoch: ticket.epoch + 1, returned: Some(why), ..ticket };
        let parts = encode_body(&back, &image.body).and_then(|mut bytes| {
            bytes.extend(encode_inbox(&image.inbox)?);
            Ok(bytes)
        });
        match parts {
            Ok(bytes) => self.dispatch(from, &back, &bytes),
            Err(e) => self.fabric.cut_off(from, &chain(&e)),
        }
    }

    /// A vCPU is set up here: see [`crate::kvm::exec::Machine::confirm`].
    pub(super) fn confirm_move(&self, ticket: &Ticket) {
        match &ticket.returned {
            None => {
                let moved = crate::fabric::wire::Message::Moved { token: ticket.token, vcpu: ticket.vcpu };
                // The guest waits for this thread.
                self.fabric.send_later(ticket.origin, &moved);
            }
            Some(why) => {
                // Only this member knows the token, and who had it.
                let to = self.travels.lock().get(&ticket.token).map(|(to, _)| *to);
                if let Some(to) = to {
                    self.travels.end(to, ticket.token, Err(why.clone()));
                }
            }
        }
    }

    /// A peer has set up a vCPU that left from here.
    pub(super) fn confirmed(&self, from: MemberId, token: u64) {
        self.travels.end(from, token, Ok(()));
    }
}
