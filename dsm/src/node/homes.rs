//! A change of homes at one member ([`crate::protocol::homes`]), and members that come and go.

use super::engine::Engine;
use crate::addr::{Epoch, HomeRange, MemberId, PAGE_SIZE};
use crate::layout::{Layout, LayoutError, Page};
use crate::protocol::MemberSet;
use crate::protocol::directory::Entry;
use crate::protocol::homes::RehomeError;
use crate::protocol::pages::BLOCK;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Neighbouring pages of which a directory says the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HomeRun {
    /// Address of the first.
    pub start: u64,
    /// How many.
    pub pages: u32,
    /// What it says of each.
    pub entry: Entry,
}

/// Who is in the memory, and where pages have their homes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// Its number, higher than that of the one before.
    pub epoch: Epoch,
    /// The same memory as before, with other homes.
    pub memory: Vec<HomeRange>,
    /// All members. A member that is not in its own table has left: it has nothing, and nothing comes to it.
    pub members: Vec<MemberId>,
}

/// Why homes were not changed.
#[derive(Debug, thiserror::Error)]
pub enum HomesError {
    /// The new table is none.
    #[error("the new table of homes is wrong: {0}")]
    Layout(#[from] LayoutError),
    /// It can't follow the one that holds.
    #[error(transparent)]
    Rehome(#[from] RehomeError),
    /// Its number is not higher.
    #[error("the new table of homes has epoch {new}, and {ours} holds")]
    Epoch {
        /// Of the new one.
        new: u64,
        /// Of the one that holds.
        ours: u64,
    },
    /// A home, or somebody who has a page, is no member.
    #[error("the page at {0:#x} is said to be with somebody who is no member, or is homed here already")]
    Stranger(u64),
    /// Who leaves still has pages.
    #[error("{member} has the page at {gpa:#x}")]
    HasPages {
        /// Who.
        member: MemberId,
        /// One of them.
        gpa: u64,
    },
    /// It has a connection already, or can't have one.
    #[error("{0} is a peer already, or can't be one")]
    Peer(MemberId),
    /// The memory has failed, or a thread could not be had.
    #[error("{0}")]
    Memory(String),
}

impl Engine {
    /// See [`crate::protocol::Core::freeze`].
    pub(crate) fn freeze(&self, frozen: bool) {
        self.shards().for_each(|mut shard| shard.core.freeze(frozen));
    }

    /// Whether nothing is under way here.
    pub(crate) fn is_quiet(&self) -> bool {
        self.shards().all(|shard| shard.core.is_quiet())
    }

    /// What the directory says of the pages homed here, from `from` on: at most `most` runs, and where to go on.
    pub(crate) fn entries(&self, layout: &Layout, from: Page, most: usize) -> (Vec<HomeRun>, Option<Page>) {
        let mut runs: Vec<HomeRun> = Vec::new();
        let pages = layout.pages();
        let mut first = from.0;
        while first < pages {
            let shard = self.shard(Page(first));
            let end = pages.min((first / BLOCK + 1) * BLOCK);
            for page in (first..end).map(Page) {
                let Some(entry) = shard.core.entry(page) else { continue };
                let start = layout.gpa_of(page);
                let fits = |run: &&mut HomeRun| {
                    run.entry == entry && run.start + u64::from(run.pages) * PAGE_SIZE == start
                };
                if let Some(run) = runs.last_mut().filter(fits) {
                    run.pages += 1;
                } else if runs.len() >= most {
                    return (runs, Some(page));
                } else {
                    runs.push(HomeRun { start, pages: 1, entry });
                }
            }
            first = end;
        }
        (runs, None)
    }

    /// Forgets what it was told of pages that are to be homed here.
    pub(crate) fn forget(&self, layout: &Layout, ranges: &[(u64, u64)]) {
        for (start, len) in ranges {
            for gpa in (*start..start.saturating_add(*len)).step_by(4096) {
                if let Some(page) = layout.page_at(gpa) {
                    self.shard(page).core.inherit(page, None, MemberSet::EMPTY);
                }
            }
        }
    }

    /// Is told of pages that are to be homed here.
    pub(crate) fn inherit(
        &self,
        layout: &Layout,
        runs: &[HomeRun],
        members: MemberSet,
    ) -> Result<(), HomesError> {
        for run in runs {
            for n in 0..u64::from(run.pages) {
                let gpa = run.start.saturating_add(n * PAGE_SIZE);
                let page = layout.page_at(gpa).ok_or(HomesError::Stranger(gpa))?;
                if !self.shard(page).core.inherit(page, Some(run.entry), members) {
                    return Err(HomesError::Stranger(gpa));
                }
            }
        }
        Ok(())
    }

    /// The new table holds.
    pub(crate) fn rehome(&self, layout: &Arc<Layout>) -> Result<(), RehomeError> {
        // All or none: while it is frozen and quiet nothing begins between the look and the change.
        if !self.is_quiet() {
            return Err(RehomeError::InUse);
        }
        self.shards().try_for_each(|mut shard| shard.core.rehome(layout.clone()))
    }

    /// A page homed here that `member` has.
    pub(crate) fn page_of(&self, layout: &Layout, member: MemberId) -> Option<u64> {
        let pages = (0..layout.pages()).map(Page);
        pages
            .map(|page| (page, self.shard(page).core.entry(page)))
            .find_map(|(page, entry)| entry.filter(|entry| entry.names(member)).map(|_| layout.gpa_of(page)))
    }

    /// Number of pages that are here.
    pub(crate) fn resident(&self) -> u64 {
        self.shards()
            .map(|shard| {
                let (shared, modified) = shard.core.cache().resident();
                shared + modified
            })
            .sum()
    }
}

impl super::shell::Shell {
    fn layout_of_homes(&self) -> Arc<Layout> {
        self.homes.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// Home of a page by the table that holds.
    pub(super) fn home_of(&self, page: Page) -> Option<MemberId> {
        self.layout_of_homes().home_of(page)
    }

    /// See [`super::DsmHandle::entries`].
    pub(super) fn entries(&self, from: u64, most: usize) -> (Vec<HomeRun>, Option<u64>) {
        let first = self.layout.ranges().find(|r| r.end() > from).map(|r| r.start.max(from));
        let Some(first) = first.and_then(|gpa| self.layout.page_at(gpa)) else { return (Vec::new(), None) };
        let (runs, next) = self.engine.entries(&self.layout, first, most.max(1));
        (runs, next.map(|page| self.layout.gpa_of(page)))
    }

    /// See [`super::DsmHandle::change_table`].
    pub(super) fn change_table(&self, table: &Table) -> Result<(), HomesError> {
        let ours = self.epoch().0;
        if table.epoch.0 <= ours {
            return Err(HomesError::Epoch { new: table.epoch.0, ours });
        }
        let layout = Arc::new(Layout::new(&table.memory)?);
        let me = self.config().me;
        let mut set = MemberSet::EMPTY;
        for member in &table.members {
            if *member != me && self.link(*member).is_none() {
                return Err(HomesError::Peer(*member));
            }
            set = set.with(*member);
        }
        if let Some(range) = table.memory.iter().find(|range| !set.has(range.home)) {
            return Err(HomesError::Stranger(range.start));
        }
        if !set.has(me) && self.engine.resident() != 0 {
            return Err(HomesError::HasPages { member: me, gpa: 0 });
        }
        for gone in self.members().iter().filter(|member| !set.has(*member)) {
            if let Some(gpa) = self.engine.page_of(&self.layout, gone) {
                return Err(HomesError::HasPages { member: gone, gpa });
            }
        }
        self.engine.rehome(&layout)?;
        *self.homes.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = layout;
        // Who has left is alone.
        self.set_table(table.epoch, if set.has(me) { set } else { MemberSet::only(me) });
        Ok(())
    }
}
