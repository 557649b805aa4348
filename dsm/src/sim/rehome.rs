//! Homes change while the memory is in use: everybody stops, nothing is under way, the new homes are told, each member takes
//! the new table in its own time, everybody goes on. What the coordinator of a VM does, with chance instead of orders.

use super::member::Member;
use super::plan::{MS, US};
use super::sched::Event;
use super::world::World;
use crate::addr::{Epoch, HomeRange, MemberId, PAGE_SIZE};
use crate::layout::{Layout, Page};
use crate::protocol::pages::BLOCK;
use std::cell::{Cell, RefCell};
use std::sync::Arc;

/// Between two looks whether all is quiet.
const LOOK: u64 = 20 * US;
/// Runs that one message to a new home names.
const MOST: usize = 2;

/// How far a change is.
#[derive(Debug, Default)]
pub(super) struct Rehoming {
    /// The threads of the workload stand still; their steps wait here.
    pub(super) is_on: Cell<bool>,
    pub(super) parked: RefCell<Vec<Event>>,
    next: RefCell<Option<Arc<Layout>>>,
    /// Members that still have to take the new table.
    missing: Cell<u16>,
}

/// Somebody wants other homes; one change at a time.
pub(super) fn begin(world: &World) {
    if world.plan.fatal().is_some() || world.rehoming.is_on.replace(true) {
        return;
    }
    world.members.iter().for_each(|m| m.engine.freeze(true));
    world.sched.after(LOOK, Event::Rehome);
}

fn is_quiet(member: &Member) -> bool {
    let is_over = !member.is_watching.get() && !member.is_busy.get() && member.memory.borrow().is_idle();
    is_over && member.engine.is_quiet()
}

/// Another look; when all is quiet the new homes are told.
pub(super) fn look(world: &World) {
    if !world.members.iter().all(is_quiet) {
        return world.sched.after(LOOK, Event::Rehome);
    }
    let layout = Arc::new(other_homes(world));
    for heir in &world.members {
        let pages = (0..layout.pages()).map(Page);
        let ranges: Vec<(u64, u64)> = pages
            .filter(|p| layout.home_of(*p) == Some(MemberId(heir.number)))
            .map(|p| (layout.gpa_of(p), PAGE_SIZE))
            .collect();
        heir.engine.forget(&layout, &ranges);
        for old in world.members.iter().filter(|m| m.number != heir.number) {
            tell(world, old, heir, &layout);
        }
    }
    world.trace(None, None, || format!("new homes: {:?}", layout.ranges().collect::<Vec<_>>()));
    *world.rehoming.next.borrow_mut() = Some(layout);
    world.rehoming.missing.set(world.plan.members);
    for member in 0..world.plan.members {
        world.sched.after(world.sched.rng.skewed(MS), Event::Switch { member });
    }
}

fn tell(world: &World, old: &Member, heir: &Member, layout: &Layout) {
    let mut from = Some(Page(0));
    while let Some(first) = from {
        let (runs, next) = old.engine.entries(layout, first, MOST);
        for mut run in runs {
            for _ in 0..std::mem::replace(&mut run.pages, 1) {
                let page = layout.page_at(run.start).unwrap_or(Page(0));
                if layout.home_of(page) == Some(MemberId(heir.number)) {
                    let told = heir.engine.inherit(layout, &[run], world.set);
                    world.expect(Some(page), told.map_err(|e| e.to_string()));
                }
                run.start += PAGE_SIZE;
            }
        }
        from = next;
    }
}

/// A member takes the new table. After the last one all go on.
pub(super) fn switch(world: &World, member: &Member) {
    let Some(layout) = world.rehoming.next.borrow().clone() else { return };
    world.expect(None, member.engine.rehome(&layout).map_err(|e| format!("member {}: {e}", member.number)));
    member.epoch.set(Epoch(member.epoch.get().0 + 1));
    world.rehoming.missing.set(world.rehoming.missing.get() - 1);
    if world.rehoming.missing.get() > 0 {
        return;
    }
    *world.homes.borrow_mut() = layout;
    world.rehoming.next.borrow_mut().take();
    world.members.iter().for_each(|m| m.engine.freeze(false));
    world.rehoming.is_on.set(false);
    world.count(|t| t.rehomed += 1);
    for event in world.rehoming.parked.borrow_mut().drain(..) {
        world.sched.after(world.sched.rng.skewed(world.plan.step), event);
    }
}

/// Every page has its home anywhere, or one member has none any more.
fn other_homes(world: &World) -> Layout {
    let rng = &world.sched.rng;
    let gone = rng.chance(500).then(|| rng.member(world.plan.members));
    let old = world.homes.borrow().clone();
    let pages = (0..old.pages()).map(Page);
    let memory: Vec<HomeRange> = pages
        .map(|page| {
            let home = old.home_of(page).unwrap_or(MemberId(0));
            let is_to_move = gone.map_or(rng.chance(500), |gone| MemberId(gone) == home);
            let home = if is_to_move { MemberId(rng.member(world.plan.members)) } else { home };
            HomeRange { start: old.gpa_of(page), len: PAGE_SIZE, home }
        })
        .collect();
    Layout::new(&memory).unwrap_or_else(|_| (*old).clone())
}

/// A member wants to be rid of all that it has, whatever its threads do.
pub(super) fn push_out(world: &World, member: &Member) {
    let place = super::member::Place { world, member };
    for first in (0..world.layout.pages()).step_by(BLOCK as usize) {
        member.engine.push_out(&place, world.sched.now(), Page(first));
    }
}
