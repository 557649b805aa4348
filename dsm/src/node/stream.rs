//! Runs of faults on neighbouring pages, and how far to ask ahead of them.
//!
//! A thread that goes through memory from one end to the other (a copy, a clear, code that runs for the first time) would
//! wait a round trip for every page. Its second fault in a row shows what it does; from then on each fault asks for a
//! window of the pages that follow, twice as many each time, as a file system does when a file is read in order.

use crate::layout::Page;

/// Runs that are remembered, the last used ones.
const RUNS: usize = 16;
/// First and longest window, in pages.
const FIRST: u32 = 4;
const LONGEST: u32 = 512;
/// From so many faults in a row on, a run is steady: it takes pages from those who have them, too.
const STEADY: u32 = 6;

/// What to ask for ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    /// Number of pages.
    pub(super) pages: u32,
    /// Of these so many have been asked for before.
    pub(super) skip: u32,
    /// Whether the run has gone on for long.
    pub(super) is_steady: bool,
}

#[derive(Clone, Copy, Debug)]
struct Run {
    next: u32,
    window: u32,
    faults: u32,
}

/// The runs of one member.
#[derive(Debug, Default)]
pub(super) struct Streams(Vec<Run>);

impl Streams {
    /// A thread faulted on `page`, which is elsewhere: what to ask for of the pages behind it. `is_on_its_way` says that the
    /// page was asked for before: so were those behind it, then.
    pub(super) fn fault(&mut self, page: Page, is_on_its_way: bool) -> Window {
        // The last window may have reached further than the pages that were to be had.
        let is_near = |r: &Run| r.next.checked_sub(page.0).is_some_and(|behind| behind <= r.window);
        let found = self.0.iter().position(is_near);
        let (window, faults, asked) = match found.map(|at| self.0.remove(at)) {
            Some(run) => ((run.window * 2).clamp(FIRST, LONGEST), run.faults.saturating_add(1), run.next),
            None => (0, 1, 0),
        };
        let skip = if is_on_its_way { asked.saturating_sub(page.0.saturating_add(1)).min(window) } else { 0 };
        self.0.truncate(RUNS - 1);
        self.0.insert(0, Run { next: page.0.saturating_add(window + 1), window, faults });
        Window { pages: window, skip, is_steady: faults >= STEADY }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_seen_at_its_second_fault_and_its_window_grows() {
        let mut streams = Streams::default();
        let mut at = 100;
        let mut windows = Vec::new();
        for _ in 0..6 {
            let window = streams.fault(Page(at), false);
            windows.push((window.pages, window.is_steady));
            at += window.pages + 1;
        }
        let expect = [(0, false), (4, false), (8, false), (16, false), (32, false), (64, true)];
        assert_eq!(windows, expect);
        assert_eq!(streams.fault(Page(at - 20), false).pages, 128, "not all of the window was to be had");
        let window = streams.fault(Page(at - 10), true);
        assert_eq!((window.pages, window.skip), (256, 118), "asked for before, and still on their way");
        assert_eq!(streams.fault(Page(7), false).pages, 0);
    }

    #[test]
    fn strangers_push_out_the_oldest_run_only() {
        let mut streams = Streams::default();
        streams.fault(Page(1), false);
        (0..RUNS - 1).for_each(|n| {
            assert_eq!(streams.fault(Page(1000 * u32::try_from(n + 1).unwrap()), false).pages, 0)
        });
        assert_eq!(streams.fault(Page(2), false).pages, FIRST);
        (0..RUNS).for_each(|n| {
            assert_eq!(streams.fault(Page(5000 * u32::try_from(n + 9).unwrap()), false).pages, 0)
        });
        assert_eq!(streams.fault(Page(7), false).pages, 0);
    }
}
