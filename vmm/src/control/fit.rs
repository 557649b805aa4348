//! Whether these hosts can make one machine together, and what it can do: pure.

use super::end::End;
use crate::kvm::cpuid::CpuidTable;
use crate::member::{HostFacts, Virtualization};

/// KVM takes a guest TSC frequency this close to the host's without scaling (`tsc_tolerance_ppm`).
const TSC_TOLERANCE_PPM: u64 = 250;

/// What the members of one VM have in common.
#[derive(Clone, Debug, PartialEq)]
pub struct Common {
    /// CPUID that all can show.
    pub cpuid: CpuidTable,
    /// TSC frequency that the guest sees, kHz: the first member's.
    pub tsc_khz: u32,
    /// What the user should know, though it is no obstacle.
    pub warnings: Vec<String>,
}

/// Compares the hosts of a VM's members; the first one's word counts.
///
/// # Errors
/// [`End::HostRefused`] naming the host that does not fit, and why.
pub fn compare(hosts: &[(String, HostFacts)]) -> Result<Common, End> {
    let Some((first_name, first)) = hosts.first() else {
        return Err(End::Failed("a VM without members".into()));
    };
    let mut warnings = Vec::new();
    for (name, facts) in hosts {
        let refuse = |reason: String| Err(End::HostRefused { host: name.clone(), reason });
        if hosts.len() > 1 && !facts.nested_paging {
            return refuse(
                "KVM uses shadow paging there, which can't see page-table writes of other members: load \
                 kvm_intel with ept=1, kvm_amd with npt=1"
                    .into(),
            );
        }
        if facts.virtualization != first.virtualization {
            return refuse(format!(
                "its CPUs are {}, those of {first_name} are {}: members need CPUs of one kind",
                kind(facts.virtualization),
                kind(first.virtualization)
            ));
        }
        let apart = u64::from(facts.tsc_khz.abs_diff(first.tsc_khz)) * 1_000_000;
        if apart > TSC_TOLERANCE_PPM * u64::from(first.tsc_khz) && !facts.tsc_scaling {
            return refuse(format!(
                "its TSC runs at {} kHz, that of {first_name} at {} kHz, and its CPU can't scale: use hosts with \
                 the same frequency, or put this host first if the others can scale",
                facts.tsc_khz, first.tsc_khz
            ));
        }
        if hosts.len() > 1 && facts.virtualization == Virtualization::Intel && facts.page_walks_write {
            warnings.push(format!(
                "{name}: page-table walks count as writes, so shared page tables bounce: load kvm_intel with eptad=0"
            ));
        }
    }
    let tables: Vec<_> = hosts.iter().map(|(_, facts)| facts.cpuid.clone()).collect();
    Ok(Common { cpuid: CpuidTable::intersect(&tables), tsc_khz: first.tsc_khz, warnings })
}

/// For people.
pub fn kind(virtualization: Virtualization) -> &'static str {
    match virtualization {
        Virtualization::Intel => "Intel (VT-x)",
        Virtualization::Amd => "AMD (AMD-V)",
        Virtualization::Software => "a software variant of KVM",
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A host that fits itself.
    pub(crate) fn facts() -> HostFacts {
        HostFacts {
            hostname: "h".into(),
            kernel: "6.1.0".into(),
            cpu_model: "cpu".into(),
            virtualization: Virtualization::Amd,
            nested_paging: true,
            page_walks_write: true,
            cpus: 2,
            memory_mib: 1024,
            swap_mib: 0,
            max_vcpus: 64,
            tsc_khz: 2_000_000,
            tsc_scaling: false,
            invariant_tsc: true,
            cpuid: CpuidTable::default(),
        }
    }

    fn with(change: impl FnOnce(&mut HostFacts)) -> Result<Common, End> {
        let mut other = facts();
        change(&mut other);
        compare(&[("a".into(), facts()), ("b".into(), other)])
    }

    #[test]
    fn who_fits_whom() {
        assert_eq!(with(|_| {}).unwrap().tsc_khz, 2_000_000);
        with(|f| f.tsc_khz = 2_000_400).unwrap();
        with(|f| (f.tsc_khz, f.tsc_scaling) = (3_000_000, true)).unwrap();
        type Change = fn(&mut HostFacts);
        let table: [(Change, &str); 3] = [
            (|f| f.nested_paging = false, "shadow paging"),
            (|f| f.virtualization = Virtualization::Intel, "one kind"),
            (|f| f.tsc_khz = 2_100_000, "2100000 kHz"),
        ];
        for (change, named) in table {
            let End::HostRefused { host, reason } = with(change).unwrap_err() else { panic!("{named}") };
            assert!(host == "b" && reason.contains(named), "{reason}");
        }
        let mut shadow = facts();
        shadow.nested_paging = false;
        compare(&[("a".into(), shadow)]).unwrap();
        assert!(compare(&[]).is_err());
    }
}
