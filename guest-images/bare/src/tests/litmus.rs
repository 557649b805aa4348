//! `litmus`: x86-TSO shapes over two words on two pages (SDM vol. 3, 9.2; Owens, Sarkar, Sewell: x86-TSO). Two CPUs,
//! 0 and `peer=` (the last), run `iterations=` times each shape, in batches of `batch=` slots between two barriers;
//! IRIW needs four. Store buffering without a fence may show its relaxed outcome: it is counted, not judged.

use crate::console::Line;
use crate::env::{Env, Failure, Page, bad};
use crate::{machine, smp};
use bare_support::cast::index;
use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering, compiler_fence};

/// What a role does to its slot: words x and y; up to two registers come back.
type Role = fn(&AtomicU64, &AtomicU64) -> (u64, u64);

struct Shape {
    name: &'static str,
    roles: &'static [Role],
    /// Over the registers of all roles and the final x and y.
    relaxed: fn(&[(u64, u64); 4], u64, u64) -> bool,
    forbidden: bool,
}

// Plain MOVs, in program order: relaxed accesses with fences that only the compiler sees.
fn st(word: &AtomicU64, value: u64) {
    word.store(value, Ordering::Relaxed);
    compiler_fence(Ordering::SeqCst);
}

fn ld(word: &AtomicU64) -> u64 {
    let value = word.load(Ordering::Relaxed);
    compiler_fence(Ordering::SeqCst);
    value
}

fn mfence() {
    // SAFETY: orders memory, changes nothing.
    unsafe { asm!("mfence", options(nostack, preserves_flags)) };
}

fn store_fence_load(a: &AtomicU64, b: &AtomicU64) -> (u64, u64) {
    st(a, 1);
    mfence();
    (ld(b), 0)
}

fn swap_load(a: &AtomicU64, b: &AtomicU64) -> (u64, u64) {
    a.swap(1, Ordering::SeqCst);
    (ld(b), 0)
}

fn store_load(a: &AtomicU64, b: &AtomicU64) -> (u64, u64) {
    st(a, 1);
    (ld(b), 0)
}

fn load_store(a: &AtomicU64, b: &AtomicU64) -> (u64, u64) {
    let r = ld(a);
    st(b, 1);
    (r, 0)
}

fn store_one_two(a: &AtomicU64, b: &AtomicU64) -> (u64, u64) {
    st(a, 1);
    st(b, 2);
    (0, 0)
}

fn load_both(a: &AtomicU64, b: &AtomicU64) -> (u64, u64) {
    let first = ld(a);
    (first, ld(b))
}

fn store_one(a: &AtomicU64) -> (u64, u64) {
    st(a, 1);
    (0, 0)
}

const SHAPES: &[Shape] = &[
    Shape {
        name: "sb",
        roles: &[store_load, |x, y| store_load(y, x)],
        relaxed: |r, _, _| r[0].0 == 0 && r[1].0 == 0,
        forbidden: false,
    },
    Shape {
        name: "sb_mfence",
        roles: &[store_fence_load, |x, y| store_fence_load(y, x)],
        relaxed: |r, _, _| r[0].0 == 0 && r[1].0 == 0,
        forbidden: true,
    },
    Shape {
        name: "sb_locked",
        roles: &[swap_load, |x, y| swap_load(y, x)],
        relaxed: |r, _, _| r[0].0 == 0 && r[1].0 == 0,
        forbidden: true,
    },
    Shape {
        name: "mp",
        roles: &[store_one_two, |x, y| load_both(y, x)],
        relaxed: |r, _, _| r[1].0 == 2 && r[1].1 == 0,
        forbidden: true,
    },
    Shape {
        name: "lb",
        roles: &[load_store, |x, y| load_store(y, x)],
        relaxed: |r, _, _| r[0].0 == 1 && r[1].0 == 1,
        forbidden: true,
    },
    Shape {
        name: "corr",
        roles: &[|x, _| store_one(x), |x, _| load_both(x, x)],
        relaxed: |r, _, _| r[1] == (1, 0),
        forbidden: true,
    },
    Shape {
        name: "2+2w",
        roles: &[store_one_two, |x, y| store_one_two(y, x)],
        relaxed: |_, x, y| x == 1 && y == 1,
        forbidden: true,
    },
    Shape {
        name: "iriw",
        roles: &[|x, _| store_one(x), |_, y| store_one(y), load_both, |x, y| load_both(y, x)],
        relaxed: |r, _, _| r[2] == (1, 0) && r[3] == (1, 0),
        forbidden: true,
    },
];

/// Pages of the area: x, y, the barrier and the shape, then one page of registers per role.
const PAGES: u64 = 7;

struct Plan {
    iterations: u64,
    batch: u64,
    peer: usize,
}

fn plan(env: &Env) -> Result<Plan, Failure> {
    let last = (env.cpus - 1) as u64;
    let peer = env
        .number("peer", last, last)
        .map_err(|_| bad("litmus needs cpus=2 or more, and a peer= among them"))?;
    Ok(Plan {
        iterations: env.number("iterations", 10_000, 1 << 32)?,
        batch: env.number("batch", 16, 256)?,
        peer: index(peer),
    })
}

pub fn run(env: &Env, out: &mut Line) -> Result<bool, Failure> {
    let plan = plan(env)?;
    out.add("iterations", plan.iterations);
    let mut good = true;
    for (number, shape) in (0u64..).zip(SHAPES).filter(|(_, s)| s.roles.len() <= env.cpus) {
        let area = env.pages(PAGES)?;
        area.get(2).ok_or(bad("too few pages"))?.0[8].store(number, Ordering::Relaxed);
        smp::all(env, job, area)?;
        let seen = smp::slot(0).results[0].load(Ordering::Relaxed);
        out.add(shape.name, seen);
        good &= seen == 0 || !shape.forbidden;
    }
    Ok(good)
}

fn job(env: &Env, cpu: usize, area: &'static [Page]) -> Result<(), Failure> {
    let plan = plan(env)?;
    let [xs, ys, head, registers @ ..] = area else { return Err(bad("too few pages")) };
    let shape = SHAPES.get(index(head.0[8].load(Ordering::Relaxed))).ok_or(bad("no such shape"))?;
    let roles = shape.roles.len();
    // Two roles: CPU 0 and the peer; four: CPUs 0 to 3.
    let role = match (roles, cpu) {
        (2, 0) => 0,
        (2, c) if c == plan.peer => 1,
        (4, c) if c < 4 => c,
        _ => return Ok(()),
    };
    let (act, mine) = (shape.roles[role], &registers[role]);
    let meet = |what| {
        let arrived = head.0[0].fetch_add(1, Ordering::AcqRel) + 1;
        let target = arrived.div_ceil(roles as u64) * roles as u64;
        env.wait(cpu, what, || head.0[0].load(Ordering::Acquire) >= target)
    };
    let batch = index(plan.batch);
    let (mut seen, mut noise) = (0, machine::tsc() | 1);
    for _ in 0..plan.iterations.div_ceil(plan.batch) {
        meet("waited in vain before a batch")?;
        for slot in 0..batch {
            // A random pause, so that the roles meet in other ways each time.
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            (0..noise % 16).for_each(|_| core::hint::spin_loop());
            let (first, second) = act(&xs.0[slot], &ys.0[slot]);
            mine.0[2 * slot].store(first, Ordering::Relaxed);
            mine.0[2 * slot + 1].store(second, Ordering::Relaxed);
        }
        meet("waited in vain after a batch")?;
        if role == 0 {
            for slot in 0..batch {
                let mut values = [(0, 0); 4];
                for (value, page) in values.iter_mut().zip(registers).take(roles) {
                    *value = (
                        page.0[2 * slot].load(Ordering::Relaxed),
                        page.0[2 * slot + 1].load(Ordering::Relaxed),
                    );
                }
                let (x, y) = (xs.0[slot].swap(0, Ordering::Relaxed), ys.0[slot].swap(0, Ordering::Relaxed));
                seen += u64::from((shape.relaxed)(&values, x, y));
            }
        }
    }
    if role == 0 {
        smp::report(0, 0, seen);
    }
    Ok(())
}
