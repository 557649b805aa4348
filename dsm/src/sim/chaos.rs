//! What the world does to the members, and what must be true of them at rest.

use super::member::Member;
use super::plan::{Chaos, Forgery, US};
use super::rehome;
use super::sched::Event;
use super::world::{EPOCH, MustFail, World, new_reader};
use crate::addr::{Epoch, MemberId};
use crate::layout::Page;
use crate::protocol::cache::State;
use crate::protocol::directory::Holders;
use crate::protocol::{Contents, MemberSet, Msg, Right, Terms, Token};
use crate::transport::frame::Header;

/// The n-th thing of the plan happens.
pub(super) fn happen(world: &World, n: usize) {
    let Some((_, chaos)) = world.plan.chaos.get(n).copied() else { return };
    world.trace(None, None, || format!("{chaos:?}"));
    match chaos {
        Chaos::Stall { from, to, until } => {
            if let Some(peer) = world.member(to).and_then(|m| m.peer(from)) {
                peer.incoming.stall(until);
            }
        }
        Chaos::Stop { member, until } => {
            if let Some(member) = world.member(member) {
                member.stopped_until.set(until);
            }
        }
        Chaos::Slow { member, factor } => {
            if let Some(member) = world.member(member) {
                member.slowness.set(factor);
            }
        }
        Chaos::Blip { a, b, until } => {
            for (from, to) in [(a, b), (b, a)] {
                if let Some(peer) = world.member(to).and_then(|m| m.peer(from)) {
                    peer.blips.set(peer.blips.get() + 1);
                    peer.incoming.close(true);
                }
            }
            world.sched.at(until, Event::Heal { a, b });
        }
        // The locks that it needs are taken.
        Chaos::Rehome | Chaos::PushOut { .. } if world.members.iter().any(|m| m.is_busy.get()) => {
            world.sched.after(US, Event::Chaos(n));
        }
        Chaos::Rehome => rehome::begin(world),
        Chaos::PushOut { member } => {
            if let Some(member) = world.member(member) {
                rehome::push_out(world, member);
            }
        }
        Chaos::Crash { member, broken } => crash(world, member, broken),
        Chaos::Cut { a, b, broken } => {
            must_fail(world, a, b, "");
            must_fail(world, b, a, "");
            close(world, a, b, broken);
            close(world, b, a, broken);
        }
        Chaos::Forge { from, .. } if world.member(from).is_some_and(|m| m.is_queueing.get()) => {
            world.sched.after(US, Event::Chaos(n));
        }
        Chaos::Forge { from, to, what } => forge(world, from, to, what),
    }
}

/// Two members connect again, unless they broke up again meanwhile, or for good.
pub(super) fn heal(world: &World, a: u16, b: u16) {
    let ends = |me: u16, other: u16| {
        let member = world.member(me)?;
        Some((member, member.peer(other)?))
    };
    let (Some((one, to_b)), Some((other, to_a))) = (ends(a, b), ends(b, a)) else { return };
    for peer in [to_a, to_b] {
        peer.blips.set(peer.blips.get().saturating_sub(1));
    }
    if to_a.blips.get() > 0 {
        return;
    }
    // Only after a cut must both blame each other.
    let must = |x, y| world.must_fail.borrow().iter().any(|m| (m.member, m.blames) == (x, y));
    if one.is_dead.get() || other.is_dead.get() || (must(a, b) && must(b, a)) {
        to_a.incoming.close(true);
        to_b.incoming.close(true);
        return;
    }
    if !one.is_running() || !other.is_running() {
        // Who has failed connects no more; the other would take it for dead in the end.
        to_a.blips.set(1);
        to_b.blips.set(1);
        return;
    }
    world.trace(None, None, || format!("{a} and {b} connect again"));
    world.count(|t| t.resumed += 1);
    for (me, peer, theirs) in [(a, to_b, to_a), (b, to_a, to_b)] {
        // What this one sends comes in at the other.
        theirs.incoming.reopen();
        *theirs.reader.borrow_mut() = new_reader(&theirs.incoming);
        let result = peer.link.resume(theirs.incoming.clone(), theirs.link.received(), world.sched.now());
        world.expect(None, result.map_err(|e| format!("member {me} can't resume: {e}")));
        world.flushed_soon(me, if me == a { b } else { a });
    }
}

fn must_fail(world: &World, member: u16, blames: u16, word: &'static str) {
    world.must_fail.borrow_mut().push(MustFail { member, blames, word });
}

fn close(world: &World, from: u16, to: u16, broken: bool) {
    if let Some(peer) = world.member(to).and_then(|m| m.peer(from)) {
        peer.incoming.close(broken);
    }
}

fn crash(world: &World, number: u16, broken: bool) {
    let Some(member) = world.member(number) else { return };
    member.is_dead.set(true);
    for other in world.members.iter().filter(|m| m.number != number) {
        must_fail(world, other.number, number, "");
        close(world, number, other.number, broken);
        close(world, other.number, number, true);
    }
    for page in (0..world.layout.pages()).map(Page) {
        let result = world.truth.borrow_mut().set_right(number, page, false, false);
        world.expect(Some(page), result);
    }
}

/// A page whose home is, or is not, `member`; any page if there is none.
fn page_of(world: &World, member: u16, is_home: bool) -> Option<Page> {
    let home = |p: &Page| (world.homes.borrow().home_of(*p) == Some(MemberId(member))) == is_home;
    (0..world.layout.pages()).map(Page).find(home)
}

/// `from` sends `to` a frame that must be refused, whatever the state of the two.
fn forge(world: &World, from: u16, to: u16, what: Forgery) {
    let Some(peer) = world.member(from).and_then(|m| m.peer(to)) else { return };
    let token = Token(world.sched.rng.next());
    let terms = Terms { token, right: Right::Modified, acks: MemberSet::EMPTY, done: true };
    let requester = MemberId(from);
    let (me, epoch, stale) = (MemberId(from), EPOCH, Epoch(EPOCH.0 - 1));
    let homed = page_of(world, to, true);
    let foreign = page_of(world, from, false);
    let any = Page(0);
    let message = |me, epoch, page: Page, msg: Msg<()>| {
        Some(Header::message(me, epoch, world.layout.gpa_of(page), &msg))
    };
    let get = Msg::Get { write: true, token, hint: false };
    let header = match what {
        Forgery::StaleGet => message(me, stale, homed.unwrap_or(any), get),
        Forgery::StaleAck => message(me, stale, any, Msg::InvAck { token }),
        Forgery::Done => message(me, epoch, homed.unwrap_or(any), Msg::Done { token }),
        Forgery::Ack => message(me, epoch, any, Msg::InvAck { token }),
        Forgery::Grant => message(me, epoch, any, Msg::Grant { terms, contents: Contents::Zero }),
        Forgery::Invalidate => {
            foreign.and_then(|p| message(me, epoch, p, Msg::Invalidate { requester, token }))
        }
        Forgery::Forward => {
            foreign.and_then(|p| message(me, epoch, p, Msg::Forward { requester, terms, data: true }))
        }
        Forgery::Sender => message(MemberId(to), epoch, homed.unwrap_or(any), get),
        Forgery::Run => {
            must_fail(world, to, from, "");
            let msg = Msg::Grant { terms, contents: Contents::Zero };
            let header = Header::run(me, epoch, world.layout.gpa_of(any), &msg, 2);
            let pushed = peer.link.push_with(|queue| {
                let at = queue.begin();
                (0..2).for_each(|n| queue.bytes().extend_from_slice(&(token.0 ^ n).to_le_bytes()));
                queue.finish(at, header);
                Ok::<(), std::convert::Infallible>(())
            });
            world.trace_sent(from, to, &header);
            world.flushed_soon(from, to);
            return world.expect(None, pushed.map_err(|e| e.to_string()));
        }
        Forgery::Home => page_of(world, to, false).and_then(|p| message(me, epoch, p, get)),
    };
    if let Some(header) = header {
        let is_stale = matches!(what, Forgery::StaleGet | Forgery::StaleAck);
        must_fail(world, to, from, if is_stale { "epoch" } else { "" });
        world.trace_sent(from, to, &header);
        peer.link.push(&header);
        world.flushed_soon(from, to);
    }
}

/// At rest nobody waits, nothing is in flight, and the directory says what the memories hold.
pub(super) fn agree(world: &World) -> Result<(), String> {
    for page in (0..world.layout.pages()).map(Page) {
        let home = world.homes.borrow().home_of(page);
        let Some(home) = home.and_then(|h| world.member(h.0)) else { continue };
        let shard = home.engine.shard(page);
        if shard.core.directory().is_busy(page) {
            return Err(format!("the transaction of page {} never ends", page.0));
        }
        let holders = shard.core.directory().holders(page);
        drop(shard);
        for member in &world.members {
            check_member(member, page, holders)?;
        }
    }
    let in_flight =
        world.members.iter().flat_map(|m| m.peers.iter().flatten()).find(|p| !p.incoming.is_empty());
    in_flight.map_or(Ok(()), |p| Err(format!("bytes from {} are never read", p.link.peer())))
}

fn check_member(member: &Member, page: Page, holders: Holders) -> Result<(), String> {
    let me = MemberId(member.number);
    let due = match holders {
        Holders::Modified { owner } if owner == me => State::Modified,
        Holders::Shared { sharers, .. } if sharers.has(me) => State::Shared,
        _ => State::Invalid,
    };
    let memory = member.memory.borrow();
    let held = match memory.copy(page) {
        None => State::Invalid,
        Some(copy) if copy.writable => State::Modified,
        Some(_) => State::Shared,
    };
    let shard = member.engine.shard(page);
    let cache = shard.core.cache();
    if cache.is_pending(page) {
        return Err(format!("{me} waits for page {} for ever", page.0));
    }
    let known = cache.state(page);
    if (due, due) != (held, known) {
        return Err(format!(
            "page {} is {due:?} at {me} says its home, {known:?} says {me}, and its memory has it {held:?}",
            page.0
        ));
    }
    Ok(())
}
