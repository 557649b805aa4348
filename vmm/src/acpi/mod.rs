//! The firmware's tables: what the guest learns about processors, memory, distances and devices (ACPI 6.5).

/// Where the tables start: the read-only area below 1 MiB in which old systems look for the RSDP.
pub const ACPI_START: u64 = 0xE_0000;

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
