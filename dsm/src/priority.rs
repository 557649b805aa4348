//! Threads that all members wait for go before those that compute.
//!
//! A host's vCPU threads may be busy all the time, and a thread that serves pages wakes often, for some microseconds each. The
//! scheduler soon counts it among the busy ones and lets it wait until the vCPU's time slice is over, milliseconds that a
//! vCPU elsewhere waits as well. With a higher weight it runs as soon as it wakes.

use rustix::process::setpriority_process;
use std::sync::Once;

/// The most that `nice` can do for a thread (sched(7)).
const FIRST: i32 = -20;

/// Lets the calling thread go first, if this process may (CAP_SYS_NICE, or RLIMIT_NICE of 40); else it stays as it is, which
/// costs time only.
pub fn raise() {
    static SAID: Once = Once::new();
    // On Linux this is about the one thread, whatever the call's name says.
    if let Err(e) = setpriority_process(None, FIRST) {
        SAID.call_once(|| {
            tracing::info!(
                "threads that serve pages can't go before others ({e}): on a busy host each fault takes longer; \
                 CAP_SYS_NICE helps"
            );
        });
    }
}
