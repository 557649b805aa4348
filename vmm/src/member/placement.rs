//! On which member each vCPU lives, as this member knows it: a table that is never wrong for long. Every entry carries
//! the epoch of the move that made it, so news that come in the wrong order do no harm. A message that follows an old
//! entry is handed on by the member that it finds.

use dsm::addr::MemberId;
use std::sync::atomic::{AtomicU64, Ordering};

/// The table. Reading takes no lock.
#[derive(Debug)]
pub struct Placement(Vec<AtomicU64>);

const MEMBER_BITS: u32 = 16;

fn pack(member: MemberId, epoch: u64) -> u64 {
    // A VM that moves a vCPU a million times a second reaches 2^48 after nine years.
    epoch << MEMBER_BITS | u64::from(member.0)
}

impl Placement {
    /// The placement at the start, epoch 0.
    pub fn new(vcpus: &[MemberId]) -> Placement {
        Placement(vcpus.iter().map(|member| AtomicU64::new(pack(*member, 0))).collect())
    }

    /// Number of vCPUs.
    pub fn len(&self) -> u32 {
        u32::try_from(self.0.len()).unwrap_or(u32::MAX)
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn entry(&self, vcpu: u32) -> Option<&AtomicU64> {
        self.0.get(usize::try_from(vcpu).ok()?)
    }

    /// Where it lives; `None` if there is no such vCPU.
    pub fn get(&self, vcpu: u32) -> Option<MemberId> {
        let [a, b, ..] = self.entry(vcpu)?.load(Ordering::SeqCst).to_le_bytes();
        Some(MemberId(u16::from_le_bytes([a, b])))
    }

    /// It lives there since `epoch`. Old news change nothing.
    pub fn set(&self, vcpu: u32, member: MemberId, epoch: u64) {
        if let Some(entry) = self.entry(vcpu) {
            entry.fetch_max(pack(member, epoch), Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn news_in_any_order() {
        let table = Placement::new(&[MemberId(0), MemberId(1)]);
        assert_eq!((table.get(0), table.get(1), table.get(2)), (Some(MemberId(0)), Some(MemberId(1)), None));
        table.set(0, MemberId(2), 4);
        table.set(0, MemberId(1), 2);
        table.set(7, MemberId(1), 9);
        assert_eq!(table.get(0), Some(MemberId(2)));
        table.set(0, MemberId(0), 5);
        assert_eq!((table.get(0), table.len()), (Some(MemberId(0)), 2));
    }
}
