//! A whole cluster of cores in one value: memory of every member, messages in flight, timers. The model checker and
//! the random tests drive it; every step checks what must hold.

use super::{Command, Contents, Core, CoreConfig, Event, Msg, Right, Violation};
use crate::addr::{HomeRange, MemberId};
use crate::layout::{Layout, Page};
use crate::protocol::cut::{Duties, Duty};
use crate::protocol::hold::HoldConfig;
use crate::protocol::pages::Share;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

/// The time of every event but timers; far from 0 so that ages can be computed.
const NOW: u64 = 1 << 30;
/// No hold is longer.
const LONGEST: u64 = 1 << 31;

/// A copy of a page in a member's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Copy {
    pub(super) value: u8,
    pub(super) writable: bool,
}

/// Messages from one member to another, oldest first.
type Line = VecDeque<(Page, Msg<u8>)>;

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Wrong {
    Violation(Violation),
    Memory(&'static str),
}

/// A number that is no part of the state: clusters that differ in it alone are the same.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Aside(pub(super) u32);

impl PartialEq for Aside {
    fn eq(&self, _: &Aside) -> bool {
        true
    }
}

impl Eq for Aside {}

impl Hash for Aside {
    fn hash<H: Hasher>(&self, _: &mut H) {}
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Cluster {
    pub(super) cores: Vec<Core<u8>>,
    pub(super) memory: Vec<BTreeMap<Page, Copy>>,
    /// Messages in flight by sender and receiver; each such line stays in order.
    pub(super) network: BTreeMap<(u16, u16), Line>,
    pub(super) timers: BTreeMap<(u16, Page), u64>,
    /// Threads that wait: member, page, whether they want to write.
    pub(super) waiting: BTreeSet<(u16, Page, bool)>,
    /// The last write in each page's order.
    pub(super) newest: Vec<u8>,
    pub(super) wrong: Option<Wrong>,
    /// Pages sent with their bytes, for tests that count.
    pub(super) transfers: Aside,
    /// The member that has crashed.
    pub(super) crashed: Option<u16>,
}

pub(super) fn layout(homes: &[u16]) -> Layout {
    let ranges: Vec<_> = (0u64..)
        .zip(homes)
        .map(|(n, home)| HomeRange { start: n * 4096, len: 4096, home: MemberId(*home) })
        .collect();
    Layout::new(&ranges).unwrap()
}

impl Cluster {
    /// `members` members and one page per entry of `homes`. With `hold`, every page that came from elsewhere is held
    /// until its timer is fired.
    pub(super) fn new(members: u16, homes: &[u16], hold: bool) -> Cluster {
        let layout = Arc::new(layout(homes));
        let min = if hold { Duration::from_secs(1) } else { Duration::ZERO };
        let hold = HoldConfig { min, max: min, transfers: 0 };
        let core = |me| {
            Core::new(CoreConfig {
                me: MemberId(me),
                layout: layout.clone(),
                share: Share::WHOLE,
                hold,
                token_key: 0,
                first_touch: 1,
            })
        };
        Cluster {
            cores: (0..members).map(core).collect(),
            memory: vec![BTreeMap::new(); usize::from(members)],
            network: BTreeMap::new(),
            timers: BTreeMap::new(),
            waiting: BTreeSet::new(),
            newest: vec![0; homes.len()],
            wrong: None,
            transfers: Aside::default(),
            crashed: None,
        }
    }

    pub(super) fn has(&self, member: u16, page: Page, write: bool) -> bool {
        self.memory[usize::from(member)].get(&page).is_some_and(|c| c.writable || !write)
    }

    /// Number of pages that a member has.
    pub(super) fn copies(&self, member: u16) -> usize {
        self.memory[usize::from(member)].len()
    }

    /// A thread touches a page; it waits if it has to.
    pub(super) fn touch(&mut self, member: u16, page: Page, write: bool) {
        if !self.has(member, page, write) {
            self.waiting.insert((member, page, write));
            self.handle(member, NOW, Event::Fault { page, write });
        }
    }

    /// A thread writes to a page that it may write to.
    pub(super) fn store(&mut self, member: u16, page: Page) {
        let newest = &mut self.newest[page.0 as usize];
        *newest = newest.wrapping_add(1);
        let value = *newest;
        match self.memory[usize::from(member)].get_mut(&page) {
            Some(copy) if copy.writable => copy.value = value,
            _ => self.memory_error("wrote without the right to"),
        }
    }

    /// While nothing is under way: every member saves what it has to, into `image`. A page that is neither saved now nor
    /// was at an earlier cut keeps the image's value, so a change that was missed shows as a wrong one.
    pub(super) fn cut(&mut self, full: bool, image: &mut [u8]) -> Result<(), String> {
        let (mut answers_for, mut touched) = (0, 0);
        for member in 0..self.cores.len() {
            self.check_duties(member)?;
            for page in (0u32..).zip(self.newest.clone()).map(|(n, _)| Page(n)) {
                let member_id = u16::try_from(member).unwrap();
                if let Duty::Fetch { changed } = self.cores[member].duty(page) {
                    if changed || full {
                        self.handle(member_id, NOW, Event::Fault { page, write: false });
                        super::properties::settle(self)?;
                    }
                }
                touched += u32::from(self.cores[member].is_touched(page));
                let duty = self.cores[member].duty(page);
                answers_for += u32::from(duty != Duty::None);
                let Duty::Save { changed, in_image } = duty else { continue };
                if changed || full {
                    let copy = self.memory[member].get(&page).map(|c| c.value);
                    let value = if in_image { Some(image[page.0 as usize]) } else { copy };
                    image[page.0 as usize] = value.ok_or("saves a page that it does not have")?;
                }
                if self.cores[member].saved(page) {
                    match self.memory[member].get_mut(&page) {
                        Some(copy) => copy.writable = false,
                        None => return Err("protects a page that it does not have".into()),
                    }
                }
            }
        }
        if answers_for == touched { Ok(()) } else { Err(format!("{answers_for} of {touched} pages")) }
    }

    /// What a core says of many pages in sum is what it says of each.
    fn check_duties(&self, member: usize) -> Result<(), String> {
        let core = &self.cores[member];
        let pages = u32::try_from(self.newest.len()).unwrap();
        for start in 0..pages {
            for end in start..=pages {
                let mut sum = Duties::default();
                for page in (start..end).map(Page) {
                    let duty = core.duty(page);
                    sum.answers_for += u64::from(duty != Duty::None);
                    sum.touched += u64::from(core.is_touched(page));
                    sum.has_changed |=
                        matches!(duty, Duty::Save { changed: true, .. } | Duty::Fetch { changed: true });
                    sum.is_lacking |= matches!(duty, Duty::Fetch { .. });
                }
                if core.duties(start..end) != sum {
                    return Err(format!(
                        "pages {start} to {end}: {:?}, not {sum:?}",
                        core.duties(start..end)
                    ));
                }
            }
        }
        Ok(())
    }

    /// A cluster that starts from an image that `holder` has.
    pub(super) fn from_image(members: u16, homes: &[u16], holder: u16, image: &[u8]) -> Cluster {
        let mut cluster = Cluster::new(members, homes, false);
        cluster.newest = image.to_vec();
        for (n, _) in (0u32..).zip(image).filter(|(_, value)| **value != 0) {
            let home = homes[n as usize];
            for member in [home, holder].into_iter().collect::<BTreeSet<u16>>() {
                assert!(cluster.cores[usize::from(member)].adopt(Page(n), MemberId(holder)));
            }
        }
        cluster
    }

    /// A page in the image is to come ahead of need.
    pub(super) fn load(&mut self, member: u16, page: Page) {
        self.handle(member, NOW, Event::Load { page });
    }

    /// A member would like to have a page that no thread waits for.
    pub(super) fn hint(&mut self, member: u16, page: Page, write: bool) {
        self.handle(member, NOW, Event::Hint { page, write, insist: false });
    }

    /// A member would like to be rid of a page.
    pub(super) fn evict(&mut self, member: u16, page: Page) {
        self.handle(member, NOW + LONGEST, Event::Evict { page });
    }

    /// A member dies with everything it has; what it sent and nobody has read is lost.
    pub(super) fn crash(&mut self, member: u16) {
        self.crashed = Some(member);
        self.memory[usize::from(member)].clear();
        self.network.retain(|(from, to), _| *from != member && *to != member);
        self.timers.retain(|(at, _), _| *at != member);
        self.waiting.retain(|(at, _, _)| *at != member);
    }

    /// Delivers the oldest message of a line.
    pub(super) fn deliver(&mut self, from: u16, to: u16) {
        let Some(line) = self.network.get_mut(&(from, to)) else { return };
        let message = line.pop_front();
        if line.is_empty() {
            self.network.remove(&(from, to));
        }
        if let Some((page, msg)) = message {
            self.handle(to, NOW, Event::Message { from: MemberId(from), page, msg });
        }
    }

    /// Fires a timer.
    pub(super) fn fire(&mut self, member: u16, page: Page) {
        if let Some(at) = self.timers.remove(&(member, page)) {
            self.handle(member, at, Event::Timer { page });
        }
    }

    fn memory_error(&mut self, what: &'static str) {
        self.wrong.get_or_insert(Wrong::Memory(what));
    }

    fn send(&mut self, from: u16, to: MemberId, page: Page, msg: Msg<u8>) {
        if self.crashed == Some(to.0) {
            return;
        }
        self.network.entry((from, to.0)).or_default().push_back((page, msg));
    }

    fn handle(&mut self, member: u16, now: u64, event: Event<u8>) {
        if self.wrong.is_some() {
            return;
        }
        let mut out = Vec::new();
        let core = &mut self.cores[usize::from(member)];
        if let Err(violation) = core.handle(now, event, &mut out) {
            self.wrong.get_or_insert(Wrong::Violation(violation));
            return;
        }
        for command in out {
            self.carry_out(member, command);
        }
    }

    fn carry_out(&mut self, member: u16, command: Command<u8>) {
        let memory = &mut self.memory[usize::from(member)];
        match command {
            Command::Send { to, page, msg } => self.send(member, to, page, msg),
            Command::Give { to, page, terms, protect, drop } => {
                let Some(copy) = memory.get_mut(&page) else {
                    return self.memory_error("gave a page that is not there");
                };
                if copy.writable != protect {
                    return self.memory_error("protection does not match the memory");
                }
                copy.writable = false;
                let value = copy.value;
                if drop {
                    memory.remove(&page);
                }
                self.transfers.0 += u32::from(value != 0);
                let contents = if value == 0 { Contents::Zero } else { Contents::Bytes(value) };
                self.send(member, to, page, Msg::Grant { terms, contents });
            }
            Command::Drop { page } => {
                if memory.remove(&page).is_none() {
                    self.memory_error("dropped a page that is not there");
                }
            }
            Command::Install { page, right, contents, .. } => {
                let writable = right == Right::Modified;
                let value = match contents {
                    Contents::Zero => 0,
                    Contents::Bytes(value) => value,
                    Contents::Keep => match memory.remove(&page) {
                        Some(copy) if !copy.writable => copy.value,
                        _ => return self.memory_error("upgraded a page that is not there"),
                    },
                };
                if memory.insert(page, Copy { value, writable }).is_some() {
                    return self.memory_error("filled a page that is there");
                }
                self.wake(member, page);
            }
            Command::Zero { page, count, .. } => {
                for n in 0..count {
                    let page = Page(page.0 + n);
                    let copy = Copy { value: 0, writable: true };
                    if self.memory[usize::from(member)].insert(page, copy).is_some() {
                        return self.memory_error("filled a page that is there");
                    }
                    self.wake(member, page);
                }
            }
            Command::Load { page, protect, wake } => {
                let value = self.newest[page.0 as usize];
                if memory.insert(page, Copy { value, writable: !protect }).is_some() {
                    return self.memory_error("loaded a page that is there");
                }
                if wake {
                    self.wake(member, page);
                }
            }
            Command::Reopen { page } => {
                match memory.get_mut(&page) {
                    Some(copy) if !copy.writable => copy.writable = true,
                    _ => return self.memory_error("reopened a page that is not closed"),
                }
                self.wake(member, page);
            }
            Command::Wake { page } => self.wake(member, page),
            Command::Timer { page, at } => {
                // One that is there is left over from a hold that ended early; the core would ignore it.
                self.timers.insert((member, page), at);
            }
        }
    }

    /// All who wait for the page try again; who still lacks the right takes another fault, which must be under way.
    fn wake(&mut self, member: u16, page: Page) {
        let woken: Vec<_> = self.waiting.iter().filter(|w| w.0 == member && w.1 == page).copied().collect();
        for waiter in woken {
            if self.has(member, page, waiter.2) {
                self.waiting.remove(&waiter);
            } else if self.cores[usize::from(member)].cache().is_writable(page) {
                return self.memory_error("the core takes a page for writable that is not");
            } else {
                self.handle(member, NOW, Event::Fault { page, write: waiter.2 });
            }
        }
    }

    /// Single writer or many readers, and every copy holds the newest value.
    pub(super) fn check(&self) -> Result<(), String> {
        if let Some(wrong) = &self.wrong {
            return Err(format!("{wrong:?}"));
        }
        for (n, newest) in (0u32..).zip(&self.newest) {
            let copies: Vec<_> = self.memory.iter().filter_map(|m| m.get(&Page(n))).collect();
            if copies.iter().any(|c| c.writable) && copies.len() > 1 {
                return Err(format!("page {n}: a writable copy is not the only one"));
            }
            if let Some(stale) = copies.iter().find(|c| c.value != *newest) {
                return Err(format!("page {n}: {stale:?} is not the last write, {newest}"));
            }
        }
        Ok(())
    }

    /// Whether nothing can happen any more though somebody waits. Who waits for a member that has crashed is not told
    /// here: noticing is up to the connections.
    pub(super) fn is_stuck(&self) -> bool {
        self.crashed.is_none()
            && self.network.is_empty()
            && self.timers.is_empty()
            && !self.waiting.is_empty()
    }
}
