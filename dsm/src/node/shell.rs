//! Everything that a member's threads share, and what surrounds the [`Engine`] in production.

use super::config::DsmConfig;
use super::engine::Engine;
use super::failure::{Cause, DsmFailure, Lost};
use super::homes::HomesError;
use super::keeper::Keeper;
use super::pace::Pace;
use super::recent::Recent;
use super::save::PageSource;
use super::shard::Env;
use super::{DsmError, PAGE};
use crate::addr::{Epoch, MAX_MEMBERS, MemberId, PAGE_SIZE};
use crate::clock::nanos;
use crate::layout::{Layout, Page};
use crate::protocol::pages::{BLOCK, Share};
use crate::protocol::{CoreConfig, Event, MemberSet, Msg};
use crate::region::{Fault, Kernel, Region, RegionError, Wake};
use crate::stats::{DsmSnapshot, FaultLog, FaultRecord, PeerTraffic, PeerWaits};
use crate::transport::frame::Header;
use crate::transport::link::{Flush, Link, Queue};
use crate::transport::run::Run;
use arc_swap::ArcSwapOption;
use std::collections::BTreeMap;
use std::net::TcpStream;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

/// Number of protocol cores is `1 << SHARD_BITS`.
const SHARD_BITS: u32 = 4;
/// Pages that a failure names.
const NAMED: usize = 4;
const RUNNING: u8 = 0;
const FAILED: u8 = 1;
const STOPPED: u8 = 2;

#[derive(Default)]
struct Report {
    failure: Option<DsmFailure>,
    handler: Option<Box<dyn Fn(DsmFailure) + Send + Sync>>,
}

/// Everything that a member's threads share. Lock order: the engine's, then a link's locks or the keeper's; `report` and
/// `log` are taken alone.
pub(super) struct Shell {
    cfg: DsmConfig,
    /// The pages and their addresses. The homes are those of the start: [`Shell::home_of`] knows those that hold.
    pub(super) layout: Arc<Layout>,
    pub(super) homes: Mutex<Arc<Layout>>,
    /// Number of the table that holds, and the members in it ([`MemberSet`]).
    epoch: AtomicU64,
    members: AtomicU64,
    pub(super) region: Region,
    pub(super) engine: Engine,
    /// By member. Who has a link and is no member is about to become one, or is on its way out: what happens to it harms
    /// nobody.
    links: Vec<ArcSwapOption<Link>>,
    keeper: Keeper,
    pace: Pace,
    state: AtomicU8,
    report: Mutex<Report>,
    log: Option<Mutex<FaultLog>>,
    recent: Mutex<Recent>,
    pub(super) image: OnceLock<Arc<dyn PageSource>>,
    /// Nothing is brought in ahead while a cut is being made.
    pub(super) is_held: Mutex<bool>,
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
        Shell::epoch(self)
    }

    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn now(&self) -> u64 {
        Shell::now(self)
    }

    fn push(&self, to: MemberId, header: &Header) -> bool {
        self.with_link(to, |link| link.push(header)).is_some()
    }

    fn push_with(
        &self,
        to: MemberId,
        fill: impl FnOnce(&mut Queue) -> Result<(), RegionError>,
    ) -> Result<bool, RegionError> {
        self.with_link(to, |link| link.push_with(fill)).transpose().map(|pushed| pushed.is_some())
    }

    fn set_timer(&self, at: u64, page: Page) {
        self.keeper.set_timer(at, page);
    }

    fn image(&self, page: Page, out: &mut [u8; PAGE]) -> Result<(), RegionError> {
        let gpa = self.layout.gpa_of(page);
        let failed = |what: String| RegionError::Image { gpa, what };
        let image = self.image.get().ok_or_else(|| failed("there is none".into()))?;
        image.page(gpa, out).map_err(failed)
    }

    fn is_running(&self) -> bool {
        Shell::is_running(self)
    }

    fn fail(&self, peer: Option<MemberId>, cause: Cause) {
        Shell::fail(self, peer, cause);
    }

    /// What the sockets don't take is the keeper's.
    fn flush(&self, talk: MemberSet, now: u64) {
        if talk.is_empty() {
            return;
        }
        for peer in talk.iter() {
            let Some(link) = self.link(peer) else { continue };
            if link.has_left() && self.members().has(peer) {
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
}

fn make_link(cfg: &DsmConfig, peer: MemberId, stream: TcpStream, now: u64) -> Link {
    let make = if cfg.reconnect.is_some() { Link::keeping } else { Link::new };
    make(peer, stream, now)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shell {
    pub(super) fn new(cfg: DsmConfig, streams: Vec<(MemberId, TcpStream)>) -> Result<Shell, DsmError> {
        let layout = Arc::new(Layout::new(&cfg.memory)?);
        let members = cfg.member_set()?;
        let links: Vec<ArcSwapOption<Link>> = (0..MAX_MEMBERS).map(|_| ArcSwapOption::empty()).collect();
        for (peer, stream) in streams {
            match links.get(usize::from(peer.0)) {
                Some(slot) if slot.load().is_none() && members.has(peer) && peer != cfg.me => {
                    slot.store(Some(Arc::new(make_link(&cfg, peer, stream, 0))));
                }
                _ => return Err(DsmError::Links(peer)),
            }
        }
        for peer in members.without(cfg.me).iter() {
            if links.get(usize::from(peer.0)).is_none_or(|link| link.load().is_none()) {
                return Err(DsmError::Links(peer));
            }
        }
        let region = Region::new(&layout, cfg.shards)?;
        let token_key = rand::random::<u64>() | 1;
        let core = CoreConfig {
            me: cfg.me,
            layout: layout.clone(),
            share: Share::WHOLE,
            hold: cfg.hold,
            token_key,
            first_touch: cfg.first_touch.clamp(1, crate::region::MAX_ZERO_RUN),
        };
        Ok(Shell {
            engine: Engine::new(&core, SHARD_BITS, cfg.budget.map(|bytes| bytes / PAGE_SIZE)),
            pace: Pace::new(cfg.me, members, &cfg.hold),
            homes: Mutex::new(layout.clone()),
            layout,
            epoch: AtomicU64::new(cfg.epoch.0),
            members: AtomicU64::new(members.0),
            region,
            links,
            keeper: Keeper::new().map_err(|source| DsmError::Start { what: "the timer", source })?,
            state: AtomicU8::new(RUNNING),
            report: Mutex::default(),
            log: (cfg.fault_log > 0).then(|| Mutex::new(FaultLog::new(cfg.fault_log))),
            recent: Mutex::default(),
            image: OnceLock::new(),
            is_held: Mutex::new(false),
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
        MemberSet(self.members.load(Ordering::Acquire))
    }

    /// Number of the table of members and homes that holds.
    pub(super) fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(Ordering::Acquire))
    }

    /// Another table holds from now on.
    pub(super) fn set_table(&self, epoch: Epoch, members: MemberSet) {
        self.members.store(members.0, Ordering::Release);
        self.epoch.store(epoch.0, Ordering::Release);
        let slots = self.pace.set_members(members);
        self.engine.set_slots(self, self.now(), slots);
    }

    /// There is a connection to somebody who may become a member.
    pub(super) fn connect(&self, peer: MemberId, stream: TcpStream) -> Result<Arc<Link>, HomesError> {
        let free = self.links.get(usize::from(peer.0)).filter(|slot| {
            peer != self.cfg.me
                && !self.members().has(peer)
                && slot.load().as_ref().is_none_or(|l| l.has_ended())
        });
        let slot = free.ok_or(HomesError::Peer(peer))?;
        let link = Arc::new(make_link(&self.cfg, peer, stream, self.now()));
        slot.store(Some(link.clone()));
        Ok(link)
    }

    /// The connection to somebody who is no member ends.
    pub(super) fn disconnect(&self, peer: MemberId) -> Result<(), HomesError> {
        if self.members().has(peer) {
            return Err(HomesError::Peer(peer));
        }
        if let Some(slot) = self.links.get(usize::from(peer.0))
            && let Some(link) = slot.swap(None)
        {
            link.set_left();
            link.close();
        }
        Ok(())
    }

    pub(super) fn keeper(&self) -> &Keeper {
        &self.keeper
    }

    pub(super) fn links(&self) -> impl Iterator<Item = Arc<Link>> {
        self.links.iter().filter_map(ArcSwapOption::load_full)
    }

    pub(super) fn link(&self, peer: MemberId) -> Option<Arc<Link>> {
        self.links.get(usize::from(peer.0))?.load_full()
    }

    /// The same without counting who has it.
    fn with_link<T>(&self, peer: MemberId, work: impl FnOnce(&Link) -> T) -> Option<T> {
        self.links.get(usize::from(peer.0))?.load().as_ref().map(|link| work(link))
    }

    /// Nanoseconds since the start.
    pub(super) fn now(&self) -> u64 {
        nanos(self.start.elapsed())
    }

    pub(super) fn is_running(&self) -> bool {
        self.state.load(Ordering::Acquire) == RUNNING
    }

    /// Whether the member leaves in order: its peers may still have something to say.
    pub(super) fn is_leaving(&self) -> bool {
        self.state.load(Ordering::Acquire) == STOPPED
    }

    /// A thread waits for a page.
    pub(super) fn fault(&self, fault: Fault) {
        let Fault { page, write, thread } = fault;
        let now = self.now();
        let asked = self.engine.fault(self, now, page, write);
        let remote = asked.is_some();
        // Answers of several would be looked for by as many threads, on as many processors.
        if let Some(peer) = asked.and_then(MemberSet::sole) {
            self.with_link(peer, |link| link.ear().ask(now));
        }
        if remote {
            lock(&self.recent).note(thread, page, write);
        }
        if let Some(log) = &self.log {
            let gpa = self.layout.gpa_of(page);
            lock(log).push(FaultRecord { at_ns: now, gpa, write, remote, thread });
        }
        if remote {
            // While the answer is on its way.
            let mut shard = self.engine.shard(page);
            shard.stats.waits(page, thread, now);
            shard.stats.count_up();
        }
    }

    /// See [`super::DsmHandle::recent`].
    pub(super) fn recent(&self, thread: u32) -> Vec<(u64, bool)> {
        let pages = lock(&self.recent).of(thread);
        pages.into_iter().map(|(page, write)| (self.layout.gpa_of(page), write)).collect()
    }

    /// See [`super::DsmHandle::waits`].
    pub(super) fn waits(&self, thread: u32) -> Vec<PeerWaits> {
        let mut all = BTreeMap::new();
        for mut shard in self.engine.shards() {
            shard.stats.count_up();
            shard.stats.add_waits(thread, &mut all);
        }
        all.into_iter().map(|(peer, (faults, ns))| PeerWaits { peer, faults, wait_us: ns / 1000 }).collect()
    }

    /// See [`super::DsmHandle::want`].
    pub(super) fn want(&self, pages: &[(u64, bool)]) {
        let now = self.now();
        for (gpa, write) in pages {
            if let Some(page) = self.layout.page_at(*gpa) {
                // Homes decline hints to write to pages that somebody has.
                let hint = Event::Hint { page, write: *write, insist: *write };
                self.engine.one(self, now, page, hint);
            }
        }
    }

    /// See [`super::DsmHandle::soften`].
    pub(super) fn soften(&self) {
        self.engine.soften(self, self.now());
    }

    /// See [`super::DsmHandle::rest`].
    pub(super) fn rest(&self, resting: bool) {
        self.engine.rest(self, self.now(), resting);
    }

    /// A message has come. `bytes` is its page, if it has one. Returns the peers to be written to, with [`Env::flush`],
    /// when no more messages are at hand.
    pub(super) fn message(
        &self,
        now: u64,
        from: MemberId,
        page: Page,
        msg: Msg<()>,
        bytes: &[u8],
    ) -> MemberSet {
        self.engine.message(self, now, from, page, msg, bytes)
    }

    /// The same for a run of messages that came in one frame.
    pub(super) fn run(&self, now: u64, from: MemberId, run: &Run, bytes: &[u8]) -> MemberSet {
        self.engine.run(self, now, from, run, bytes)
    }

    /// The member that leads has told its time.
    pub(super) fn beat(&self, from: MemberId, clock: u64, shift: u8) {
        let now = self.now();
        if self.pace.is_led_by(from)
            && let Some(slots) = self.pace.follow(now, clock, shift)
        {
            self.engine.set_slots(self, now, slots);
        }
    }

    /// Tells all peers the time of the slots, if this member leads. Returns the peers that now have something queued.
    pub(super) fn lead(&self) -> MemberSet {
        if !self.pace.is_led_by(self.cfg.me) {
            return MemberSet::EMPTY;
        }
        let (shift, changed) = self.pace.lead(self.now(), self.engine.transfer(), self.engine.take_losses());
        if let Some(slots) = changed {
            self.engine.set_slots(self, self.now(), slots);
        }
        let mut talk = MemberSet::EMPTY;
        for link in self.links().filter(|l| shift != 0 && !l.has_left() && l.full_since() == 0) {
            link.push(&Header::beat(self.cfg.me, self.epoch(), self.now(), shift));
            talk = talk.with(link.peer());
        }
        talk
    }

    /// Hold times have run out.
    pub(super) fn timers(&self, pages: &[Page]) {
        self.engine.timers(self, self.now(), pages);
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

    pub(super) fn preload(&self, gpa: u64, bytes: &[u8]) -> Result<(), DsmError> {
        if !self.is_running() {
            return Err(DsmError::Stopped);
        }
        let mut gpa = gpa;
        let mut rest = bytes;
        while !rest.is_empty() {
            let page = self.layout.page_at(gpa).filter(|p| self.home_of(*p) == Some(self.cfg.me));
            let page = page.ok_or(DsmError::NotHome { gpa })?;
            let at = usize::try_from(gpa % PAGE_SIZE).unwrap_or(0);
            let mut shard = self.engine.shard(page);
            // Whole pages of one block go in together: they are the same shard's.
            let whole = if at == 0 { u32::try_from(rest.len() / PAGE).unwrap_or(u32::MAX) } else { 0 };
            let run = shard.core.preload(page, whole.min(BLOCK - page.0 % BLOCK));
            let len = if run > 0 { run as usize * PAGE } else { rest.len().min(PAGE - at) };
            let (now, later) = rest.split_at(len);
            if run > 0 {
                self.region.fill_run(page, now, false, Wake::Later)?;
                shard.stats.preloaded(run);
                self.engine.budget().add(i64::from(run));
            } else if shard.core.preload(page, 1) == 1 {
                let mut buf = [0; PAGE];
                if let Some(room) = buf.get_mut(at..at + now.len()) {
                    room.copy_from_slice(now);
                }
                self.region.fill_run(page, &buf, false, Wake::Later)?;
                shard.stats.preloaded(1);
                self.engine.budget().add(1);
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

    /// What only a peer has, of the memory homed here.
    fn lost_with(&self, peer: MemberId) -> Lost {
        let mut lost = Lost::default();
        for shard in self.engine.shards() {
            for page in shard.core.directory().only_at(peer) {
                lost.pages += 1;
                if lost.first.len() < NAMED {
                    lost.first.push(self.layout.gpa_of(page));
                }
            }
        }
        lost.first.sort_unstable();
        lost
    }

    /// Stops answering and tells the handler, once. The caller holds no shard's lock.
    pub(super) fn fail(&self, peer: Option<MemberId>, cause: Cause) {
        if let Some(peer) = peer.filter(|peer| !self.members().has(*peer)) {
            tracing::info!("{peer}, which is not (or no longer) a member: {cause}");
            // It is no member, so that can't fail.
            let _ = self.disconnect(peer);
            return;
        }
        if self.state.compare_exchange(RUNNING, FAILED, Ordering::AcqRel, Ordering::Acquire).is_err() {
            return;
        }
        let lost = peer.map(|peer| self.lost_with(peer)).unwrap_or_default();
        let failure = DsmFailure { peer, cause, lost };
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
        let bye = Header::bye(self.cfg.me, self.epoch());
        for link in self.links() {
            if before == RUNNING {
                link.finish(&bye, self.now());
            } else {
                link.close();
            }
        }
        self.keeper.stop();
        // Who copies pages out looks, with a shard's lock held, whether the memory still runs.
        self.engine.shards().for_each(drop);
        self.region.close();
    }

    pub(super) fn take_fault_log(&self) -> Vec<FaultRecord> {
        self.log.as_ref().map(|log| lock(log).take()).unwrap_or_default()
    }

    pub(super) fn snapshot(&self) -> DsmSnapshot {
        let mut snapshot = DsmSnapshot { replaced: self.region.replaced(), ..DsmSnapshot::default() };
        let mut total = crate::stats::Totals::default();
        for mut shard in self.engine.shards() {
            shard.stats.count_up();
            let (shared, modified) = shard.core.cache().resident();
            snapshot.pages_shared += shared;
            snapshot.pages_modified += modified;
            total.add(&shard.stats, &self.layout);
        }
        total.write_to(&mut snapshot);
        snapshot.evictions = self.engine.budget().asked();
        snapshot.peak_bytes = self.engine.budget().peak() * PAGE_SIZE;
        snapshot.budget_bytes = self.cfg.budget;
        for link in self.links() {
            let [sent, bytes_sent, got, bytes_got] = link.traffic();
            snapshot.peers.push(PeerTraffic {
                peer: link.peer(),
                messages_sent: sent,
                bytes_sent,
                messages_received: got,
                bytes_received: bytes_got,
                reconnects: link.resumed(),
            });
        }
        snapshot.finish(self.layout.pages());
        snapshot
    }
}
