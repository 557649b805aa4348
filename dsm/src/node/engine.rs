//! What a member does about a fault, a message or a hold time that is over: which shards it asks, in which order, and what
//! it does when their locks are let go.
//!
//! The pages are dealt out to cores, each with its [`Shard`] behind a lock. Memory commands are carried out under the
//! lock: a fill and the drop that follows it can't change places. None of them waits for anybody but the kernel. Frames
//! are only queued under the lock, so that those about a page leave in order, and are written after it is let go.
//!
//! No thread, socket or clock: those are behind [`Env`], so the simulation runs this code as it is.

use super::evict::{Budget, Hands, Kind};
use super::gang::Gang;
use super::shard::{After, Env, PageBuf, Shard};
use super::stream::Streams;
use crate::addr::MemberId;
use crate::layout::Page;
use crate::protocol::cache::State;
use crate::protocol::pages::{BLOCK, Share, blocks};
use crate::protocol::slots::Slots;
use crate::protocol::{Core, CoreConfig, Event, MemberSet, Msg};
use crate::stats::ShardStats;
use crate::transport::run::Run;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

/// The cores of a member. Lock order: `hands`, then a shard, then what [`Env`] locks; `gang` and `streams` are taken
/// alone.
pub(crate) struct Engine {
    bits: u32,
    shards: Vec<Mutex<Shard>>,
    gang: Mutex<Gang>,
    budget: Arc<Budget>,
    hands: Mutex<Hands>,
    streams: Mutex<Streams>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Engine {
    /// `1 << bits` cores like this one, each for its share of the pages. `budget` is the number of pages to keep.
    pub(crate) fn new(cfg: &CoreConfig, bits: u32, budget: Option<u64>) -> Engine {
        let budget = Arc::new(Budget::new(budget));
        let shard = |index: u32| {
            let share = Share::new(index, bits);
            let token_key = cfg.token_key.wrapping_mul(u64::from(index) * 2 + 1);
            let stats = ShardStats::new(share, cfg.layout.pages());
            let core = Core::new(CoreConfig { share, token_key, ..cfg.clone() });
            Mutex::new(Shard::new(core, stats, budget.clone()))
        };
        Engine {
            bits,
            shards: (0..1 << bits).map(shard).collect(),
            gang: Mutex::default(),
            streams: Mutex::default(),
            hands: Mutex::default(),
            budget,
        }
    }

    /// How much of the memory is here.
    pub(crate) fn budget(&self) -> &Budget {
        &self.budget
    }

    /// The shard that has a page.
    pub(crate) fn shard(&self, page: Page) -> MutexGuard<'_, Shard> {
        let index = Share::index_of(page, self.bits) as usize;
        lock(&self.shards[index % self.shards.len()])
    }

    /// All shards, one after the other.
    pub(crate) fn shards(&self) -> impl Iterator<Item = MutexGuard<'_, Shard>> {
        self.shards.iter().map(lock)
    }

    /// A thread waits for a page. If another member is asked for it: to whom messages went.
    pub(crate) fn fault(&self, env: &impl Env, now: u64, page: Page, write: bool) -> Option<MemberSet> {
        let mut shard = self.shard(page);
        let is_on_its_way = shard.core.cache().is_pending(page);
        let mut after = process(&mut shard, env, now, Event::Fault { page, write });
        let is_remote = shard.core.cache().is_pending(page);
        let is_contended = shard.core.cache().is_contended(page);
        drop(shard);
        if is_remote && is_contended {
            let companions = lock(&self.gang).call(page);
            self.ask_ahead(env, companions, now, &mut after);
        } else if is_remote {
            let window = lock(&self.streams).fault(page, is_on_its_way);
            let ahead = env.layout().following(page);
            let end = ahead.end.min(ahead.start.saturating_add(window.pages.min(self.budget.room())));
            for run in blocks(ahead.start.saturating_add(window.skip)..end) {
                let mut shard = self.shard(Page(run.start));
                let hint = |page| Event::Hint { page: Page(page), write, insist: window.is_steady };
                after.add(process_run(&mut shard, env, now, run.map(hint), &[]));
            }
        }
        let talk = self.follow_up(env, after, now);
        is_remote.then_some(talk)
    }

    fn ask_ahead(&self, env: &impl Env, pages: Vec<Page>, now: u64, after: &mut After) {
        for page in pages {
            after.add(process(&mut self.shard(page), env, now, Event::Ahead { page }));
        }
    }

    /// Gives each shard an event that concerns no page in particular.
    fn tell_all(&self, env: &impl Env, now: u64, event: &Event<PageBuf>, after: &mut After) {
        for mut shard in self.shards() {
            after.add(process(&mut shard, env, now, event.clone()));
        }
    }

    fn announce(&self, env: &impl Env, now: u64, event: &Event<PageBuf>) {
        let mut after = After::default();
        self.tell_all(env, now, event, &mut after);
        self.follow_up(env, after, now);
    }

    /// See [`super::DsmHandle::soften`].
    pub(crate) fn soften(&self, env: &impl Env, now: u64) {
        self.announce(env, now, &Event::Soften);
    }

    /// See [`super::DsmHandle::rest`].
    pub(crate) fn rest(&self, env: &impl Env, now: u64, resting: bool) {
        self.announce(env, now, &Event::Rest { resting });
    }

    /// The members have agreed on their slots.
    pub(crate) fn set_slots(&self, env: &impl Env, now: u64, slots: Slots) {
        self.announce(env, now, &Event::Slots(slots));
    }

    /// How many contended pages were given away since the last call of this function.
    pub(crate) fn take_losses(&self) -> u32 {
        lock(&self.gang).take_losses()
    }

    /// What a remote fault costs here, in nanoseconds: the median of what the shards have seen; 0 if none has seen any.
    pub(crate) fn transfer(&self) -> u64 {
        let mut costs: Vec<u64> =
            self.shards().map(|s| s.core.cache().transfer()).filter(|c| *c != 0).collect();
        costs.sort_unstable();
        costs.get(costs.len() / 2).copied().unwrap_or(0)
    }

    /// A message has come. `bytes` is its page, if it has one. Returns the peers for whom frames are queued: the caller
    /// flushes, when it has no more messages at hand.
    pub(crate) fn message(
        &self,
        env: &impl Env,
        now: u64,
        from: MemberId,
        page: Page,
        msg: Msg<()>,
        bytes: &[u8],
    ) -> MemberSet {
        let mut shard = self.shard(page);
        let msg = shard.attach(msg, bytes);
        let after = process_run(&mut shard, env, now, [Event::Message { from, page, msg }], bytes);
        drop(shard);
        self.settle(env, after, now)
    }

    /// Messages about a run of pages have come in one frame; `bytes` is what lay behind its header. Returns what
    /// [`Engine::message`] does.
    pub(crate) fn run(&self, env: &impl Env, now: u64, from: MemberId, run: &Run, bytes: &[u8]) -> MemberSet {
        let messages = (0..).zip(run.messages(bytes)).map(|(n, (page, msg))| {
            let msg = msg.map(|()| PageBuf::Nth(n));
            Event::Message { from, page, msg }
        });
        let after = process_run(&mut self.shard(run.page), env, now, messages, bytes);
        self.settle(env, after, now)
    }

    /// Something that concerns one page only.
    pub(super) fn one(&self, env: &impl Env, now: u64, page: Page, event: Event<PageBuf>) {
        let after = process(&mut self.shard(page), env, now, event);
        self.follow_up(env, after, now);
    }

    /// Hold times have run out.
    pub(crate) fn timers(&self, env: &impl Env, now: u64, pages: &[Page]) {
        let mut after = After::default();
        for page in pages {
            after.add(process(&mut self.shard(*page), env, now, Event::Timer { page: *page }));
        }
        if !after.lost.is_empty() {
            self.tell_all(env, now, &Event::Yield, &mut after);
        }
        self.follow_up(env, after, now);
    }

    /// Asks pages to go, unless another thread is at it.
    fn evict(&self, env: &impl Env, now: u64, after: &mut After) {
        let mut hands = match self.hands.try_lock() {
            Ok(hands) => hands,
            Err(TryLockError::Poisoned(e)) => e.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        let is_gone = |page| self.shard(page).core.cache().state(page) == State::Invalid;
        let mut missing = hands.missing(&self.budget, now, is_gone);
        let pages = env.layout().pages();
        for kind in [Kind::Clean, Kind::Modified] {
            let mut looked = 0;
            while missing > 0
                && let Some(first) = hands.next(kind, pages, looked)
            {
                looked += 1;
                let mut shard = self.shard(first);
                for page in (first.0..pages.min(first.0 + BLOCK)).map(Page) {
                    let is_of_kind = shard.core.can_evict(now, page) == Some(kind == Kind::Clean);
                    if missing > 0 && is_of_kind && !hands.has_asked(page) {
                        missing -= 1;
                        hands.ask(page, now, &self.budget);
                        after.add(process(&mut shard, env, now, Event::Evict { page }));
                    }
                }
            }
        }
    }

    /// What is left to do without a lock. Returns the peers that were written to.
    pub(super) fn follow_up(&self, env: &impl Env, after: After, now: u64) -> MemberSet {
        let talk = self.settle(env, after, now);
        env.flush(talk, now);
        talk
    }

    /// What is left to do without a lock, but for writing to the peers that it returns.
    fn settle(&self, env: &impl Env, mut after: After, now: u64) -> MemberSet {
        after.wake(env.kernel());
        let came = after.came;
        if came.is_some() || !after.lost.is_empty() {
            let mut gang = lock(&self.gang);
            if let Some((first, count)) = came {
                gang.came(first, count);
            }
            let missed = std::mem::take(&mut after.lost).into_iter().filter_map(|p| gang.lost(p)).collect();
            drop(gang);
            self.ask_ahead(env, missed, now, &mut after);
        }
        if after.has_come && self.budget.excess() > 0 {
            self.evict(env, now, &mut after);
        }
        if let Some((peer, cause)) = after.failure {
            env.fail(peer, cause);
        }
        after.talk
    }
}

/// Gives an event to a core and carries out what it commands, unless the member has stopped.
pub(super) fn process(shard: &mut Shard, env: &impl Env, now: u64, event: Event<PageBuf>) -> After {
    process_run(shard, env, now, [event], &[])
}

/// The same for events about pages of a run. `bytes` has the pages that come with them.
pub(super) fn process_run(
    shard: &mut Shard,
    env: &impl Env,
    now: u64,
    events: impl IntoIterator<Item = Event<PageBuf>>,
    bytes: &[u8],
) -> After {
    if !env.is_running() {
        return After::default();
    }
    let after = shard.process(env, now, events, bytes);
    env.after(&shard.core);
    after
}
