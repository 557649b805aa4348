//! Keeps a member within its memory budget: which pages go when there are too many.
//!
//! Over the budget less a small slack, the thread that has just put a page in place asks for a few to go: first
//! read-only copies, which move no data, then writable pages of other homes, which go back to their homes. Pages
//! homed here that nobody else has stay: there is no other place for them. A page that is still within its hold time stays,
//! too. Two hands go round the memory, so that every page has had its time; nothing is looked up per access, as an
//! access to a page that is here costs nothing and tells nothing.

use crate::layout::Page;
use crate::protocol::pages::BLOCK;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

/// Blocks of pages that one look for clean copies goes through at most: 64 MiB of memory.
const LOOK: u32 = 256;
/// Pages that are asked to go in one go at most.
const MOST: usize = 16;
/// A page that is still here so long after it was asked to go was needed elsewhere first; in nanoseconds.
const LOST: u64 = 20_000_000;

/// What is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Read-only copies.
    Clean,
    /// Pages that only this member has.
    Modified,
}

/// How much a member may keep, and how much it does.
#[derive(Debug, Default)]
pub(crate) struct Budget {
    /// Pages; `None` for as many as there are.
    most: Option<u64>,
    here: AtomicI64,
    peak: AtomicI64,
    asked: AtomicU64,
}

impl Budget {
    pub(super) fn new(most: Option<u64>) -> Budget {
        Budget { most, ..Budget::default() }
    }

    /// Pages have come, or gone if negative.
    pub(crate) fn add(&self, pages: i64) {
        let here = self.here.fetch_add(pages, Ordering::Relaxed) + pages;
        if pages > 0 {
            self.peak.fetch_max(here, Ordering::Relaxed);
        }
    }

    /// Pages that are here.
    pub(crate) fn here(&self) -> u64 {
        u64::try_from(self.here.load(Ordering::Relaxed)).unwrap_or(0)
    }

    /// Most pages that were ever here.
    pub(crate) fn peak(&self) -> u64 {
        u64::try_from(self.peak.load(Ordering::Relaxed)).unwrap_or(0)
    }

    /// How often a page was asked to go.
    pub(crate) fn asked(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }

    /// Pages that may come beyond those that a thread waits for: half of what is free, and no more than a small part of the
    /// budget, as every page on its way takes buffers, too.
    pub(super) fn room(&self) -> u32 {
        let free = self.most.map_or(u64::MAX, |most| most.saturating_sub(self.here()).min(most / 128));
        u32::try_from(free / 2).unwrap_or(u32::MAX)
    }

    /// Pages that should go, not counting those on their way out. A thirty-second of the budget is kept free, for what
    /// comes meanwhile: with runs of pages on their way, a sixty-fourth was exceeded by 5 % of the budget.
    pub(super) fn excess(&self) -> u64 {
        self.most.map_or(0, |most| self.here().saturating_sub(most - most / 32))
    }
}

/// Where to look next, and who has been asked to go.
#[derive(Debug, Default)]
pub(super) struct Hands {
    clean: u32,
    modified: u32,
    asked: VecDeque<(Page, u64)>,
}

impl Hands {
    /// Forgets those at the front of the line that have gone, or that will not. Returns how many more should go.
    pub(super) fn missing(&mut self, budget: &Budget, now: u64, is_gone: impl Fn(Page) -> bool) -> usize {
        while let Some((page, at)) = self.asked.front() {
            if now.saturating_sub(*at) <= LOST && !is_gone(*page) {
                break;
            }
            self.asked.pop_front();
        }
        let excess = usize::try_from(budget.excess()).unwrap_or(usize::MAX);
        excess.saturating_sub(self.asked.len()).min(MOST)
    }

    /// Whether a page has been asked to go.
    pub(super) fn has_asked(&self, page: Page) -> bool {
        self.asked.iter().any(|(p, _)| *p == page)
    }

    /// A page has been asked to go.
    pub(super) fn ask(&mut self, page: Page, now: u64, budget: &Budget) {
        self.asked.push_back((page, now));
        budget.asked.fetch_add(1, Ordering::Relaxed);
    }

    /// Goes on to the next block of pages: its first. `None` after `looked` blocks were enough.
    pub(super) fn next(&mut self, kind: Kind, pages: u32, looked: u32) -> Option<Page> {
        let blocks = pages.div_ceil(BLOCK);
        let (hand, most) = match kind {
            Kind::Clean => (&mut self.clean, blocks.min(LOOK)),
            Kind::Modified => (&mut self.modified, blocks),
        };
        if looked >= most {
            return None;
        }
        *hand = if *hand + 1 >= blocks { 0 } else { *hand + 1 };
        Some(Page(*hand * BLOCK))
    }
}
