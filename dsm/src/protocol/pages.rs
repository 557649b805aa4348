//! Which pages one [`Core`](super::Core) is responsible for, and where they lie in its dense tables.

use crate::layout::Page;
use std::ops::Range;

/// Neighbouring pages stay together in blocks of this many, so that one core can serve a run of pages.
pub const BLOCK: u32 = 64;

/// A member's pages are dealt out to `1 << bits` cores in blocks; this is core `index`'s share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Share {
    index: u32,
    bits: u32,
}

impl Share {
    /// All pages in one core.
    pub const WHOLE: Share = Share { index: 0, bits: 0 };

    /// The share of core `index` of `1 << bits`.
    pub fn new(index: u32, bits: u32) -> Share {
        Share { index, bits: bits.min(16) }
    }

    /// The core, of `1 << bits`, that has a page.
    pub fn index_of(page: Page, bits: u32) -> u32 {
        (page.0 / BLOCK) & ((1 << bits.min(16)) - 1)
    }

    /// Whether the page belongs to this share.
    pub fn has(self, page: Page) -> bool {
        Self::index_of(page, self.bits) == self.index
    }

    /// Position of a page of this share in its dense tables.
    pub fn slot(self, page: Page) -> usize {
        let block = (page.0 / BLOCK) >> self.bits;
        (block * BLOCK + page.0 % BLOCK) as usize
    }

    /// The page at a position: the inverse of [`Share::slot`].
    pub fn page(self, slot: usize) -> Page {
        let slot = u32::try_from(slot).unwrap_or(u32::MAX);
        Page((((slot / BLOCK) << self.bits) | self.index) * BLOCK + slot % BLOCK)
    }

    /// Number of slots for a memory of `pages` pages.
    pub fn slots(self, pages: u32) -> usize {
        if self.bits == 0 {
            return pages as usize;
        }
        let blocks = pages.div_ceil(BLOCK) as usize;
        (blocks >> self.bits) * BLOCK as usize + BLOCK as usize
    }
}

/// Cuts a run of pages where blocks begin: each piece is one core's.
pub fn blocks(pages: Range<u32>) -> impl Iterator<Item = Range<u32>> {
    let mut rest = pages;
    std::iter::from_fn(move || {
        let end = rest.end.min((rest.start / BLOCK).saturating_add(1).saturating_mul(BLOCK));
        let piece = rest.start..end;
        rest.start = end;
        (!piece.is_empty()).then_some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_cut_where_blocks_begin() {
        assert!(blocks(3..3).next().is_none());
        assert!(blocks(3..64).eq(std::iter::once(3..64)));
        assert!(blocks(60..200).eq([60..64, 64..128, 128..192, 192..200]));
        assert!(blocks(u32::MAX - 1..u32::MAX).eq(std::iter::once(u32::MAX - 1..u32::MAX)));
    }

    #[test]
    fn slots_are_dense_and_invertible() {
        for bits in 0..4 {
            for n in 0..5000 {
                let share = Share::new(Share::index_of(Page(n), bits), bits);
                assert!(share.has(Page(n)));
                assert_eq!(share.page(share.slot(Page(n))), Page(n));
                assert!(share.slot(Page(n)) < share.slots(5000));
            }
        }
    }
}
