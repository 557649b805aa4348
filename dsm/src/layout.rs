//! Which guest-physical pages exist and where their homes are: dense page numbers for everything below.

use crate::addr::{HomeRange, MAX_MEMBERS, MemberId, PAGE_SIZE};
use std::ops::Range;
use thiserror::Error;

/// Number of a page: its position in the memory, counted over all ranges in ascending order of address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Page(pub u32);

/// A list of ranges that no memory can have.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum LayoutError {
    /// No range at all.
    #[error("the memory has no range")]
    Empty,
    /// A range is empty or not made of whole pages.
    #[error("range {start:#x}+{len:#x} is not a positive number of whole pages")]
    Unaligned {
        /// First address of the range.
        start: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// A range starts before the one in front of it has ended, or runs over the end of the address space.
    #[error("range at {start:#x} overlaps the one before it, or is out of order or too long")]
    Overlap {
        /// First address of the range.
        start: u64,
    },
    /// A home that no memory can have.
    #[error("range at {start:#x} has its home at {home}; members are 0..{MAX_MEMBERS}")]
    Home {
        /// First address of the range.
        start: u64,
        /// Its home.
        home: MemberId,
    },
    /// More pages than a page number can count.
    #[error("the memory is larger than 16 TiB")]
    TooLarge,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Span {
    range: HomeRange,
    first: u32,
    pages: u32,
}

/// All ranges of a memory, in ascending order of address.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    spans: Vec<Span>,
    pages: u32,
}

impl Layout {
    /// Checks the ranges (ascending, whole pages, not overlapping) and numbers their pages.
    pub fn new(ranges: &[HomeRange]) -> Result<Layout, LayoutError> {
        let mut spans = Vec::with_capacity(ranges.len());
        let (mut pages, mut end) = (0u32, 0u64);
        for range in ranges {
            let HomeRange { start, len, home } = *range;
            if len == 0 || start % PAGE_SIZE != 0 || len % PAGE_SIZE != 0 {
                return Err(LayoutError::Unaligned { start, len });
            }
            if usize::from(home.0) >= MAX_MEMBERS {
                return Err(LayoutError::Home { start, home });
            }
            let next_end = start.checked_add(len).ok_or(LayoutError::Overlap { start })?;
            if start < end {
                return Err(LayoutError::Overlap { start });
            }
            let count = u32::try_from(len / PAGE_SIZE).map_err(|_| LayoutError::TooLarge)?;
            spans.push(Span { range: *range, first: pages, pages: count });
            pages = pages.checked_add(count).ok_or(LayoutError::TooLarge)?;
            end = next_end;
        }
        if spans.is_empty() { Err(LayoutError::Empty) } else { Ok(Layout { spans, pages }) }
    }

    /// Number of pages in all ranges.
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// The ranges, in ascending order.
    pub fn ranges(&self) -> impl Iterator<Item = HomeRange> + '_ {
        self.spans.iter().map(|s| s.range)
    }

    /// The page that holds an address, or `None` where there is no memory.
    pub fn page_at(&self, gpa: u64) -> Option<Page> {
        let at = self.spans.partition_point(|s| s.range.end() <= gpa);
        let span = self.spans.get(at)?;
        let offset = gpa.checked_sub(span.range.start)? / PAGE_SIZE;
        Some(Page(span.first + u32::try_from(offset).ok()?))
    }

    /// Guest-physical address of a page. A page beyond the memory has the address behind the last range.
    pub fn gpa_of(&self, page: Page) -> u64 {
        match self.span_of(page) {
            Some(span) => span.range.start + u64::from(page.0 - span.first) * PAGE_SIZE,
            None => self.spans.last().map_or(0, |s| s.range.end()),
        }
    }

    /// Home of a page, or `None` for a page that the memory does not have.
    pub fn home_of(&self, page: Page) -> Option<MemberId> {
        self.span_of(page).map(|s| s.range.home)
    }

    /// Whether the other memory has the same pages at the same addresses, whatever their homes.
    pub fn has_the_addresses_of(&self, other: &Layout) -> bool {
        self.runs() == other.runs()
    }

    /// The runs of addresses, however many ranges each is made of.
    fn runs(&self) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for range in self.ranges() {
            match runs.last_mut() {
                Some((_, end)) if *end == range.start => *end = range.end(),
                _ => runs.push((range.start, range.end())),
            }
        }
        runs
    }

    /// The numbers of the pages behind a page, in its range.
    pub fn following(&self, page: Page) -> Range<u32> {
        let end = self.span_of(page).map_or(0, |s| s.first + s.pages);
        page.0.saturating_add(1)..end
    }

    /// Whether `count` pages from `page` on exist and lie behind each other, whatever their homes.
    pub fn is_run(&self, page: Page, count: u32) -> bool {
        let last = page.0.checked_add(count).and_then(|behind| behind.checked_sub(1)).map(Page);
        let (Some(last), Some(span)) = (last.filter(|last| last.0 < self.pages), self.span_of(page)) else {
            return false;
        };
        let distance = u64::from(count.saturating_sub(1)) * PAGE_SIZE;
        let is_within = (page.0..span.first + span.pages).contains(&last.0);
        is_within || self.gpa_of(last) == self.gpa_of(page) + distance
    }

    fn span_of(&self, page: Page) -> Option<&Span> {
        let at = self.spans.partition_point(|s| s.first + s.pages <= page.0);
        self.spans.get(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, len: u64, home: u16) -> HomeRange {
        HomeRange { start, len, home: MemberId(home) }
    }

    #[test]
    fn numbers_pages_over_a_hole() {
        let layout = Layout::new(&[range(0, 0x2000, 0), range(0x1_0000, 0x3000, 1)]).unwrap();
        assert_eq!(layout.pages(), 5);
        assert_eq!(layout.page_at(0x1fff), Some(Page(1)));
        assert_eq!(layout.page_at(0x2000), None);
        assert_eq!(layout.page_at(0x1_2abc), Some(Page(4)));
        assert_eq!(layout.page_at(0x1_3000), None);
        assert_eq!(layout.gpa_of(Page(4)), 0x1_2000);
        assert_eq!(layout.home_of(Page(1)), Some(MemberId(0)));
        assert_eq!(layout.home_of(Page(2)), Some(MemberId(1)));
        assert_eq!(layout.home_of(Page(5)), None);
        assert!(layout.following(Page(0)).eq([1]));
        assert!(layout.following(Page(2)).eq([3, 4]));
        assert!(layout.following(Page(9)).next().is_none());
        assert!(layout.is_run(Page(0), 2) && layout.is_run(Page(2), 3));
        assert!(!layout.is_run(Page(0), 3), "over the hole");
        let cut = Layout::new(&[range(0, 0x2000, 0), range(0x2000, 0x1000, 1)]).unwrap();
        assert!(cut.is_run(Page(0), 3), "whatever their homes");
        assert!(
            !layout.is_run(Page(3), 3) && !layout.is_run(Page(5), 1) && !layout.is_run(Page(4), u32::MAX)
        );
    }

    #[test]
    fn the_same_addresses_however_they_are_cut() {
        let whole = Layout::new(&[range(0, 0x4000, 0), range(0x1_0000, 0x1000, 1)]).unwrap();
        let cut = [range(0, 0x1000, 2), range(0x1000, 0x3000, 0), range(0x1_0000, 0x1000, 0)];
        assert!(whole.has_the_addresses_of(&Layout::new(&cut).unwrap()));
        assert!(!whole.has_the_addresses_of(&Layout::new(&cut[..2]).unwrap()));
    }

    #[test]
    fn refuses_ranges_that_no_memory_has() {
        assert_eq!(Layout::new(&[]), Err(LayoutError::Empty));
        assert_eq!(
            Layout::new(&[range(1, 0x1000, 0)]),
            Err(LayoutError::Unaligned { start: 1, len: 0x1000 })
        );
        assert_eq!(Layout::new(&[range(0, 0, 0)]), Err(LayoutError::Unaligned { start: 0, len: 0 }));
        assert_eq!(
            Layout::new(&[range(0, 0x2000, 0), range(0x1000, 0x1000, 0)]),
            Err(LayoutError::Overlap { start: 0x1000 })
        );
        assert_eq!(Layout::new(&[range(!0xfff, 0x1000, 0)]), Err(LayoutError::Overlap { start: !0xfff }));
        assert!(matches!(Layout::new(&[range(0, 0x1000, 64)]), Err(LayoutError::Home { .. })));
        assert_eq!(Layout::new(&[range(0, 1 << 45, 0)]), Err(LayoutError::TooLarge));
    }
}
