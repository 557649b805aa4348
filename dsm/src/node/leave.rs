//! Giving everything back before leaving: all pages here are asked to go to their homes, in order, some at a time.

use super::engine::{Engine, process_run};
use super::shard::Env;
use super::shell::Shell;
use crate::layout::Page;
use crate::protocol::Event;
use crate::protocol::pages::BLOCK;
use serde::{Deserialize, Serialize};
use std::thread::{self, Builder};
use std::time::{Duration, Instant};

/// Requests for pages to go that may be under way. What has been sent and not been taken is still in a processor's cache then.
const WINDOW: u64 = 256;
/// Between two looks at them.
const LOOK: Duration = Duration::from_micros(200);
/// A request that is not answered within so many looks was not heeded.
const UNHEEDED: u32 = 50;

/// How far a member is with giving its pages back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evicted {
    /// Pages that were here when it began.
    #[serde(default)]
    pub before: u64,
    /// Pages that are still here.
    pub left: u64,
    /// Nothing is here, and nothing is under way.
    pub is_empty: bool,
}

impl Engine {
    /// Asks the pages of one block to go that may go. Returns how many.
    pub(crate) fn push_out(&self, env: &impl Env, now: u64, first: Page) -> usize {
        let end = env.layout().pages().min(first.0.saturating_add(BLOCK));
        let mut shard = self.shard(first);
        let mut pages: Vec<Page> = (first.0..end).map(Page).collect();
        pages.retain(|page| shard.core.can_evict(now, *page).is_some());
        // Together: those behind each other go as a run, and all that their home does about them is done for the run.
        let events = pages.iter().map(|page| Event::Evict { page: *page });
        let after = process_run(&mut shard, env, now, events, &[]);
        drop(shard);
        self.follow_up(env, after, now);
        pages.len()
    }
}

impl Shell {
    /// See [`super::DsmHandle::evict_all`].
    pub(super) fn evict_all(&self, limit: Duration) -> Evicted {
        // What serves pages here and at their home goes first and has nothing to do until it was asked: the thread that asks must
        // not wait for a processor until they sleep.
        let first = || {
            crate::priority::raise();
            self.ask_all(limit)
        };
        thread::scope(|scope| match Builder::new().name("dsm-leave".into()).spawn_scoped(scope, first) {
            Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            // Slower, and as good.
            Err(_) => self.ask_all(limit),
        })
    }

    /// Asks all pages to go, not too many at a time.
    fn ask_all(&self, limit: Duration) -> Evicted {
        let end = Instant::now() + limit;
        let here = || self.engine.budget().here();
        let at_first = here();
        while self.is_running() && Instant::now() < end {
            let mut asked = 0;
            let before = here();
            for first in (0..self.layout().pages()).step_by(BLOCK as usize) {
                asked += self.engine.push_out(self, self.now(), Page(first)) as u64;
                self.wait_gone(before, asked, WINDOW);
                if Instant::now() >= end {
                    break;
                }
            }
            self.wait_gone(before, asked, 0);
            if here() == 0 || asked == 0 {
                break;
            }
        }
        let left = self.engine.resident();
        Evicted { before: at_first, left, is_empty: left == 0 && self.engine.is_quiet() }
    }

    /// Waits until at most `open` of the pages that were asked to go are still here, or nothing more goes.
    fn wait_gone(&self, before: u64, asked: u64, open: u64) {
        let (mut looks, mut last) = (0, u64::MAX);
        loop {
            let here = self.engine.budget().here();
            if before.saturating_sub(here) + open >= asked || looks > UNHEEDED || !self.is_running() {
                return;
            }
            looks = if here < last { 0 } else { looks + 1 };
            last = here;
            thread::sleep(LOOK);
        }
    }
}
