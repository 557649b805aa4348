//! A processor for each member, as hosts have their own, and one that does not sleep.
//!
//! Left to the scheduler, two processes on a machine with few processors sometimes share one and sometimes do not, and a wake
//! that goes to a sleeping processor costs ten times as much as one that does not (20 to 30 us on a virtual machine).
//! Which of the wakes do is then a matter of luck, for a fault and for its floor, and their ratio means little.

use crate::addr::MemberId;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};

/// Lets this thread, and those that it starts from now on, run on the member's processor only: the members have those that
/// this thread may use in turn. With one processor there is nothing to choose.
///
/// # Errors
/// The kernel's.
pub fn pin(member: MemberId) -> io::Result<()> {
    let allowed = sched_getaffinity(None)?;
    let cpus: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect();
    let Some(cpu) = cpus.get(usize::from(member.0) % cpus.len().max(1)) else { return Ok(()) };
    let mut own = CpuSet::new();
    own.set(*cpu);
    Ok(sched_setaffinity(None, &own)?)
}

/// Keeps all processors of this machine from sleeping as long as it lives, if this process may: who opens
/// `/dev/cpu_dma_latency` and writes a number of microseconds wants none to take longer to wake (Linux,
/// Documentation/power/pm_qos_interface.rst). Other measuring tools do the same.
#[derive(Debug)]
pub struct Awake(Option<File>);

impl Awake {
    /// Begins.
    pub fn start() -> Awake {
        let file = OpenOptions::new().write(true).open("/dev/cpu_dma_latency");
        Awake(file.and_then(|mut file| file.write_all(&0i32.to_ne_bytes()).map(|()| file)).ok())
    }

    /// Whether it works.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }
}
