//! The tables of fixed form: FADT, MADT, SRAT, SLIT, XSDT.

use super::{AcpiError, OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::layout::{
    IOAPIC_START, LAPIC_START, RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT,
};
use crate::topology::Topology;
use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::sdt::Sdt;

/// IAPC_BOOT_ARCH: there is no VGA (ACPI 6.5, table 5.11). No 8042 and no legacy devices either: bits clear.
const NO_VGA: u16 = 1 << 2;
/// Flag "enabled" of MADT processors and of SRAT entries.
const ENABLED: u32 = 1;
/// Largest APIC id that fits the 8-bit structures; 255 is the broadcast.
const MAX_XAPIC_ID: u32 = 254;
/// SLIT: distance to itself, and "unreachable".
const LOCAL: u8 = 10;
const UNREACHABLE: u8 = 255;

/// Length of an SDT header (ACPI 6.5, 5.2.6).
const HEADER_LEN: u32 = 36;

/// An SDT with this body.
fn sdt(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut sdt = Sdt::new(signature, HEADER_LEN, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    sdt.append_slice(body);
    sdt.as_slice().to_vec()
}

fn port(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port))
}

/// FADT (5.2.9): hardware-reduced, with sleep and reset registers.
pub fn fadt(dsdt: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .preferred_pm_profile(PmProfile::EnterpriseServer);
    fadt.iapc_boot_arch = NO_VGA.into();
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    let mut bytes = Vec::new();
    fadt.finalize().to_aml_bytes(&mut bytes);
    bytes
}

/// MADT (5.2.12): one local APIC per vCPU, one IOAPIC, no 8259 (PCAT_COMPAT clear).
pub fn madt(topology: &Topology) -> Vec<u8> {
    let low = |address: u64| u32::try_from(address).unwrap_or(u32::MAX).to_le_bytes();
    let mut body = low(LAPIC_START).to_vec();
    body.extend(0u32.to_le_bytes());
    for (id, _) in (0u32..).zip(&topology.vcpus) {
        match u8::try_from(id) {
            Ok(short) if id <= MAX_XAPIC_ID => {
                body.extend([0, 8, short, short]);
                body.extend(ENABLED.to_le_bytes());
            }
            _ => {
                body.extend([9, 16, 0, 0]);
                body.extend([id, ENABLED, id].iter().flat_map(|v| v.to_le_bytes()));
            }
        }
    }
    body.extend([1, 12, 0, 0]);
    body.extend(low(IOAPIC_START));
    body.extend(0u32.to_le_bytes());
    sdt(*b"APIC", 5, &body)
}

/// SRAT (5.2.16): each member is a proximity domain with its vCPUs and the memory that has its home there.
pub fn srat(topology: &Topology) -> Vec<u8> {
    let mut body = 1u32.to_le_bytes().to_vec();
    body.extend(0u64.to_le_bytes());
    for (id, member) in (0u32..).zip(&topology.vcpus) {
        let domain = u32::from(member.0);
        match u8::try_from(id) {
            Ok(short) if id <= MAX_XAPIC_ID => {
                let [d0, d1, d2, d3] = domain.to_le_bytes();
                body.extend([0, 16, d0, short]);
                body.extend(ENABLED.to_le_bytes());
                body.extend([0, d1, d2, d3, 0, 0, 0, 0]);
            }
            _ => {
                body.extend([2, 24, 0, 0]);
                body.extend([domain, id, ENABLED, 0, 0].iter().flat_map(|v| v.to_le_bytes()));
            }
        }
    }
    for range in &topology.memory {
        body.extend([1, 40]);
        body.extend(u32::from(range.home.0).to_le_bytes());
        body.extend([0, 0]);
        body.extend(range.start.to_le_bytes());
        body.extend(range.len.to_le_bytes());
        body.extend(0u32.to_le_bytes());
        body.extend(ENABLED.to_le_bytes());
        body.extend(0u64.to_le_bytes());
    }
    sdt(*b"SRAT", 3, &body)
}

/// SLIT (5.2.17).
///
/// # Errors
/// [`AcpiError::Distance`] for a matrix that Linux would reject.
pub fn slit(topology: &Topology) -> Result<Vec<u8>, AcpiError> {
    let members = topology.members.len();
    let mut body = (members as u64).to_le_bytes().to_vec();
    for from in 0..members {
        for to in 0..members {
            let distance = topology.distances.get(from).and_then(|row| row.get(to)).copied();
            let possible =
                |d: &u8| if from == to { *d == LOCAL } else { (LOCAL + 1..UNREACHABLE).contains(d) };
            body.push(distance.filter(possible).ok_or(AcpiError::Distance { from, to })?);
        }
    }
    Ok(sdt(*b"SLIT", 1, &body))
}

/// XSDT (5.2.8).
pub fn xsdt(tables: &[u64]) -> Vec<u8> {
    sdt(*b"XSDT", 1, &tables.iter().flat_map(|t| t.to_le_bytes()).collect::<Vec<_>>())
}
