//! Saving the memory, and starting from what was saved.
//!
//! A *cut* is the memory at an instant at which nobody writes and nothing is under way. Who saves a page is known without
//! a word between members: its owner if it is Modified, its home if it is Shared (which fetches a copy if it has none).
//!
//! What changed since the last cut is known as well:
//!
//! ```text
//!  at a cut      Modified: write-protected and marked clean by its owner      Shared: marked saved by its home
//!  a write       faults at the owner, which ends the mark: no message         needs Modified: ends the home's mark
//!  moved on      every grant of Modified begins without the mark; becoming Shared begins without the home's
//! ```
//! So a page counts as changed at least when it was written to, and sometimes when it only moved.
//!
//! An *adopted* page is Modified at the member that has the image, without being in memory: its contents come when
//! somebody needs them there, or are asked for from elsewhere, or ahead of that ([`super::Event::Load`]).

use super::cache::State;
use super::core::Core;
use super::directory::Holders;
use crate::addr::MemberId;
use crate::layout::Page;
use std::ops::Range;

/// What a member is to save of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Duty {
    /// Nothing: it is untouched, or another member's.
    None,
    /// The page, which has changed since the last cut or not.
    Save {
        /// It has.
        changed: bool,
        /// Its contents are not in memory but still in the image.
        in_image: bool,
    },
    /// The page, of which it has no copy yet: a read fault brings one.
    Fetch {
        /// It has changed since the last cut.
        changed: bool,
    },
}

/// What a member is to save of many pages, in sum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Duties {
    /// Pages that it is to save, changed or not.
    pub answers_for: u64,
    /// Pages whose home is here that anybody has touched.
    pub touched: u64,
    /// One of those to save has changed since the last cut.
    pub has_changed: bool,
    /// It has no copy of one of them.
    pub is_lacking: bool,
}

impl<D> Core<D> {
    /// Whether nothing is under way at this member.
    pub fn is_quiet(&self) -> bool {
        self.cache.is_quiet() && self.directory.is_quiet()
    }

    /// What this member is to save of a page, while all members are quiet.
    pub fn duty(&self, page: Page) -> Duty {
        let Some(home) = self.home(page) else { return Duty::None };
        match self.cache.state(page) {
            State::Modified => {
                Duty::Save { changed: !self.cache.is_clean(page), in_image: self.cache.is_in_image(page) }
            }
            state if home == self.me && matches!(self.directory.holders(page), Holders::Shared { .. }) => {
                let changed = !self.directory.is_saved(page);
                match state {
                    State::Shared => Duty::Save { changed, in_image: false },
                    _ => Duty::Fetch { changed },
                }
            }
            _ => Duty::None,
        }
    }

    /// What [`Core::duty`] and [`Core::is_touched`] say of pages of one block, in sum. All of the memory is looked at
    /// while the guest stands still, and most of it has not changed since the last cut: this takes a nanosecond per page.
    pub fn duties(&self, pages: Range<u32>) -> Duties {
        let mut sum = Duties::default();
        let mut rest = pages;
        // Pages of one range have one home.
        while let Some(home) = self.home(Page(rest.start)).filter(|_| !rest.is_empty()) {
            let first = Page(rest.start);
            let end = self.layout.following(first).end.min(rest.end);
            let count = (end - first.0) as usize;
            let mut add = |state: State, is_clean: bool, holders: Holders, is_saved: bool| {
                let is_shared = matches!(holders, Holders::Shared { .. });
                let is_modified = state == State::Modified;
                sum.answers_for += u64::from(is_modified || is_shared);
                sum.touched += u64::from(holders != Holders::Untouched);
                sum.has_changed |= if is_modified { !is_clean } else { is_shared && !is_saved };
                sum.is_lacking |= is_shared && state == State::Invalid;
            };
            let states = self.cache.states(first, count);
            if home == self.me {
                let entries = self.directory.entries(first, count);
                for ((state, is_clean), (holders, is_saved)) in states.zip(entries) {
                    add(state, is_clean, holders, is_saved);
                }
            } else {
                states.for_each(|(state, is_clean)| add(state, is_clean, Holders::Untouched, false));
            }
            rest.start = end;
        }
        sum
    }

    /// The page has been saved. Says whether the shell must write-protect it.
    pub fn saved(&mut self, page: Page) -> bool {
        match self.duty(page) {
            Duty::Save { changed, .. } if self.cache.state(page) == State::Modified => {
                self.cache.set_clean(page);
                changed
            }
            Duty::Save { .. } => {
                self.directory.set_saved(page);
                false
            }
            Duty::None | Duty::Fetch { .. } => false,
        }
    }

    /// Whether anybody has touched a page whose home is here.
    pub fn is_touched(&self, page: Page) -> bool {
        self.home(page) == Some(self.me) && self.directory.holders(page) != Holders::Untouched
    }

    /// Before anybody runs: the contents of the page are in the image that `holder` has. To be said at the page's home
    /// and at `holder`. Says whether the page was untouched, as it must be.
    pub fn adopt(&mut self, page: Page, holder: MemberId) -> bool {
        let Some(home) = self.home(page) else { return false };
        if self.cache.state(page) != State::Invalid
            || (home == self.me && self.directory.holders(page) != Holders::Untouched)
        {
            return false;
        }
        if home == self.me {
            self.directory.set(page, Holders::Modified { owner: holder });
        }
        if holder == self.me {
            self.cache.adopt(page);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use crate::layout::Page;
    use crate::protocol::cluster::Cluster;
    use crate::protocol::properties::{apply, settle, step};
    use proptest::prelude::*;

    const HOMES: [u16; 4] = [0, 1, 2, 3];

    /// Steps between two cuts, whether the cut is full, and pages that members want to be rid of.
    type Round = (Vec<crate::protocol::properties::Step>, bool, Vec<(u16, u32)>);

    fn round() -> impl Strategy<Value = Round> {
        let evictions = prop::collection::vec((0u16..4, 0u32..4), 0..6);
        (prop::collection::vec(step(4, 4), 1..60), prop::bool::weighted(0.2), evictions)
    }

    fn run(cluster: &mut Cluster, image: &mut [u8], rounds: Vec<Round>) -> Result<(), TestCaseError> {
        for (steps, full, evictions) in rounds {
            let half = steps.len() / 2;
            for (n, step) in steps.into_iter().enumerate() {
                if n == half {
                    evictions.iter().for_each(|(member, page)| cluster.evict(*member, Page(*page)));
                }
                apply(cluster, step);
                prop_assert_eq!(cluster.check(), Ok(()));
            }
            prop_assert_eq!(settle(cluster), Ok(()));
            prop_assert!(cluster.cores.iter().all(|c| c.is_quiet()));
            prop_assert_eq!(cluster.cut(full, image), Ok(()));
            prop_assert_eq!(&image[..], &cluster.newest[..]);
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]
        /// Whatever happened between two cuts, an incremental one makes the image what the memory is; and a cluster that
        /// starts from the image goes on from there, with further cuts.
        #[test]
        fn every_cut_is_the_memory(
            hold in any::<bool>(),
            first in prop::collection::vec(round(), 1..5),
            holder in 0u16..4,
            loads in prop::collection::vec(0u32..4, 0..4),
            then in prop::collection::vec(round(), 0..5),
        ) {
            let mut image = vec![0; HOMES.len()];
            let mut cluster = Cluster::new(4, &HOMES, hold);
            run(&mut cluster, &mut image, first)?;
            let mut again = Cluster::from_image(4, &HOMES, holder, &image);
            loads.into_iter().for_each(|page| again.load(holder, Page(page)));
            run(&mut again, &mut image, then)?;
            for member in 0..4 {
                for page in (0..4).map(Page) {
                    again.touch(member, page, false);
                    prop_assert_eq!(settle(&mut again), Ok(()));
                    prop_assert!(again.has(member, page, false));
                }
            }
        }
    }
}
