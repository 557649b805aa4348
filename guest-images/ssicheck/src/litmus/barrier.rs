//! Where the threads of a litmus test meet.
//!
//! Waiting spins a little, yields a little, then sleeps on a futex, so that it works with more threads than CPUs and
//! with vCPUs that share a host CPU. All words are on one page: meeting costs few page transfers.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::context::PATIENCE;
use crate::failure::Failure;
use crate::sys::shared::Shared;
use crate::sys::{cpu, futex};

/// A reusable barrier for a fixed number of threads.
#[derive(Debug)]
pub struct Barrier {
    memory: Shared,
    threads: u32,
}

impl Barrier {
    /// A barrier for `threads` threads.
    pub fn new(threads: usize) -> Result<Barrier, Failure> {
        let threads = u32::try_from(threads).map_err(|_| Failure::Other("too many threads".into()))?;
        Ok(Barrier { memory: Shared::anonymous(1)?, threads })
    }

    /// Waits for all threads; the last one to arrive runs `last` before anybody goes on.
    pub fn meet(&self, last: impl FnOnce()) -> Result<(), Failure> {
        let [arrived, generation, sleepers, ..] = self.memory.words() else {
            return Err(Failure::Other("no memory for the barrier".into()));
        };
        let mine = generation.load(Ordering::SeqCst);
        if arrived.fetch_add(1, Ordering::SeqCst) + 1 == self.threads {
            last();
            arrived.store(0, Ordering::SeqCst);
            generation.store(mine.wrapping_add(1), Ordering::SeqCst);
            if sleepers.load(Ordering::SeqCst) > 0 {
                futex::wake(generation, i32::MAX);
            }
            return Ok(());
        }
        for round in 0..60 {
            for _ in 0..100 {
                if generation.load(Ordering::SeqCst) != mine {
                    return Ok(());
                }
                std::hint::spin_loop();
            }
            if round >= 10 {
                cpu::yield_now();
            }
        }
        let start = Instant::now();
        sleepers.fetch_add(1, Ordering::SeqCst);
        while generation.load(Ordering::SeqCst) == mine {
            futex::wait(generation, mine, Duration::from_millis(200));
            if start.elapsed() > PATIENCE {
                let here = arrived.load(Ordering::SeqCst);
                let what = format!("barrier {mine}: {here} of {} threads arrived", self.threads);
                return Err(Failure::timeout(what, PATIENCE));
            }
        }
        sleepers.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }
}
