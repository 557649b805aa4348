//! What a vCPU thread is asked to do besides running: each order is carried out on the thread itself, between two
//! entries of the guest, and answered. An order whose answer can't come any more (the thread has ended) shows as a
//! closed channel.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// One order.
#[derive(Debug)]
pub enum Order {
    /// Leave the guest, complete the last exit and wait, parked. Answered when that is so.
    Park(Sender<()>),
    /// Go on. Nothing happens to a vCPU that is not parked.
    Resume,
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
