//! A computing process moves between CPUs of different nodes with its state intact: registers, anonymous memory, mapped
//! files, file offsets, floating point, heap.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::sync::atomic::Ordering;

use serde_json::json;

use crate::checks::procfs;
use crate::context::{Context, Note, repeat, wait_until};
use crate::failure::{During, Failure, expect_eq};
use crate::sys::shared::{PAGE, Shared};
use crate::sys::{cpu, process};

/// Fewest and most moves; between them time decides.
const MIN_MOVES: u64 = 30;
const MAX_MOVES: u64 = 3_000;

/// Runs the check.
pub fn run(context: &Context) {
    let slice = context.slice(3);
    let target = |step: u64| {
        let spread = &context.topology().spread;
        let turn = usize::try_from(step).unwrap_or(0) % spread.len().max(1);
        spread.get(turn).map_or(0, |c| c.id)
    };
    context.sub("registers", || {
        let moves = repeat(slice, MIN_MOVES, MAX_MOVES, |step| {
            let intact = cpu::move_with_registers(target(step), value(step))?;
            expect_eq(format!("registers intact after move {step}"), true, intact)?;
            expect_eq(format!("CPU after move {step}"), target(step), cpu::current()?)
        })?;
        Ok(moved(moves))
    });
    context.sub("files_and_memory", || {
        let mut state = State::new(context)?;
        let moves = repeat(slice, MIN_MOVES, MAX_MOVES, |step| {
            cpu::pin(target(step))?;
            state.compute(step)
        })?;
        state.verify(moves)?;
        Ok(moved(moves))
    });
    context.sub("moved_by_another", || {
        let memory = Shared::anonymous(2)?;
        let mut task = process::spawn(target(0), || walk(&memory))?;
        let (stop, out) = (memory.longs().first(), memory.longs().get(PAGE / 8..).unwrap_or_default());
        let ([x, n, ..], Some(stop)) = (out, stop) else { return Err(Failure::Other("no memory".into())) };
        // Only a process that has pinned itself stays where it is moved.
        wait_until("start of the process to be moved", || Ok(n.load(Ordering::SeqCst) > 0))?;
        let moves = repeat(slice, MIN_MOVES, MAX_MOVES, |step| {
            cpu::set_affinity(task.pid, target(step))?;
            wait_until(&format!("arrival of process {} on CPU {}", task.pid, target(step)), || {
                Ok(procfs::stat(task.pid)?.processor == target(step))
            })
        })?;
        stop.store(1, Ordering::SeqCst);
        expect_eq("exit of the moved process", process::Ended::Exited(0), task.wait_change(false)?)?;
        let (x, n) = (x.load(Ordering::SeqCst), n.load(Ordering::SeqCst));
        expect_eq(format!("result of {n} steps"), walk_closed_form(n), x)?;
        Ok(moved(moves))
    });
}

fn moved(moves: u64) -> Note {
    Note::with_data(format!("{moves} moves, state intact"), json!({ "moves": moves }))
}

/// The value that belongs to a step: any other is a lost or torn state.
fn value(step: u64) -> u64 {
    (step + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// The multiplier and the increment of the walk (Knuth's MMIX generator).
const MUL: u64 = 6_364_136_223_846_793_005;
const ADD: u64 = 1_442_695_040_888_963_407;

/// Computes until told to stop: a chain in which one wrong step spoils the result.
fn walk(memory: &Shared) -> i32 {
    let (mut x, mut n) = (0u64, 0u64);
    let Some(stop) = memory.longs().first() else { return 1 };
    let Some([result, steps, ..]) = memory.longs().get(PAGE / 8..) else { return 1 };
    steps.store(1, Ordering::SeqCst);
    while stop.load(Ordering::Relaxed) == 0 {
        for _ in 0..4096 {
            x = std::hint::black_box(x.wrapping_mul(MUL).wrapping_add(ADD));
        }
        n += 4096;
    }
    result.store(x, Ordering::SeqCst);
    steps.store(n, Ordering::SeqCst);
    0
}

/// Where the walk is after `n` steps, by squaring the affine map instead of walking.
fn walk_closed_form(n: u64) -> u64 {
    let (mut mul, mut add) = (MUL, ADD);
    let (mut x, mut left) = (0u64, n);
    while left > 0 {
        if left & 1 == 1 {
            x = x.wrapping_mul(mul).wrapping_add(add);
        }
        add = add.wrapping_mul(mul).wrapping_add(add);
        mul = mul.wrapping_mul(mul);
        left >>= 1;
    }
    x
}

/// Bytes of the input file, read in pieces of [`PIECE`].
const INPUT: u64 = 64 * 1024;
const PIECE: usize = 128;
/// Slots of the memory areas.
const PAGES: usize = 8;

/// What the moving process carries along.
struct State {
    input: File,
    log: File,
    mapped_file: File,
    mapped: Shared,
    anonymous: Shared,
    heap: BTreeMap<u64, u64>,
    sum: f64,
    log_path: std::path::PathBuf,
}

impl State {
    fn new(context: &Context) -> Result<State, Failure> {
        let open = |name: &str| {
            let path = context.file(name);
            File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open(&path)
                .during(format!("making {}", path.display()))
        };
        let mut input = open("input")?;
        let bytes: Vec<u8> = (0..INPUT / 8).flat_map(|i| value(i).to_le_bytes()).collect();
        input.write_all(&bytes).during("writing the input file")?;
        input.rewind().during("rewinding the input file")?;
        let mapped_file = open("mapped")?;
        mapped_file.set_len((PAGES * PAGE) as u64).during("sizing the mapped file")?;
        Ok(State {
            input,
            log: open("log")?,
            mapped: Shared::of_file(&mapped_file, PAGES)?,
            mapped_file,
            anonymous: Shared::private(PAGES)?,
            heap: BTreeMap::new(),
            sum: 0.0,
            log_path: context.file("log"),
        })
    }

    /// One piece of work on the CPU the process has just reached; checks what earlier CPUs left.
    fn compute(&mut self, step: u64) -> Result<(), Failure> {
        let mut piece = [0u8; PIECE];
        let at = step * PIECE as u64 % INPUT;
        if at == 0 {
            self.input.rewind().during("rewinding the input file")?;
        }
        expect_eq("file offset", at, self.input.stream_position().during("file offset")?)?;
        self.input.read_exact(&mut piece).during("reading the input file")?;
        let first = piece.first_chunk().copied().map(u64::from_le_bytes);
        expect_eq(format!("input at {at}"), Some(value(at / 8)), first)?;

        self.log.write_all(&value(step).to_le_bytes()).during("writing the log")?;
        // Slots lie 520 bytes apart, so that neighbouring steps touch different pages and lines.
        let slots = PAGES * PAGE / 8;
        let slot = |s: u64| usize::try_from(s * 65).unwrap_or(0) % slots;
        for (what, area) in [("mapped file", &self.mapped), ("anonymous memory", &self.anonymous)] {
            for back in [1, 7] {
                if let Some(old) = step.checked_sub(back) {
                    let found = area.longs().get(slot(old)).map(|w| w.load(Ordering::Relaxed));
                    expect_eq(format!("{what}, written at step {old}"), Some(value(old)), found)?;
                }
            }
            if let Some(word) = area.longs().get(slot(step)) {
                word.store(value(step), Ordering::Relaxed);
            }
        }
        self.heap.insert(step, value(step));
        self.sum += term(step);
        Ok(())
    }

    /// After the last move: everything is as if it had never moved.
    fn verify(mut self, moves: u64) -> Result<(), Failure> {
        let expected: Vec<u64> = (0..moves).map(value).collect();
        let heap: Vec<u64> = self.heap.values().copied().collect();
        expect_eq("heap is intact", true, heap == expected)?;
        // The same operations in the same order round the same way.
        let sum = (0..moves).fold(0.0, |sum, step| sum + term(step));
        expect_eq("floating-point sum", sum.to_bits(), self.sum.to_bits())?;
        let log = std::fs::read(&self.log_path).during("reading the log")?;
        let bytes: Vec<u8> = expected.iter().flat_map(|v| v.to_le_bytes()).collect();
        expect_eq("log file is intact", true, log == bytes)?;
        let mut file = Vec::new();
        self.mapped_file.read_to_end(&mut file).during("reading the mapped file")?;
        let memory: Vec<u8> = self.mapped.bytes().iter().map(|b| b.load(Ordering::Relaxed)).collect();
        expect_eq("mapped file as read(2) sees it is what the mapping holds", true, file == memory)
    }
}

/// A summand whose order of addition matters.
fn term(step: u64) -> f64 {
    1.0 / f64::from(u32::try_from(step % 1_000_000).unwrap_or(0) + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closed_form_walks_the_same_way() {
        let mut x = 0u64;
        for n in 0..100 {
            assert_eq!(walk_closed_form(n), x, "{n}");
            x = x.wrapping_mul(MUL).wrapping_add(ADD);
        }
    }
}
