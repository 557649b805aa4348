//! Where vCPUs should live: pure. [`meter`] turns counters into a [`Sample`]; [`follow`] and [`balance`] say what each
//! possible move would gain; [`planner`] decides, one move at a time, and learns whether it paid.
//!
//! ```text
//!  counters --> Meter --> Sample --> Planner --> Round: candidates with their figures, and perhaps one move
//!                                       ^                                                       |
//!                                       +------------- carried out, or refused -----------------+
//! ```

pub mod balance;
pub mod follow;
pub mod meter;
pub mod planner;
#[cfg(test)]
mod tests;

use dsm::addr::MemberId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// Who decides where vCPUs live.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// The user.
    #[default]
    Static,
    /// vCPUs go from crowded hosts to others.
    Balance,
    /// vCPUs go to where their page faults go.
    Follow,
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Policy::Static => "static",
            Policy::Balance => "balance",
            Policy::Follow => "follow",
        })
    }
}

impl FromStr for Policy {
    type Err = String;

    fn from_str(text: &str) -> Result<Policy, String> {
        match text {
            "static" => Ok(Policy::Static),
            "balance" => Ok(Policy::Balance),
            "follow" => Ok(Policy::Follow),
            _ => Err(format!("there is no policy {text:?}: static, balance or follow")),
        }
    }
}

/// A member as a place to live.
#[derive(Clone, Debug, PartialEq)]
pub struct MemberLoad {
    /// Its number.
    pub id: MemberId,
    /// Its host: members of one host share its processors.
    pub host: String,
    /// Processors of the host; 0 if nobody knows.
    pub cpus: u32,
    /// vCPUs with which it started: so many it may have, however few processors there are.
    pub share: u32,
    /// It may be given vCPUs: it is neither coming nor going.
    pub open: bool,
    /// Pages that it has.
    pub pages: u64,
}

/// Page faults per second that one member answered, and seconds per second that they took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Flow {
    /// Faults per second.
    pub faults: f64,
    /// Seconds waited per second; at most 1 of one vCPU.
    pub wait: f64,
}

/// What a vCPU did lately.
#[derive(Clone, Debug, PartialEq)]
pub struct VcpuLoad {
    /// Its id.
    pub id: u32,
    /// Where it lives.
    pub on: MemberId,
    /// Share of the time in which it computed: neither halted nor waiting for a page.
    pub busy: f64,
    /// Its faults, by the member that answered.
    pub flows: BTreeMap<MemberId, Flow>,
    /// The figures are known: it has lived there for the whole time.
    pub known: bool,
}

/// What a VM did lately.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// When, seconds since some moment.
    pub at_s: f64,
    /// Its members.
    pub members: Vec<MemberLoad>,
    /// Its vCPUs.
    pub vcpus: Vec<VcpuLoad>,
}

impl Sample {
    fn member(&self, id: MemberId) -> Option<&MemberLoad> {
        self.members.iter().find(|m| m.id == id)
    }

    fn on(&self, member: MemberId) -> impl Iterator<Item = &VcpuLoad> {
        self.vcpus.iter().filter(move |v| v.on == member)
    }

    /// Members of a host, and what `of` makes of them, summed up.
    fn of_host<'a, T: std::iter::Sum<T>>(&'a self, host: &'a str, of: impl Fn(&'a MemberLoad) -> T) -> T {
        self.members.iter().filter(|m| m.host == host).map(of).sum()
    }

    /// Whether a vCPU may come to `to` from another member: no member, and no host, gets more than it has processors, or
    /// started with.
    pub fn has_room(&self, from: MemberId, to: MemberId) -> bool {
        let Some(target) = self.member(to) else { return false };
        let count = |m: &MemberLoad| u32::try_from(self.on(m.id).count()).unwrap_or(u32::MAX);
        let is_same_host = self.member(from).is_some_and(|source| source.host == target.host);
        let host = self.of_host(&target.host, |m| m.share).max(target.cpus);
        count(target) < target.share.max(target.cpus)
            && (is_same_host || self.of_host(&target.host, count) < host)
    }

    /// Seconds per second that all vCPUs wait for other members, and what one fault takes, seconds.
    pub fn waits(&self) -> (f64, Option<f64>) {
        let flows = self.vcpus.iter().flat_map(|v| v.flows.values());
        let (wait, faults) = flows.fold((0.0, 0.0), |(w, f), flow| (w + flow.wait, f + flow.faults));
        (wait, (faults > 0.0).then(|| wait / faults))
    }
}

/// Why a move is made, or not.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Verdict {
    /// The best one: it is made.
    Move,
    /// Another one is better, and they are made one at a time.
    NotBest,
    /// It gains too little.
    TooLittle,
    /// It costs more than it gains.
    TooDear,
    /// The member, or its host, has as many vCPUs as processors.
    NoRoom,
    /// The member is coming or going.
    Closed,
    /// The vCPU moved, or was refused, a short time ago.
    Stays {
        /// For so many seconds more.
        seconds: f64,
    },
    /// It moved there some time ago, and it did not pay.
    DidNotPay {
        /// It is not tried again for so many seconds.
        seconds: f64,
    },
    /// Not enough is known yet.
    Looking,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Move => f.write_str("move"),
            Verdict::NotBest => f.write_str("another move is better"),
            Verdict::TooLittle => f.write_str("gains too little"),
            Verdict::TooDear => f.write_str("costs more than it gains"),
            Verdict::NoRoom => f.write_str("no room there"),
            Verdict::Closed => f.write_str("the member is coming or going"),
            Verdict::Stays { seconds } => write!(f, "stays for {seconds:.0} s more"),
            Verdict::DidNotPay { seconds } => write!(f, "did not pay before; not for {seconds:.0} s"),
            Verdict::Looking => f.write_str("looking"),
        }
    }
}

/// A move that could be made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// The vCPU.
    pub vcpu: u32,
    /// Where it lives.
    pub from: u16,
    /// Where it could live.
    pub to: u16,
    /// What it would gain. *follow*: seconds per second that nobody would wait any more. *balance*: see [`balance`].
    pub gain: f64,
    /// Of that, what the vCPU itself waits for that member; the rest is what vCPUs there wait for its own member because of it.
    pub own: f64,
    /// What the move costs once, seconds: downtime, and pages that follow by fault.
    pub cost_s: f64,
    /// What is done about it.
    pub verdict: Verdict,
}
