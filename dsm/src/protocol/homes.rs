//! A change of homes: pages get another member that serialises their transactions.
//!
//! ```text
//!  all members      nobody uses the memory; Put is not listened to (freeze), nothing is under way
//!  the old home --> entries of its directory --> the new home       any number of times: the old table still holds
//!  all members      the new table, under a new epoch (rehome)       in memory only: it can't fail
//!  all members      go on
//! ```
//!
//! Who has a page does not change, only who knows it. The one thing that may be on its way between quiet members is a Put,
//! which is a wish: if it arrives under the new epoch it is passed over ([`crate::transport::frame`]).

use super::core::Core;
use super::directory::Entry;
use super::message::MemberSet;
use crate::addr::MemberId;
use crate::layout::{Layout, Page};
use crate::seeded::{SeededFault, is_on};
use std::sync::Arc;

/// A table of homes that can't follow the one that holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RehomeError {
    /// Something is under way.
    #[error("the memory is in use")]
    InUse,
    /// It is about another memory.
    #[error("the new table of homes is not about the same addresses")]
    OtherMemory,
}

impl<D> Core<D> {
    /// From now on (or no longer) nothing begins by itself: wishes to be rid of pages are passed over.
    pub fn freeze(&mut self, frozen: bool) {
        self.frozen = frozen;
    }

    /// What the directory says of a page that is homed here and that anybody has touched.
    pub fn entry(&self, page: Page) -> Option<Entry> {
        let is_home = self.home(page) == Some(self.me);
        self.directory.entry(page).filter(|_| is_home)
    }

    /// What another home's directory says of a page that is to be homed here. Of no consequence before the new table holds.
    /// False if it speaks of others than `members`, or of a page that is homed here already.
    pub fn inherit(&mut self, page: Page, entry: Option<Entry>, members: MemberSet) -> bool {
        let is_ours = self.home(page).is_none_or(|home| home == self.me);
        if is_ours || !entry.is_none_or(|entry| entry.is_about(members)) {
            return false;
        }
        let entry = entry.filter(|_| !is_on(SeededFault::LostEntry));
        self.directory.set_entry(page, entry);
        true
    }

    /// The new table holds.
    ///
    /// # Errors
    /// [`RehomeError`]; nothing has changed.
    pub fn rehome(&mut self, layout: Arc<Layout>) -> Result<(), RehomeError> {
        if !self.is_quiet() || !self.frozen {
            return Err(RehomeError::InUse);
        }
        if !self.layout.has_the_addresses_of(&layout) {
            return Err(RehomeError::OtherMemory);
        }
        self.layout = layout;
        Ok(())
    }

    /// The home of a page by the table that holds.
    pub fn home_of(&self, page: Page) -> Option<MemberId> {
        self.layout.home_of(page)
    }
}
