//! Devices that go to other members: with the homes, in the pause of a change of tables ([`super::table`]).
//!
//! ```text
//! coordinator                 who has them       who is to have them      all members
//!   | Describe (the guest runs) |                   |                        |
//!   |-------------------------->|  flush            |                        |
//!   | Inspect                   |                   |                        |
//!   |---------------------------------------------->|  the same file? or the next member is asked
//!   |            ... the pause ...                  |                        |
//!   | Give                      |                   |                        |
//!   |-------------------------->|  flush, state, the lock is free            |
//!   | Take                      |                   |                        |
//!   |---------------------------------------------->|  the same file? locked, made, as it was
//!   | Change(table, owners)     |                   |                        |
//!   |----------------------------------------------------------------------->|  accesses go there
//!   | Discard                   |                   |                        |
//!   |-------------------------->|                   |                        |
//! ```
//!
//! If something fails before `Change`, or the old table is given again: `Discard` to who was to have them, then `Reclaim` to who
//! had them. An image that can't be locked again is in somebody else's hands: then the VM ends, rather than write to it.

use super::table::Roster;
use super::{OpError, Turn, console, odd, pause};
use crate::control::crew::GRACE;
use crate::control::end::End;
use crate::devices::handover::Portable;
use crate::devices::{DeviceSpec, spec};
use crate::member::devices::{DeviceReply, DeviceTask};
use crate::member::{MemberReply, MemberTask};
use dsm::addr::MemberId;
use std::collections::BTreeMap;
use std::time::Duration;

/// What was written and is not on the disk yet may take so long to get there while the guest runs.
const FLUSH: Duration = Duration::from_secs(60);
/// Before the VM is ended for a device that nobody has: who has died is named first.
const SETTLE: Duration = Duration::from_secs(1);

/// One device that goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceMove {
    /// Index of its window.
    pub window: usize,
    /// What it is.
    pub name: String,
    /// Who has it.
    pub from: MemberId,
    /// Who is to have it.
    pub to: MemberId,
}

/// What a device is, for people.
pub fn name(device: &DeviceSpec) -> String {
    match device {
        DeviceSpec::Blk { path, .. } => format!("the disk {}", path.display()),
        DeviceSpec::Rng { .. } => "the random-number device".into(),
        DeviceSpec::Console { .. } => "the virtio console".into(),
        DeviceSpec::Serial { .. } => "the serial port and the interrupt controller".into(),
    }
}

/// Which devices the user asked for go when one list takes the place of the other, and where to.
pub(super) fn report(old: &[DeviceSpec], new: &[DeviceSpec]) -> Vec<(String, u16)> {
    let gone = old.iter().zip(new).filter(|(old, new)| old.member() != new.member());
    gone.map(|(device, new)| (name(device), new.member().0)).collect()
}

/// Who has each device, by window.
///
/// # Errors
/// A list that no VM has.
pub fn owners(devices: &[DeviceSpec]) -> Result<Vec<MemberId>, OpError> {
    let windows = spec::windows(devices).map_err(|e| OpError::Failed(e.to_string()))?;
    Ok(windows.iter().map(|window| window.member).collect())
}

/// What goes when one list takes the place of the other; they differ in their members alone.
pub(super) fn moves(old: &[DeviceSpec], new: &[DeviceSpec]) -> Result<Vec<DeviceMove>, OpError> {
    let windows = spec::windows(old).map_err(|e| OpError::Failed(e.to_string()))?;
    let owners = owners(new)?;
    let all = windows.iter().zip(owners).enumerate().filter(|(_, (window, to))| window.member != *to);
    Ok(all
        .map(|(n, (window, to))| DeviceMove {
            window: n,
            name: window.spec.and_then(|at| old.get(at)).map_or_else(|| "the board".into(), name),
            from: window.member,
            to,
        })
        .collect())
}

/// Finds for each device of a member one of `others` that can have it; returns all devices of the VM with their new
/// members. The guest runs, and nothing changes.
///
/// # Errors
/// A device that none of them can have; the text says why.
pub async fn arrange(
    turn: &Turn,
    roster: &Roster,
    member: MemberId,
    others: &[MemberId],
) -> Result<Vec<DeviceSpec>, OpError> {
    let mut devices = roster.devices.clone();
    let windows = spec::windows(&devices).map_err(|e| OpError::Failed(e.to_string()))?;
    // The rest of the board goes with the serial port.
    let leaves = |w: &spec::DeviceWindow| w.member == member && w.spec.is_some();
    let leaving: Vec<usize> = (0..).zip(&windows).filter(|(_, w)| leaves(w)).map(|(n, _)| n).collect();
    if leaving.is_empty() {
        return Ok(devices);
    }
    let candidates = candidates(roster, member, others);
    let elsewhere = candidates.iter().any(|other| roster.host_of(*other) != roster.host_of(member));
    let known = describe(turn, member, leaving, elsewhere, FLUSH).await?;
    let mut refused = None;
    for device in known {
        let at = windows.get(device.window).and_then(|window| window.spec);
        let Some(spec) = at.and_then(|at| devices.get_mut(at)) else { continue };
        match heir(turn, &candidates, device).await {
            Ok(other) => spec.set_member(other),
            Err(why) => {
                let owner = turn.crew()?.name(member);
                refused = Some(format!("{owner} has {}, and no other member can take it: {why}", name(spec)));
                break;
            }
        }
    }
    if elsewhere {
        // Nothing is to stay beside the images; if it does the next description removes it.
        let _ = ask(turn, member, DeviceTask::Discard { windows: Vec::new() }, pause::LIMIT).await;
    }
    refused.map_or(Ok(devices), |why| Err(OpError::Refused(why)))
}

/// The first member that can have a device; or why none can.
async fn heir(turn: &Turn, candidates: &[MemberId], device: Portable) -> Result<MemberId, String> {
    let mut why = Vec::new();
    for other in candidates {
        match ask(turn, *other, DeviceTask::Inspect { devices: vec![device.clone()] }, pause::LIMIT).await {
            Ok(_) => return Ok(*other),
            Err(e) => why.push(e.to_string()),
        }
    }
    Err(why.join("; "))
}

/// Who may take devices of `member`: those on its own host first, then who has fewest devices.
fn candidates(roster: &Roster, member: MemberId, others: &[MemberId]) -> Vec<MemberId> {
    let mut all: Vec<MemberId> = others.iter().copied().filter(|other| *other != member).collect();
    let load = |other: &MemberId| roster.devices.iter().filter(|d| d.member() == *other).count();
    all.sort_by_key(|other| (roster.host_of(*other) != roster.host_of(member), load(other), *other));
    all
}

async fn describe(
    turn: &Turn,
    member: MemberId,
    windows: Vec<usize>,
    elsewhere: bool,
    limit: Duration,
) -> Result<Vec<Portable>, OpError> {
    match ask(turn, member, DeviceTask::Describe { windows, elsewhere }, limit).await? {
        DeviceReply::Described(known) => Ok(known),
        _ => Err(OpError::Failed(format!("{member} does not say what it has"))),
    }
}

/// Devices that have been given away, until it is clear where they stay.
#[derive(Debug, Default)]
pub(super) struct Handover {
    moves: Vec<DeviceMove>,
}

impl Handover {
    /// Everything up to the table: who had the devices has given them away, and who is to have them has them, idle.
    /// While the VM is paused.
    ///
    /// # Errors
    /// What failed; all is as it was, or the VM ends.
    pub async fn carry(turn: &Turn, roster: &Roster, moves: Vec<DeviceMove>) -> Result<Handover, OpError> {
        let handover = Handover { moves };
        match handover.pass(turn, roster).await {
            Ok(()) => Ok(handover),
            Err(e) => {
                handover.undo(turn).await?;
                Err(e)
            }
        }
    }

    async fn pass(&self, turn: &Turn, roster: &Roster) -> Result<(), OpError> {
        for (from, windows) in self.by(|device| device.from) {
            let of_it = |device: &&DeviceMove| device.from == from;
            let elsewhere = self
                .moves
                .iter()
                .filter(of_it)
                .any(|device| roster.host_of(device.to) != roster.host_of(from));
            let known = describe(turn, from, windows.clone(), elsewhere, pause::LIMIT).await?;
            let brings = windows.contains(&spec::BOARD_WINDOW);
            if brings {
                console::let_go(turn.shared()).await;
            }
            let DeviceReply::Given(states, ioapic) =
                ask(turn, from, DeviceTask::Give { windows, limit: pause::LIMIT }, pause::LIMIT).await?
            else {
                return Err(OpError::Failed(format!("{from} does not say how its devices are")));
            };
            let mut takes: BTreeMap<MemberId, Vec<(Portable, String)>> = BTreeMap::new();
            for device in self.moves.iter().filter(of_it) {
                let portable = known.iter().find(|known| known.window == device.window);
                let state = states.iter().find(|(n, _)| *n == device.window);
                let (Some(portable), Some((_, state))) = (portable, state) else {
                    return Err(OpError::Failed(format!("{from} says nothing of {}", device.name)));
                };
                takes.entry(device.to).or_default().push((portable.clone(), state.clone()));
            }
            for (to, devices) in takes {
                let board = |(device, _): &(Portable, String)| device.window == spec::BOARD_WINDOW;
                let ioapic = ioapic.clone().filter(|_| devices.iter().any(board));
                ask(turn, to, DeviceTask::Take { devices, ioapic, limit: pause::LIMIT }, pause::LIMIT)
                    .await?;
            }
        }
        Ok(())
    }

    fn by(&self, who: impl Fn(&DeviceMove) -> MemberId) -> BTreeMap<MemberId, Vec<usize>> {
        let mut all: BTreeMap<MemberId, Vec<usize>> = BTreeMap::new();
        self.moves.iter().for_each(|device| all.entry(who(device)).or_default().push(device.window));
        all
    }

    /// The new table holds.
    pub async fn settle(self, turn: &Turn) {
        console::follow(turn.shared());
        for (from, windows) in self.by(|device| device.from) {
            if let Err(e) = ask(turn, from, DeviceTask::Discard { windows }, pause::LIMIT).await {
                // They do nothing, and have no lock.
                tracing::warn!("devices that have gone to other members are left behind: {e}");
            }
        }
    }

    /// The old table holds. While the VM is paused.
    ///
    /// # Errors
    /// A device is nobody's: the VM ends.
    pub async fn undo(self, turn: &Turn) -> Result<(), OpError> {
        console::follow(turn.shared());
        for (to, windows) in self.by(|device| device.to) {
            if let Err(e) = ask(turn, to, DeviceTask::Discard { windows }, pause::LIMIT).await {
                // If it has a lock that shows in what follows.
                tracing::warn!("{e}");
            }
        }
        for (from, windows) in self.by(|device| device.from) {
            if let Err(e) = ask(turn, from, DeviceTask::Reclaim { windows }, pause::LIMIT).await {
                let names: Vec<_> =
                    self.moves.iter().filter(|d| d.from == from).map(|d| d.name.as_str()).collect();
                let text = format!("{} could not be given back: {e}", names.join(", "));
                // If the member has died, that is the reason, and a checkpoint may help.
                tokio::time::sleep(SETTLE).await;
                turn.shared().stop(End::Failed(text.clone()));
                return Err(OpError::Failed(format!("{text}: the VM ends")));
            }
        }
        Ok(())
    }
}

async fn ask(
    turn: &Turn,
    member: MemberId,
    task: DeviceTask,
    limit: Duration,
) -> Result<DeviceReply, OpError> {
    match turn.crew()?.ask(member, MemberTask::Device(task), limit + GRACE).await? {
        MemberReply::Device(reply) => Ok(reply),
        reply => Err(odd(&reply)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dsm::addr::Epoch;
    use dsm::node::Table;

    fn devices(disk: u16, rng: u16) -> Vec<DeviceSpec> {
        vec![
            DeviceSpec::Serial { member: MemberId(0), log: None },
            DeviceSpec::Blk { member: MemberId(disk), path: "/d".into(), readonly: false },
            DeviceSpec::Rng { member: MemberId(rng) },
        ]
    }

    #[test]
    fn what_goes_is_what_differs() {
        assert_eq!(moves(&devices(1, 1), &devices(1, 1)).unwrap(), []);
        let gone = moves(&devices(1, 1), &devices(2, 1)).unwrap();
        let disk = DeviceMove { window: 4, name: "the disk /d".into(), from: MemberId(1), to: MemberId(2) };
        assert_eq!(gone, [disk]);
    }

    #[test]
    fn the_same_host_comes_first() {
        let members: Vec<MemberId> = (0..4).map(MemberId).collect();
        let host = |name: &str| Some(crate::config::HostPort { host: name.into(), port: 7 });
        let hosts = members.iter().copied().zip([host("a"), host("b"), host("c"), host("b")]).collect();
        let table = Table { epoch: Epoch(1), memory: Vec::new(), members: members.clone() };
        let roster = Roster { table, devices: devices(1, 1), hosts, home: None, leader: MemberId(0) };
        assert_eq!(candidates(&roster, MemberId(1), &members), [3, 2, 0].map(MemberId));
        assert_eq!(candidates(&roster, MemberId(1), &members[..2]), [MemberId(0)]);
    }
}
