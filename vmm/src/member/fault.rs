//! Faults on purpose, for tests over the real binary: `SPANVM_FAULT=MEMBER:STEP:ACTION[,...]`, where the action is
//! `refuse` (the step fails), `die` (the process ends) or `hang` (the step never ends). Without the variable this costs one
//! load. Steps of a move: `expect`, `depart`, `arrive`, `restore`, `confirm`.

use dsm::addr::MemberId;
use std::sync::OnceLock;
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Refuse,
    Die,
    Hang,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Fault {
    member: MemberId,
    step: String,
    action: Action,
}

fn parse(text: &str) -> Vec<Fault> {
    let one = |fault: &str| {
        let mut parts = fault.split(':');
        let (member, step, action) = (parts.next()?, parts.next()?, parts.next()?);
        let action = match action {
            "refuse" => Action::Refuse,
            "die" => Action::Die,
            "hang" => Action::Hang,
            _ => return None,
        };
        Some(Fault { member: MemberId(member.parse().ok()?), step: step.into(), action })
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
    match faults.iter().find(|f| f.member == me && f.step == step).map(|f| f.action) {
        None => Ok(()),
        Some(Action::Refuse) => Err(format!("a fault on purpose, at {step}")),
        Some(Action::Die) => std::process::abort(),
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
        let found = parse("1:restore:refuse,x,0:arrive:die,2:arrive:burn");
        let fault =
            |member, step: &str, action| Fault { member: MemberId(member), step: step.into(), action };
        assert_eq!(found, [fault(1, "restore", Action::Refuse), fault(0, "arrive", Action::Die)]);
        assert_eq!(at(MemberId(9), "arrive"), Ok(()));
    }
}
