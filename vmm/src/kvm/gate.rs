//! Keeps the vCPUs of a member out of the guest for some microseconds, all at the same time, to change what they must not
//! see in two versions: their clock.
//!
//! ```text
//!  who changes    close, draw out ......... all out: change, tell, hold, open
//!  vCPU thread A      in the guest  | at the gate ........................ | in the guest, with the new clock
//!  vCPU thread B          waits for a page, in the kernel, a signal pending ............ | looks at its mail
//! ```
//!
//! A thread that waits for a page inside KVM_RUN may take long. It is not waited for: with a signal pending KVM_RUN returns
//! before the guest executes another instruction.

use super::handle::VcpuHandle;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// A signal reaches a vCPU that executes guest instructions within this time; who is still inside waits in the kernel.
const SIGNAL: Duration = Duration::from_millis(1);
/// A thread goes on after so long even if nobody opened the gate.
const LIMIT: Duration = Duration::from_millis(20);

/// The gate of one member's vCPUs.
#[derive(Debug, Default)]
pub struct Gate {
    /// 1 while it is closed; a futex.
    closed: AtomicU32,
}

impl Gate {
    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst) != 0
    }

    /// Waits until it is open.
    pub(super) fn pass(&self) {
        let end = Instant::now() + LIMIT;
        while self.is_closed() && Instant::now() < end {
            super::handle::futex_wait(&self.closed, 1, Some(LIMIT));
        }
    }

    /// Calls `change` while none of these vCPUs, which are all of this gate, executes guest instructions, and keeps them out for
    /// `hold` (some microseconds) afterwards. Then they look at the clock. One thread at a time may call this.
    pub fn together(&self, vcpus: &[Arc<VcpuHandle>], hold: Duration, change: impl FnOnce()) {
        self.closed.store(1, Ordering::SeqCst);
        let here = || vcpus.iter().filter(|v| v.is_inside());
        here().for_each(|v| v.kick());
        let start = Instant::now();
        while here().next().is_some() && start.elapsed() < SIGNAL {
            std::thread::yield_now();
        }
        change();
        let changed = Instant::now();
        vcpus.iter().filter(|v| v.is_here()).for_each(|v| v.clock_changed());
        while changed.elapsed() < hold {
            std::hint::spin_loop();
        }
        self.closed.store(0, Ordering::SeqCst);
        super::handle::futex_wake_all(&self.closed);
    }
}
