//! Both sides of a member behind one door: events in, commands out.

use super::Violation;
use super::cache::{Cache, Demand, Reason, State};
use super::directory::{Directory, Holders, Request};
use super::hold::{Hold, HoldConfig};
use super::message::{Contents, Msg, Right, Served, Terms, Want};
use super::pages::Share;
use super::slots::Slots;
use crate::addr::MemberId;
use crate::layout::{Layout, Page};
use std::collections::VecDeque;
use std::sync::Arc;

/// What happens to a member. Times are nanoseconds of any clock that does not step back.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event<D> {
    /// A thread of this member touched a page without the right to and waits.
    Fault {
        /// The page.
        page: Page,
        /// Whether it wants to write.
        write: bool,
    },
    /// The page was lost while it was in use, and a page that is used together with it has just been asked for.
    Ahead {
        /// The page.
        page: Page,
    },
    /// A thread of this member will very likely touch the page soon.
    Hint {
        /// The page.
        page: Page,
        /// Whether it will write.
        write: bool,
        /// Whether the home may not decline.
        insist: bool,
    },
    /// Whether all threads of this member that use the memory rest. While they do, nothing is held longer than the
    /// shortest hold.
    Rest {
        /// They rest.
        resting: bool,
    },
    /// A thread of this member is about to wait for something that another member does: no long holds for a while.
    Soften,
    /// This member has just lost a contended page whose hold was over: the others whose hold is over go, too.
    Yield,
    /// This member wants its memory back: the page is to go to its home, or the copy to be dropped. A wish: a page that
    /// is under way, or that has nowhere to go, stays.
    Evict {
        /// The page.
        page: Page,
    },
    /// The members have agreed on their time slots, or corrected a clock.
    Slots(Slots),
    /// A page whose contents are still in the image is to be brought in, before anybody needs it.
    Load {
        /// The page.
        page: Page,
    },
    /// A message arrived.
    Message {
        /// Its sender.
        from: MemberId,
        /// The page it is about.
        page: Page,
        /// The message.
        msg: Msg<D>,
    },
    /// The time that a [`Command::Timer`] asked for has come.
    Timer {
        /// The page.
        page: Page,
    },
}

impl<D> Event<D> {
    /// The event without the bytes of its page.
    pub(crate) fn without_bytes(&self) -> Event<()> {
        match self {
            Event::Fault { page, write } => Event::Fault { page: *page, write: *write },
            Event::Hint { page, write, insist } => {
                Event::Hint { page: *page, write: *write, insist: *insist }
            }
            Event::Ahead { page } => Event::Ahead { page: *page },
            Event::Rest { resting } => Event::Rest { resting: *resting },
            Event::Soften => Event::Soften,
            Event::Evict { page } => Event::Evict { page: *page },
            Event::Yield => Event::Yield,
            Event::Slots(slots) => Event::Slots(*slots),
            Event::Load { page } => Event::Load { page: *page },
            Event::Message { from, page, msg } => {
                Event::Message { from: *from, page: *page, msg: msg.without_bytes() }
            }
            Event::Timer { page } => Event::Timer { page: *page },
        }
    }
}

/// What the shell around the core must do, in this order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Command<D> {
    /// Send a message.
    Send {
        /// To whom.
        to: MemberId,
        /// The page it is about.
        page: Page,
        /// The message.
        msg: Msg<D>,
    },
    /// Grant the page with its contents: write-protect it if `protect`, then read it, then drop it if `drop`, then
    /// send it (as [`Contents::Zero`] if it is all zero).
    Give {
        /// To whom.
        to: MemberId,
        /// The page.
        page: Page,
        /// The terms of the grant.
        terms: Terms,
        /// Whether the page is writable here.
        protect: bool,
        /// Whether this member loses the page.
        drop: bool,
    },
    /// Drop the page.
    Drop {
        /// The page.
        page: Page,
    },
    /// Put the contents in place with this right, in one step, and wake all who wait for the page. With
    /// [`Contents::Keep`] the copy that is there becomes writable.
    Install {
        /// The page.
        page: Page,
        /// The right.
        right: Right,
        /// The contents.
        contents: Contents<D>,
        /// The fault that this ends.
        served: Served,
    },
    /// Put zero pages in place, writable, and wake all who wait for them.
    Zero {
        /// The first page.
        page: Page,
        /// Number of pages.
        count: u32,
        /// The fault that this ends.
        served: Served,
    },
    /// Put the contents of the page in place that the image has, write-protected if `protect`, and wake all who wait for
    /// the page if `wake`.
    Load {
        /// The page.
        page: Page,
        /// It stays as it was saved.
        protect: bool,
        /// Somebody may wait.
        wake: bool,
    },
    /// End the write protection of a page that was saved, and wake all who wait to write to it.
    Reopen {
        /// The page.
        page: Page,
    },
    /// Wake all who wait for the page: it is there.
    Wake {
        /// The page.
        page: Page,
    },
    /// Deliver [`Event::Timer`] at this time.
    Timer {
        /// The page.
        page: Page,
        /// When, in the time of the events.
        at: u64,
    },
}

/// Commands under construction. What a member says to itself goes round here.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Effects<D> {
    me: MemberId,
    commands: Vec<Command<D>>,
    to_self: VecDeque<(Page, Msg<D>)>,
}

impl<D> Effects<D> {
    pub(super) fn push(&mut self, command: Command<D>) {
        self.commands.push(command);
    }

    pub(super) fn send(&mut self, to: MemberId, page: Page, msg: Msg<D>) {
        if to == self.me {
            self.to_self.push_back((page, msg));
        } else {
            self.commands.push(Command::Send { to, page, msg });
        }
    }
}

/// What a core needs to know.
#[derive(Clone, Debug)]
pub struct CoreConfig {
    /// This member.
    pub me: MemberId,
    /// The memory.
    pub layout: Arc<Layout>,
    /// The pages this core is responsible for.
    pub share: Share,
    /// Hold times.
    pub hold: HoldConfig,
    /// Secret from which request tokens are made; 0 makes them count up, for tests.
    pub token_key: u64,
    /// How many untouched neighbours a fault on an untouched page homed here brings along, itself included.
    pub first_touch: u32,
}

/// A member's protocol for its share of the pages.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Core<D> {
    pub(super) me: MemberId,
    pub(super) layout: Arc<Layout>,
    /// Nothing begins by itself: see [`super::homes`].
    pub(super) frozen: bool,
    share: Share,
    first_touch: u32,
    pub(super) cache: Cache<D>,
    pub(super) directory: Directory,
    fx: Effects<D>,
}

impl<D> Core<D> {
    /// A member that has no page, in a memory that nobody has touched.
    pub fn new(cfg: CoreConfig) -> Core<D> {
        let CoreConfig { me, layout, share, hold, token_key, first_touch } = cfg;
        let pages = layout.pages();
        Core {
            me,
            share,
            first_touch,
            cache: Cache::new(me, share, pages, Hold::new(&hold), token_key),
            directory: Directory::new(me, share, pages),
            layout,
            frozen: false,
            fx: Effects { me, commands: Vec::new(), to_self: VecDeque::new() },
        }
    }

    /// The pages this member has.
    pub fn cache(&self) -> &Cache<D> {
        &self.cache
    }

    /// The pages this member is home of.
    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    /// Takes an event and appends what is to be done to `out`. After a violation the core's state is not to be
    /// used again.
    pub fn handle(&mut self, now: u64, event: Event<D>, out: &mut Vec<Command<D>>) -> Result<(), Violation> {
        std::mem::swap(out, &mut self.fx.commands);
        let result = self.dispatch(now, event);
        std::mem::swap(out, &mut self.fx.commands);
        result
    }

    fn dispatch(&mut self, now: u64, event: Event<D>) -> Result<(), Violation> {
        match event {
            Event::Fault { page, write } => {
                let Some(home) = self.home(page) else { return Ok(()) };
                if !self.claim(now, page, write, home) {
                    self.cache.fault(now, page, write, home, &mut self.fx);
                }
            }
            Event::Hint { .. } | Event::Ahead { .. } | Event::Evict { .. } if self.frozen => {}
            Event::Hint { page, write, insist } => {
                let Some(home) = self.home(page) else { return Ok(()) };
                let reason = Reason { write, ahead: true, hint: !insist };
                self.cache.hint(now, page, reason, home, &mut self.fx);
            }
            Event::Ahead { page } => {
                let Some(home) = self.home(page) else { return Ok(()) };
                self.cache.ahead(now, page, home, &mut self.fx);
            }
            Event::Rest { resting } => {
                let layout = &self.layout;
                self.cache.rest(now, resting, |page| layout.home_of(page), &mut self.fx);
            }
            Event::Soften => {
                let layout = &self.layout;
                self.cache.soften(now, |page| layout.home_of(page), &mut self.fx);
            }
            Event::Yield => {
                let layout = &self.layout;
                self.cache.yield_contended(now, |page| layout.home_of(page), &mut self.fx);
            }
            Event::Evict { page } => {
                let Some(home) = self.home(page) else { return Ok(()) };
                self.cache.evict(now, page, home, &mut self.fx);
            }
            Event::Slots(slots) => self.cache.set_slots(slots),
            Event::Load { page } => {
                self.cache.load(page, false, false, &mut self.fx);
            }
            Event::Timer { page } => {
                let Some(home) = self.home(page) else { return Ok(()) };
                self.cache.timer(now, page, home, &mut self.fx);
            }
            Event::Message { from, page, msg } => {
                self.message(now, from, page, msg)?;
            }
        }
        while let Some((page, msg)) = self.fx.to_self.pop_front() {
            self.message(now, self.me, page, msg)?;
        }
        self.cache.settle();
        Ok(())
    }

    pub(super) fn home(&self, page: Page) -> Option<MemberId> {
        self.layout.home_of(page).filter(|_| self.share.has(page))
    }

    fn message(&mut self, now: u64, from: MemberId, page: Page, msg: Msg<D>) -> Result<(), Violation> {
        let blame = |what| Violation { from, page, what };
        let home = self.home(page).ok_or(blame("spoke of a page that is not there"))?;
        let fx = &mut self.fx;
        let result = match msg {
            Msg::Get { .. } | Msg::Done { .. } | Msg::Put { .. } if home != self.me => {
                Err("took this member for the home of the page")
            }
            Msg::Forward { .. } | Msg::Invalidate { .. } | Msg::Release { .. } | Msg::Awaited { .. }
                if home != from =>
            {
                Err("spoke for a home that it is not")
            }
            Msg::Get { write, token, hint } => {
                let request = Request { from, write, token, hint };
                return self.directory.get(page, request, fx).map_err(|b| b.on(page));
            }
            Msg::Done { token } => {
                return self.directory.done(page, from, token, fx).map_err(|b| b.on(page));
            }
            Msg::Put { .. } if self.frozen => Ok(()),
            Msg::Put { token } => {
                if self.directory.put(page, from, token, fx) {
                    // The last copy comes home as any page does.
                    self.cache.ahead(now, page, home, fx);
                }
                Ok(())
            }
            Msg::Release { token } => self.cache.release(page, token, home, fx),
            Msg::Forward { requester, terms, data } => {
                self.cache.demand(now, page, Demand::Give { requester, terms, data }, home, fx)
            }
            Msg::Invalidate { requester, token } => {
                self.cache.demand(now, page, Demand::Drop { requester, token }, home, fx)
            }
            Msg::Awaited { requester, patient } => {
                self.cache.awaited(now, page, requester, patient, home, fx);
                Ok(())
            }
            Msg::Decline { token } => self.cache.declined(now, page, from, token, home, fx),
            Msg::Grant { terms, contents } => self.cache.grant(now, page, from, terms, contents, home, fx),
            Msg::InvAck { token } => self.cache.inv_ack(now, page, from, token, home, fx),
        };
        result.map_err(blame)
    }

    /// Whether [`Event::Evict`] would make a page go: `Some(true)` for one of several copies, `Some(false)` for the last.
    pub fn can_evict(&self, now: u64, page: Page) -> Option<bool> {
        let home = self.home(page)?;
        let holders = (home == self.me).then(|| self.directory.holders(page));
        match (self.cache.evictable(now, page)?, holders) {
            (State::Modified, Some(_)) | (_, Some(Holders::Untouched | Holders::Modified { .. })) => None,
            (_, Some(Holders::Shared { sharers, .. })) => {
                (!sharers.without(self.me).is_empty() && !self.directory.is_busy(page)).then_some(true)
            }
            (state, None) => Some(state == State::Shared),
        }
    }

    /// Whether a page is homed here and nobody has it or is about to.
    fn is_unclaimed(&self, page: Page) -> bool {
        self.home(page) == Some(self.me)
            && self.directory.holders(page) == Holders::Untouched
            && !self.directory.is_busy(page)
            && !self.cache.is_pending(page)
            && self.cache.state(page) == State::Invalid
    }

    fn take(&mut self, page: Page) {
        self.directory.set(page, Holders::Modified { owner: self.me });
        self.cache.set(page, State::Modified);
    }

    /// First touch of a page homed here: no message at all, and untouched neighbours come along.
    fn claim(&mut self, now: u64, page: Page, write: bool, home: MemberId) -> bool {
        if home != self.me || !self.is_unclaimed(page) {
            return false;
        }
        let mut count = 0;
        while count < self.first_touch.max(1) {
            let Some(next) = self.neighbour(page, count).filter(|p| self.is_unclaimed(*p)) else { break };
            self.take(next);
            count += 1;
        }
        let want = if write { Want::Write } else { Want::Read };
        self.fx.push(Command::Zero {
            page,
            count,
            served: Served { want, remote: false, from: self.me, since: now, ahead: false },
        });
        true
    }

    /// Makes this member the owner of pages homed here that nobody has touched, for filling them before anybody can
    /// fault. The shell must put the contents in place, writable. Returns how many of the `count` pages from `page` on
    /// were of that kind without a gap; they are neighbours in address, too.
    pub fn preload(&mut self, page: Page, count: u32) -> u32 {
        let mut taken = 0;
        while taken < count {
            let Some(next) = self.neighbour(page, taken).filter(|p| self.is_unclaimed(*p)) else { break };
            self.take(next);
            taken += 1;
        }
        taken
    }

    /// The `n`th page behind `page`, if it is `n` pages behind it in address: a run of page numbers is a run of
    /// addresses only inside one range.
    fn neighbour(&self, page: Page, n: u32) -> Option<Page> {
        let next = Page(page.0.checked_add(n)?);
        let gpa = self.layout.gpa_of(page) + u64::from(n) * crate::addr::PAGE_SIZE;
        (self.layout.gpa_of(next) == gpa).then_some(next)
    }
}
