//! The firmware's tables: what the guest learns about processors, memory, distances and devices (ACPI 6.5).
//!
//! The platform is hardware-reduced: no PM timer, no SCI, no 8259, no PIT. [`dsdt`] has the devices, [`tables`]
//! everything of fixed form; [`build`] lays them out behind each other and links them.

mod dsdt;
mod tables;
#[cfg(test)]
mod tests;

use crate::devices::DeviceWindow;
use crate::topology::Topology;
use acpi_tables::{Aml, rsdp::Rsdp};

/// Where the tables start: the read-only area below 1 MiB in which old systems look for the RSDP.
pub const ACPI_START: u64 = 0xE_0000;
/// First address behind the area for tables.
pub const ACPI_END: u64 = crate::boot::firmware::FIRMWARE_START;
/// Tables start at multiples of this.
const ALIGNMENT: u64 = 16;

const OEM_ID: [u8; 6] = *b"SPANVM";
const OEM_TABLE_ID: [u8; 8] = *b"SPANVM  ";
const OEM_REVISION: u32 = 1;

/// All tables, ready to be written to guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiTables {
    /// Address of the RSDP (ACPI 6.5, 5.2.5.3).
    pub rsdp: u64,
    /// Where `bytes` go.
    pub gpa: u64,
    /// The tables.
    pub bytes: Vec<u8>,
}

/// Why a VM cannot be described.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum AcpiError {
    /// The tables are larger than their area.
    #[error("ACPI tables need {need} bytes, {room} are there: the VM has too many CPUs or ranges of memory")]
    TooLarge {
        /// Bytes needed.
        need: u64,
        /// Bytes there.
        room: u64,
    },
    /// The distances are no matrix of the members, or not 10 on the diagonal and above elsewhere.
    #[error("distance from {from} to {to} is missing or impossible (10 to itself, 11 to 254 to others)")]
    Distance {
        /// Index of the row.
        from: usize,
        /// Index of the column.
        to: usize,
    },
    /// More vCPUs than names.
    #[error("{0} vCPUs, ACPI names go up to 4096")]
    TooManyCpus(usize),
}

/// Builds all tables. Proximity domain `n` is member `n`; processor UID and APIC id are the vCPU's id.
///
/// # Errors
/// See [`AcpiError`].
pub fn build(topology: &Topology, windows: &[DeviceWindow]) -> Result<AcpiTables, AcpiError> {
    if topology.vcpus.len() > 4096 {
        return Err(AcpiError::TooManyCpus(topology.vcpus.len()));
    }
    let mut area = Area { bytes: vec![0; Rsdp::len()] };
    let dsdt = area.add(&dsdt::dsdt(topology, windows));
    let linked = [
        area.add(&tables::fadt(dsdt)),
        area.add(&tables::madt(topology)),
        area.add(&tables::srat(topology)),
        area.add(&tables::slit(topology)?),
    ];
    let xsdt = area.add(&tables::xsdt(&linked));
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    area.bytes[..rsdp.len()].copy_from_slice(&rsdp);

    let (need, room) = (area.bytes.len() as u64, ACPI_END - ACPI_START);
    if need > room {
        return Err(AcpiError::TooLarge { need, room });
    }
    Ok(AcpiTables { rsdp: ACPI_START, gpa: ACPI_START, bytes: area.bytes })
}

/// The tables behind each other, the RSDP's place first.
struct Area {
    bytes: Vec<u8>,
}

impl Area {
    /// Appends a table; returns its guest-physical address.
    fn add(&mut self, table: &[u8]) -> u64 {
        let offset = (self.bytes.len() as u64).next_multiple_of(ALIGNMENT);
        while self.bytes.len() as u64 != offset {
            self.bytes.push(0);
        }
        self.bytes.extend_from_slice(table);
        ACPI_START + offset
    }
}
