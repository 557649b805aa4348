//! Contended pages that are used together: the gang.
//!
//! Where page walks count as writes (AMD nested paging, Intel EPT with accessed/dirty bits), every vCPU needs the guest's
//! upper page tables writable, all of them at once, for any instruction. Two members that fetch them one by one spend the
//! hold time of the first on waiting for the last. So a member remembers which contended pages it lost, and when it faults
//! on one of them it asks for the others in the same go: one round trip for the whole working set.

use crate::layout::Page;

/// Most pages that are asked for together.
const MOST: usize = 24;
/// Of so many calls a page sits out one: if it is still needed it faults and is back in the gang, if not it is gone.
const SIT_OUT: u32 = 16;

/// Contended pages that this member lost and did not ask for since.
#[derive(Debug, Default)]
pub(super) struct Gang {
    lost: Vec<Page>,
    /// The page whose fault called the gang last, until it comes.
    called: Option<Page>,
    calls: u32,
}

impl Gang {
    /// The member gave a contended page away. Returns it if it is to be asked for at once, because the gang is being
    /// called at the moment.
    pub(super) fn lost(&mut self, page: Page) -> Option<Page> {
        if self.called.is_some_and(|called| called != page) {
            self.lost.retain(|p| *p != page);
            return Some(page);
        }
        if self.lost.contains(&page) {
            return None;
        }
        if self.lost.len() == MOST {
            self.lost.remove(0);
        }
        self.lost.push(page);
        None
    }

    /// A page has come.
    pub(super) fn came(&mut self, page: Page) {
        if self.called == Some(page) {
            self.called = None;
        }
    }

    /// The member faulted on `page`, which is contended: the pages to ask for along with it.
    pub(super) fn call(&mut self, page: Page) -> Vec<Page> {
        self.called = Some(page);
        self.calls = self.calls.wrapping_add(1);
        let turn = self.calls;
        let sits_out = |p: &Page| p.0.wrapping_add(turn) % SIT_OUT == 0;
        std::mem::take(&mut self.lost).into_iter().filter(|p| *p != page && !sits_out(p)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gang_comes_back_together() {
        let mut gang = Gang::default();
        for n in 1..=4 {
            gang.lost(Page(n));
            gang.lost(Page(n));
        }
        assert_eq!(gang.call(Page(2)), [Page(1), Page(3), Page(4)]);
        assert_eq!(gang.lost(Page(5)), Some(Page(5)), "lost while the gang is called: asked for at once");
        gang.came(Page(2));
        assert!(gang.call(Page(3)).is_empty(), "asked for already");
        gang.came(Page(3));
        assert_eq!(gang.lost(Page(5)), None);
    }

    #[test]
    fn a_gang_is_bounded_and_every_page_sits_out_in_turn() {
        let mut gang = Gang::default();
        (0..100).for_each(|n| assert_eq!(gang.lost(Page(n)), None));
        assert!(gang.call(Page(99)).len() < MOST);
        let mut gang = Gang::default();
        let mut sat_out = 0;
        for _ in 0..SIT_OUT {
            gang.lost(Page(1));
            gang.lost(Page(2));
            sat_out += u32::from(gang.call(Page(1)).is_empty());
            gang.came(Page(1));
        }
        assert_eq!(sat_out, 1);
    }
}
