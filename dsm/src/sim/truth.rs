//! What must be true of the memory as a whole, at every instant: the reference that all members are measured by.

use super::memory::{Copy, PAGE};
use crate::layout::Page;

/// Words that the workload uses, by their place in the page: near both ends and between.
pub(super) const WORDS: [usize; 4] = [8, 1032, 2056, 4088];

#[derive(Clone, Copy, Debug, Default)]
struct Known {
    words: [u64; WORDS.len()],
    /// Members that have the page.
    present: u64,
    /// Members that may write to it.
    writable: u64,
}

/// Every page's last write, and who has the page.
#[derive(Debug)]
pub(super) struct Truth {
    pages: Vec<Known>,
}

fn word(bytes: &[u8; PAGE], n: usize) -> u64 {
    let at = WORDS.get(n).copied().unwrap_or(0);
    let word = bytes.get(at..at + 8).and_then(|w| w.try_into().ok());
    word.map_or(0, u64::from_le_bytes)
}

/// What a thread does to one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write(u64),
    /// A locked increment.
    Add,
}

impl Truth {
    pub(super) fn new(pages: u32) -> Truth {
        Truth { pages: vec![Known::default(); pages as usize] }
    }

    pub(super) fn words(&self, page: Page) -> [u64; WORDS.len()] {
        self.pages.get(page.0 as usize).map_or([0; WORDS.len()], |k| k.words)
    }

    /// Accesses a word of a page that may be accessed so; returns what went wrong.
    pub(super) fn access(
        &mut self,
        page: Page,
        n: usize,
        access: Access,
        copy: &mut Copy,
    ) -> Result<(), String> {
        let found = word(&copy.bytes, n);
        let last = self.pages.get_mut(page.0 as usize).and_then(|k| k.words.get_mut(n));
        let Some(last) = last else { return Ok(()) };
        if matches!(access, Access::Read | Access::Add) && found != *last {
            return Err(format!("read {found} from word {n} of page {}, whose last write is {last}", page.0));
        }
        let value = match access {
            Access::Read => return Ok(()),
            Access::Write(value) => value,
            Access::Add => found + 1,
        };
        *last = value;
        let at = WORDS.get(n).copied().unwrap_or(0);
        if let Some(room) = copy.bytes.get_mut(at..at + 8) {
            room.copy_from_slice(&value.to_le_bytes());
        }
        Ok(())
    }

    /// A page of before the start.
    pub(super) fn preload(&mut self, page: Page, words: [u64; WORDS.len()]) -> [u8; PAGE] {
        let mut bytes = [0; PAGE];
        for (at, value) in WORDS.iter().zip(words) {
            if let Some(room) = bytes.get_mut(*at..at + 8) {
                room.copy_from_slice(&value.to_le_bytes());
            }
        }
        if let Some(known) = self.pages.get_mut(page.0 as usize) {
            known.words = words;
        }
        bytes
    }

    /// The bytes that a member puts in place must be the page's last.
    pub(super) fn check_contents(&self, page: Page, bytes: &[u8; PAGE]) -> Result<(), String> {
        for (n, last) in self.words(page).into_iter().enumerate() {
            let found = word(bytes, n);
            if found != last {
                return Err(format!(
                    "page {} arrives with {found} in word {n}, but its last write is {last}",
                    page.0
                ));
            }
        }
        Ok(())
    }

    /// A member's right to a page has changed. One writer, or many readers.
    pub(super) fn set_right(
        &mut self,
        member: u16,
        page: Page,
        present: bool,
        writable: bool,
    ) -> Result<(), String> {
        let Some(known) = self.pages.get_mut(page.0 as usize) else { return Ok(()) };
        let bit = 1u64 << (member % 64);
        known.present = if present { known.present | bit } else { known.present & !bit };
        known.writable = if writable { known.writable | bit } else { known.writable & !bit };
        if known.writable != 0 && known.present.count_ones() > 1 {
            return Err(format!(
                "page {} is writable at members {:?} while {:?} have it",
                page.0,
                list(known.writable),
                list(known.present)
            ));
        }
        Ok(())
    }
}

fn list(set: u64) -> Vec<u16> {
    (0..64).filter(|n| set & (1 << n) != 0).collect()
}
