//! Contended pages that are used together: the gang.
//!
//! Where page walks count as writes (AMD nested paging, Intel EPT with accessed/dirty bits), every vCPU needs the guest's
//! upper page tables writable, all of them at once, for any instruction. Two members that fetch them one by one spend the
//! hold time of the first on waiting for the last. So a member remembers which contended pages it lost, and when it faults
//! on one of them it asks for the others in the same go: one round trip for the whole working set.
//!
//! Nobody can see whether a page that came along is used. So each sits out now and then: if it is still needed a thread
//! faults on it, and it will sit out half as often; if not it is gone.

use crate::layout::Page;
use std::collections::HashMap;

/// Most pages that are asked for together.
const MOST: usize = 64;
/// Most pages that count as called at a time; more threads than that seldom wait at once.
const MOST_CALLED: usize = 16;
/// A new page sits out one call of so many.
const FIRST_TERM: u32 = 16;
/// How often the time between two such calls can double.
const MOST_DOUBLINGS: u8 = 8;
/// Pages whose habits are remembered.
const HABITS: usize = 512;

/// What is known of a page's use.
#[derive(Clone, Copy, Debug)]
struct Habit {
    /// How often it was missed when it sat out.
    missed: u8,
    /// The call at which it sits out next.
    due: u32,
}

/// Contended pages that this member lost and did not ask for since.
#[derive(Debug, Default)]
pub(super) struct Gang {
    lost: Vec<Page>,
    /// The pages whose faults called the gang last, until they come.
    called: Vec<Page>,
    calls: u32,
    losses: u32,
    habits: HashMap<Page, Habit>,
}

impl Gang {
    /// The member gave a contended page away. Returns it if it is to be asked for at once, because the gang is being
    /// called at the moment.
    pub(super) fn lost(&mut self, page: Page) -> Option<Page> {
        self.losses = self.losses.saturating_add(1);
        if self.called.iter().any(|called| *called != page) {
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

    /// How many contended pages were given away since the last call of this function.
    pub(super) fn take_losses(&mut self) -> u32 {
        std::mem::take(&mut self.losses)
    }

    /// Pages have come.
    pub(super) fn came(&mut self, first: Page, count: u32) {
        let run = first.0..first.0.saturating_add(count);
        self.called.retain(|called| !run.contains(&called.0));
    }

    /// The member faulted on `page`, which is contended: the pages to ask for along with it. A fault that is only repeated,
    /// as the kernel does for a thread that has a signal pending, calls nobody: others would seem to sit out in vain.
    pub(super) fn call(&mut self, page: Page) -> Vec<Page> {
        if self.called.contains(&page) {
            return Vec::new();
        }
        if self.called.len() == MOST_CALLED {
            self.called.remove(0);
        }
        self.called.push(page);
        self.calls = self.calls.wrapping_add(1);
        self.missed(page);
        let lost = std::mem::take(&mut self.lost);
        lost.into_iter().filter(|p| *p != page && !self.sits_out(*p)).collect()
    }

    /// A thread needed the page before it was asked for.
    fn missed(&mut self, page: Page) {
        if self.habits.len() >= HABITS {
            // Those that nobody ever missed are learnt again at no cost.
            self.habits.retain(|_, h| h.missed > 0);
        }
        if self.habits.len() >= HABITS {
            self.habits.clear();
        }
        let calls = self.calls;
        let habit = self.habits.entry(page).or_insert(Habit { missed: 0, due: calls });
        habit.missed = (habit.missed + 1).min(MOST_DOUBLINGS);
        // Not all that began together sit out together.
        habit.due = calls.wrapping_add((FIRST_TERM << habit.missed) + page.0 % FIRST_TERM);
    }

    /// Whether the page is left out of this call.
    fn sits_out(&mut self, page: Page) -> bool {
        let due = match self.habits.get(&page) {
            Some(habit) => habit.due,
            None => {
                let due = self.calls.wrapping_add(FIRST_TERM + page.0 % FIRST_TERM);
                self.habits.insert(page, Habit { missed: 0, due });
                due
            }
        };
        self.calls.wrapping_sub(due) < u32::MAX / 2
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
        gang.came(Page(2), 1);
        assert!(gang.call(Page(3)).is_empty(), "asked for already");
        assert_eq!(gang.calls, 2);
        assert!(gang.call(Page(3)).is_empty(), "a fault that is repeated");
        assert_eq!(gang.calls, 2);
        gang.came(Page(3), 1);
        assert_eq!(gang.lost(Page(5)), None);
    }

    /// Loses pages 1 and 2, faults on 1, `rounds` times; says in which rounds 2 was not asked for. With `needed` a thread
    /// faults on 2 then, without, 2 does not come back and is not lost again.
    fn absences(rounds: u32, needed: bool) -> Vec<u32> {
        let mut gang = Gang::default();
        let mut is_here = true;
        let mut absent = Vec::new();
        for round in 0..rounds {
            gang.lost(Page(1));
            if is_here {
                gang.lost(Page(2));
            }
            is_here = gang.call(Page(1)).contains(&Page(2));
            gang.came(Page(1), 1);
            if !is_here {
                absent.push(round);
                if needed {
                    gang.call(Page(2));
                    gang.came(Page(2), 1);
                    is_here = true;
                }
            }
        }
        absent
    }

    #[test]
    fn a_page_that_is_needed_sits_out_less_and_less() {
        let absent = absences(2000, true);
        assert!((4..10).contains(&absent.len()), "{absent:?}");
        assert!(absent.windows(3).all(|w| w[2] - w[1] > w[1] - w[0]), "{absent:?}");
    }

    #[test]
    fn a_page_that_is_not_needed_is_soon_gone() {
        let absent = absences(200, false);
        assert!(absent.first().is_some_and(|first| *first <= 2 * FIRST_TERM));
        assert_eq!(absent, (absent[0]..200).collect::<Vec<_>>());
    }

    #[test]
    fn a_gang_is_bounded() {
        let mut gang = Gang::default();
        (0..10_000).for_each(|n| assert_eq!(gang.lost(Page(n)), None));
        assert!(gang.call(Page(9_999)).len() < MOST);
        (0..10_000).for_each(|n| drop(gang.call(Page(n))));
        assert!(gang.habits.len() <= HABITS);
    }
}
