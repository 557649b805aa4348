//! Waiting for interrupts.

use crate::apic::{LVT_TIMER, TSC_DEADLINE};
use crate::env::{Env, Failure, bad};
use crate::{boot, machine};
use core::sync::atomic::Ordering;

/// Vector of the timer that ends a HLT whose interrupt does not come.
const WATCHDOG: u32 = 0x40;

/// Interrupts of `vector` that `cpu` has taken.
pub fn count(cpu: usize, vector: u8) -> u64 {
    boot::cpu_blocks[cpu % boot::MAX_CPUS].interrupts[usize::from(vector)].load(Ordering::Acquire)
}

/// How a CPU waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Idle {
    /// HLT at CPL 0; interrupts only there.
    Halt,
    /// A loop at CPL 3 with interrupts on.
    Spin,
}

impl Idle {
    /// As `idle=` says.
    ///
    /// # Errors
    /// Another word.
    pub fn of(env: &Env) -> Result<Self, Failure> {
        match env.cmdline.text("idle") {
            None | Some("halt") => Ok(Self::Halt),
            Some("spin") => Ok(Self::Spin),
            Some(_) => Err(bad("idle= must be halt or spin")),
        }
    }

    /// Name as on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Halt => "halt",
            Self::Spin => "spin",
        }
    }
}

/// Waits of one CPU, with one deadline for all of them together.
#[derive(Debug)]
pub struct Waiter<'a> {
    env: &'a Env,
    cpu: usize,
    idle: Idle,
    end: u64,
}

impl<'a> Waiter<'a> {
    /// Arms the deadline (through the TSC-deadline timer when the CPU will halt).
    pub fn new(env: &'a Env, cpu: usize, idle: Idle) -> Self {
        let end = machine::tsc().saturating_add(env.patience);
        match idle {
            Idle::Halt => {
                env.apic.write(LVT_TIMER, 2 << 17 | WATCHDOG);
                machine::wrmsr(TSC_DEADLINE, end);
            }
            Idle::Spin => machine::interrupts(true),
        }
        Self { env, cpu, idle, end }
    }

    /// Waits until `done`.
    ///
    /// # Errors
    /// `what`, at the deadline.
    pub fn until(&mut self, what: &'static str, mut done: impl FnMut() -> bool) -> Result<(), Failure> {
        while !done() {
            if machine::tsc() >= self.end {
                return Err(Failure { cpu: self.cpu, what });
            }
            match self.idle {
                Idle::Halt => machine::halt(),
                Idle::Spin => core::hint::spin_loop(),
            }
        }
        Ok(())
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        match self.idle {
            Idle::Halt => {
                machine::wrmsr(TSC_DEADLINE, 0);
                self.env.apic.write(LVT_TIMER, 1 << 16);
            }
            Idle::Spin => machine::interrupts(false),
        }
    }
}
