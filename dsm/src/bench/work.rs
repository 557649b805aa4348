//! What a member can be ordered to do with shared memory. Every workload checks what it can see by itself.

use super::mix::Mix;
use crate::addr::PAGE_SIZE;
use crate::region::Memory;
use serde::{Deserialize, Serialize};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::thread;
use std::time::{Duration, Instant};

/// One order to a member process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Work {
    /// Writes `value` into the first word of each page.
    Fill {
        /// First page's address.
        gpa: u64,
        /// Number of pages.
        pages: u64,
        /// The value; 0 leaves pages zero but owned by this member.
        value: u64,
    },
    /// Sets every word of each page to zero.
    Clear {
        /// First page's address.
        gpa: u64,
        /// Number of pages.
        pages: u64,
    },
    /// Adds the first words of the pages.
    Sum {
        /// First page's address.
        gpa: u64,
        /// Number of pages.
        pages: u64,
    },
    /// Increments the first words of the pages in turn with locked instructions, `rounds` times per thread, and sees to it
    /// that none of them ever goes down.
    Increment {
        /// First page's address.
        gpa: u64,
        /// Number of pages.
        pages: u64,
        /// Increments per thread.
        rounds: u64,
        /// Number of threads.
        threads: u64,
    },
    /// Counts up every word of this member's own page in order, and reads those of others: in each, the words from first to
    /// last must never rise, and no word may ever go down.
    CountPages {
        /// First page's address.
        gpa: u64,
        /// Number of pages, one per member.
        pages: u64,
        /// The page that this member counts up.
        own: u64,
        /// For how long, in milliseconds.
        millis: u64,
    },
    /// For a while: increments a shared word with a locked instruction, then a private one some times, and so on.
    Contend {
        /// The shared word.
        shared: u64,
        /// The private word.
        own: u64,
        /// Private increments per shared one.
        privately: u64,
        /// For how long, in milliseconds.
        millis: u64,
    },
    /// Random reads, writes and locked sections.
    Mix(Mix),
    /// Adds up the locked sections of all members.
    Sections(Mix),
    /// Store buffering with locked instructions (SB): stores 1 to its word `i`, then loads the other's word `i`.
    StoreThenLoad {
        /// Page to store to.
        store: u64,
        /// Page to load from.
        load: u64,
    },
    /// Message passing (MP), writer: data word `i`, then flag word `i`, plain stores.
    Publish {
        /// Page of the data.
        data: u64,
        /// Page of the flags.
        flag: u64,
    },
    /// Message passing (MP), reader: flag word `i`, then data word `i`, plain loads.
    Observe {
        /// Page of the data.
        data: u64,
        /// Page of the flags.
        flag: u64,
    },
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// A number: a sum, or how often something was done.
    Number(u64),
    /// Pairs of loaded values, or single ones, word by word.
    Values(Vec<u64>),
}

const NO_MEMORY: &str = "the order is about memory that is not there";
const WORDS: u64 = PAGE_SIZE / 8;

/// Carries out an order; `Err` says what must never be seen and was.
pub fn run(memory: Memory<'_>, work: &Work) -> Result<Outcome, String> {
    match *work {
        Work::Fill { gpa, pages, value } => {
            for page in 0..pages {
                memory.u64_at(gpa + page * PAGE_SIZE).ok_or(NO_MEMORY)?.store(value, SeqCst);
            }
            Ok(Outcome::Number(pages))
        }
        Work::Clear { gpa, pages } => {
            for page in 0..pages {
                memory.words(gpa + page * PAGE_SIZE).for_each(|word| word.store(0, SeqCst));
            }
            Ok(Outcome::Number(pages))
        }
        Work::Sum { gpa, pages } => {
            let mut sum = 0u64;
            for page in 0..pages {
                let word = memory.u64_at(gpa + page * PAGE_SIZE).ok_or(NO_MEMORY)?;
                sum = sum.wrapping_add(word.load(SeqCst));
            }
            Ok(Outcome::Number(sum))
        }
        Work::Increment { gpa, pages, rounds, threads } => thread::scope(|scope| {
            let threads: Vec<_> =
                (0..threads).map(|n| scope.spawn(move || increment(memory, gpa, pages, rounds, n))).collect();
            for thread in threads {
                thread.join().map_err(|_| "a thread panicked")??;
            }
            Ok(Outcome::Number(rounds))
        }),
        Work::CountPages { gpa, pages, own, millis } => count_pages(memory, gpa, pages, own, millis),
        Work::Contend { shared, own, privately, millis } => contend(memory, shared, own, privately, millis),
        Work::Mix(mix) => mix.run(memory),
        Work::Sections(mix) => mix.sections(memory),
        Work::StoreThenLoad { store, load } => {
            let pairs = memory.words(store).zip(memory.words(load));
            Ok(Outcome::Values(
                pairs
                    .map(|(mine, other)| {
                        mine.swap(1, SeqCst);
                        other.load(SeqCst)
                    })
                    .collect(),
            ))
        }
        Work::Publish { data, flag } => {
            for (data, flag) in memory.words(data).zip(memory.words(flag)) {
                data.store(1, Relaxed);
                flag.store(1, Release);
            }
            Ok(Outcome::Number(WORDS))
        }
        Work::Observe { data, flag } => {
            let mut seen = 0;
            for (n, (data, flag)) in memory.words(data).zip(memory.words(flag)).enumerate() {
                let flagged = flag.load(Acquire);
                let value = data.load(Relaxed);
                if flagged == 1 && value == 0 {
                    return Err(format!("word {n}: the flag was seen before the data (MP)"));
                }
                seen += flagged;
            }
            Ok(Outcome::Number(seen))
        }
    }
}

fn contend(
    memory: Memory<'_>,
    shared: u64,
    own: u64,
    privately: u64,
    millis: u64,
) -> Result<Outcome, String> {
    let (shared, own) = (memory.u64_at(shared).ok_or(NO_MEMORY)?, memory.u64_at(own).ok_or(NO_MEMORY)?);
    own.store(0, SeqCst);
    let end = Instant::now() + Duration::from_millis(millis);
    let mut count = 0;
    while Instant::now() < end {
        shared.fetch_add(1, SeqCst);
        count += 1;
        for _ in 0..privately {
            own.fetch_add(1, SeqCst);
        }
    }
    if own.load(SeqCst) != count * privately {
        return Err("a private word is not what its only writer wrote".into());
    }
    Ok(Outcome::Number(count))
}

fn increment(memory: Memory<'_>, gpa: u64, pages: u64, rounds: u64, thread: u64) -> Result<(), String> {
    let mut seen = vec![0; usize::try_from(pages).map_err(|e| e.to_string())?];
    for round in 0..rounds {
        let page = (round + thread) % pages.max(1);
        let word = memory.u64_at(gpa + page * PAGE_SIZE).ok_or(NO_MEMORY)?;
        let before = word.fetch_add(1, SeqCst);
        let last = usize::try_from(page).ok().and_then(|p| seen.get_mut(p)).ok_or(NO_MEMORY)?;
        if before < *last {
            return Err(format!("page {page} went down from {last} to {before}"));
        }
        *last = before + 1;
    }
    Ok(())
}

fn count_pages(memory: Memory<'_>, gpa: u64, pages: u64, own: u64, millis: u64) -> Result<Outcome, String> {
    let end = Instant::now() + Duration::from_millis(millis);
    let mut count = 0u64;
    let mut seen = vec![vec![0u64; 512]; usize::try_from(pages).map_err(|e| e.to_string())?];
    while Instant::now() < end {
        count += 1;
        for word in memory.words(gpa + own * PAGE_SIZE) {
            word.store(count, Release);
        }
        for (page, seen) in (0..pages).zip(&mut seen) {
            let mut left = u64::MAX;
            for (n, (word, seen)) in memory.words(gpa + page * PAGE_SIZE).zip(seen).enumerate() {
                // Read from first to last while the writer goes the same way: a later word may be newer than an earlier
                // one read before it, but never older than what was there a round ago.
                let value = word.load(Acquire);
                if value < *seen {
                    return Err(format!("page {page} word {n} went down from {seen} to {value}"));
                }
                if left != u64::MAX && value.saturating_add(1) < left {
                    return Err(format!("page {page} word {n} is {value} behind a word that is {left}"));
                }
                *seen = value;
                left = value;
            }
        }
    }
    Ok(Outcome::Number(count))
}
