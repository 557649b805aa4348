//! The litmus tests as data, and the classifier of their outcomes.
//!
//! The forbidden outcomes are those of x86-TSO (Sewell et al., "x86-TSO: a rigorous and usable programmer's model",
//! CACM 2010): only a store may be delayed past a later load of another location, and not past MFENCE or a locked
//! instruction.

use crate::sys::ops::Flavour;

/// A shared variable of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Var {
    /// The first.
    X,
    /// The second.
    Y,
}

use Var::{X, Y};

/// What one thread does; each load fills the next register of the instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Store a value.
    W(Var, u32),
    /// Two stores.
    WW(Var, u32, Var, u32),
    /// A store, then a load.
    WR(Var, u32, Var),
    /// A load, then a store.
    RW(Var, Var, u32),
    /// Two loads.
    RR(Var, Var),
}

/// A litmus test, by its name in the literature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Test {
    /// Store buffering.
    SB,
    /// Message passing.
    MP,
    /// Load buffering.
    LB,
    /// Independent reads of independent writes.
    Iriw,
    /// Coherence of two reads of one location.
    CoRR,
    /// Two writes each, in opposite orders.
    TwoPlusTwoW,
}

/// Where the variables of an instance are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// On one page.
    SamePage,
    /// Each on a page of its own (shared with the same variable of other instances).
    SeparatePages,
}

/// What one instance left behind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Registers: those of the first loading thread first.
    pub r: [u32; 4],
    /// Final value of X.
    pub x: u32,
    /// Final value of Y.
    pub y: u32,
}

/// What an outcome means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Some interleaving of the threads explains it.
    Interleaved,
    /// No interleaving explains it, but store buffers do: allowed.
    Relaxed,
    /// x86-TSO forbids it.
    Forbidden,
    /// A value that nobody ever stored there.
    Corrupt,
}

impl Test {
    /// All of them.
    pub const ALL: [Test; 6] = [Test::SB, Test::MP, Test::LB, Test::Iriw, Test::CoRR, Test::TwoPlusTwoW];

    /// The name in results.
    pub fn name(self) -> &'static str {
        match self {
            Test::SB => "SB",
            Test::MP => "MP",
            Test::LB => "LB",
            Test::Iriw => "IRIW",
            Test::CoRR => "CoRR",
            Test::TwoPlusTwoW => "2+2W",
        }
    }

    /// The threads.
    pub fn threads(self) -> &'static [Step] {
        match self {
            Test::SB => &[Step::WR(X, 1, Y), Step::WR(Y, 1, X)],
            Test::MP => &[Step::WW(X, 1, Y, 1), Step::RR(Y, X)],
            Test::LB => &[Step::RW(X, Y, 1), Step::RW(Y, X, 1)],
            Test::Iriw => &[Step::W(X, 1), Step::W(Y, 1), Step::RR(X, Y), Step::RR(Y, X)],
            Test::CoRR => &[Step::W(X, 1), Step::RR(X, X)],
            Test::TwoPlusTwoW => &[Step::WW(X, 1, Y, 2), Step::WW(Y, 1, X, 2)],
        }
    }

    /// The layouts that differ for this test: one variable has one.
    pub fn layouts(self) -> &'static [Layout] {
        match self {
            Test::CoRR => &[Layout::SamePage],
            _ => &[Layout::SamePage, Layout::SeparatePages],
        }
    }

    /// What `o` means if the accesses were made in this flavour.
    pub fn classify(self, flavour: Flavour, o: &Outcome) -> Verdict {
        let [a, b, c, d] = o.r;
        let bit = |v: u32| v <= 1;
        let sound = match self {
            Test::SB => bit(a) && bit(b) && (o.x, o.y) == (1, 1),
            Test::MP => bit(a) && bit(b) && (o.x, o.y) == (1, 1),
            Test::LB => bit(a) && bit(b) && (o.x, o.y) == (1, 1),
            Test::Iriw => o.r.into_iter().all(bit) && (o.x, o.y) == (1, 1),
            Test::CoRR => bit(a) && bit(b) && o.x == 1,
            Test::TwoPlusTwoW => (1..=2).contains(&o.x) && (1..=2).contains(&o.y),
        };
        if !sound {
            return Verdict::Corrupt;
        }
        let forbidden = match self {
            Test::SB if (a, b) == (0, 0) => {
                return if flavour == Flavour::Plain { Verdict::Relaxed } else { Verdict::Forbidden };
            }
            Test::SB => false,
            // The flag (Y, read first) is there and the message (X) is not.
            Test::MP => (a, b) == (1, 0),
            Test::LB => (a, b) == (1, 1),
            // The two readers disagree about which store came first.
            Test::Iriw => (a, b, c, d) == (1, 0, 1, 0),
            Test::CoRR => (a, b) == (1, 0),
            // Each location keeps the first store of the thread that stored there first.
            Test::TwoPlusTwoW => (o.x, o.y) == (1, 1),
        };
        if forbidden { Verdict::Forbidden } else { Verdict::Interleaved }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Every outcome of every interleaving of the threads' accesses: an independent model of what is ordinary.
    fn interleavings(test: Test) -> BTreeSet<([u32; 4], u32, u32)> {
        // One access: (store value or None for a load, variable, register).
        type Access = (Option<u32>, Var, usize);
        let mut next = 0;
        let mut load = |v: Var| {
            next += 1;
            (None, v, next - 1)
        };
        let threads: Vec<Vec<Access>> = test
            .threads()
            .iter()
            .map(|step| match *step {
                Step::W(a, v) => vec![(Some(v), a, 0)],
                Step::WW(a, v, b, w) => vec![(Some(v), a, 0), (Some(w), b, 0)],
                Step::WR(a, v, b) => vec![(Some(v), a, 0), load(b)],
                Step::RW(a, b, w) => vec![load(a), (Some(w), b, 0)],
                Step::RR(a, b) => vec![load(a), load(b)],
            })
            .collect();
        fn go(threads: &[Vec<Access>], at: Vec<usize>, o: Outcome, all: &mut BTreeSet<([u32; 4], u32, u32)>) {
            let mut end = true;
            for (t, accesses) in threads.iter().enumerate() {
                let Some(&(store, var, register)) = accesses.get(at[t]) else { continue };
                end = false;
                let (mut at, mut o) = (at.clone(), o);
                at[t] += 1;
                let place = if var == X { &mut o.x } else { &mut o.y };
                match store {
                    Some(value) => *place = value,
                    None => o.r[register] = *place,
                }
                go(threads, at, o, all);
            }
            if end {
                all.insert((o.r, o.x, o.y));
            }
        }
        let mut all = BTreeSet::new();
        go(&threads, vec![0; threads.len()], Outcome::default(), &mut all);
        all
    }

    /// All outcomes with values 0..=3 in the registers and variables in use.
    fn every_outcome() -> impl Iterator<Item = Outcome> {
        (0..4u32.pow(6)).map(|n| {
            let digit = |i: u32| n / 4u32.pow(i) % 4;
            Outcome { r: [digit(0), digit(1), digit(2), digit(3)], x: digit(4), y: digit(5) }
        })
    }

    #[test]
    fn interleaved_outcomes_are_never_blamed() {
        for test in Test::ALL {
            for (r, x, y) in interleavings(test) {
                for flavour in Flavour::ALL {
                    let verdict = test.classify(flavour, &Outcome { r, x, y });
                    assert_eq!(verdict, Verdict::Interleaved, "{} {r:?} x={x} y={y}", test.name());
                }
            }
        }
    }

    #[test]
    fn everything_else_is_blamed_but_the_store_buffer() {
        for test in Test::ALL {
            let ordinary = interleavings(test);
            let loads =
                ordinary.iter().map(|(r, ..)| r.iter().rposition(|&v| v > 0).map_or(0, |i| i + 1)).max();
            for o in every_outcome() {
                // Registers that the test does not have, and Y in CoRR, are always zero.
                let unused = o.r.iter().skip(loads.unwrap_or(0)).any(|&v| v > 0);
                if unused || (test == Test::CoRR && o.y > 0) || ordinary.contains(&(o.r, o.x, o.y)) {
                    continue;
                }
                let verdict = test.classify(Flavour::Plain, &o);
                let store_buffer = test == Test::SB && o == Outcome { r: [0; 4], x: 1, y: 1 };
                assert_eq!(verdict == Verdict::Relaxed, store_buffer, "{} {o:?}", test.name());
                assert_ne!(verdict, Verdict::Interleaved, "{} {o:?}", test.name());
                assert!(
                    matches!(test.classify(Flavour::Locked, &o), Verdict::Forbidden | Verdict::Corrupt),
                    "{} {o:?}",
                    test.name()
                );
            }
        }
    }

    #[test]
    fn fences_forbid_the_store_buffer() {
        let o = Outcome { r: [0; 4], x: 1, y: 1 };
        assert_eq!(Test::SB.classify(Flavour::Plain, &o), Verdict::Relaxed);
        assert_eq!(Test::SB.classify(Flavour::Mfence, &o), Verdict::Forbidden);
        assert_eq!(Test::SB.classify(Flavour::Locked, &o), Verdict::Forbidden);
    }
}
