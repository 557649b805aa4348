//! What a vCPU thread is asked to do besides running: each order is carried out on the thread itself, between two
//! entries of the guest, and answered. An order whose answer can't come any more (the thread has ended) shows as a
//! closed channel.

use dsm::addr::MemberId;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One order.
#[derive(Debug)]
pub enum Order {
    /// Leave the guest, complete the last exit and wait, parked. Answered when that is so.
    Park(Sender<()>),
    /// Go on. Nothing happens to a vCPU that is not parked.
    Resume,
    /// Leave for another member.
    Depart(Departure),
    /// Say what you are; only while parked.
    Capture(Sender<super::still::Captured>),
}

/// A vCPU is to leave.
#[derive(Debug)]
pub struct Departure {
    /// Where to.
    pub to: MemberId,
    /// Placement epoch of the move; the next one is kept for its return.
    pub epoch: u64,
    /// This member.
    pub origin: MemberId,
    /// Names the move here.
    pub token: u64,
    /// Whose decision it is.
    pub claim: Arc<Claim>,
    /// Answered with the bytes sent, or why it stayed.
    pub answer: Sender<Result<usize, String>>,
}

/// Decides between a thread that carries an order out and a waiter that gives it up: exactly one of them wins.
#[derive(Debug, Default)]
pub struct Claim(AtomicBool);

impl Claim {
    /// True for the first who asks.
    pub fn take(&self) -> bool {
        !self.0.swap(true, Ordering::SeqCst)
    }
}

/// The orders of one vCPU thread; `None` while there is no thread to take them.
#[derive(Debug, Default)]
pub(super) struct Desk(Mutex<Option<VecDeque<Order>>>);

impl Desk {
    fn lock(&self) -> MutexGuard<'_, Option<VecDeque<Order>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on a thread takes orders, or will soon.
    pub fn open(&self) {
        self.lock().get_or_insert_default();
    }

    /// Is there a thread?
    pub fn is_open(&self) -> bool {
        self.lock().is_some()
    }

    /// No thread takes orders any more; who waits for an answer is told.
    pub fn close(&self) {
        *self.lock() = None;
    }

    /// Queues an order. False when nobody would take it.
    pub fn put(&self, order: Order) -> bool {
        match self.lock().as_mut() {
            Some(orders) => {
                orders.push_back(order);
                true
            }
            None => false,
        }
    }

    pub fn take(&self) -> Option<Order> {
        self.lock().as_mut()?.pop_front()
    }
}

/// The two ends of an answer.
pub fn answer<T>() -> (Sender<T>, Receiver<T>) {
    channel()
}
