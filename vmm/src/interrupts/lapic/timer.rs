//! The local APIC's timer (11.5.4): one-shot, periodic and TSC-deadline. All times are guest TSC values.

use super::{ApicAction, LVT_MASKED, LocalApic, lvt};
use serde::{Deserialize, Serialize};

/// What the LVT timer entry's bits 18:17 select.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    OneShot,
    Periodic,
    TscDeadline,
}

impl Mode {
    /// The reserved encoding 3 counts once.
    fn of(entry: u32) -> Mode {
        match entry >> 17 & 3 {
            1 => Mode::Periodic,
            2 => Mode::TscDeadline,
            _ => Mode::OneShot,
        }
    }
}

/// State of the timer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Timer {
    initial: u32,
    /// Divide configuration register as written.
    divide: u32,
    /// When it fires next.
    next: Option<u64>,
}

impl Timer {
    /// log2 of the divisor (Figure 11-10): bits 3,1,0 count 2, 4, ..., 128, and 111b is 1.
    fn shift(&self) -> u32 {
        let encoded = (self.divide >> 1 & 4) | (self.divide & 3);
        (encoded + 1) & 7
    }

    fn ticks(&self, count: u32) -> u64 {
        u64::from(count) << self.shift()
    }

    fn remaining(&self, now: u64) -> u32 {
        let left = self.next.map_or(0, |next| next.saturating_sub(now)) >> self.shift();
        u32::try_from(left).unwrap_or(u32::MAX)
    }
}

impl LocalApic {
    fn timer_mode(&self) -> Mode {
        Mode::of(self.lvt[lvt::TIMER])
    }

    /// When the timer fires next, or `None` while it is disarmed or its interrupt would go nowhere.
    pub fn timer_deadline(&self) -> Option<u64> {
        let next = self.timer.next?;
        // A masked one-shot timer has no effect that anyone could see before its count is read.
        (self.lvt[lvt::TIMER] & LVT_MASKED == 0).then_some(next)
    }

    /// Lets the timer fire if its time has come. True when it did. A periodic timer that is several periods
    /// late fires once, and goes on in phase.
    pub fn timer_expire(&mut self, now: u64) -> bool {
        let Some(next) = self.timer.next.filter(|next| *next <= now) else { return false };
        self.timer.next = match self.timer_mode() {
            Mode::Periodic => {
                let period = self.timer.ticks(self.timer.initial).max(1);
                Some(next.saturating_add(((now - next) / period + 1).saturating_mul(period)))
            }
            Mode::OneShot | Mode::TscDeadline => None,
        };
        self.fire_local(lvt::TIMER);
        true
    }

    pub(super) fn write_timer_lvt(&mut self, value: u32, now: u64) -> ApicAction {
        if self.lvt[lvt::TIMER] & LVT_MASKED != 0 {
            // Nobody waited for it while it was masked: what expired then is lost, not late.
            self.timer_expire(now);
        }
        let (old, new) = (self.timer_mode(), Mode::of(value));
        // 11.5.4.1: going to or from TSC-deadline mode disarms.
        if (old == Mode::TscDeadline) != (new == Mode::TscDeadline) {
            self.timer.next = None;
        }
        self.lvt[lvt::TIMER] = value;
        ApicAction::TimerChanged
    }

    pub(super) fn initial_count(&self) -> u32 {
        self.timer.initial
    }

    pub(super) fn write_initial_count(&mut self, value: u32, now: u64) -> ApicAction {
        if self.timer_mode() == Mode::TscDeadline {
            return ApicAction::None;
        }
        self.timer.initial = value;
        self.timer.next = (value != 0).then(|| now.saturating_add(self.timer.ticks(value)));
        ApicAction::TimerChanged
    }

    /// Reading a periodic timer whose expiry has not been handled yet shows the count of the running period.
    pub(super) fn current_count(&self, now: u64) -> u32 {
        match (self.timer_mode(), self.timer.next) {
            (Mode::TscDeadline, _) | (_, None) => 0,
            (Mode::Periodic, Some(next)) if next <= now => {
                let period = self.timer.ticks(self.timer.initial).max(1);
                let left = period - (now - next) % period;
                u32::try_from(left >> self.timer.shift()).unwrap_or(u32::MAX)
            }
            _ => self.timer.remaining(now),
        }
    }

    pub(super) fn divide(&self) -> u32 {
        self.timer.divide
    }

    /// A new divisor applies to what is left of a running count.
    pub(super) fn write_divide(&mut self, value: u32, now: u64) -> ApicAction {
        let left = self.timer.remaining(now);
        self.timer.divide = value & 0xB;
        if self.timer_mode() != Mode::TscDeadline && self.timer.next.is_some_and(|next| next > now) {
            self.timer.next = Some(now.saturating_add(self.timer.ticks(left.max(1))));
        }
        ApicAction::TimerChanged
    }

    /// RDMSR IA32_TSC_DEADLINE: 0 while disarmed or in another mode.
    pub fn tsc_deadline(&self) -> u64 {
        if self.timer_mode() == Mode::TscDeadline { self.timer.next.unwrap_or(0) } else { 0 }
    }

    /// WRMSR IA32_TSC_DEADLINE: 0 disarms, a time in the past fires at once; ignored in the other modes.
    pub fn set_tsc_deadline(&mut self, value: u64) -> ApicAction {
        if self.timer_mode() != Mode::TscDeadline {
            return ApicAction::None;
        }
        self.timer.next = (value != 0).then_some(value);
        ApicAction::TimerChanged
    }
}
