//! Random reads, writes and locked sections on any number of pages: an oracle that needs no order between members.
//!
//! Every thread has a word of its own on each page, which it alone counts up: it must always find what it wrote last, and
//! nobody may ever see it go down. Two more words are counted up together under a lock in a third: who has the lock must
//! find them equal.

use super::work::Outcome;
use crate::addr::PAGE_SIZE;
use crate::region::Memory;
use serde::{Deserialize, Serialize};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::thread;
use std::time::{Duration, Instant};

/// Place of the lock and of the two words that it protects, in words.
const LOCK: u64 = 0;
const PAIR: [u64; 2] = [1, 511];
/// Place of the first thread's own word.
const OWN: u64 = 8;
/// Threads of all members together that have room.
const MOST: u64 = 128;

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mix {
    /// First page's address.
    pub gpa: u64,
    /// Number of pages.
    pub pages: u64,
    /// This member's number.
    pub me: u64,
    /// Number of members.
    pub members: u64,
    /// Threads of each member.
    pub threads: u64,
    /// Seed of the random numbers.
    pub seed: u64,
    /// For how long, in milliseconds.
    pub millis: u64,
}

impl Mix {
    fn word<'a>(&self, memory: Memory<'a>, page: u64, word: u64) -> Result<&'a AtomicU64, String> {
        let gpa = self.gpa + page * PAGE_SIZE + word * 8;
        memory.u64_at(gpa).ok_or_else(|| "the order is about memory that is not there".into())
    }

    /// Adds what the locks protect: the number of locked sections of all members since the memory was zero.
    pub fn sections(&self, memory: Memory<'_>) -> Result<Outcome, String> {
        let mut sum = 0;
        for page in 0..self.pages {
            let [a, b] = PAIR.map(|w| self.word(memory, page, w).map(|w| w.load(SeqCst)));
            let (a, b) = (a?, b?);
            if a != b {
                return Err(format!("page {page}: {a} and {b} were counted up together"));
            }
            sum += a;
        }
        Ok(Outcome::Number(sum))
    }

    /// Does it. Returns the number of locked sections.
    pub fn run(&self, memory: Memory<'_>) -> Result<Outcome, String> {
        if self.pages == 0 || self.members * self.threads > MOST || self.me >= self.members {
            return Err("the order is about more threads than a page has room for".into());
        }
        thread::scope(|scope| {
            let threads: Vec<_> = (0..self.threads)
                .map(|n| scope.spawn(move || self.thread(memory, self.me * self.threads + n)))
                .collect();
            let mut sum = 0;
            for thread in threads {
                sum += thread.join().map_err(|_| "a thread panicked")??;
            }
            Ok(Outcome::Number(sum))
        })
    }

    fn thread(&self, memory: Memory<'_>, me: u64) -> Result<u64, String> {
        let end = Instant::now() + Duration::from_millis(self.millis);
        let all = self.members * self.threads;
        let places = usize::try_from(self.pages * all).map_err(|e| e.to_string())?;
        let mut seen: Vec<u32> = vec![0; places];
        let mut random = self.seed.wrapping_add(me).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut sections = 0;
        while Instant::now() < end {
            // Xorshift64.
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let page = (random >> 8) % self.pages;
            let other = (random >> 40) % all;
            match random % 4 {
                0 => sections += u64::from(self.section(memory, page, me)?),
                1 => {
                    let word = self.word(memory, page, OWN + me)?;
                    let found = word.load(Relaxed);
                    check(&mut seen, page * all + me, found, true, page)?;
                    word.store(found + 1, Release);
                    check(&mut seen, page * all + me, found + 1, false, page)?;
                }
                _ => {
                    let found = self.word(memory, page, OWN + other)?.load(Acquire);
                    check(&mut seen, page * all + other, found, other == me, page)?;
                }
            }
        }
        Ok(sections)
    }

    /// Counts up the pair of a page, if nobody else is at it.
    fn section(&self, memory: Memory<'_>, page: u64, me: u64) -> Result<bool, String> {
        let lock = self.word(memory, page, LOCK)?;
        if lock.compare_exchange(0, me + 1, SeqCst, SeqCst).is_err() {
            return Ok(false);
        }
        let (a, b) = (self.word(memory, page, PAIR[0])?, self.word(memory, page, PAIR[1])?);
        let (x, y) = (a.load(Relaxed), b.load(Relaxed));
        if x != y {
            return Err(format!("page {page}: under its lock {x} is not {y}"));
        }
        a.store(x + 1, Relaxed);
        b.store(y + 1, Relaxed);
        if lock.swap(0, SeqCst) != me + 1 {
            return Err(format!("page {page}: somebody else had its lock as well"));
        }
        Ok(true)
    }
}

/// Compares with what was seen last, and remembers it: small, so that it does not count beside the memory.
fn check(seen: &mut [u32], at: u64, found: u64, is_own: bool, page: u64) -> Result<(), String> {
    let last = usize::try_from(at).ok().and_then(|at| seen.get_mut(at)).ok_or("there is no such place")?;
    let found = u32::try_from(found).map_err(|_| format!("page {page}: {found} is no count"))?;
    // 0 for a word that was not looked at: what earlier orders left there is not known.
    match last.checked_sub(1) {
        Some(last) if found < last => Err(format!("page {page}: a word went down from {last} to {found}")),
        Some(last) if is_own && found != last => {
            Err(format!("page {page}: a thread's own word is {found} but it wrote {last}"))
        }
        _ => {
            *last = found.saturating_add(1);
            Ok(())
        }
    }
}
