//! What this host can do for a VM, and each reason why it can't.

use crate::kvm::cpuid::CpuidTable;
use crate::kvm::vm::shows_tsc_deadline;
use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// What executes guest code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Virtualization {
    /// VT-x (`kvm_intel`).
    Intel,
    /// AMD-V (`kvm_amd`).
    Amd,
    /// A software variant of KVM: neither `kvm_intel` nor `kvm_amd` is loaded. Bare-metal test guests run;
    /// Linux as a guest does not.
    Software,
}

/// Why this host can't be a member.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// No device node.
    #[error("/dev/kvm does not exist: load kvm_intel or kvm_amd, or enable virtualisation in the firmware")]
    NoKvm,
    /// No right to use it.
    #[error("no permission to open /dev/kvm: add the user to the group kvm, or run as root")]
    KvmPermission,
    /// Something else is wrong with KVM.
    #[error("/dev/kvm is not usable: {0}")]
    KvmBroken(String),
    /// A KVM without something that we need.
    #[error("this kernel's KVM lacks {0}: Linux 5.10 and later have it")]
    MissingCapability(&'static str),
    /// userfaultfd can't be opened. The text says what to do.
    #[error("{0}")]
    NoUserfaultfd(String),
}

/// What a host offers, sent to the coordinator before it plans a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostFacts {
    /// Host name.
    pub hostname: String,
    /// Kernel release, such as `6.1.0-40-amd64`.
    pub kernel: String,
    /// CPU model name.
    pub cpu_model: String,
    /// What executes guest code.
    pub virtualization: Virtualization,
    /// False with shadow paging (`npt=0`, `ept=0`), which multi-member guests can't use. The software
    /// variant counts as true: its guests are test programs that never edit their page tables.
    pub nested_paging: bool,
    /// True when the walker's accesses to guest page tables count as writes (AMD; Intel with `eptad=1`), so
    /// page tables that two members share bounce.
    pub page_walks_write: bool,
    /// CPUs that this process may use.
    pub cpus: u32,
    /// Physical memory in MiB.
    pub memory_mib: u64,
    /// Swap space in MiB.
    pub swap_mib: u64,
    /// Most vCPUs that KVM recommends for one VM.
    pub max_vcpus: u32,
    /// TSC frequency in kHz as KVM reports it.
    pub tsc_khz: u32,
    /// KVM can scale a guest's TSC to another frequency.
    pub tsc_scaling: bool,
    /// The TSC runs at one rate in all power states.
    pub invariant_tsc: bool,
    /// What KVM can show to a guest, already without what spanvm hides.
    pub cpuid: CpuidTable,
}

/// What must be there, and its name for people.
const NEEDED: [(Cap, &str); 5] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::X86UserSpaceMsr, "KVM_CAP_X86_USER_SPACE_MSR"),
    (Cap::X86MsrFilter, "KVM_CAP_X86_MSR_FILTER"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
];

impl HostFacts {
    /// Looks at this host. Takes a few milliseconds.
    ///
    /// # Errors
    /// The first reason why the host can't be a member.
    pub fn probe() -> Result<HostFacts, HostError> {
        let kvm = open_kvm(Path::new("/dev/kvm"))?;
        if let Some((_, name)) = NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(HostError::MissingCapability(name));
        }
        dsm::region::probe().map_err(|e| HostError::NoUserfaultfd(e.to_string()))?;
        let modules = Modules::read(Path::new("/sys/module"));
        let supported = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(|e| HostError::KvmBroken(format!("KVM_GET_SUPPORTED_CPUID: {e}")))?;
        let is_intel = modules.virtualization == Virtualization::Intel;
        let cpuid = CpuidTable::from_supported(&supported, shows_tsc_deadline(&kvm, is_intel));
        let tsc_khz = tsc_khz(&kvm).ok_or_else(|| {
            HostError::KvmBroken("it does not know the TSC's frequency (KVM_GET_TSC_KHZ)".into())
        })?;
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Ok(HostFacts {
            hostname: first_line("/proc/sys/kernel/hostname").unwrap_or_else(|| "localhost".into()),
            kernel: first_line("/proc/sys/kernel/osrelease").unwrap_or_default(),
            cpu_model: field("/proc/cpuinfo", "model name").unwrap_or_default(),
            virtualization: modules.virtualization,
            nested_paging: modules.nested_paging,
            page_walks_write: modules.page_walks_write,
            cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
            memory_mib: mebibytes("MemTotal"),
            swap_mib: mebibytes("SwapTotal"),
            max_vcpus: u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX),
            tsc_khz,
            tsc_scaling: kvm.check_extension(Cap::TscControl),
            invariant_tsc: host_cpuid_edx(0x8000_0007) & 1 << 8 != 0,
            cpuid,
        })
    }
}

/// A line of /proc/meminfo.
fn mebibytes(what: &str) -> u64 {
    let kib = field("/proc/meminfo", what).and_then(|v| v.trim_end_matches(" kB").parse::<u64>().ok());
    kib.map_or(0, |kib| kib / 1024)
}

/// The host's TSC frequency in kHz as KVM sees it.
pub fn host_tsc_khz() -> Option<u32> {
    tsc_khz(&Kvm::new().ok()?)
}

fn tsc_khz(kvm: &Kvm) -> Option<u32> {
    let khz = kvm.create_vm().ok()?.create_vcpu(0).ok()?.get_tsc_khz().ok()?;
    (khz != 0).then_some(khz)
}

fn open_kvm(path: &Path) -> Result<Kvm, HostError> {
    let c_path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes());
    let c_path = c_path.map_err(|_| HostError::NoKvm)?;
    let kvm = Kvm::new_with_path(&c_path).map_err(|e| match e.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => HostError::NoKvm,
        libc::EACCES | libc::EPERM => HostError::KvmPermission,
        _ => HostError::KvmBroken(e.to_string()),
    })?;
    match kvm.get_api_version() {
        12 => Ok(kvm),
        version => Err(HostError::KvmBroken(format!("it speaks version {version} of the API, not 12"))),
    }
}

/// What the parameters of KVM's modules say.
#[derive(Debug, PartialEq, Eq)]
struct Modules {
    virtualization: Virtualization,
    nested_paging: bool,
    page_walks_write: bool,
}

impl Modules {
    fn read(root: &Path) -> Modules {
        let parameter = |module: &str, name: &str| {
            let text = std::fs::read_to_string(root.join(module).join("parameters").join(name)).ok()?;
            Some(matches!(text.trim(), "Y" | "1"))
        };
        // Either may be built in and idle; the other one's parameters then don't exist or say 0.
        if let Some(nested_paging) = parameter("kvm_intel", "ept") {
            // Without the parameter the processor has no A/D bits in EPT.
            let page_walks_write = parameter("kvm_intel", "eptad").unwrap_or(false);
            return Modules { virtualization: Virtualization::Intel, nested_paging, page_walks_write };
        }
        if let Some(nested_paging) = parameter("kvm_amd", "npt") {
            return Modules { virtualization: Virtualization::Amd, nested_paging, page_walks_write: true };
        }
        Modules { virtualization: Virtualization::Software, nested_paging: true, page_walks_write: false }
    }
}

fn host_cpuid_edx(leaf: u32) -> u32 {
    std::arch::x86_64::__cpuid(leaf).edx
}

fn first_line(path: &str) -> Option<String> {
    Some(std::fs::read_to_string(path).ok()?.lines().next()?.trim().to_owned())
}

/// The value of the first line `name : value`.
fn field(path: &str, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find(|l| l.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn module_parameters() {
        use Virtualization::{Amd, Intel, Software};
        type Case = (&'static [(&'static str, &'static str)], Virtualization, bool, bool);
        let cases: [Case; 5] = [
            (&[], Software, true, false),
            (
                &[("kvm_intel/parameters/ept", "Y\n"), ("kvm_intel/parameters/eptad", "N\n")],
                Intel,
                true,
                false,
            ),
            (
                &[("kvm_intel/parameters/ept", "N\n"), ("kvm_intel/parameters/eptad", "Y\n")],
                Intel,
                false,
                true,
            ),
            (&[("kvm_amd/parameters/npt", "Y\n")], Amd, true, true),
            (&[("kvm_amd/parameters/npt", "0\n")], Amd, false, true),
        ];
        for (files, virtualization, nested_paging, page_walks_write) in cases {
            let root = tempfile::tempdir().unwrap();
            for (path, text) in files {
                let path = root.path().join(path);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, text).unwrap();
            }
            let expected = Modules { virtualization, nested_paging, page_walks_write };
            assert_eq!(Modules::read(root.path()), expected, "{files:?}");
        }
    }

    #[test]
    fn what_is_wrong_with_kvm_is_named() {
        assert!(matches!(open_kvm(Path::new("/nowhere/kvm")), Err(HostError::NoKvm)));
        assert!(matches!(open_kvm(Path::new("/dev/null")), Err(HostError::KvmBroken(_))));
    }

    #[test]
    fn this_host_is_described_or_refused() {
        match HostFacts::probe() {
            Ok(facts) => {
                assert!(facts.tsc_khz > 100_000 && facts.cpus > 0 && facts.memory_mib > 0, "{facts:?}");
                assert!(facts.cpuid.get(1, 0).is_some());
            }
            Err(e) => assert!(e.to_string().len() > 20, "{e}"),
        }
    }
}
