//! The pages on which each thread waited last: its working set, as far as faults show it. A thread that goes to work on
//! another member (a vCPU that moves) takes the list along, and that member asks for the pages before they are missed.

use crate::layout::Page;
use std::collections::VecDeque;

/// Pages that are remembered of a thread.
const PAGES: usize = 32;
/// Threads that are remembered; the one that has not waited for longest is forgotten.
const THREADS: usize = 256;

/// What is remembered.
#[derive(Debug, Default)]
pub(super) struct Recent {
    /// The thread that waited last comes last.
    threads: VecDeque<(u32, VecDeque<(Page, bool)>)>,
}

impl Recent {
    /// A thread waits for a page.
    pub(super) fn note(&mut self, thread: u32, page: Page, write: bool) {
        let known = self.threads.iter().rposition(|(id, _)| *id == thread);
        let mut pages =
            known.and_then(|at| self.threads.remove(at)).map(|(_, pages)| pages).unwrap_or_default();
        pages.retain(|(p, _)| *p != page);
        if pages.len() == PAGES {
            pages.pop_front();
        }
        pages.push_back((page, write));
        if self.threads.len() == THREADS {
            self.threads.pop_front();
        }
        self.threads.push_back((thread, pages));
    }

    /// The pages of a thread, the newest first, and whether it wrote.
    pub(super) fn of(&self, thread: u32) -> Vec<(Page, bool)> {
        let found = self.threads.iter().find(|(id, _)| *id == thread);
        found.map(|(_, pages)| pages.iter().rev().copied().collect()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_pages_of_the_newest_threads() {
        let mut recent = Recent::default();
        for n in 0..40 {
            recent.note(1, Page(n), false);
        }
        recent.note(1, Page(20), true);
        let pages = recent.of(1);
        assert_eq!((pages.len(), pages[0], pages[1]), (PAGES, (Page(20), true), (Page(39), false)));
        assert_eq!(pages.iter().filter(|(p, _)| *p == Page(20)).count(), 1);
        for thread in 2..=300 {
            recent.note(thread, Page(thread), false);
            recent.note(250, Page(1), true);
        }
        assert!(recent.of(1).is_empty() && recent.of(2).is_empty());
        assert_eq!((recent.of(300), recent.of(250)[0]), (vec![(Page(300), false)], (Page(1), true)));
    }
}
