//! What everybody but its own thread has of a vCPU: its local APIC, a mailbox, counters, and a bell.
//!
//! Rule for the bell: first put the message where it belongs (IRR, mailbox bit), then ring. The vCPU thread
//! announces that it is about to enter the guest, then looks at the mailbox a last time; so either it sees the
//! message or the ringer sees the announcement.

use super::desk::{Desk, Order};
use super::gate::Gate;
use super::image::{Inbox, VcpuImage};
use super::signal;
use crate::interrupts::lapic::LocalApic;
use crate::interrupts::{DeliveryMode, Destination, InterruptMessage};
use crate::member::stats::VcpuStats;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Bits of the mailbox.
pub(super) mod mail {
    /// Something new is in IRR.
    pub const IRQ: u32 = 1;
    pub const NMI: u32 = 1 << 1;
    pub const INIT: u32 = 1 << 2;
    /// The vector is in `startup`.
    pub const STARTUP: u32 = 1 << 3;
    /// The thread ends.
    pub const STOP: u32 = 1 << 4;
    /// The TSC offset changed.
    pub const CLOCK: u32 = 1 << 5;
    /// There are orders on the desk, or the vCPU has come.
    pub const ORDER: u32 = 1 << 6;

    /// What goes along when the vCPU moves; all else is about this member's thread.
    pub fn travelling(mail: u32) -> u32 {
        mail & (IRQ | NMI | INIT | STARTUP)
    }
}

/// Where the vCPU thread is.
mod place {
    pub const HOST: u32 = 0;
    pub const GUEST: u32 = 1;
    pub const WAITING: u32 = 2;
}

macro_rules! counters {
    ($($name:ident),*) => {
        /// Counters of a vCPU; written by its own thread, read by anybody.
        #[derive(Debug, Default)]
        pub struct Counters { $(#[doc = "See [`VcpuStats`]."] pub $name: AtomicU64),* }

        impl Counters {
            fn snapshot(&self, vcpu: u32) -> VcpuStats {
                VcpuStats { vcpu, waits: Vec::new(), $($name: self.$name.load(Ordering::Relaxed)),* }
            }
        }
    };
}
counters!(
    exits,
    pio,
    mmio,
    msr,
    hlt,
    irq_window,
    interrupted,
    injections,
    nmis,
    ipis_local,
    ipis_remote,
    timer_fires,
    remote_accesses,
    halted_us
);

/// Adds one.
pub fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// The vCPU has it.
    Taken,
    /// The vCPU is here, and the message is not for it, or its APIC refused it.
    Ignored,
    /// The vCPU is not here.
    Away,
}

/// One vCPU, for others: every member has a handle of every vCPU of the VM, of which those are `here` that live there.
#[derive(Debug)]
pub struct VcpuHandle {
    id: u32,
    /// Held for register accesses and acceptance only, never across I/O.
    apic: Mutex<LocalApic>,
    /// The vCPU lives here. Changes while `apic` is locked, so that a message is delivered or handed on, never both.
    here: AtomicBool,
    /// A vCPU that came, for its thread to set up.
    arrival: Mutex<Option<Box<VcpuImage>>>,
    downtime_ns: AtomicU64,
    mailbox: AtomicU32,
    place: AtomicU32,
    /// In KVM_RUN, or about to call it. Unlike `place`, only its thread changes this.
    inside: AtomicBool,
    gate: Arc<Gate>,
    startup: AtomicU32,
    tid: AtomicI32,
    desk: Desk,
    /// What it counts.
    pub counters: Counters,
}

impl VcpuHandle {
    /// A vCPU after power-up, which lives here or elsewhere. All of one member have the same gate.
    pub fn new(id: u32, here: bool, gate: Arc<Gate>) -> VcpuHandle {
        VcpuHandle {
            id,
            apic: Mutex::new(LocalApic::new(id, id == 0)),
            here: AtomicBool::new(here),
            arrival: Mutex::default(),
            downtime_ns: AtomicU64::new(0),
            mailbox: AtomicU32::new(0),
            place: AtomicU32::new(place::HOST),
            inside: AtomicBool::new(false),
            gate,
            startup: AtomicU32::new(0),
            tid: AtomicI32::new(0),
            desk: Desk::default(),
            counters: Counters::default(),
        }
    }

    /// Its id, which is its APIC id.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Its local APIC.
    pub fn apic(&self) -> MutexGuard<'_, LocalApic> {
        // A panic elsewhere must not become one here; the model has no broken intermediate states.
        self.apic.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does it live here?
    pub fn is_here(&self) -> bool {
        self.here.load(Ordering::SeqCst)
    }

    /// A thread takes its orders.
    pub fn has_thread(&self) -> bool {
        self.desk.is_open()
    }

    /// How long the guest did not have it when it last moved here, nanoseconds.
    pub fn downtime_ns(&self) -> u64 {
        self.downtime_ns.load(Ordering::SeqCst)
    }

    pub(super) fn set_downtime(&self, ns: u64) {
        self.downtime_ns.store(ns, Ordering::SeqCst);
    }

    /// Takes it away from here in one step. `send` gets what was delivered until then; if it fails nothing changes.
    pub(super) fn cut<T, E>(&self, send: impl FnOnce(Inbox) -> Result<T, E>) -> Result<T, E> {
        let apic = self.apic();
        let pending = self.mailbox.load(Ordering::SeqCst);
        let mail = mail::travelling(pending);
        let startup = self.startup.load(Ordering::SeqCst);
        let result = send(Inbox { apic: apic.clone(), mail, startup })?;
        self.here.store(false, Ordering::SeqCst);
        // All who set these bits hold the lock.
        self.mailbox.fetch_and(!mail::travelling(u32::MAX), Ordering::SeqCst);
        Ok(result)
    }

    /// The vCPU comes to live here, with all that was delivered to it elsewhere; its thread does the rest. `placed` is
    /// called in the same step. Gives the image back if there is no thread, or the vCPU is here already.
    pub fn arrive(&self, image: Box<VcpuImage>, placed: impl FnOnce()) -> Option<Box<VcpuImage>> {
        if !self.has_thread() {
            return Some(image);
        }
        let mut apic = self.apic();
        if self.is_here() {
            return Some(image);
        }
        *apic = image.inbox.apic.clone();
        self.startup.store(image.inbox.startup, Ordering::SeqCst);
        self.mailbox.fetch_or(mail::travelling(image.inbox.mail), Ordering::SeqCst);
        *self.arrival.lock().unwrap_or_else(PoisonError::into_inner) = Some(image);
        placed();
        self.here.store(true, Ordering::SeqCst);
        drop(apic);
        self.ring(mail::ORDER);
        None
    }

    pub(super) fn take_arrival(&self) -> Option<Box<VcpuImage>> {
        self.arrival.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Does a logical destination mean this vCPU?
    pub fn matches_logical(&self, mda: u32) -> bool {
        self.apic().matches_logical(mda)
    }

    /// Hands it a message, if it lives here and is one of those that the message is for. Never blocks for long.
    pub fn deliver(&self, message: &InterruptMessage) -> Delivery {
        let mut apic = self.apic();
        if !self.is_here() {
            return Delivery::Away;
        }
        let meant = match message.destination {
            Destination::All | Destination::Physical(u32::MAX) => true,
            Destination::AllButSelf => Some(self.id) != message.source,
            Destination::Physical(id) => id == self.id,
            Destination::Logical(mda) => apic.matches_logical(mda),
        };
        let bit = match message.mode {
            _ if !meant => return Delivery::Ignored,
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                if !apic.accept(message.vector, message.level_triggered) {
                    return Delivery::Ignored;
                }
                mail::IRQ
            }
            DeliveryMode::Nmi => mail::NMI,
            DeliveryMode::Init if message.asserted => mail::INIT,
            DeliveryMode::Startup => {
                self.startup.store(u32::from(message.vector), Ordering::SeqCst);
                mail::STARTUP
            }
            // Nobody is there to take these: no SMM, no 8259.
            DeliveryMode::Init | DeliveryMode::Smi | DeliveryMode::ExtInt => return Delivery::Ignored,
        };
        self.post(bit);
        drop(apic);
        self.wake();
        Delivery::Taken
    }

    /// Ends its thread at the next chance.
    pub fn stop(&self) {
        self.ring(mail::STOP);
    }

    /// Makes it look at the clock again.
    pub fn clock_changed(&self) {
        self.ring(mail::CLOCK);
    }

    /// Gives its thread an order. False when it has none, or none any more.
    pub fn order(&self, order: Order) -> bool {
        let taken = self.desk.put(order);
        if taken {
            self.ring(mail::ORDER);
        }
        taken
    }

    /// A thread is about to run it: orders are taken from now on.
    pub fn open_desk(&self) {
        self.desk.open();
    }

    pub(super) fn next_order(&self) -> Option<Order> {
        self.desk.take()
    }

    /// Kernel id of its thread; 0 while there is none.
    pub fn thread(&self) -> u32 {
        u32::try_from(self.tid.load(Ordering::SeqCst)).unwrap_or(0)
    }

    /// Sends it out of the guest (or out of a wait) with no message.
    pub fn kick(&self) {
        let tid = self.tid.load(Ordering::SeqCst);
        if tid != 0 {
            signal::kick(tid);
        }
    }

    /// What it counted.
    pub fn stats(&self) -> VcpuStats {
        self.counters.snapshot(self.id)
    }

    fn ring(&self, bit: u32) {
        self.post(bit);
        self.wake();
    }

    fn post(&self, bit: u32) {
        self.mailbox.fetch_or(bit, Ordering::SeqCst);
    }

    fn wake(&self) {
        let was = self.place.compare_exchange(place::GUEST, place::HOST, Ordering::SeqCst, Ordering::SeqCst);
        match was {
            Ok(_) => self.kick(),
            Err(place::WAITING) => futex_wake(&self.mailbox),
            Err(_) => {}
        }
    }

    pub(super) fn register_thread(&self) {
        self.tid.store(signal::current_tid(), Ordering::SeqCst);
    }

    pub(super) fn unregister_thread(&self) {
        self.desk.close();
        self.tid.store(0, Ordering::SeqCst);
    }

    pub(super) fn take_mail(&self) -> u32 {
        self.mailbox.swap(0, Ordering::SeqCst)
    }

    /// Mail that its thread has not looked at, and the vector of the last start-up IPI.
    pub(super) fn pending(&self) -> (u32, u32) {
        (self.mailbox.load(Ordering::SeqCst), self.startup_vector())
    }

    pub(super) fn set_startup(&self, vector: u32) {
        self.startup.store(vector, Ordering::SeqCst);
    }

    pub(super) fn startup_vector(&self) -> u32 {
        self.startup.load(Ordering::SeqCst)
    }

    /// Announces KVM_RUN. False when there is mail, or the gate is closed: then don't, but [`VcpuHandle::pass_gate`].
    pub(super) fn enter_guest(&self) -> bool {
        self.inside.store(true, Ordering::SeqCst);
        self.place.store(place::GUEST, Ordering::SeqCst);
        let clear = self.mailbox.load(Ordering::SeqCst) == 0 && !self.gate.is_closed();
        if !clear {
            self.leave_guest();
        }
        clear
    }

    pub(super) fn leave_guest(&self) {
        self.place.store(place::HOST, Ordering::SeqCst);
        self.inside.store(false, Ordering::SeqCst);
    }

    /// Waits while the gate is closed.
    pub(super) fn pass_gate(&self) {
        self.gate.pass();
    }

    /// It may be executing guest instructions.
    pub fn is_inside(&self) -> bool {
        self.inside.load(Ordering::SeqCst)
    }

    /// Sleeps until there is mail, a signal comes, or the time is over.
    pub(super) fn wait(&self, timeout: Option<Duration>) {
        self.place.store(place::WAITING, Ordering::SeqCst);
        futex_wait(&self.mailbox, 0, timeout);
        self.place.store(place::HOST, Ordering::SeqCst);
    }
}

pub(super) fn futex_wait(word: &AtomicU32, expected: u32, timeout: Option<Duration>) {
    let spec = timeout.map(|t| libc::timespec {
        tv_sec: i64::try_from(t.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(t.subsec_nanos()),
    });
    let spec = spec.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the word and the timespec outlive the call; every way to return is fine, the caller looks again.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
            expected,
            spec,
        )
    };
}

fn futex_wake(word: &AtomicU32) {
    wake(word, 1);
}

pub(super) fn futex_wake_all(word: &AtomicU32) {
    wake(word, i32::MAX);
}

fn wake(word: &AtomicU32, count: i32) {
    // SAFETY: only the address of the word is used.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, count)
    };
}
