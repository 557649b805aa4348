//! Saving this member's part of the memory, and starting from what was saved. What is to be saved is the protocol's
//! decision ([`crate::protocol::cut`]).

use super::DsmError;
use super::shard::Env;
use super::shell::Shell;
use crate::addr::{MemberId, PAGE_SIZE};
use crate::layout::Page;
use crate::protocol::Event;
use crate::protocol::cut::Duty;
use crate::protocol::directory::Holders;
use crate::protocol::pages::{BLOCK, blocks};
use crate::region::{Kernel, RegionError};
use std::io;
use std::ops::Range;
use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Length of a page.
const PAGE: usize = 4096;
/// Requests for pages ahead of need that may be under way.
const AHEAD: usize = 32;
/// Between two looks at what is under way.
const LOOK: Duration = Duration::from_micros(500);

/// Takes pages in ascending order of their addresses.
pub trait PageSink {
    /// Whole pages that follow each other from `gpa` on.
    ///
    /// # Errors
    /// They can't be kept.
    fn data(&mut self, gpa: u64, bytes: &[u8]) -> io::Result<()>;

    /// Pages from `gpa` on that have become zero.
    ///
    /// # Errors
    /// It can't be kept.
    fn zero(&mut self, gpa: u64, pages: u32) -> io::Result<()>;
}

/// Has the contents of pages.
pub trait PageSource: Send + Sync {
    /// The contents of the page at `gpa`.
    ///
    /// # Errors
    /// In words.
    fn page(&self, gpa: u64, out: &mut [u8; PAGE]) -> Result<(), String>;
}

/// What to save.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SaveOptions {
    /// All pages, or only those that changed since the last time.
    pub full: bool,
    /// Note from now on which pages change, so that the next time need not be full: the first write to each page costs a
    /// local fault.
    pub track: bool,
}

/// What a member has saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    /// Pages with contents.
    pub data: u64,
    /// Pages that were all zero. In full, they are left out.
    pub zero: u64,
    /// Pages that this member answers for, saved or unchanged.
    pub answers_for: u64,
    /// Pages whose home is here that anybody has touched. Over all members it is the sum of `answers_for`: no page is
    /// missing, and none is saved twice.
    pub touched: u64,
}

/// Why the memory was not saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// Something was still under way.
    #[error("{pages} pages are still under way after {limit:?}")]
    Busy {
        /// About so many.
        pages: usize,
        /// The deadline.
        limit: Duration,
    },
    /// The memory is in no state for it.
    #[error(transparent)]
    Memory(#[from] DsmError),
    /// The sink refused.
    #[error("{0}")]
    Sink(#[from] io::Error),
}

impl From<RegionError> for SaveError {
    fn from(e: RegionError) -> SaveError {
        SaveError::Memory(e.into())
    }
}

impl Shell {
    fn held(&self) -> MutexGuard<'_, bool> {
        self.is_held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn under_way(&self) -> usize {
        self.engine
            .shards()
            .filter(|s| !s.core.is_quiet())
            .map(|s| s.core.cache().waiting().count().max(1))
            .sum()
    }

    fn running(&self) -> Result<(), SaveError> {
        if self.is_running() { Ok(()) } else { Err(DsmError::Stopped.into()) }
    }

    pub(super) fn quiesce(&self, limit: Duration) -> Result<(), SaveError> {
        *self.held() = true;
        self.engine.freeze(true);
        let quiet = self.wait_quiet(limit);
        if quiet.is_err() {
            self.release();
        }
        quiet
    }

    fn wait_quiet(&self, limit: Duration) -> Result<(), SaveError> {
        let end = Instant::now() + limit;
        loop {
            self.running()?;
            match self.under_way() {
                0 => return Ok(()),
                pages if Instant::now() > end => return Err(SaveError::Busy { pages, limit }),
                _ => std::thread::sleep(LOOK),
            }
        }
    }

    pub(super) fn release(&self) {
        self.engine.freeze(false);
        *self.held() = false;
    }

    pub(super) fn save(&self, options: SaveOptions, sink: &mut dyn PageSink) -> Result<Saved, SaveError> {
        self.running()?;
        self.fetch_missing(options)?;
        let mut saved = Saved::default();
        let mut buffer = Vec::with_capacity(BLOCK as usize * PAGE);
        for block in blocks(0..self.layout.pages()) {
            let runs = self.copy_block(block, options, &mut buffer, &mut saved)?;
            let mut at = 0;
            for (page, count) in runs {
                let len = count as usize * PAGE;
                let bytes = buffer.get(at..at + len).unwrap_or_default();
                self.put(page, bytes, options.full, sink, &mut saved)?;
                at += len;
            }
        }
        // A memory that failed meanwhile may have given wrong pages.
        self.running()?;
        Ok(saved)
    }

    /// Shared pages homed here of which there is no copy here.
    fn fetch_missing(&self, options: SaveOptions) -> Result<(), SaveError> {
        let mut asked = 0;
        let is_worth_a_look = |block: &Range<u32>| {
            let duties = self.engine.shard(Page(block.start)).core.duties(block.clone());
            duties.is_lacking && (duties.has_changed || options.full)
        };
        for page in blocks(0..self.layout.pages()).filter(is_worth_a_look).flatten().map(Page) {
            let duty = self.engine.shard(page).core.duty(page);
            if matches!(duty, Duty::Fetch { changed } if changed || options.full) {
                // Not as a fault of a thread, which may ask for more than this page.
                self.engine.one(self, self.now(), page, Event::Fault { page, write: false });
                asked += 1;
                if asked % AHEAD == 0 {
                    self.wait_quiet(self.config().deadline)?;
                }
            }
        }
        self.wait_quiet(self.config().deadline)
    }

    /// Copies what is to be saved of a block into `buffer`, as runs of pages, and marks it as saved.
    fn copy_block(
        &self,
        block: Range<u32>,
        options: SaveOptions,
        buffer: &mut Vec<u8>,
        saved: &mut Saved,
    ) -> Result<Vec<(Page, u32)>, SaveError> {
        buffer.clear();
        let mut runs: Vec<(Page, u32)> = Vec::new();
        let mut protect: Vec<(Page, u32)> = Vec::new();
        let add = |runs: &mut Vec<(Page, u32)>, page: Page| match runs.last_mut() {
            // Neighbours in number are neighbours in address only inside one range.
            Some((start, count))
                if start.0 + *count == page.0
                    && self.layout.gpa_of(*start) + u64::from(*count) * PAGE_SIZE
                        == self.layout.gpa_of(page) =>
            {
                *count += 1;
            }
            _ => runs.push((page, 1)),
        };
        let mut shard = self.engine.shard(Page(block.start));
        // From here on it can't be made inaccessible before the lock is let go.
        self.running()?;
        let duties = shard.core.duties(block.clone());
        saved.touched += duties.touched;
        saved.answers_for += duties.answers_for;
        if !duties.has_changed && !options.full {
            return Ok(runs);
        }
        for page in block.map(Page) {
            let (changed, in_image) = match shard.core.duty(page) {
                Duty::None => continue,
                Duty::Save { changed, in_image } => (changed, in_image),
                // It has not changed, or it would have come.
                Duty::Fetch { .. } => (false, false),
            };
            if !changed && !options.full {
                continue;
            }
            if in_image {
                let mut bytes = [0; PAGE];
                self.image(page, &mut bytes)?;
                buffer.extend(bytes);
            } else {
                self.region.read(page, buffer)?;
            }
            if options.track && shard.core.saved(page) {
                add(&mut protect, page);
            }
            add(&mut runs, page);
        }
        for (page, count) in protect {
            self.region.protect(page, count)?;
        }
        Ok(runs)
    }

    /// Hands a run on, without the pages in it that are zero.
    fn put(
        &self,
        page: Page,
        bytes: &[u8],
        full: bool,
        sink: &mut dyn PageSink,
        saved: &mut Saved,
    ) -> Result<(), SaveError> {
        static ZERO: [u8; PAGE] = [0; PAGE];
        let mut gpa = self.layout.gpa_of(page);
        let mut rest = bytes;
        while let Some(first) = rest.get(..PAGE) {
            let is_zero = first == ZERO;
            let same = rest.chunks_exact(PAGE).take_while(|page| (*page == ZERO) == is_zero).count();
            let (now, later) = rest.split_at(same * PAGE);
            let count = u32::try_from(same).unwrap_or(u32::MAX);
            if !is_zero {
                sink.data(gpa, now)?;
                saved.data += u64::from(count);
            } else {
                if !full {
                    sink.zero(gpa, count)?;
                }
                saved.zero += u64::from(count);
            }
            gpa += now.len() as u64;
            rest = later;
        }
        Ok(())
    }

    pub(super) fn adopt(&self, runs: &[(u64, u32)], holder: MemberId) -> Result<(), DsmError> {
        for gpa in addresses(runs) {
            let page = self.layout.page_at(gpa).ok_or(DsmError::NotHome { gpa })?;
            let mut shard = self.engine.shard(page);
            let concerns_us = holder == self.config().me || self.home_of(page) == Some(self.config().me);
            if concerns_us && !shard.core.adopt(page, holder) {
                return Err(DsmError::InUse { gpa });
            }
        }
        Ok(())
    }

    /// Until all pages homed here have come, or the member stops.
    pub(super) fn prefetch(&self, runs: &[(u64, u32)], holder: MemberId) {
        let is_ours = |p: &Page| self.home_of(*p) == Some(self.config().me);
        let pages = addresses(runs).filter_map(|gpa| self.layout.page_at(gpa).filter(is_ours));
        for (n, page) in pages.enumerate() {
            loop {
                if !self.is_running() {
                    return;
                }
                // Held while the page is asked for: who makes a cut sees either nothing of it or all.
                let held = self.held();
                if !*held && !self.is_crowded(n) {
                    self.engine.bring(self, self.now(), page, holder);
                    break;
                }
                drop(held);
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        tracing::debug!("all pages of the checkpoint have come");
    }

    /// Now and then: are enough requests under way?
    fn is_crowded(&self, n: usize) -> bool {
        n % (AHEAD / 2) == 0 && self.under_way() > AHEAD
    }
}

fn addresses(runs: &[(u64, u32)]) -> impl Iterator<Item = u64> {
    runs.iter().flat_map(|(start, pages)| (0..u64::from(*pages)).map(move |n| start + n * PAGE_SIZE))
}

impl super::engine::Engine {
    /// A page homed here that is in the image of `holder` is to come, unless somebody has taken it meanwhile.
    pub(super) fn bring(&self, env: &Shell, now: u64, page: Page, holder: MemberId) {
        let shard = self.shard(page);
        let is_in_image = shard.core.cache().is_in_image(page);
        let is_there = shard.core.directory().holders(page) == Holders::Modified { owner: holder };
        drop(shard);
        if is_in_image {
            self.one(env, now, page, Event::Load { page });
        } else if is_there && holder != env.me() {
            self.one(env, now, page, Event::Ahead { page });
        }
    }
}
