//! CPUID tables as data: what hosts offer, what they have in common, what one vCPU is shown.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

/// One leaf (SDM vol. 2, CPUID; APM vol. 3, appendix E).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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

/// A set of leaves.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidTable(pub Vec<CpuidLeaf>);

/// CPUID.1:ECX.
pub mod leaf1_ecx {
    /// x2APIC.
    pub const X2APIC: u32 = 1 << 21;
    /// TSC-deadline timer.
    pub const TSC_DEADLINE: u32 = 1 << 24;
    /// Running under a hypervisor.
    pub const HYPERVISOR: u32 = 1 << 31;
    /// MONITOR, DTES64, DS-CPL, VMX, SMX, EIST, TM2, PDCM: what a guest here can't use.
    pub const HIDDEN: u32 = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 15;
}

/// SVM, IBS, SKINIT, WDT, LWP, the performance counters and MWAITX (CPUID.80000001H:ECX).
const AMD_ECX_HIDDEN: u32 =
    1 << 2 | 1 << 10 | 1 << 12 | 1 << 13 | 1 << 15 | 1 << 23 | 1 << 24 | 1 << 27 | 1 << 28 | 1 << 29;

/// Leaves that are not passed on: performance counters, SGX, tracing, topology V2, SVM, IBS, LWP, SEV, PerfMonV2,
/// and all of the hypervisor range but the signature.
fn is_hidden(function: u32) -> bool {
    matches!(
        function,
        0x5 | 0xA | 0xB | 0x12 | 0x14 | 0x15 | 0x16 | 0x1B | 0x1C | 0x1F | 0x4000_0000
            ..=0x4FFF_FFFF
                | 0x8000_000A
                | 0x8000_001B
                | 0x8000_001C
                | 0x8000_001F
                | 0x8000_0022
                | 0x8000_0026
    )
}

impl CpuidTable {
    /// What a host's KVM supports, without what spanvm hides. KVM's paravirtual features share memory between
    /// host and guest per CPU, or answer for vCPUs that live elsewhere; only KVM's signature stays, with an
    /// empty feature leaf, so that Linux trusts x2APIC without interrupt remapping.
    pub fn from_supported(supported: &CpuId, tsc_deadline: bool) -> CpuidTable {
        let mut leaves: Vec<CpuidLeaf> = supported
            .as_slice()
            .iter()
            .filter(|e| !is_hidden(e.function))
            .map(|e| CpuidLeaf {
                function: e.function,
                index: e.index,
                indexed: e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0,
                eax: e.eax,
                ebx: e.ebx,
                ecx: e.ecx,
                edx: e.edx,
            })
            .collect();
        for leaf in &mut leaves {
            match (leaf.function, leaf.index) {
                (1, _) => {
                    leaf.ecx &= !(leaf1_ecx::HIDDEN | leaf1_ecx::TSC_DEADLINE);
                    leaf.ecx |= leaf1_ecx::HYPERVISOR | leaf1_ecx::X2APIC;
                    leaf.ecx |= if tsc_deadline { leaf1_ecx::TSC_DEADLINE } else { 0 };
                    leaf.edx |= 1 << 9;
                }
                // Only ARAT: the APIC timer never stops.
                (6, _) => (leaf.eax, leaf.ebx, leaf.ecx) = (1 << 2, 0, 0),
                // TSC_ADJUST would let the guest shift one vCPU's TSC against the others; SGX needs its leaf.
                (7, 0) => leaf.ebx &= !(1 << 1 | 1 << 2),
                (0x8000_0001, _) => leaf.ecx &= !AMD_ECX_HIDDEN,
                _ => {}
            }
        }
        let signature = CpuidLeaf {
            function: 0x4000_0000,
            eax: 0x4000_0001,
            ebx: u32::from_le_bytes(*b"KVMK"),
            ecx: u32::from_le_bytes(*b"VMKV"),
            edx: u32::from_le_bytes(*b"M\0\0\0"),
            ..CpuidLeaf::default()
        };
        leaves.push(signature);
        leaves.push(CpuidLeaf { function: 0x4000_0001, ..CpuidLeaf::default() });
        CpuidTable(leaves)
    }

    /// The leaf for `function` and `index`.
    pub fn get(&self, function: u32, index: u32) -> Option<&CpuidLeaf> {
        self.0.iter().find(|l| l.function == function && (!l.indexed || l.index == index))
    }

    fn get_mut(&mut self, function: u32, index: u32) -> Option<&mut CpuidLeaf> {
        self.0.iter_mut().find(|l| l.function == function && (!l.indexed || l.index == index))
    }

    /// Replaces or adds.
    fn put(&mut self, leaf: CpuidLeaf) {
        self.0.retain(|l| l.function != leaf.function || (l.indexed && l.index != leaf.index));
        self.0.push(leaf);
    }

    /// The twelve letters of leaf 0, such as `AuthenticAMD`.
    pub fn vendor(&self) -> String {
        let Some(leaf) = self.get(0, 0) else { return String::new() };
        let bytes = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// What all of `tables` can do; empty for no tables. What is not a feature (model, caches, names) is taken
    /// from the first.
    pub fn intersect(tables: &[CpuidTable]) -> CpuidTable {
        let Some((first, others)) = tables.split_first() else { return CpuidTable::default() };
        let mut result = first.clone();
        for leaf in &mut result.0 {
            for other in others {
                let theirs = other.get(leaf.function, leaf.index).copied().unwrap_or_default();
                intersect_leaf(leaf, &theirs);
            }
        }
        result.limit_xsave();
        result
    }

    /// Drops the XSAVE components that no longer are in XCR0 and XSS, and recomputes the size of the area.
    fn limit_xsave(&mut self) {
        let (Some(xcr0), xss) = (self.get(0xD, 0).copied(), self.get(0xD, 1).copied().unwrap_or_default())
        else {
            return;
        };
        let present = |index: u32| match index {
            0 | 1 => true,
            2..=31 => (xcr0.eax | xss.ecx) & (1 << index) != 0,
            32..=63 => (xcr0.edx | xss.edx) & (1 << (index - 32)) != 0,
            _ => false,
        };
        self.0.retain(|l| l.function != 0xD || present(l.index));
        let user = |l: &&CpuidLeaf| l.function == 0xD && l.index >= 2 && l.ecx & 1 == 0;
        // Legacy area and XSAVE header (SDM vol. 1, 13.4).
        let size = self.0.iter().filter(user).map(|l| l.eax.saturating_add(l.ebx)).fold(576, u32::max);
        if let Some(leaf) = self.get_mut(0xD, 0) {
            leaf.ecx = size;
        }
    }

    /// Fills in what depends on the vCPU: APIC id and topology. Every vCPU is a core with one thread. On Intel,
    /// leaf 15H gives the guest its TSC frequency.
    pub fn for_vcpu(&self, id: u32, cores: Cores, tsc_khz: u32) -> CpuidTable {
        let Cores { package_shift, cache_shift } = cores;
        let mut table = self.clone();
        let cores = 1u32 << package_shift.min(8);
        let sharers = 1u32 << cache_shift.min(8);
        let has_topology = self.get(0x8000_001D, 0).is_some() && self.get(0x8000_001E, 0).is_some();
        let [id_low, ..] = id.to_le_bytes();
        if self.vendor() == "GenuineIntel" {
            table.describe_tsc(tsc_khz);
        }
        let level = |index: u32, shift: u32, count: u32, kind: u32| CpuidLeaf {
            function: 0xB,
            index,
            indexed: true,
            eax: shift,
            ebx: count,
            ecx: kind << 8 | index,
            edx: id,
        };
        table.put(level(0, 0, 1, 1));
        table.put(level(1, package_shift, cores, 2));
        table.put(level(2, 0, 0, 0));
        table.promise_constant_tsc();
        for leaf in &mut table.0 {
            // Deterministic cache parameters: the last level is shared within a member, the others by nobody.
            let sharing = if leaf.eax >> 5 & 7 == 3 { sharers - 1 } else { 0 };
            match leaf.function {
                0 => leaf.eax = leaf.eax.max(0xB),
                1 => {
                    leaf.ebx = leaf.ebx & 0xFF00 | u32::from(id_low) << 24 | cores.min(255) << 16 | 8 << 8;
                    leaf.edx = leaf.edx & !(1 << 28) | if cores > 1 { 1 << 28 } else { 0 };
                }
                4 if leaf.eax & 0x1F != 0 => {
                    leaf.eax = leaf.eax & 0x3FFF | sharing << 14 | (cores - 1).min(63) << 26;
                }
                0x8000_0001 => {
                    // CmpLegacy, and TopologyExtensions: without the latter Linux takes a package for one cache.
                    leaf.ecx = leaf.ecx & !2 | if cores > 1 { 2 } else { 0 };
                    leaf.ecx |= if has_topology { 1 << 22 } else { 0 };
                }
                0x8000_0008 => leaf.ecx = (cores - 1).min(255) | package_shift << 12,
                0x8000_001D => leaf.eax = leaf.eax & 0x3FFF | sharing << 14,
                0x8000_001E => {
                    (leaf.eax, leaf.ebx, leaf.ecx) = (id, id & (cores - 1), id >> package_shift & 0xFF);
                }
                _ => {}
            }
        }
        table
    }

    /// The guest's TSC is one clock that we keep steady, whatever the hosts' processors say of theirs; the
    /// guest's command line says the same to Linux. Without this bit each of its CPUs measures its delay loop.
    fn promise_constant_tsc(&mut self) {
        if let Some(leaf) = self.get_mut(0x8000_0007, 0) {
            leaf.edx |= 1 << 8;
            return;
        }
        self.put(CpuidLeaf { function: 0x8000_0007, edx: 1 << 8, ..CpuidLeaf::default() });
        if let Some(leaf) = self.get_mut(0x8000_0000, 0) {
            leaf.eax = leaf.eax.max(0x8000_0007);
        }
    }

    /// Crystal clock = TSC (SDM vol. 3, 19.7.3); also the input of our APIC timer, as Linux assumes.
    fn describe_tsc(&mut self, tsc_khz: u32) {
        let Some(hz) = tsc_khz.checked_mul(1000) else { return };
        self.put(CpuidLeaf { function: 0x15, eax: 1, ebx: 1, ecx: hz, ..CpuidLeaf::default() });
        self.put(CpuidLeaf {
            function: 0x16,
            eax: tsc_khz / 1000,
            ebx: tsc_khz / 1000,
            ..CpuidLeaf::default()
        });
        if let Some(leaf) = self.get_mut(0, 0) {
            leaf.eax = leaf.eax.max(0x16);
        }
    }

    /// As KVM_SET_CPUID2 takes it; `None` for more leaves than KVM accepts.
    pub fn to_kvm(&self) -> Option<CpuId> {
        let entries: Vec<kvm_cpuid_entry2> = self
            .0
            .iter()
            .map(|l| kvm_cpuid_entry2 {
                function: l.function,
                index: l.index,
                flags: if l.indexed { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
                eax: l.eax,
                ebx: l.ebx,
                ecx: l.ecx,
                edx: l.edx,
                ..Default::default()
            })
            .collect();
        CpuId::from_entries(&entries).ok()
    }
}

fn intersect_leaf(mine: &mut CpuidLeaf, theirs: &CpuidLeaf) {
    match (mine.function, mine.index) {
        (0 | 0x8000_0000, _) => mine.eax = mine.eax.min(theirs.eax),
        (1, _) => {
            mine.ecx &= theirs.ecx;
            mine.edx &= theirs.edx;
        }
        (6, _) => mine.eax &= theirs.eax,
        (7, 0) => {
            mine.eax = mine.eax.min(theirs.eax);
            mine.ebx &= theirs.ebx;
            mine.ecx &= theirs.ecx;
            mine.edx &= theirs.edx;
        }
        (7, _) | (0x19 | 0x8000_0021, _) => {
            mine.eax &= theirs.eax;
            mine.ebx &= theirs.ebx;
            mine.ecx &= theirs.ecx;
            mine.edx &= theirs.edx;
        }
        (0xD, 0) => {
            mine.eax &= theirs.eax;
            mine.edx &= theirs.edx;
        }
        (0xD, 1) => {
            mine.eax &= theirs.eax;
            mine.ecx &= theirs.ecx;
            mine.edx &= theirs.edx;
        }
        (0x8000_0001, _) => {
            mine.ecx &= theirs.ecx;
            mine.edx &= theirs.edx;
        }
        (0x8000_0007, _) => mine.edx &= theirs.edx,
        (0x8000_0008, _) => {
            // Physical, linear and guest-physical address widths: the smaller of each.
            let bytes = mine.eax.to_le_bytes().into_iter().zip(theirs.eax.to_le_bytes());
            for (shift, (a, b)) in [0, 8, 16, 24].into_iter().zip(bytes) {
                mine.eax = mine.eax & !(0xFF << shift) | u32::from(a.min(b)) << shift;
            }
            mine.ebx &= theirs.ebx;
        }
        _ => {}
    }
}

/// How APIC ids are made of parts: how many low bits tell apart the vCPUs of one package, and how many those
/// that share a last-level cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cores {
    /// One package for the whole VM, its members are NUMA nodes within it: CPUs of a package take the delay loop's
    /// calibration from each other, where otherwise the first CPU of each package measures it against clock ticks that
    /// another member counts.
    pub package_shift: u32,
    /// The most for which no cache spans two members, so that no guest believes that CPUs of two hosts share one.
    pub cache_shift: u32,
}

impl Cores {
    /// The parts for a VM whose vCPU `i` lives on `member_of[i]`.
    pub fn of<T: PartialEq>(member_of: &[T]) -> Cores {
        let cache_shift = (1..=7u32)
            .rev()
            .find(|shift| {
                1usize << shift <= member_of.len()
                    && member_of.chunks(1 << shift).all(|group| group.windows(2).all(|w| w[0] == w[1]))
            })
            .unwrap_or(0);
        let package_shift = member_of.len().next_power_of_two().trailing_zeros().min(8);
        Cores { package_shift, cache_shift }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, regs: [u32; 4]) -> CpuidLeaf {
        let [eax, ebx, ecx, edx] = regs;
        CpuidLeaf { function, index, indexed: matches!(function, 4 | 7 | 0xB | 0xD), eax, ebx, ecx, edx }
    }

    fn sample() -> CpuidTable {
        CpuidTable(vec![
            leaf(0, 0, [0xD, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
            leaf(1, 0, [0x306A9, 0x0010_0800, 0xFFFF_FFFF, 0xFFFF_FFFF]),
            leaf(7, 0, [0, 0xF0, 0, 0]),
            leaf(0xD, 0, [7, 832, 832, 0]),
            leaf(0xD, 1, [1, 0, 0, 0]),
            leaf(0xD, 2, [256, 576, 0, 0]),
            leaf(0x8000_0008, 0, [0x3027, 0, 0, 0]),
        ])
    }

    #[test]
    fn caches_never_span_members_and_the_package_is_one() {
        let shifts = |member_of: &[u8]| {
            let Cores { package_shift, cache_shift } = Cores::of(member_of);
            (cache_shift, package_shift)
        };
        assert_eq!(shifts(&[0, 1]), (0, 1));
        assert_eq!(shifts(&[0, 0, 1, 1]), (1, 2));
        assert_eq!(shifts(&[0, 0, 1, 2]), (0, 2));
        assert_eq!(shifts(&[0, 0, 0, 0]), (2, 2));
        assert_eq!(shifts(&[0, 0, 0]), (1, 2));
        assert_eq!(shifts(&[0]), (0, 0));
        assert_eq!(shifts(&[]), (0, 0));
    }

    #[test]
    fn intersection_keeps_common_features_only() {
        let mut other = sample();
        other.0[1].ecx = 0x0000_FFFF;
        other.0[3].eax = 3;
        other.0[6].eax = 0x2F28;
        let common = CpuidTable::intersect(&[sample(), other]);
        assert_eq!(common.get(1, 0).map(|l| l.ecx), Some(0xFFFF));
        assert_eq!(common.get(0xD, 2), None, "AVX state is gone");
        assert_eq!(common.get(0xD, 0).map(|l| (l.eax, l.ecx)), Some((3, 576)));
        assert_eq!(common.get(0x8000_0008, 0).map(|l| l.eax), Some(0x2F27));
        assert_eq!(CpuidTable::intersect(&[]), CpuidTable::default());
    }

    #[test]
    fn a_leaf_that_one_host_lacks_has_no_features() {
        let mut other = sample();
        other.0.retain(|l| l.function != 7);
        let common = CpuidTable::intersect(&[sample(), other]);
        assert_eq!(common.get(7, 0).map(|l| l.ebx), Some(0));
    }

    #[test]
    fn each_vcpu_sees_its_own_apic_id() {
        let table = sample().for_vcpu(3, Cores { package_shift: 1, cache_shift: 0 }, 2_000_000);
        assert_eq!(table.get(1, 0).map(|l| l.ebx >> 16), Some(0x0302));
        assert_eq!(table.get(0xB, 1).map(|l| (l.eax, l.ebx, l.edx)), Some((1, 2, 3)));
        assert_eq!(table.get(0x15, 0).map(|l| l.ecx), Some(2_000_000_000));
        assert_eq!(table.get(0, 0).map(|l| l.eax), Some(0x16));
        assert_eq!(table.get(0x8000_0007, 0).map(|l| l.edx), Some(1 << 8));
        assert_eq!(table.vendor(), "GenuineIntel");
    }
}
