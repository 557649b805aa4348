//! ACPI tables: RSDP, XSDT, MADT, SRAT, SLIT, FADT (hardware-reduced), DSDT.
