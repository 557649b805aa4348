//! Commands of one kind about neighbouring pages, carried out together: one write protection, one frame, one copy for all
//! of them, where page after page would take as many.
//!
//! The protocol knows nothing of it: it handles one page after the other, and its commands about each keep their order.
//! Those about different pages need none, so the first commands of all pages of a run are looked at first, then the second.

use super::{After, Env, PageBuf, Shard, is_zero};
use crate::layout::{Layout, Page};
use crate::node::PAGE;
use crate::protocol::pages::BLOCK;
use crate::protocol::{Command, Contents, Msg, Right};
use crate::region::{Kernel, RegionError, Wake};
use crate::seeded::{SeededFault, is_on};
use crate::transport::frame::Header;
use crate::transport::link::Queue;
use crate::transport::run::is_alike;
use std::io;

type Commands<'a> = &'a [Command<PageBuf>];

/// Hands out the first command of every event, then the second of every event that has one, and so on. `ends` has the
/// end of each event's commands; every event is about a page of its own.
pub(super) fn in_turns<E>(
    commands: &mut Vec<Command<PageBuf>>,
    ends: &[usize],
    mut f: impl FnMut(Command<PageBuf>) -> Result<(), E>,
) -> Result<(), E> {
    let most = ends.iter().fold((0, 0), |(most, start), end| (most.max(end - start), *end)).0;
    if ends.len() <= 1 || most == 1 {
        return commands.drain(..).try_for_each(f);
    }
    for turn in 0..most {
        let mut start = 0;
        for end in ends {
            if let Some(slot) = commands.get_mut(start..*end).and_then(|own| own.get_mut(turn)) {
                f(std::mem::replace(slot, Command::Wake { page: Page(0) }))?;
            }
            start = *end;
        }
    }
    Ok(())
}

/// Whether a frame may have both pages. One event can command something about pages all over the memory.
fn is_next(layout: &Layout, page: Page, next: Page) -> bool {
    page.0.checked_add(1) == Some(next.0) && page.0 / BLOCK == next.0 / BLOCK && layout.is_run(page, 2)
}

/// Whether two commands can be carried out as one.
pub(super) fn follows(layout: &Layout, last: &Command<PageBuf>, next: &Command<PageBuf>) -> bool {
    match (last, next) {
        (Command::Send { to, page, msg }, Command::Send { to: to_2, page: page_2, msg: msg_2 }) => {
            to == to_2
                && is_next(layout, *page, *page_2)
                && is_alike(&msg.without_bytes(), &msg_2.without_bytes())
        }
        (
            Command::Give { to, page, terms, protect, drop },
            Command::Give { to: to_2, page: page_2, terms: terms_2, protect: protect_2, drop: drop_2 },
        ) => {
            let grant = |terms| Msg::Grant { terms, contents: Contents::Zero };
            to == to_2
                && is_next(layout, *page, *page_2)
                && (protect, drop) == (protect_2, drop_2)
                && is_alike(&grant(*terms), &grant(*terms_2))
        }
        (
            Command::Install { page, right, contents, .. },
            Command::Install { page: page_2, right: right_2, contents: contents_2, .. },
        ) => {
            let is_alike = match (contents, contents_2) {
                (Contents::Zero, Contents::Zero) => true,
                (Contents::Bytes(PageBuf::Nth(n)), Contents::Bytes(PageBuf::Nth(n_2))) => n + 1 == *n_2,
                _ => false,
            };
            right == right_2 && is_next(layout, *page, *page_2) && is_alike
        }
        _ => false,
    }
}

/// The tokens of the messages, as they lie in a frame.
fn put_tokens(queue: &mut Queue, commands: Commands<'_>) {
    for command in commands {
        let token = match command {
            Command::Send { msg, .. } => msg.token(),
            Command::Give { terms, .. } => terms.token,
            _ => continue,
        };
        queue.bytes().extend_from_slice(&token.0.to_le_bytes());
    }
}

fn count_of(commands: Commands<'_>) -> u32 {
    u32::try_from(commands.len()).unwrap_or(u32::MAX)
}

impl Shard {
    /// Carries out commands that [follow](follows) each other, two at least. `bytes` has the pages that came.
    pub(super) fn carry_out_run(
        &mut self,
        env: &impl Env,
        commands: Commands<'_>,
        bytes: &[u8],
        after: &mut After,
    ) -> Result<(), RegionError> {
        match commands.first() {
            Some(Command::Send { to, page, msg }) => {
                let msg = msg.without_bytes();
                commands.iter().for_each(|_| self.stats.sent(&msg));
                let gpa = env.layout().gpa_of(*page);
                let header = Header::run(env.me(), env.epoch(), gpa, &msg, count_of(commands));
                let is_known = env.push_with(*to, |queue| {
                    let at = queue.begin();
                    put_tokens(queue, commands);
                    queue.finish(at, header);
                    Ok(())
                })?;
                if is_known {
                    after.talk = after.talk.with(*to);
                }
                Ok(())
            }
            Some(Command::Give { .. }) => self.give_run(env, commands, after),
            _ => self.install_run(env, commands, bytes, after),
        }
    }

    fn give_run(
        &mut self,
        env: &impl Env,
        commands: Commands<'_>,
        after: &mut After,
    ) -> Result<(), RegionError> {
        let Some(Command::Give { to, page: first, protect, drop, .. }) = commands.first() else {
            return Ok(());
        };
        let (kernel, count) = (env.kernel(), count_of(commands));
        if *protect && !is_on(SeededFault::ReadBeforeProtect) {
            kernel.protect(*first, count)?;
        }
        let is_known = env.push_with(*to, |queue| {
            let mut grants = Grants { env, commands, begun: None };
            for (n, page) in (first.0..).map(Page).enumerate().take(commands.len()) {
                let is_zero = grants.add(queue, n, |room| kernel.read(page, room))?;
                self.stats.gave(page, is_zero);
            }
            grants.end(queue, commands.len());
            if *protect && is_on(SeededFault::ReadBeforeProtect) {
                kernel.protect(*first, count)?;
            }
            if *drop {
                kernel.discard(*first, count)?;
                self.budget.add(-i64::from(count));
            }
            Ok(())
        })?;
        if is_known {
            after.talk = after.talk.with(*to);
        }
        if *drop {
            let gone = (first.0..first.0.saturating_add(count)).map(Page);
            after.lost.extend(gone.filter(|page| self.core.cache().is_contended(*page)));
        }
        Ok(())
    }

    fn install_run(
        &mut self,
        env: &impl Env,
        commands: Commands<'_>,
        bytes: &[u8],
        after: &mut After,
    ) -> Result<(), RegionError> {
        let Some(Command::Install { page: first, right, contents, .. }) = commands.first() else {
            return Ok(());
        };
        let (kernel, count) = (env.kernel(), count_of(commands));
        let replaced = kernel.replaced();
        let protect = *right == Right::Shared;
        self.budget.add(i64::from(count));
        match contents {
            Contents::Bytes(PageBuf::Nth(n)) => {
                let at = usize::try_from(*n).unwrap_or(usize::MAX).saturating_mul(PAGE);
                let pages = bytes.get(at..).and_then(|rest| rest.get(..commands.len() * PAGE));
                let lacking = || kernel.step("fill", *first, io::ErrorKind::InvalidInput.into());
                kernel.fill(*first, pages.ok_or_else(lacking)?, protect, Wake::Later)?;
            }
            _ => kernel.fill_zero(*first, count, protect, Wake::Later)?,
        }
        after.has_come = true;
        let is_wake_forgotten = is_on(SeededFault::ForgottenWake) && replaced != kernel.replaced();
        let now = env.now();
        for command in commands {
            if let Command::Install { page, served, .. } = command {
                self.stats.served(*page, served, now);
                if !served.ahead && !is_wake_forgotten {
                    after.wake_later(*page, 1);
                }
            }
        }
        Ok(())
    }
}

/// Frames with the pages of a run that is given away: a new one where pages that are all zero, which are not sent, begin or
/// end.
struct Grants<'a, E> {
    env: &'a E,
    commands: Commands<'a>,
    /// The frame that has been begun: where it lies, its first page, and whether its pages are zero.
    begun: Option<(usize, usize, bool)>,
}

impl<E: Env> Grants<'_, E> {
    /// Adds the page of the `n`th command, which `read` appends. Says whether it is all zero.
    fn add(
        &mut self,
        queue: &mut Queue,
        n: usize,
        read: impl FnOnce(&mut Vec<u8>) -> Result<(), RegionError>,
    ) -> Result<bool, RegionError> {
        let (at, ..) = *self.begun.get_or_insert_with(|| (queue.begin(), n, false));
        let start = queue.bytes().len();
        read(queue.bytes())?;
        let is_zero = queue.bytes().get(start..).is_some_and(is_zero);
        if is_zero {
            queue.bytes().truncate(start);
        }
        match self.begun {
            Some((_, first, was_zero)) if first < n && was_zero != is_zero => {
                let page = queue.bytes().split_off(start);
                self.end(queue, n);
                self.begun = Some((queue.begin(), n, is_zero));
                queue.bytes().extend_from_slice(&page);
            }
            Some((_, first, _)) => self.begun = Some((at, first, is_zero)),
            None => {}
        }
        Ok(is_zero)
    }

    /// Ends the frame before the page of the `n`th command.
    fn end(&mut self, queue: &mut Queue, n: usize) {
        let Some((at, first, is_zero)) = self.begun.take() else { return };
        let commands = self.commands.get(first..n).unwrap_or(&[]);
        let Some(Command::Give { page, terms, .. }) = commands.first() else { return };
        let contents = if is_zero { Contents::Zero } else { Contents::Bytes(()) };
        let msg = Msg::Grant { terms: *terms, contents };
        let (me, epoch, gpa) = (self.env.me(), self.env.epoch(), self.env.layout().gpa_of(*page));
        let header = if commands.len() == 1 {
            Header::message(me, epoch, gpa, &msg)
        } else {
            put_tokens(queue, commands);
            Header::run(me, epoch, gpa, &msg, count_of(commands))
        };
        queue.finish(at, header);
    }
}

#[cfg(test)]
mod tests;
