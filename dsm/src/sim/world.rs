//! The world of one run: who does what next, and whether what must hold still holds.
//!
//! One event is one step of one thread of one member. While a node's thread carries out a command, [`World::pause`] lets
//! the rest of the world go on between its steps: the threads of the same member use its memory, its frames may be sent
//! by another of its threads, and other members do whatever they do. Only what a lock forbids waits.

use super::chaos;
use super::member::{Failure, Member, Peer, Place};
use super::net::{Pipe, Stream};
use super::plan::{MS, Plan};
use super::rehome::{self, Rehoming};
use super::sched::{Event, Sched};
use super::trace::Trace;
use super::truth::{Truth, WORDS};
use super::workload::Thread;
use crate::addr::{Epoch, MemberId};
use crate::layout::{Layout, Page};
use crate::node::Cause;
use crate::node::shard::{Env, PageBuf};
use crate::protocol::slots::Slots;
use crate::protocol::{CoreConfig, Event as Input, MemberSet, Msg, pages::Share};
use crate::region::{Kernel, Wake};
use crate::transport::frame::{Frame, HEADER_LEN, Header, PAGE_LEN, Rules};
use crate::transport::link::{Flush, Link};
use crate::transport::reader::{FrameReader, ReadError};
use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::sync::Arc;

/// Commands whose steps may be interrupted while the steps of another one are.
const DEPTH: u32 = 3;
/// Number of the first table of homes.
pub(super) const EPOCH: Epoch = Epoch(7);
/// Time between two looks at those who wait.
const WATCH: u64 = 20 * MS;

/// How often things happened that a run must not be without.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) accesses: u64,
    pub(super) faults: u64,
    pub(super) frames: u64,
    pub(super) resumed: u64,
    pub(super) holds: u64,
    pub(super) pauses: u64,
    pub(super) exists: u64,
    pub(super) again: u64,
    pub(super) full: u64,
    pub(super) handled: u64,
    pub(super) aheads: u64,
    pub(super) yields: u64,
    pub(super) hints: u64,
    pub(super) declined: u64,
    pub(super) runs: u64,
    pub(super) evictions: u64,
    pub(super) rehomed: u64,
    pub(super) rests: u64,
    /// Accesses that had to wait, and how long all of them together, in nanoseconds.
    pub(super) waits: u64,
    pub(super) waited: u64,
}

/// What went wrong in a run.
#[derive(Clone, Debug)]
pub(super) struct Verdict {
    pub(super) what: String,
    pub(super) page: Option<Page>,
}

/// A member that must fail.
#[derive(Clone, Copy, Debug)]
pub(super) struct MustFail {
    pub(super) member: u16,
    /// Whom it must blame.
    pub(super) blames: u16,
    /// A word of the reason that it must give.
    pub(super) word: &'static str,
}

/// An event that a member's core handled, and when; pages without their bytes.
pub(super) type Record = (u16, u64, Input<()>);

/// Everything there is.
#[derive(Debug)]
pub(super) struct World {
    pub(super) plan: Plan,
    pub(super) sched: Rc<Sched>,
    pub(super) layout: Arc<Layout>,
    /// The same pages with the homes that they have now.
    pub(super) homes: RefCell<Arc<Layout>>,
    pub(super) rehoming: Rehoming,
    pub(super) members: Vec<Member>,
    pub(super) truth: RefCell<Truth>,
    pub(super) trace: Trace,
    pages: Vec<Page>,
    pub(super) set: MemberSet,
    depth: Cell<u32>,
    tally: Cell<Tally>,
    verdict: RefCell<Option<Verdict>>,
    /// Who must fail, since the fatal event.
    pub(super) must_fail: RefCell<Vec<MustFail>>,
    /// What the cores were made from, and every event that they handled, if they are to be kept.
    pub(super) cores: Vec<CoreConfig>,
    pub(super) record: Option<RefCell<Vec<Record>>>,
    unique: Cell<u64>,
    is_over: Cell<bool>,
}

/// Reads what comes out of a pipe, from the start of a frame.
pub(super) fn new_reader(pipe: &Rc<Pipe>) -> FrameReader<Stream> {
    FrameReader::with_capacity(Stream(pipe.clone()), 2 * (HEADER_LEN + PAGE_LEN))
}

impl World {
    pub(super) fn new(seed: u64, plan: impl FnOnce(&Sched) -> Plan, trace: bool) -> Option<World> {
        let sched = Rc::new(Sched::new(seed));
        let plan = plan(&sched);
        let layout = Arc::new(Layout::new(&plan.memory).ok()?);
        let members = plan.members;
        let pipe = |from, to| Rc::new(Pipe::new(sched.clone(), from, to, plan.wire));
        let pipes: Vec<Vec<Rc<Pipe>>> =
            (0..members).map(|from| (0..members).map(|to| pipe(from, to)).collect()).collect();
        let find = |from: u16, to: u16| pipes.get(usize::from(from))?.get(usize::from(to)).cloned();
        let peer = |me: u16, other: u16| {
            let (outgoing, incoming) = (find(me, other)?, find(other, me)?);
            let reader = new_reader(&incoming);
            let link = Link::keeping(MemberId(other), outgoing, 0);
            let reader = RefCell::new(reader);
            (me != other).then_some(Peer {
                link,
                reader,
                incoming,
                is_receiving: Cell::default(),
                blips: Cell::default(),
            })
        };
        let core = |me| CoreConfig {
            me: MemberId(me),
            layout: layout.clone(),
            share: Share::WHOLE,
            hold: plan.hold,
            token_key: sched.rng.next() | 1,
            first_touch: plan.first_touch,
        };
        let cores: Vec<CoreConfig> = (0..members).map(core).collect();
        let member = |core: &CoreConfig| {
            let me = core.me.0;
            Member::new(me, core, plan.budget, (0..members).map(|other| peer(me, other)).collect())
        };
        let mut world = World {
            members: cores.iter().map(member).collect(),
            cores,
            record: None,
            truth: RefCell::new(Truth::new(layout.pages())),
            trace: Trace::new(trace),
            pages: (0..layout.pages()).map(Page).collect(),
            set: MemberSet(u64::MAX >> (64 - members.clamp(1, 64))),
            homes: RefCell::new(layout.clone()),
            rehoming: Rehoming::default(),
            depth: Cell::default(),
            tally: Cell::default(),
            verdict: RefCell::default(),
            must_fail: RefCell::default(),
            unique: Cell::new(1),
            is_over: Cell::default(),
            plan,
            layout: layout.clone(),
            sched: sched.clone(),
        };
        if !world.pages.is_empty() {
            let hot = sched.rng.index(world.pages.len());
            world.pages.swap(0, hot);
        }
        Some(world)
    }

    pub(super) fn tally(&self) -> Tally {
        self.tally.get()
    }

    pub(super) fn count(&self, add: impl FnOnce(&mut Tally)) {
        let mut tally = self.tally.get();
        add(&mut tally);
        self.tally.set(tally);
    }

    pub(super) fn trace(&self, member: Option<u16>, page: Option<Page>, text: impl FnOnce() -> String) {
        self.trace.add(self.sched.now(), member, page, text);
    }

    pub(super) fn trace_sent(&self, from: u16, to: u16, header: &Header) {
        if !self.trace.is_on() {
            return;
        }
        match header.decode(&self.rules(from, from), || ()) {
            Ok(Frame::Page(page, msg)) => self.trace(Some(from), Some(page), || format!("to {to}: {msg:?}")),
            Ok(Frame::Run(run)) => self.trace(Some(from), Some(run.page), || format!("to {to}: {run:?}")),
            other => self.trace(Some(from), None, || format!("to {to}: {other:?}")),
        }
    }

    /// Ends the run if something is wrong.
    pub(super) fn expect(&self, page: Option<Page>, result: Result<(), String>) {
        if let Err(what) = result {
            self.trace(None, page, || format!("WRONG: {what}"));
            self.verdict.borrow_mut().get_or_insert(Verdict { what, page });
        }
    }

    pub(super) fn member(&self, number: u16) -> Option<&Member> {
        self.members.get(usize::from(number))
    }

    /// What `peer` may say to `me`.
    fn rules(&self, me: u16, peer: u16) -> Rules<'_> {
        let epoch = self.member(me).map_or(EPOCH, |m| m.epoch.get());
        Rules { peer: MemberId(peer), epoch, layout: &self.layout, members: self.set }
    }

    /// Runs to the end of the workload, or to the first thing that is wrong.
    pub(super) fn run(&self) -> Option<Verdict> {
        if self.plan.preload {
            self.preload();
        }
        for member in &self.members {
            let threads = (0..self.plan.threads).map(|_| Thread::new(self.plan.ops));
            member.threads.borrow_mut().extend(threads);
            for thread in 0..self.plan.threads {
                self.thread_soon(member.number, thread);
            }
        }
        if let Some(shift) = self.plan.slots {
            let rng = &self.sched.rng;
            for member in (0..self.plan.members).filter(|_| !rng.chance(100)) {
                // Some learn it late, or twice; their clocks are off by up to a slot.
                for at in [rng.skewed(MS), rng.skewed(4 * MS)] {
                    let offset = i64::try_from(rng.skewed(1 << shift)).unwrap_or(0) * [1, -1][rng.index(2)];
                    self.sched.after(at, Event::Slots { member, shift, offset });
                }
            }
        }
        for (n, (at, _)) in self.plan.chaos.iter().enumerate() {
            self.sched.at(*at, Event::Chaos(n));
        }
        self.sched.after(WATCH, Event::Watch);
        self.go_on(u64::MAX);
        if self.verdict.borrow().is_none() && self.plan.fatal().is_none() {
            self.expect(None, self.is_complete());
            self.sweep();
        }
        self.verdict.borrow().clone()
    }

    /// The threads have ended: the directory and the memories must agree, and every member must read the same.
    fn sweep(&self) {
        self.expect(None, chaos::agree(self));
        for member in &self.members {
            if let Some(thread) = member.threads.borrow_mut().first_mut() {
                thread.sweep(&self.pages);
            }
            self.thread_soon(member.number, 0);
        }
        self.sched.after(WATCH, Event::Watch);
        self.go_on(u64::MAX);
        self.expect(None, self.is_complete());
        self.expect(None, chaos::agree(self));
    }

    fn is_complete(&self) -> Result<(), String> {
        for member in &self.members {
            for (n, thread) in member.threads.borrow().iter().enumerate() {
                if let Some((op, since)) = thread.waiting() {
                    return Err(format!(
                        "nothing more will happen, but thread {n} of member {} waits to {} page {} since {} us",
                        member.number,
                        if op.is_write() { "write to" } else { "read" },
                        op.page.0,
                        since / 1000
                    ));
                }
            }
        }
        Ok(())
    }

    fn preload(&self) {
        for page in &self.pages {
            let Some(home) = self.layout.home_of(*page).and_then(|h| self.member(h.0)) else { continue };
            if self.sched.rng.chance(300) || home.engine.shard(*page).core.preload(*page, 1) == 0 {
                continue;
            }
            home.engine.budget().add(1);
            let words = std::array::from_fn::<u64, { WORDS.len() }, _>(|_| self.sched.rng.below(3));
            let bytes = self.truth.borrow_mut().preload(*page, words);
            let result = Place { world: self, member: home }.fill_run(*page, &bytes, false, Wake::Later);
            self.expect(Some(*page), result.map_err(|e| e.to_string()));
        }
    }

    /// Handles events until `limit` or until something is wrong.
    fn go_on(&self, limit: u64) {
        while self.verdict.borrow().is_none() && !self.is_over.get() {
            let Some(event) = self.sched.next(limit) else { break };
            self.dispatch(event);
            if self.sched.count() > self.plan.most_events {
                self.expect(None, Err("the run goes round in circles".into()));
            }
        }
        if limit != u64::MAX {
            self.sched.advance(limit);
        }
    }

    /// Between two steps of a command: perhaps the rest of the world goes on for a while.
    pub(super) fn pause(&self) {
        if self.depth.get() >= DEPTH || !self.sched.rng.chance(self.plan.pauses) {
            return;
        }
        self.count(|t| t.pauses += 1);
        self.depth.set(self.depth.get() + 1);
        self.go_on(self.sched.now() + self.sched.rng.skewed(self.plan.longest_pause));
        self.depth.set(self.depth.get() - 1);
    }

    /// Another thread of the member may write to the socket what this one has just queued.
    pub(super) fn flushed_by_another(&self, member: u16, to: u16) {
        if self.sched.rng.chance(200) {
            self.sched.after(0, Event::Flush { member, to });
        }
    }

    /// Some thread of the member writes what is queued for a peer, in a moment.
    pub(super) fn flushed_soon(&self, member: u16, to: u16) {
        let delay = self.delay(member, self.plan.step);
        self.sched.after(delay, Event::Flush { member, to });
    }

    /// A thread of a member takes its next step in a moment.
    pub(super) fn thread_soon(&self, member: u16, thread: u16) {
        let delay = self.delay(member, self.plan.step);
        self.sched.after(delay, Event::Step { member, thread });
    }

    /// How long a step of a member takes.
    fn delay(&self, member: u16, longest: u64) -> u64 {
        let slowness = self.member(member).map_or(1, |m| m.slowness.get());
        self.sched.rng.skewed(longest) * slowness
    }

    fn dispatch(&self, event: Event) {
        let member = match event.member().map(|number| self.member(number)) {
            Some(Some(member)) if !member.is_dead.get() => member,
            Some(_) => return,
            None => {
                return match event {
                    Event::Chaos(n) => chaos::happen(self, n),
                    Event::Heal { a, b } => chaos::heal(self, a, b),
                    Event::Rehome => rehome::look(self),
                    _ => self.watch(),
                };
            }
        };
        if member.stopped_until.get() > self.sched.now() {
            return self.sched.at(member.stopped_until.get(), event);
        }
        match event {
            Event::Chaos(_) | Event::Heal { .. } | Event::Rehome | Event::Watch => {}
            Event::Step { .. } if self.rehoming.is_on.get() => {
                self.rehoming.parked.borrow_mut().push(event);
            }

            Event::Step { thread, .. } => self.step(member, thread),
            Event::Flush { to, .. } if !member.is_queueing.get() => self.flush(member, to),
            // The lock that it needs is taken.
            _ if member.is_busy.get() => member.backlog.borrow_mut().push(event),
            Event::Flush { .. } => member.backlog.borrow_mut().push(event),
            Event::Switch { .. } => rehome::switch(self, member),
            Event::Faults { .. } => self.faults(member),
            Event::Receive { from, .. } => self.receive(member, from),
            // The keeper is one thread; the next timer waits for it.
            Event::Rest { .. } => {
                let resting = member.threads.borrow().iter().all(|t| t.rests || t.is_done());
                member.engine.rest(&Place { world: self, member }, self.sched.now(), resting);
            }
            Event::Slots { shift, offset, .. } => {
                let slots = Slots { shift, offset, members: self.set };
                member.engine.set_slots(&Place { world: self, member }, self.sched.now(), slots);
            }
            Event::Soften { .. } => member.engine.soften(&Place { world: self, member }, self.sched.now()),
            Event::Timer { .. } if member.is_keeping.get() => self.sched.after(self.plan.step, event),
            Event::Timer { page, .. } => {
                let page = Page(page);
                self.trace(Some(member.number), Some(page), || "hold time over".into());
                member.is_keeping.set(true);
                member.engine.timers(&Place { world: self, member }, self.sched.now(), &[page]);
                member.is_keeping.set(false);
            }
        }
    }

    /// A thread of the workload tries its access.
    fn step(&self, member: &Member, number: u16) {
        let mut threads = member.threads.borrow_mut();
        let Some(thread) = threads.get_mut(usize::from(number)) else { return };
        if std::mem::take(&mut thread.rests) {
            self.sched.after(0, Event::Rest { member: member.number });
        }
        let unique = self.unique.get();
        self.unique.set(unique + 1);
        let rng = &self.sched.rng;
        let Some(op) = thread.current(rng, &self.plan.taste, &self.pages, unique) else { return };
        let mut memory = member.memory.borrow_mut();
        if let Some(copy) = memory.access(op.page, op.is_write()) {
            let result = self.truth.borrow_mut().access(op.page, op.word, op.access, copy);
            self.trace(Some(member.number), Some(op.page), || {
                format!("thread {number}: word {} {:?}", op.word, op.access)
            });
            self.expect(Some(op.page), result);
            let waited = thread.waits.map(|since| self.sched.now() - since);
            self.count(|t| {
                t.accesses += 1;
                t.waits += u64::from(waited.is_some());
                t.waited += waited.unwrap_or(0);
            });
            thread.advance();
            self.after_access(member.number, thread, number);
        } else {
            thread.waits.get_or_insert(self.sched.now());
            thread.tries += 1;
            memory.sleep(number, op.page, op.is_write());
            self.count(|t| t.faults += 1);
            self.trace(Some(member.number), Some(op.page), || {
                format!("thread {number}: fault, wants to {}", if op.is_write() { "write" } else { "read" })
            });
            if !member.is_watching.replace(true) {
                let delay = self.delay(member.number, self.plan.step);
                self.sched.after(delay, Event::Faults { member: member.number });
            }
        }
    }

    /// A thread thinks about its next access, or rests.
    fn after_access(&self, member: u16, thread: &mut Thread, number: u16) {
        let (taste, rng) = (&self.plan.taste, &self.sched.rng);
        if taste.softens > 0 && rng.chance(taste.softens) {
            self.sched.after(0, Event::Soften { member });
        }
        thread.rests = taste.rests > 0 && rng.chance(taste.rests);
        if thread.rests || thread.is_done() {
            self.sched.after(0, Event::Rest { member });
        }
        if !thread.is_done() {
            let longest = if thread.rests { taste.longest_rest } else { taste.think };
            self.sched.after(self.delay(member, longest), Event::Step { member, thread: number });
        }
    }

    /// The fault thread: reads up to 16 faults, then serves them one by one.
    fn faults(&self, member: &Member) {
        if member.batch.borrow().is_empty() {
            let mut batch = member.batch.borrow_mut();
            member.memory.borrow_mut().read_faults(16, |fault| batch.push_back(fault));
        }
        let next = member.batch.borrow_mut().pop_front();
        let Some(fault) = next else {
            member.is_watching.set(false);
            return;
        };
        member.engine.fault(&Place { world: self, member }, self.sched.now(), fault.page, fault.write);
        let delay = self.delay(member.number, self.plan.step);
        self.sched.after(delay, Event::Faults { member: member.number });
    }

    /// The receive thread of one peer takes the next frame.
    fn receive(&self, member: &Member, from: u16) {
        let Some(peer) = member.peer(from).filter(|_| member.is_running()) else { return };
        if peer.is_receiving.get() {
            return self.sched.after(self.plan.step, Event::Receive { member: member.number, from });
        }
        let mut reader = peer.reader.borrow_mut();
        let blame = Some(MemberId(from));
        let failure = match reader.next(|_| ()) {
            Err(ReadError::Io(e)) if e.kind() == io::ErrorKind::WouldBlock => {
                peer.incoming.rearm();
                return;
            }
            Err(ReadError::Frame(e)) => Cause::Violation(e.to_string()),
            // Its receive thread is busy with connecting again.
            Err(_) if peer.blips.get() > 0 => return peer.link.set_broken(),
            Err(e) => Cause::Disconnected(e.to_string()),
            Ok((header, bytes)) => {
                self.count(|t| t.frames += 1);
                peer.link.note_message();
                peer.link.acknowledged(header.received());
                match header.decode(&self.rules(member.number, from), || ()) {
                    Ok(frame @ (Frame::Page(..) | Frame::Run(_))) => {
                        let bytes = bytes.to_vec();
                        drop(reader);
                        peer.is_receiving.set(true);
                        let (place, now) = (Place { world: self, member }, self.sched.now());
                        let talk = self.deliver(place, now, from, frame, &bytes);
                        place.flush(talk, now);
                        peer.is_receiving.set(false);
                        let delay = self.delay(member.number, self.plan.step);
                        return peer.incoming.resume(self.sched.now() + delay);
                    }
                    Ok(_) => return peer.incoming.resume(self.sched.now()),
                    Err(e) => Cause::Violation(e.to_string()),
                }
            }
        };
        self.fail(member, (blame, failure));
    }

    /// A frame has come.
    fn deliver(&self, place: Place<'_>, now: u64, from: u16, frame: Frame<()>, bytes: &[u8]) -> MemberSet {
        let Member { number, engine, .. } = place.member;
        match frame {
            Frame::Page(page, msg) => {
                self.trace(Some(*number), Some(page), || format!("from {from}: {msg:?}"));
                engine.message(&place, now, MemberId(from), page, msg, bytes)
            }
            Frame::Run(run) => {
                self.count(|t| t.runs += 1);
                for (page, msg) in run.messages(bytes) {
                    self.trace(Some(*number), Some(page), || format!("from {from}, in a run: {msg:?}"));
                }
                engine.run(&place, now, MemberId(from), &run, bytes)
            }
            _ => MemberSet::EMPTY,
        }
    }

    /// A member's core is about to handle an event.
    pub(super) fn note(&self, member: u16, now: u64, input: &Input<PageBuf>) {
        self.count(|t| t.handled += 1);
        let kind = match input {
            Input::Ahead { .. } => Some("ahead"),
            Input::Hint { .. } => Some("hint"),
            Input::Yield => Some("yield"),
            Input::Evict { .. } => Some("evict"),
            Input::Slots(_) => Some("slots"),
            Input::Soften => Some("soften"),
            Input::Rest { .. } => Some("rest"),
            _ => None,
        };
        if let Some(kind) = kind {
            self.trace(Some(member), None, || kind.into());
        }
        self.count(|t| match input {
            Input::Ahead { .. } => t.aheads += 1,
            Input::Hint { .. } => t.hints += 1,
            Input::Message { msg: Msg::Decline { .. }, .. } => t.declined += 1,
            Input::Yield => t.yields += 1,
            Input::Evict { .. } => t.evictions += 1,
            Input::Soften | Input::Rest { resting: true } => t.rests += 1,
            _ => {}
        });
        if let Some(record) = &self.record {
            record.borrow_mut().push((member, now, input.without_bytes()));
        }
    }

    fn flush(&self, member: &Member, to: u16) {
        let Some(peer) = member.peer(to) else { return };
        match peer.link.flush(self.sched.now()) {
            Ok(Flush::Done) => {}
            // The pipe tells when it has room.
            Ok(Flush::Full) => self.count(|t| t.full += 1),
            Err(e) => self.fail(member, (Some(MemberId(to)), Cause::Disconnected(e.to_string()))),
        }
    }

    /// A member's memory has failed: it must have been meant to, and for that reason.
    pub(super) fn fail(&self, member: &Member, failure: Failure) {
        if !member.is_running() {
            return;
        }
        let (peer, cause) = &failure;
        self.trace(Some(member.number), None, || format!("fails: {peer:?} {cause}"));
        let (blamed, reason) = (peer.map(|p| p.0), cause.to_string());
        let is_meant =
            |m: &MustFail| m.member == member.number && Some(m.blames) == blamed && reason.contains(m.word);
        if !self.must_fail.borrow().iter().any(is_meant) {
            let whom = blamed.map_or_else(|| "nobody".into(), |b| format!("member {b}"));
            let what = format!("member {} fails and blames {whom}: {cause}", member.number);
            self.expect(None, Err(what));
        }
        *member.failure.borrow_mut() = Some(failure);
    }

    /// Looks at everybody who waits.
    fn watch(&self) {
        let now = self.sched.now();
        let healed = self.plan.healed();
        if let Some((at, chaos)) = self.plan.fatal() {
            if now < at.max(healed) + self.plan.patience / 2 {
                return self.sched.after(WATCH, Event::Watch);
            }
            let must_fail = self.must_fail.borrow();
            let lacking = must_fail.iter().find(|m| self.member(m.member).is_some_and(Member::is_running));
            let result = lacking.map_or(Ok(()), |m| {
                Err(format!(
                    "member {} goes on and does not blame member {} for {chaos:?}",
                    m.member, m.blames
                ))
            });
            self.expect(None, result);
            // Who still waits, waits for a member that has failed.
            self.is_over.set(true);
            return;
        }
        for member in &self.members {
            for (n, thread) in member.threads.borrow().iter().enumerate() {
                let Some((op, since)) = thread.waiting() else { continue };
                if now > since.max(healed) + self.plan.patience {
                    let what = format!(
                        "thread {n} of member {} waits for page {} since {} us, after {} faults",
                        member.number,
                        op.page.0,
                        since / 1000,
                        thread.tries
                    );
                    self.expect(Some(op.page), Err(what));
                }
            }
        }
        if !self.sched.is_empty() {
            self.sched.after(WATCH, Event::Watch);
        }
    }
}
