//! This member's part of a change of homes and members, while the VM is paused; and giving everything back before it leaves.
//! The coordinator makes it the whole VM's ([`crate::control::ops::table`]).

use super::fault;
use super::runtime::Member;
use dsm::addr::MemberId;
use dsm::node::{Dsm, DsmHandle, Evicted, HomeRun, Table};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// What the coordinator asks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum TableTask {
    /// What do you know of the pages homed with you, from this address on? Answer: `Entries`.
    Entries {
        /// Address.
        from: u64,
        /// Longest answer.
        most: usize,
    },
    /// Pages in these ranges (start, length) are to be homed with you. Answer: `Done`.
    BeginInherit {
        /// The ranges.
        ranges: Vec<(u64, u64)>,
    },
    /// This is what is known of them. Answer: `Done`.
    Inherit {
        /// Runs of pages.
        runs: Vec<HomeRun>,
    },
    /// This table holds. Answer: `Done`.
    Change {
        /// The table.
        table: Table,
        /// Who has each device, by window.
        devices: Vec<MemberId>,
        /// Whose clock the others follow.
        leader: MemberId,
    },
    /// Nothing goes to or comes from this member any more, which is none. Answer: `Done`.
    Part {
        /// Who; or, said to the one that leaves, all others.
        members: Vec<MemberId>,
    },
    /// Connect with somebody who is to become a member. Answer: `Done`.
    Meet {
        /// Its number.
        member: MemberId,
        /// Where it listens.
        addr: SocketAddr,
        /// Longest wait for it.
        limit: Duration,
    },
    /// Ask your pages to go home, for so long. Answer: `Evicted`.
    Evict {
        /// Longest time.
        limit: Duration,
    },
}

/// The answer to a [`TableTask`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum TableReply {
    /// It is done.
    Done,
    /// What a home knows.
    Entries {
        /// Runs of pages.
        runs: Vec<HomeRun>,
        /// Where the rest begins.
        next: Option<u64>,
    },
    /// How much is left.
    Evicted(Evicted),
}

impl Member {
    fn engine(&self) -> Result<DsmHandle, String> {
        self.with_ram(|ram| ram.dsm().map(Dsm::handle))?.ok_or_else(|| "the memory is not shared".into())
    }

    /// Does its part.
    ///
    /// # Errors
    /// In words; nothing has changed here.
    pub fn table_task(&self, task: TableTask) -> Result<TableReply, String> {
        let me = self.plan().me;
        let dsm = self.engine()?;
        match task {
            TableTask::Entries { from, most } => {
                fault::at(me, "entries")?;
                let (runs, next) = dsm.entries(from, most);
                return Ok(TableReply::Entries { runs, next });
            }
            TableTask::BeginInherit { ranges } => {
                fault::at(me, "inherit")?;
                dsm.begin_inherit(&ranges);
            }
            TableTask::Inherit { runs } => dsm.inherit(&runs).map_err(|e| e.to_string())?,
            TableTask::Change { table, devices, leader } => {
                fault::at(me, &format!("change{}", table.epoch.0))?;
                // First, because it says no without having changed anything.
                let machine = self.running_machine().ok_or("the guest does not run")?;
                machine.platform.assign(&devices)?;
                machine.take_board(&devices, leader);
                self.follow_console(&machine.platform);
                dsm.change_table(&table).map_err(|e| e.to_string())?;
                self.fabric().set_members(|member| table.members.contains(&member));
            }
            TableTask::Part { members } => {
                fault::at(me, "part")?;
                for member in members.into_iter().filter(|member| *member != me) {
                    self.part(member);
                    dsm.disconnect(member).map_err(|e| e.to_string())?;
                }
            }
            TableTask::Meet { member, addr, limit } => {
                fault::at(me, "meet")?;
                self.meet(member, addr, Instant::now() + limit)?;
            }
            TableTask::Evict { limit } => {
                fault::at(me, "evict")?;
                return Ok(TableReply::Evicted(dsm.evict_all(limit)));
            }
        }
        Ok(TableReply::Done)
    }
}
