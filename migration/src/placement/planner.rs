//! Which move is made, and what is learned from it.
//!
//! ```text
//!               a window of samples               a move gains enough and is worth its cost
//!  (changed) --------------------------> looking ------------------------------------------> moved or refused
//!      ^                                                                                          |
//!      +------------------------------------------------------------------------------------------+
//!        the next window tells whether it paid
//! ```
//!
//! Against flapping:
//! - what is decided on is the mean of a whole window in which nothing moved; one move at a time;
//! - a vCPU that moved stays for a while, twice as long each time it goes back to where it lived before;
//! - where it went in vain (the waits of all fell by less than half of what was expected) it does not go again for long, unless
//!   it would now gain more than twice what was expected then; if it made things worse it may go back at once;
//! - a move that was refused is not tried again at once: twice as long after each refusal.

use super::{Candidate, Flow, Policy, Sample, VcpuLoad, Verdict, balance, follow};
use dsm::addr::MemberId;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};

/// Doublings of a stay, at most.
const MOST_LEVELS: u32 = 6;

/// What the planner goes by; seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tuning {
    /// Samples that a decision rests on.
    pub window: usize,
    /// Least gain of a move.
    pub min_gain: f64,
    /// A move has to be worth its cost within this time.
    pub horizon_s: f64,
    /// How often over.
    pub margin: f64,
    /// Least stay of a vCPU that moved.
    pub stay_s: f64,
    /// For so long a vCPU does not go where it went in vain, and it is remembered where it lived.
    pub memory_s: f64,
    /// Downtime of a move before one was measured.
    pub downtime_s: f64,
}

impl Default for Tuning {
    fn default() -> Tuning {
        Tuning {
            window: 3,
            min_gain: 0.05,
            horizon_s: 30.0,
            margin: 1.5,
            stay_s: 5.0,
            memory_s: 600.0,
            downtime_s: 0.01,
        }
    }
}

/// What is remembered of a vCPU.
#[derive(Clone, Debug)]
struct Record {
    on: MemberId,
    stay_until: f64,
    /// Stays are so often doubled.
    level: u32,
    /// When it last moved or was refused.
    last: f64,
    /// Where it lived before, and until when.
    lived: BTreeMap<MemberId, f64>,
    /// Where it went in vain, until when that counts, and what was expected.
    vain: BTreeMap<MemberId, (f64, f64)>,
}

/// A move of which is not known yet whether it paid.
#[derive(Clone, Debug)]
struct Trial {
    vcpu: u32,
    to: MemberId,
    gain: f64,
    before: f64,
}

/// Whether a move paid.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Judgement {
    /// The vCPU.
    pub vcpu: u32,
    /// Where it went.
    pub to: u16,
    /// What was expected.
    pub expected: f64,
    /// What came of it; less than 0 if it made things worse.
    pub seen: f64,
    /// At least half of what was expected.
    pub paid: bool,
}

/// One look at a sample.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Seconds per second that all vCPUs wait for other members.
    pub waits: f64,
    /// What a fault takes, seconds, if there were any.
    pub fault_s: Option<f64>,
    /// What a move costs in downtime, seconds.
    pub downtime_s: f64,
    /// Samples that are still missing.
    pub missing: usize,
    /// All moves that would gain something, best first.
    pub candidates: Vec<Candidate>,
    /// Whether the last move paid, as soon as that is known.
    pub judged: Option<Judgement>,
}

impl Round {
    /// The move that is to be made.
    pub fn decision(&self) -> Option<&Candidate> {
        self.candidates.first().filter(|c| c.verdict == Verdict::Move)
    }
}

/// The state of a policy.
#[derive(Clone, Debug)]
pub struct Planner {
    policy: Policy,
    tuning: Tuning,
    history: VecDeque<Sample>,
    records: BTreeMap<u32, Record>,
    trial: Option<Trial>,
    downtime_s: f64,
}

impl Planner {
    /// A policy that has seen nothing yet.
    pub fn new(policy: Policy, tuning: Tuning) -> Planner {
        let downtime_s = tuning.downtime_s;
        Planner {
            policy,
            tuning,
            history: VecDeque::new(),
            records: BTreeMap::new(),
            trial: None,
            downtime_s,
        }
    }

    /// The policy.
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// Samples that a decision rests on.
    pub fn window(&self) -> usize {
        self.tuning.window
    }

    /// Something else happened to the VM, so what was seen so far says nothing any more.
    pub fn disturbed(&mut self) {
        self.history.clear();
        self.trial = None;
    }

    /// Looks at what happened lately. If there is a decision, [`Planner::moved`] or [`Planner::refused`] has to follow.
    pub fn look(&mut self, sample: Sample) -> Round {
        self.note_changes(&sample);
        let at = sample.at_s;
        self.history.push_back(sample);
        while self.history.len() > self.tuning.window.max(1) {
            self.history.pop_front();
        }
        let Some(mean) = mean(&self.history) else { return Round::default() };
        let missing = self.tuning.window.saturating_sub(self.history.len());
        let judged = if missing == 0 { self.judge(&mean) } else { None };
        let mut candidates = match self.policy {
            Policy::Static => Vec::new(),
            Policy::Balance => balance::candidates(&mean, self.downtime_s),
            Policy::Follow => follow::candidates(&mean, self.downtime_s),
        };
        for candidate in &mut candidates {
            candidate.verdict = self.verdict(candidate, &mean, at, missing);
        }
        // The best that can be made comes first; of equals the one with the lowest number, so that two that want to meet do
        // not pass each other.
        candidates.sort_by(|a, b| {
            let key = |c: &Candidate| c.verdict != Verdict::Move;
            let worth = |c: &Candidate| c.gain * self.tuning.horizon_s - c.cost_s;
            key(a).cmp(&key(b)).then(worth(b).total_cmp(&worth(a))).then((a.vcpu, a.to).cmp(&(b.vcpu, b.to)))
        });
        for candidate in candidates.iter_mut().skip(1).filter(|c| c.verdict == Verdict::Move) {
            candidate.verdict = Verdict::NotBest;
        }
        let (waits, fault_s) = mean.waits();
        Round { waits, fault_s, downtime_s: self.downtime_s, missing, candidates, judged }
    }

    /// What was decided in `round` has been done, at `at`.
    pub fn moved(&mut self, round: &Round, at_s: f64, downtime_s: Option<f64>) {
        let Some(done) = round.decision() else { return };
        let (stay_s, memory_s) = (self.tuning.stay_s, self.tuning.memory_s);
        if let Some(record) = self.records.get_mut(&done.vcpu) {
            let to = MemberId(done.to);
            record.forget(at_s, memory_s);
            if record.lived.contains_key(&to) {
                record.level = (record.level + 1).min(MOST_LEVELS);
            }
            record.lived.insert(record.on, at_s);
            record.on = to;
            record.stay(at_s, stay_s);
        }
        if let Some(measured) = downtime_s.filter(|s| s.is_finite() && *s > 0.0) {
            self.downtime_s = (self.downtime_s + measured) / 2.0;
        }
        let before = mean(&self.history).map_or(0.0, |mean| self.burden(&mean));
        self.history.clear();
        self.trial = Some(Trial { vcpu: done.vcpu, to: MemberId(done.to), gain: done.gain, before });
    }

    /// What was decided in `round` could not be done.
    pub fn refused(&mut self, round: &Round, at_s: f64) {
        let Some(refused) = round.decision() else { return };
        if let Some(record) = self.records.get_mut(&refused.vcpu) {
            record.forget(at_s, self.tuning.memory_s);
            record.level = (record.level + 1).min(MOST_LEVELS);
            record.stay(at_s, self.tuning.stay_s);
        }
    }

    /// Members that have come or gone, and vCPUs that somebody else moved.
    fn note_changes(&mut self, sample: &Sample) {
        let mut changed = self.history.back().is_some_and(|last| {
            let ids = |s: &Sample| s.members.iter().map(|m| (m.id, m.open)).collect::<Vec<_>>();
            ids(last) != ids(sample)
        });
        for vcpu in &sample.vcpus {
            let fresh = Record {
                on: vcpu.on,
                stay_until: 0.0,
                level: 0,
                last: sample.at_s,
                lived: BTreeMap::new(),
                vain: BTreeMap::new(),
            };
            let record = self.records.entry(vcpu.id).or_insert(fresh);
            if record.on != vcpu.on {
                record.on = vcpu.on;
                record.stay(sample.at_s, self.tuning.stay_s);
                changed = true;
            }
        }
        if changed {
            self.disturbed();
        }
    }

    fn burden(&self, sample: &Sample) -> f64 {
        match self.policy {
            Policy::Balance => balance::burden(sample),
            Policy::Follow | Policy::Static => sample.waits().0,
        }
    }

    fn judge(&mut self, mean: &Sample) -> Option<Judgement> {
        let trial = self.trial.take()?;
        let seen = trial.before - self.burden(mean);
        let paid = seen >= trial.gain / 2.0;
        if let Some(record) = self.records.get_mut(&trial.vcpu).filter(|_| !paid) {
            record.vain.insert(trial.to, (mean.at_s + self.tuning.memory_s, trial.gain));
            if seen < 0.0 {
                record.stay_until = mean.at_s;
            }
        }
        Some(Judgement { vcpu: trial.vcpu, to: trial.to.0, expected: trial.gain, seen, paid })
    }

    fn verdict(&self, candidate: &Candidate, sample: &Sample, at: f64, missing: usize) -> Verdict {
        let (from, to) = (MemberId(candidate.from), MemberId(candidate.to));
        let record = self.records.get(&candidate.vcpu);
        let vain = record.and_then(|r| r.vain.get(&to)).filter(|(_, gain)| candidate.gain < 2.0 * gain);
        let vain = vain.map_or(at, |(until, _)| *until);
        let stay = record.map_or(at, |r| r.stay_until);
        if candidate.gain < self.tuning.min_gain {
            Verdict::TooLittle
        } else if candidate.gain * self.tuning.horizon_s < candidate.cost_s * self.tuning.margin {
            Verdict::TooDear
        } else if !sample.member(to).is_some_and(|m| m.open) || !sample.member(from).is_some_and(|m| m.open) {
            Verdict::Closed
        } else if !sample.has_room(from, to) {
            Verdict::NoRoom
        } else if vain > at {
            Verdict::DidNotPay { seconds: vain - at }
        } else if stay > at {
            Verdict::Stays { seconds: stay - at }
        } else if missing > 0 {
            Verdict::Looking
        } else {
            Verdict::Move
        }
    }
}

impl Record {
    fn stay(&mut self, at: f64, least: f64) {
        let doublings = (0..self.level).fold(1.0, |times, _| times * 2.0);
        self.stay_until = at + least * doublings;
        self.last = at;
    }

    /// What was long ago does not count.
    fn forget(&mut self, at: f64, memory: f64) {
        if at - self.last > memory {
            self.level = 0;
        }
        self.lived.retain(|_, left| at - *left <= memory);
        self.vain.retain(|_, (until, _)| *until > at);
    }
}

/// The mean over some samples, with the members and places of the last. A vCPU is known if it was in all of them.
fn mean(history: &VecDeque<Sample>) -> Option<Sample> {
    let last = history.back()?;
    // A handful.
    #[allow(clippy::cast_precision_loss)]
    let count = history.len() as f64;
    let vcpus = last.vcpus.iter().map(|vcpu| {
        let mut sum = VcpuLoad { busy: 0.0, flows: BTreeMap::new(), ..vcpu.clone() };
        for sample in history {
            let same = sample.vcpus.iter().find(|v| v.id == vcpu.id && v.on == vcpu.on && v.known);
            sum.known &= same.is_some();
            let Some(one) = same else { continue };
            sum.busy += one.busy / count;
            for (peer, flow) in &one.flows {
                let all = sum.flows.entry(*peer).or_default();
                *all = Flow { faults: all.faults + flow.faults / count, wait: all.wait + flow.wait / count };
            }
        }
        sum
    });
    Some(Sample { at_s: last.at_s, members: last.members.clone(), vcpus: vcpus.collect() })
}
