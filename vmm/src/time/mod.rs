//! One TSC for the whole VM. The coordinator's guest TSC is the truth; every other member measures how far its
//! own is off ([`filter`]) and sets its vCPUs' offsets accordingly ([`tsc`]).

pub mod filter;
pub mod tsc;
