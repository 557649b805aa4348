//! A processor for each member, as hosts have their own, and one that does not sleep.
//!
//! Left to the scheduler, two processes on a machine with few processors sometimes share one and sometimes do not, and a wake
//! that goes to a sleeping processor costs ten times as much as one that does not (20 to 30 us on a virtual machine).
//! Which of the wakes do is then a matter of luck, for a fault and for its floor, and their ratio means little.

use crate::addr::MemberId;
use rustix::io::Errno;
use rustix::thread::{CpuSet, Pid, sched_getaffinity, sched_setaffinity};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};

/// A thread that stays on a processor until this goes, on the same thread.
#[derive(Debug)]
pub struct Pinned(CpuSet);

impl Drop for Pinned {
    fn drop(&mut self) {
        // What could be used before can be used again.
        let _ = sched_setaffinity(None, &self.0);
    }
}

/// Lets this thread, and those that it starts from now on, run on the member's processor only: the members have those that
/// this thread may use in turn. With one processor there is nothing to choose.
///
/// # Errors
/// The kernel's.
pub fn pin(member: MemberId) -> io::Result<Pinned> {
    let before = sched_getaffinity(None)?;
    if let Some(own) = own(member)? {
        sched_setaffinity(None, &own)?;
    }
    Ok(Pinned(before))
}

/// The same for a member that is another process, whose threads may use what this one may.
///
/// # Errors
/// The kernel's; there is no such process.
pub fn pin_process(pid: u32, member: MemberId) -> io::Result<()> {
    let Some(own) = own(member)? else { return Ok(()) };
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
        match task.map_or(Ok(()), |task| sched_setaffinity(Some(task), &own)) {
            // Threads come and go.
            Ok(()) | Err(Errno::SRCH) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

fn own(member: MemberId) -> io::Result<Option<CpuSet>> {
    let allowed = sched_getaffinity(None)?;
    let cpus: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect();
    Ok(cpus.get(usize::from(member.0) % cpus.len().max(1)).map(|cpu| {
        let mut own = CpuSet::new();
        own.set(*cpu);
        own
    }))
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
