//! A change of the table of members and homes, in a short pause of the VM.
//!
//! ```text
//! coordinator                    old homes          new homes          all members
//!   | pause, QuietMemory (twice: after the first nobody asks for anything, after the second nothing is under way)
//!   | Entries                        |                  |                  |
//!   |<------------------------------>|                  |                  |
//!   | BeginInherit, Inherit          |                  |                  |
//!   |-------------------------------------------------->|                  |    so far nothing has changed
//!   | devices that go with it: [`super::devices`]
//!   | Change(table)                  |                  |                  |
//!   |--------------------------------------------------------------------->|    in memory only
//!   | ReleaseMemory, resume
//! ```
//!
//! If a member does not take the table, all are given the old one again, under a newer number.

use super::devices::{self, Handover};
use super::{OpError, Turn, odd, pause};
use crate::config::HostPort;
use crate::control::crew::{GRACE, join_all};
use crate::control::end::End;
use crate::devices::DeviceSpec;
use crate::member::table::{TableReply, TableTask};
use crate::member::{MemberReply, MemberTask};
use dsm::addr::{Epoch, HomeRange, MemberId};
use dsm::node::{HomeRun, Table};
use std::time::{Duration, Instant};

/// Runs of pages in one message.
const RUNS: usize = 50_000;
/// Shares of a range are multiples of this where it is large enough, bytes.
const GRAIN: u64 = 2 << 20;

/// Who is in the VM, and what is homed where.
#[derive(Clone, Debug, PartialEq)]
pub struct Roster {
    /// The table that holds.
    pub table: Table,
    /// All devices, with their members.
    pub devices: Vec<DeviceSpec>,
    /// Where each member is: its node daemon, or the coordinator's own host.
    pub hosts: Vec<(MemberId, Option<HostPort>)>,
    /// The coordinator's own host, if it has a node daemon.
    pub home: Option<HostPort>,
    /// The member whose clock the others follow.
    pub leader: MemberId,
}

impl Roster {
    /// Where a member is.
    pub fn host_of(&self, member: MemberId) -> Option<HostPort> {
        self.hosts.iter().find(|(id, _)| *id == member).and_then(|(_, host)| host.clone())
    }

    /// As it is, to be changed.
    pub fn as_next(&self) -> Next {
        let Table { memory, members, .. } = self.table.clone();
        Next { memory, members, devices: self.devices.clone() }
    }

    fn memory_of(&self, member: MemberId) -> u64 {
        self.table.memory.iter().filter(|range| range.home == member).map(|range| range.len).sum()
    }

    /// The same memory, with homes at `newcomer`, which has none: each member gives the last part of what it has, so that all
    /// have as much. At most one range more per member.
    pub fn with_homes_at(&self, newcomer: MemberId) -> Vec<HomeRange> {
        let shares = self.table.members.len() as u64 + 1;
        let mut gives: Vec<(MemberId, u64)> = self
            .table
            .members
            .iter()
            .map(|member| (*member, share(self.memory_of(*member), shares)))
            .collect();
        let mut memory: Vec<HomeRange> = Vec::new();
        let mut parts = Vec::new();
        for range in self.table.memory.iter().rev() {
            let left = gives.iter_mut().find(|(member, _)| *member == range.home);
            let given = left.map_or(0, |(_, left)| {
                let given = range.len.min(*left);
                *left -= given;
                given
            });
            parts.push(HomeRange { start: range.end() - given, len: given, home: newcomer });
            parts.push(HomeRange { len: range.len - given, ..*range });
        }
        parts.into_iter().rev().for_each(|part| push(&mut memory, part));
        memory
    }

    /// The same memory, without homes at these members: what they have is dealt out to all others, first to the one before it.
    /// So who is added and leaves again leaves no more ranges than there were.
    pub fn without_homes_at(&self, leaving: &[MemberId]) -> Vec<HomeRange> {
        let stay = self.table.members.iter().filter(|member| !leaving.contains(member));
        let mut takes: Vec<(MemberId, u64)> = stay.map(|member| (*member, 0)).collect();
        let (total, shares) =
            (leaving.iter().map(|member| self.memory_of(*member)).sum::<u64>(), takes.len() as u64);
        if shares == 0 {
            return self.table.memory.clone();
        }
        takes.iter_mut().for_each(|(_, left)| *left = share(total, shares));
        if let Some((_, left)) = takes.last_mut() {
            *left += total - share(total, shares) * shares;
        }
        let mut memory: Vec<HomeRange> = Vec::new();
        for range in &self.table.memory {
            if !leaving.contains(&range.home) {
                push(&mut memory, *range);
                continue;
            }
            let mut start = range.start;
            while start < range.end() {
                let before = memory.last().filter(|last| last.end() == start).map(|last| last.home);
                let neighbour = takes.iter().position(|(member, left)| Some(*member) == before && *left > 0);
                let most = || (0..takes.len()).max_by_key(|at| takes.get(*at).map(|(_, left)| *left));
                let Some((home, left)) = neighbour.or_else(most).and_then(|at| takes.get_mut(at)) else {
                    break;
                };
                // All together take all, so there is something left.
                let len = (range.end() - start).min((*left).max(dsm::addr::PAGE_SIZE));
                *left = left.saturating_sub(len);
                push(&mut memory, HomeRange { start, len, home: *home });
                start += len;
            }
        }
        memory
    }
}

/// One of so many shares, in large pieces where it is large.
fn share(len: u64, shares: u64) -> u64 {
    let unit = if len >= GRAIN * shares { GRAIN } else { dsm::addr::PAGE_SIZE };
    len / shares / unit * unit
}

/// Puts a range behind the others, as a part of the last where it can be.
fn push(memory: &mut Vec<HomeRange>, range: HomeRange) {
    match memory.last_mut() {
        _ if range.len == 0 => {}
        Some(last) if last.end() == range.start && last.home == range.home => last.len += range.len,
        _ => memory.push(range),
    }
}

/// What is to be.
#[derive(Clone, Debug, PartialEq)]
pub struct Next {
    /// What is homed where.
    pub memory: Vec<HomeRange>,
    /// All members.
    pub members: Vec<MemberId>,
    /// The devices, with their members.
    pub devices: Vec<DeviceSpec>,
}

/// Gives the VM another table. Returns for how long it was paused.
///
/// # Errors
/// The old table holds, and the VM runs on; or the text says how things stand.
pub async fn change(turn: &Turn, next: Next) -> Result<Duration, OpError> {
    let ops = turn.shared().ops();
    let before = ops.roster().ok_or_else(|| OpError::Refused("the VM is still starting".into()))?;
    let table = Table { epoch: Epoch(before.table.epoch.0 + 1), memory: next.memory, members: next.members };
    // It leads as long as it is there.
    let leads = |member: &&MemberId| **member == before.leader;
    let leader = table.members.iter().find(leads).or(table.members.first()).copied().unwrap_or(before.leader);
    let after = Roster { table, devices: next.devices, leader, ..before.clone() };
    let (old, next) = (&before.table, &after.table);
    let start = Instant::now();
    pause::quiesce(turn, pause::LIMIT).await?;
    let changed = under_pause(turn, &before, &after).await;
    if changed.is_err() {
        // The VM goes on without those that it does not know; they may be what failed.
        let crew = turn.crew()?;
        newcomers(old, next).for_each(|newcomer| crew.dismiss(newcomer));
    }
    let gone_on = pause::go_on(turn, pause::LIMIT, "a change of members").await;
    changed?;
    gone_on?;
    Ok(start.elapsed())
}

/// Who is in the next table only.
fn newcomers<'a>(old: &Table, next: &'a Table) -> impl Iterator<Item = MemberId> + use<'a> {
    let known = old.members.clone();
    next.members.iter().copied().filter(move |member| !known.contains(member))
}

async fn under_pause(turn: &Turn, before: &Roster, after: &Roster) -> Result<(), OpError> {
    let (old, next) = (&before.table, &after.table);
    // If this is wrong nothing has begun.
    let had = (devices::owners(&before.devices)?, before.leader);
    let have = (devices::owners(&after.devices)?, after.leader);
    let handed = devices::moves(&before.devices, &after.devices)?;
    for _ in 0..2 {
        pause::quiet_memory(turn, pause::LIMIT).await?;
    }
    let moves = moves(&old.memory, &next.memory);
    for heir in &next.members {
        let ranges: Vec<_> =
            moves.iter().filter(|(_, to)| to == heir).map(|(range, _)| (range.start, range.len)).collect();
        if !ranges.is_empty() {
            ask(turn, *heir, TableTask::BeginInherit { ranges }).await?;
        }
    }
    for (range, heir) in &moves {
        tell(turn, range, *heir).await?;
    }
    // What has changed since the last checkpoint is noted by home.
    turn.shared().ops().set_base(None);
    let handover = Handover::carry(turn, before, handed).await?;
    if let Err(e) = give_all(turn, old, next, &have).await {
        let back = Table { epoch: Epoch(next.epoch.0 + 1), ..old.clone() };
        if let Err(worse) = give(turn, &back, &had, &old.members).await {
            // Members disagree on who serialises a page: nobody may go on.
            let text = format!("{e}; and the members could not be given the old table again: {worse}");
            turn.shared().stop(End::Failed(text.clone()));
            return Err(OpError::Failed(format!("{text}: the VM ends")));
        }
        turn.shared().tabled(&Roster { table: back, ..before.clone() });
        handover.undo(turn).await?;
        return Err(OpError::Failed(format!("{e}; homes and members are as they were")));
    }
    turn.shared().tabled(after);
    handover.settle(turn).await;
    Ok(())
}

/// Newcomers first: if one of them fails, nobody knows of it.
async fn give_all(
    turn: &Turn,
    old: &Table,
    next: &Table,
    devices: &(Vec<MemberId>, MemberId),
) -> Result<(), OpError> {
    let newcomers: Vec<_> = newcomers(old, next).collect();
    give(turn, next, devices, &newcomers).await?;
    give(turn, next, devices, &old.members).await
}

async fn give(
    turn: &Turn,
    table: &Table,
    (devices, leader): &(Vec<MemberId>, MemberId),
    to: &[MemberId],
) -> Result<(), OpError> {
    let change = TableTask::Change { table: table.clone(), devices: devices.clone(), leader: *leader };
    let task = |member: &MemberId| (*member, change.clone());
    ask_each(turn, to.iter().map(task).collect()).await
}

/// Tells the heir of a range what its home knows of it.
async fn tell(turn: &Turn, range: &HomeRange, heir: MemberId) -> Result<(), OpError> {
    let mut from = Some(range.start);
    while let Some(at) = from {
        let task = TableTask::Entries { from: at, most: RUNS };
        let TableReply::Entries { runs, next } = ask(turn, range.home, task).await? else {
            return Err(OpError::Failed(format!("{} did not say what it knows of its pages", range.home)));
        };
        let runs: Vec<HomeRun> = runs.into_iter().filter_map(|run| clip(run, range)).collect();
        if !runs.is_empty() {
            ask(turn, heir, TableTask::Inherit { runs }).await?;
        }
        from = next.filter(|next| *next < range.end());
    }
    Ok(())
}

/// The part of a run that lies in a range.
fn clip(run: HomeRun, range: &HomeRange) -> Option<HomeRun> {
    let page = dsm::addr::PAGE_SIZE;
    let start = run.start.max(range.start);
    let end = (run.start + u64::from(run.pages) * page).min(range.end());
    let pages = u32::try_from(end.checked_sub(start)? / page).ok().filter(|pages| *pages > 0)?;
    Some(HomeRun { start, pages, ..run })
}

/// What changes its home, as ranges with their old homes, and the new ones.
fn moves(old: &[HomeRange], new: &[HomeRange]) -> Vec<(HomeRange, MemberId)> {
    let mut moves = Vec::new();
    for to in new {
        for from in old.iter().filter(|from| from.home != to.home) {
            let (start, end) = (from.start.max(to.start), from.end().min(to.end()));
            if start < end {
                moves.push((HomeRange { start, len: end - start, home: from.home }, to.home));
            }
        }
    }
    moves
}

/// Asks one member for its part.
///
/// # Errors
/// It said no, or nothing.
pub(super) async fn ask(turn: &Turn, member: MemberId, task: TableTask) -> Result<TableReply, OpError> {
    let limit = match &task {
        TableTask::Evict { limit } | TableTask::Meet { limit, .. } => *limit + pause::LIMIT,
        _ => pause::LIMIT,
    };
    match turn.crew()?.ask(member, MemberTask::Table(task), limit + GRACE).await? {
        MemberReply::Table(reply) => Ok(reply),
        reply => Err(odd(&reply)),
    }
}

/// Asks several at once.
///
/// # Errors
/// The first that said no, or nothing.
pub(super) async fn ask_each(turn: &Turn, tasks: Vec<(MemberId, TableTask)>) -> Result<(), OpError> {
    let asks = tasks.into_iter().map(|(member, task)| ask(turn, member, task));
    join_all(asks).await.into_iter().collect::<Result<Vec<_>, _>>().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, len: u64, home: u16) -> HomeRange {
        HomeRange { start: start << 20, len: len << 20, home: MemberId(home) }
    }

    fn roster(memory: Vec<HomeRange>, members: u16) -> Roster {
        let members = (0..members).map(MemberId).collect();
        Roster {
            table: Table { epoch: Epoch(1), memory, members },
            devices: Vec::new(),
            hosts: Vec::new(),
            home: None,
            leader: MemberId(0),
        }
    }

    #[test]
    fn homes_are_dealt_out_to_all_others() {
        let roster = roster(vec![range(0, 8, 0), range(8, 8, 1), range(100, 1, 1), range(101, 8, 2)], 3);
        let memory = roster.without_homes_at(&[MemberId(1)]);
        assert!(memory.iter().all(|r| r.home != MemberId(1)));
        let sum: u64 = memory.iter().map(|r| r.len).sum();
        assert_eq!(sum, 25 << 20);
        assert_eq!(memory, [range(0, 12, 0), range(12, 4, 2), range(100, 9, 2)]);
        assert_eq!(roster.without_homes_at(&[MemberId(0), MemberId(2), MemberId(1)]), roster.table.memory);
    }

    #[test]
    fn a_newcomer_gets_as_much_as_the_others_keep() {
        let before = roster(vec![range(0, 12, 0), range(100, 12, 1)], 2);
        let memory = before.with_homes_at(MemberId(2));
        assert_eq!(memory, [range(0, 8, 0), range(8, 4, 2), range(100, 8, 1), range(108, 4, 2)]);
    }

    #[test]
    fn members_that_come_and_go_leave_no_more_ranges_behind() {
        let start =
            vec![range(0, 96, 0), range(96, 3, 1), range(120, 93, 1), range(213, 1, 2), range(214, 95, 2)];
        let mut now = roster(start, 3);
        for round in 0..100 {
            // All in turn, as when hosts are updated one after the other.
            let member = MemberId(1 + round % 2);
            now.table.memory = now.without_homes_at(&[member]);
            now.table.members.retain(|m| *m != member);
            assert_eq!(now.memory_of(member), 0);
            now.table.memory = now.with_homes_at(member);
            now.table.members.push(member);
            now.table.members.sort_unstable();
            let homes: Vec<u64> = (0..3).map(|m| now.memory_of(MemberId(m)) >> 20).collect();
            assert_eq!(homes.iter().sum::<u64>(), 288, "round {round}");
            assert!(homes.iter().all(|mib| (90..=102).contains(mib)), "round {round}: {homes:?}");
            assert!(now.table.memory.windows(2).all(|pair| pair[0].end() <= pair[1].start));
            assert!(now.table.memory.len() <= 12, "round {round}: {:?}", now.table.memory);
        }
    }

    #[test]
    fn what_moves_is_exactly_what_changes_its_home() {
        let old = [range(0, 8, 0), range(8, 8, 1)];
        let new = [range(0, 12, 0), range(12, 4, 2)];
        assert_eq!(moves(&old, &new), [(range(8, 4, 1), MemberId(0)), (range(12, 4, 1), MemberId(2)),]);
        assert!(moves(&old, &old).is_empty());
    }
}
