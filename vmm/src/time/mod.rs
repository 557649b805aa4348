//! One TSC for the whole VM. The coordinator's guest TSC is the truth; every other member measures how far its
//! own is off ([`filter`]), decides when that is worth a correction ([`discipline`]), and sets its vCPUs'
//! offsets accordingly ([`tsc`]).

pub mod discipline;
pub mod filter;
pub mod tsc;
