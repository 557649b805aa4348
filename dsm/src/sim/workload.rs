//! What the threads of the members do: reads, writes and locked increments, more often where it is crowded.

use super::rng::Rng;
use super::truth::{Access, WORDS};
use crate::layout::Page;
use std::collections::VecDeque;

/// One access.
#[derive(Clone, Copy, Debug)]
pub(super) struct Op {
    pub(super) page: Page,
    pub(super) word: usize,
    pub(super) access: Access,
}

impl Op {
    pub(super) fn is_write(&self) -> bool {
        self.access != Access::Read
    }
}

/// What one kind of thread prefers, per mille: the rest are reads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taste {
    pub(super) writes: u64,
    pub(super) adds: u64,
    /// Sets every word of a page to zero, so that the page is all zero again.
    pub(super) clears: u64,
    /// Accesses that go to the first page of the list.
    pub(super) crowding: u64,
    /// Accesses that go to the page behind the last one.
    pub(super) runs: u64,
    /// Longest time between two accesses, in nanoseconds.
    pub(super) think: u64,
    /// Accesses after which a thread rests for a while, as a vCPU in HLT does.
    pub(super) rests: u64,
    /// Longest rest, in nanoseconds.
    pub(super) longest_rest: u64,
    /// Accesses after which a thread begins to wait for another member, as the sender of an IPI does.
    pub(super) softens: u64,
}

/// A thread of a member.
#[derive(Debug)]
pub(super) struct Thread {
    pub(super) left: u32,
    ops: VecDeque<Op>,
    /// Since when its current access waits.
    pub(super) waits: Option<u64>,
    /// Faults that the current access has taken.
    pub(super) tries: u32,
    /// Whether it rests.
    pub(super) rests: bool,
    last: Page,
}

impl Thread {
    pub(super) fn new(left: u32) -> Thread {
        Thread { left, ops: VecDeque::new(), waits: None, tries: 0, rests: false, last: Page(0) }
    }

    /// The access that it is at, or `None` if it is done.
    pub(super) fn current(&mut self, rng: &Rng, taste: &Taste, pages: &[Page], unique: u64) -> Option<Op> {
        if self.ops.is_empty() && self.left > 0 {
            self.left -= 1;
            self.plan(rng, taste, pages, unique);
        }
        self.ops.front().copied()
    }

    fn plan(&mut self, rng: &Rng, taste: &Taste, pages: &[Page], unique: u64) {
        let page = if taste.runs > 0 && rng.chance(taste.runs) {
            Page((self.last.0 + 1) % u32::try_from(pages.len()).unwrap_or(1).max(1))
        } else {
            let at = if rng.chance(taste.crowding) { 0 } else { rng.index(pages.len()) };
            let Some(page) = pages.get(at).copied() else { return };
            page
        };
        self.last = page;
        let word = rng.index(WORDS.len());
        let dice = rng.below(1000);
        let access = if dice < taste.writes {
            Access::Write(unique)
        } else if dice < taste.writes + taste.adds {
            Access::Add
        } else if dice < taste.writes + taste.adds + taste.clears {
            self.ops.extend((0..WORDS.len()).map(|word| Op { page, word, access: Access::Write(0) }));
            return;
        } else {
            Access::Read
        };
        self.ops.push_back(Op { page, word, access });
    }

    /// The current access is done.
    pub(super) fn advance(&mut self) {
        self.ops.pop_front();
        self.waits = None;
        self.tries = 0;
    }

    /// Reads every word of every page before it ends.
    pub(super) fn sweep(&mut self, pages: &[Page]) {
        for page in pages {
            let read = |word| Op { page: *page, word, access: Access::Read };
            self.ops.extend((0..WORDS.len()).map(read));
        }
    }

    pub(super) fn is_done(&self) -> bool {
        self.left == 0 && self.ops.is_empty()
    }

    /// What it waits for.
    pub(super) fn waiting(&self) -> Option<(Op, u64)> {
        Some((*self.ops.front()?, self.waits?))
    }
}
