//! A change of the table of members and homes, in a short pause of the VM.
//!
//! ```text
//! coordinator                    old homes          new homes          all members
//!   | pause, QuietMemory (twice: after the first nobody asks for anything, after the second nothing is under way)
//!   | Entries                        |                  |                  |
//!   |<------------------------------>|                  |                  |
//!   | BeginInherit, Inherit          |                  |                  |
//!   |-------------------------------------------------->|                  |    so far nothing has changed
//!   | Change(table)                  |                  |                  |
//!   |--------------------------------------------------------------------->|    in memory only
//!   | ReleaseMemory, resume
//! ```
//!
//! If a member does not take the table, all are given the old one again, under a newer number.

use super::{OpError, Turn, odd, pause};
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
}

impl Roster {
    /// The same memory, without homes at `member`: each of its ranges is dealt out to all others.
    pub fn without_homes_at(&self, member: MemberId) -> Vec<HomeRange> {
        let others: Vec<MemberId> = self.table.members.iter().copied().filter(|m| *m != member).collect();
        let mut memory: Vec<HomeRange> = Vec::new();
        let mut add = |range: HomeRange| match memory.last_mut() {
            Some(last) if last.end() == range.start && last.home == range.home => last.len += range.len,
            _ => memory.push(range),
        };
        for range in &self.table.memory {
            if range.home != member || others.is_empty() {
                add(*range);
                continue;
            }
            let shares = others.len() as u64;
            let unit = if range.len >= GRAIN * shares { GRAIN } else { dsm::addr::PAGE_SIZE };
            let share = (range.len / shares / unit * unit).max(unit);
            let mut start = range.start;
            for (n, home) in (1..).zip(&others) {
                let end = if n == shares { range.end() } else { range.end().min(start + share) };
                if start < end {
                    add(HomeRange { start, len: end - start, home: *home });
                }
                start = end;
            }
        }
        memory
    }
}

/// Gives the VM another table. Returns for how long it was paused.
///
/// # Errors
/// The old table holds, and the VM runs on; or the text says how things stand.
pub async fn change(
    turn: &Turn,
    memory: Vec<HomeRange>,
    members: Vec<MemberId>,
) -> Result<Duration, OpError> {
    let ops = turn.shared().ops();
    let old = ops.roster().ok_or_else(|| OpError::Refused("the VM is still starting".into()))?.table;
    let next = Table { epoch: Epoch(old.epoch.0 + 1), memory, members };
    let start = Instant::now();
    pause::quiesce(turn, pause::LIMIT).await?;
    let changed = under_pause(turn, &old, &next).await;
    let crew = turn.crew()?;
    let released = crew.ask_all(&MemberTask::ReleaseMemory, GRACE).await;
    pause::release(turn, pause::LIMIT).await?;
    changed?;
    released?;
    Ok(start.elapsed())
}

async fn under_pause(turn: &Turn, old: &Table, next: &Table) -> Result<(), OpError> {
    let crew = turn.crew()?;
    for _ in 0..2 {
        crew.ask_all(&MemberTask::QuietMemory { limit: pause::LIMIT }, pause::LIMIT + GRACE).await?;
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
    if let Err(e) = give(turn, next).await {
        let back = Table { epoch: Epoch(next.epoch.0 + 1), ..old.clone() };
        if let Err(worse) = give(turn, &back).await {
            // Members disagree on who serialises a page: nobody may go on.
            let text = format!("{e}; and the members could not be given the old table again: {worse}");
            turn.shared().stop(End::Failed(text.clone()));
            return Err(OpError::Failed(format!("{text}: the VM ends")));
        }
        turn.shared().tabled(&back);
        return Err(OpError::Failed(format!("{e}; homes and members are as they were")));
    }
    turn.shared().tabled(next);
    Ok(())
}

async fn give(turn: &Turn, table: &Table) -> Result<(), OpError> {
    let task = |member: &MemberId| (*member, TableTask::Change { table: table.clone() });
    let members: Vec<MemberId> = turn.crew()?.members().collect();
    ask_each(turn, members.iter().map(task).collect()).await
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
        TableTask::Evict { limit } => *limit + pause::LIMIT,
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
        Roster { table: Table { epoch: Epoch(1), memory, members }, devices: Vec::new() }
    }

    #[test]
    fn homes_are_dealt_out_to_all_others() {
        let roster = roster(vec![range(0, 8, 0), range(8, 8, 1), range(100, 1, 1), range(101, 8, 2)], 3);
        let memory = roster.without_homes_at(MemberId(1));
        assert!(memory.iter().all(|r| r.home != MemberId(1)));
        let sum: u64 = memory.iter().map(|r| r.len).sum();
        assert_eq!(sum, 25 << 20);
        assert_eq!(memory[..2], [range(0, 12, 0), range(12, 4, 2)]);
        assert_eq!(memory[2].home, MemberId(0));
        assert_eq!(memory[3].end(), 109 << 20);
        assert!(memory.windows(2).all(|pair| pair[0].end() <= pair[1].start));
    }

    #[test]
    fn what_moves_is_exactly_what_changes_its_home() {
        let old = [range(0, 8, 0), range(8, 8, 1)];
        let new = [range(0, 12, 0), range(12, 4, 2)];
        assert_eq!(moves(&old, &new), [(range(8, 4, 1), MemberId(0)), (range(12, 4, 1), MemberId(2)),]);
        assert!(moves(&old, &old).is_empty());
    }
}
