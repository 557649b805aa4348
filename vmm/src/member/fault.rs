//! Faults on purpose, for tests over the real binary: `SPANVM_FAULT=MEMBER:STEP:ACTION[:N][,...]`, where the action is
//! `refuse` (the step fails), `die` (the process ends), `hang` (the step never ends) or `slow` (it takes two seconds more), at
//! the N-th time only if there is an N.
//! Without the variable this costs one load. Steps of a move: `expect`, `depart`, `arrive`, `restore`, `confirm`; of a
//! checkpoint: `pause`, `quiet`, `save`, `capture`, `release`, `resume`; of a drain: `entries`, `inherit`, `changeN` (table
//! number N), `evict`, `part`; of devices that go with it: `describe`, `inspect`, `give`, `take`, `discard`, `reclaim`; of an addition: `join` (at the start of the VM, too), `meet`.

use dsm::addr::MemberId;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Refuse,
    Die,
    Hang,
    Slow,
}

#[derive(Debug)]
struct Fault {
    member: MemberId,
    step: String,
    action: Action,
    /// The only time at which it happens, from 1.
    time: Option<u32>,
    seen: AtomicU32,
}

impl Fault {
    /// Counts one more time.
    fn happens(&self) -> bool {
        let seen = self.seen.fetch_add(1, Ordering::SeqCst) + 1;
        self.time.is_none_or(|time| time == seen)
    }
}

fn parse(text: &str) -> Vec<Fault> {
    let one = |fault: &str| {
        let mut parts = fault.split(':');
        let (member, step, action) = (parts.next()?, parts.next()?, parts.next()?);
        let action = match action {
            "refuse" => Action::Refuse,
            "die" => Action::Die,
            "hang" => Action::Hang,
            "slow" => Action::Slow,
            _ => return None,
        };
        let time = parts.next().map(str::parse).transpose().ok()?;
        let member = MemberId(member.parse().ok()?);
        Some(Fault { member, step: step.into(), action, time, seen: AtomicU32::new(0) })
    };
    text.split(',').filter_map(one).collect()
}

/// A step begins; fails if a fault says so.
///
/// # Errors
/// The fault is to refuse.
pub(super) fn at(me: MemberId, step: &str) -> Result<(), String> {
    static FAULTS: OnceLock<Vec<Fault>> = OnceLock::new();
    let faults = FAULTS.get_or_init(|| parse(&std::env::var("SPANVM_FAULT").unwrap_or_default()));
    match faults.iter().find(|f| f.member == me && f.step == step && f.happens()).map(|f| f.action) {
        None => Ok(()),
        Some(Action::Refuse) => Err(format!("a fault on purpose, at {step}")),
        Some(Action::Die) => std::process::abort(),
        Some(Action::Slow) => {
            std::thread::sleep(Duration::from_secs(2));
            Ok(())
        }
        Some(Action::Hang) => loop {
            std::thread::sleep(Duration::from_secs(3600));
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_read() {
        let found = parse("1:restore:refuse,x,0:arrive:die:2,2:arrive:burn,3:save:hang:x");
        let seen: Vec<_> = found.iter().map(|f| (f.member.0, f.step.as_str(), f.action, f.time)).collect();
        assert_eq!(seen, [(1, "restore", Action::Refuse, None), (0, "arrive", Action::Die, Some(2))]);
        assert_eq!([(); 3].map(|()| found[1].happens()), [false, true, false]);
        assert!(found[0].happens() && found[0].happens());
        assert_eq!(at(MemberId(9), "arrive"), Ok(()));
    }
}
