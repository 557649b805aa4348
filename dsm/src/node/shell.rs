//! Carries out what the protocol core commands.
//!
//! The pages are dealt out to cores, each with its [`Shard`] behind a lock. Memory commands are carried out under the
//! lock: a fill and the drop that follows it can't change places. None of them waits for anybody but the kernel. Frames
//! are only queued under the lock, so that those about a page leave in order, and are written after it is let go.

use super::config::DsmConfig;
use super::failure::{Cause, DsmFailure};
use super::gang::Gang;
use super::keeper::Keeper;
use super::shard::{After, Env, PageBuf, Shard};
use super::{DsmError, PAGE};
use crate::addr::{Epoch, MAX_MEMBERS, MemberId, PAGE_SIZE};
use crate::layout::{Layout, Page};
use crate::protocol::pages::{BLOCK, Share};
use crate::protocol::{Core, CoreConfig, Event, MemberSet, Msg};
use crate::region::{Fault, Kernel, Region, RegionError};
use crate::stats::{DsmSnapshot, FaultLog, FaultRecord, PeerTraffic, ShardStats};
use crate::transport::frame::Header;
use crate::transport::link::{Flush, Link};
use std::net::TcpStream;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Number of protocol cores is `1 << SHARD_BITS`.
const SHARD_BITS: u32 = 4;
const RUNNING: u8 = 0;
const FAILED: u8 = 1;
const STOPPED: u8 = 2;

#[derive(Default)]
struct Report {
    failure: Option<DsmFailure>,
    handler: Option<Box<dyn Fn(DsmFailure) + Send + Sync>>,
}

/// Everything that a member's threads share. Lock order: a shard, then a link's locks or the keeper's; `report`, `log`
/// and `gang` are taken alone.
pub(super) struct Shell {
    cfg: DsmConfig,
    layout: Arc<Layout>,
    members: MemberSet,
    region: Region,
    shards: Vec<Mutex<Shard>>,
    links: Vec<Option<Link>>,
    gang: Mutex<Gang>,
    keeper: Keeper,
    state: AtomicU8,
    report: Mutex<Report>,
    log: Option<Mutex<FaultLog>>,
    start: Instant,
}

impl std::fmt::Debug for Shell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shell").field("cfg", &self.cfg).field("state", &self.state).finish_non_exhaustive()
    }
}

impl Env for Shell {
    type Kernel = Region;

    fn kernel(&self) -> &Region {
        &self.region
    }

    fn me(&self) -> MemberId {
        self.cfg.me
    }

    fn epoch(&self) -> Epoch {
        self.cfg.epoch
    }

    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn now(&self) -> u64 {
        Shell::now(self)
    }

    fn push(&self, to: MemberId, header: &Header) -> bool {
        self.link(to).map(|link| link.push(header)).is_some()
    }

    fn push_page(
        &self,
        to: MemberId,
        fill: impl FnOnce(&mut Vec<u8>) -> Result<Header, RegionError>,
    ) -> Result<bool, RegionError> {
        self.link(to).map(|link| link.push_page(fill)).transpose().map(|pushed| pushed.is_some())
    }

    fn set_timer(&self, at: u64, page: Page) {
        self.keeper.set_timer(at, page);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shell {
    pub(super) fn new(cfg: DsmConfig, streams: Vec<(MemberId, TcpStream)>) -> Result<Shell, DsmError> {
        let layout = Arc::new(Layout::new(&cfg.memory)?);
        let members = cfg.member_set()?;
        let mut links: Vec<Option<Link>> = (0..MAX_MEMBERS).map(|_| None).collect();
        for (peer, stream) in streams {
            match links.get_mut(usize::from(peer.0)) {
                Some(slot @ None) if members.has(peer) && peer != cfg.me => {
                    *slot = Some(Link::new(peer, stream, 0));
                }
                _ => return Err(DsmError::Links(peer)),
            }
        }
        for peer in members.without(cfg.me).iter() {
            if links.get(usize::from(peer.0)).is_none_or(Option::is_none) {
                return Err(DsmError::Links(peer));
            }
        }
        let region = Region::new(&layout, cfg.shards)?;
        let token_key = rand::random::<u64>() | 1;
        let shards = (0..1 << SHARD_BITS).map(|index| {
            let core = Core::new(CoreConfig {
                me: cfg.me,
                layout: layout.clone(),
                share: Share::new(index, SHARD_BITS),
                hold: cfg.hold,
                token_key: token_key.wrapping_mul(u64::from(index) * 2 + 1),
                first_touch: cfg.first_touch.clamp(1, crate::region::MAX_ZERO_RUN),
            });
            let stats = ShardStats::new(Share::new(index, SHARD_BITS), layout.pages());
            Mutex::new(Shard::new(core, stats))
        });
        Ok(Shell {
            shards: shards.collect(),
            layout: layout.clone(),
            members,
            region,
            links,
            gang: Mutex::default(),
            keeper: Keeper::new().map_err(|source| DsmError::Start { what: "the timer", source })?,
            state: AtomicU8::new(RUNNING),
            report: Mutex::default(),
            log: (cfg.fault_log > 0).then(|| Mutex::new(FaultLog::new(cfg.fault_log))),
            start: Instant::now(),
            cfg,
        })
    }

    pub(super) fn config(&self) -> &DsmConfig {
        &self.cfg
    }

    pub(super) fn region(&self) -> &Region {
        &self.region
    }

    pub(super) fn layout(&self) -> &Layout {
        &self.layout
    }

    pub(super) fn members(&self) -> MemberSet {
        self.members
    }

    pub(super) fn keeper(&self) -> &Keeper {
        &self.keeper
    }

    pub(super) fn links(&self) -> impl Iterator<Item = &Link> {
        self.links.iter().flatten()
    }

    pub(super) fn link(&self, peer: MemberId) -> Option<&Link> {
        self.links.get(usize::from(peer.0))?.as_ref()
    }

    /// Nanoseconds since the start.
    pub(super) fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    pub(super) fn is_running(&self) -> bool {
        self.state.load(Ordering::Acquire) == RUNNING
    }

    /// Whether the member leaves in order: its peers may still have something to say.
    pub(super) fn is_leaving(&self) -> bool {
        self.state.load(Ordering::Acquire) == STOPPED
    }

    fn shard(&self, page: Page) -> MutexGuard<'_, Shard> {
        let index = Share::index_of(page, SHARD_BITS) as usize;
        lock(&self.shards[index % self.shards.len()])
    }

    /// A thread waits for a page.
    pub(super) fn fault(&self, fault: Fault) {
        let Fault { page, write, thread } = fault;
        let now = self.now();
        let mut shard = self.shard(page);
        let after = self.process(&mut shard, now, Event::Fault { page, write });
        let remote = shard.core.cache().is_pending(page);
        let contended = shard.core.cache().is_contended(page);
        drop(shard);
        if let Some(log) = &self.log {
            let gpa = self.layout.gpa_of(page);
            lock(log).push(FaultRecord { at_ns: now, gpa, write, remote, thread });
        }
        let mut after = after;
        if remote && contended {
            let companions = lock(&self.gang).call(page);
            self.ask_ahead(companions, now, &mut after);
        }
        self.follow_up(after, now);
    }

    fn ask_ahead(&self, pages: Vec<Page>, now: u64, after: &mut After) {
        for page in pages {
            after.add(self.process(&mut self.shard(page), now, Event::Ahead { page }));
        }
    }

    /// See [`super::DsmHandle::soften`].
    pub(super) fn soften(&self) {
        let now = self.now();
        for shard in &self.shards {
            let after = self.process(&mut lock(shard), now, Event::Soften);
            self.follow_up(after, now);
        }
    }

    /// See [`super::DsmHandle::rest`].
    pub(super) fn rest(&self, resting: bool) {
        let now = self.now();
        for shard in &self.shards {
            let after = self.process(&mut lock(shard), now, Event::Rest { resting });
            self.follow_up(after, now);
        }
    }

    /// A message has come. `bytes` is its page, if it has one.
    pub(super) fn message(&self, from: MemberId, page: Page, msg: Msg<()>, bytes: &[u8]) {
        let now = self.now();
        let mut shard = self.shard(page);
        let msg = shard.attach(msg, bytes);
        let after = self.process(&mut shard, now, Event::Message { from, page, msg });
        drop(shard);
        self.follow_up(after, now);
    }

    /// A hold time has run out.
    pub(super) fn timer(&self, page: Page) {
        let now = self.now();
        let mut after = self.process(&mut self.shard(page), now, Event::Timer { page });
        if !after.lost.is_empty() {
            for shard in &self.shards {
                after.add(self.process(&mut lock(shard), now, Event::Yield));
            }
        }
        self.follow_up(after, now);
    }

    /// Gives an event to the core and carries out what it commands, unless the member has stopped.
    fn process(&self, shard: &mut Shard, now: u64, event: Event<PageBuf>) -> After {
        if self.is_running() { shard.process(self, now, event) } else { After::default() }
    }

    fn follow_up(&self, mut after: After, now: u64) {
        let woken = after.wake;
        after.wake(&self.region);
        if woken.is_some() || !after.lost.is_empty() {
            let mut gang = lock(&self.gang);
            if let Some(page) = woken {
                gang.came(page);
            }
            let missed = std::mem::take(&mut after.lost).into_iter().filter_map(|p| gang.lost(p)).collect();
            drop(gang);
            self.ask_ahead(missed, now, &mut after);
        }
        if let Some((peer, cause)) = after.failure {
            self.fail(peer, cause);
        }
        self.flush(after.talk, now);
    }

    /// Writes to the sockets, for the keeper: it will look again by itself.
    pub(super) fn flush_quietly(&self, talk: MemberSet) {
        let now = self.now();
        for peer in talk.iter() {
            let Some(link) = self.link(peer) else { continue };
            if let Err(e) = link.flush(now) {
                self.fail(Some(peer), Cause::Disconnected(format!("its connection broke: {e}")));
            }
        }
    }

    /// Writes to the sockets; what they don't take is the keeper's.
    fn flush(&self, talk: MemberSet, now: u64) {
        if talk.is_empty() {
            return;
        }
        for peer in talk.iter() {
            let Some(link) = self.link(peer) else { continue };
            if link.has_left() {
                self.fail(Some(peer), Cause::Left);
                continue;
            }
            match link.flush(now) {
                Ok(Flush::Done) => {}
                Ok(Flush::Full) => self.keeper.kick(),
                Err(e) => self.fail(Some(peer), Cause::Disconnected(format!("its connection broke: {e}"))),
            }
        }
    }

    pub(super) fn preload(&self, gpa: u64, bytes: &[u8]) -> Result<(), DsmError> {
        if !self.is_running() {
            return Err(DsmError::Stopped);
        }
        let mut gpa = gpa;
        let mut rest = bytes;
        while !rest.is_empty() {
            let page = self.layout.page_at(gpa).filter(|p| self.layout.home_of(*p) == Some(self.cfg.me));
            let page = page.ok_or(DsmError::NotHome { gpa })?;
            let at = usize::try_from(gpa % PAGE_SIZE).unwrap_or(0);
            let mut shard = self.shard(page);
            // Whole pages of one block go in together: they are the same shard's.
            let whole = if at == 0 { u32::try_from(rest.len() / PAGE).unwrap_or(u32::MAX) } else { 0 };
            let run = shard.core.preload(page, whole.min(BLOCK - page.0 % BLOCK));
            let len = if run > 0 { run as usize * PAGE } else { rest.len().min(PAGE - at) };
            let (now, later) = rest.split_at(len);
            if run > 0 {
                self.region.fill_run(page, now, false)?;
                shard.stats.preloaded(run);
            } else if shard.core.preload(page, 1) == 1 {
                let mut buf = [0; PAGE];
                if let Some(room) = buf.get_mut(at..at + now.len()) {
                    room.copy_from_slice(now);
                }
                self.region.fill_run(page, &buf, false)?;
                shard.stats.preloaded(1);
            } else if shard.core.cache().state(page) == crate::protocol::cache::State::Modified {
                self.region.write(page, at, now)?;
            } else {
                return Err(DsmError::InUse { gpa });
            }
            drop(shard);
            gpa = gpa.saturating_add(now.len() as u64);
            rest = later;
        }
        Ok(())
    }

    /// Stops answering and tells the handler, once.
    pub(super) fn fail(&self, peer: Option<MemberId>, cause: Cause) {
        if self.state.compare_exchange(RUNNING, FAILED, Ordering::AcqRel, Ordering::Acquire).is_err() {
            return;
        }
        let failure = DsmFailure { peer, cause };
        tracing::error!("{failure}");
        let handler = {
            let mut report = lock(&self.report);
            report.failure = Some(failure.clone());
            report.handler.take()
        };
        if let Some(handler) = handler {
            handler(failure);
        }
        self.keeper.kick();
    }

    pub(super) fn on_failure(&self, handler: Box<dyn Fn(DsmFailure) + Send + Sync>) {
        let failed = {
            let mut report = lock(&self.report);
            match report.failure.clone() {
                None => {
                    report.handler = Some(handler);
                    return;
                }
                failed => failed,
            }
        };
        if let Some(failure) = failed {
            handler(failure);
        }
    }

    pub(super) fn failure(&self) -> Option<DsmFailure> {
        lock(&self.report).failure.clone()
    }

    pub(super) fn shutdown(&self) {
        let before = self.state.swap(STOPPED, Ordering::AcqRel);
        if before == STOPPED {
            return;
        }
        let bye = Header::bye(self.cfg.me, self.cfg.epoch);
        for link in self.links() {
            if before == RUNNING {
                link.finish(&bye, self.now());
            } else {
                link.close();
            }
        }
        self.keeper.stop();
        self.region.close();
    }

    pub(super) fn take_fault_log(&self) -> Vec<FaultRecord> {
        self.log.as_ref().map(|log| lock(log).take()).unwrap_or_default()
    }

    pub(super) fn snapshot(&self) -> DsmSnapshot {
        let mut snapshot = DsmSnapshot { replaced: self.region.replaced(), ..DsmSnapshot::default() };
        let mut total = crate::stats::Totals::default();
        for shard in &self.shards {
            let shard = lock(shard);
            let (shared, modified) = shard.core.cache().resident();
            snapshot.pages_shared += shared;
            snapshot.pages_modified += modified;
            total.add(&shard.stats, &self.layout);
        }
        total.write_to(&mut snapshot);
        for link in self.links() {
            let [sent, bytes_sent, got, bytes_got] = link.traffic();
            snapshot.peers.push(PeerTraffic {
                peer: link.peer(),
                messages_sent: sent,
                bytes_sent,
                messages_received: got,
                bytes_received: bytes_got,
            });
        }
        snapshot.finish(self.layout.pages());
        snapshot
    }
}
