//! Model-specific registers: which ones come to user space, what the others start with, and what is answered
//! for registers that neither KVM nor we know.

/// IA32_TSC.
pub const IA32_TSC: u32 = 0x10;
/// IA32_APIC_BASE.
pub const IA32_APIC_BASE: u32 = 0x1B;
/// IA32_MISC_ENABLE.
pub const IA32_MISC_ENABLE: u32 = 0x1A0;
/// IA32_MTRR_DEF_TYPE.
pub const IA32_MTRR_DEF_TYPE: u32 = 0x2FF;
/// IA32_TSC_DEADLINE.
pub const IA32_TSC_DEADLINE: u32 = 0x6E0;

/// AMD's hardware configuration register.
pub const HWCR: u32 = 0xC001_0015;
/// What it reads as: TscFreqSel, the TSC counts at the frequency of P0 in all states (APM vol. 2, 3.2.10), which
/// Linux wants to see with a constant TSC. KVM before Linux 6.7 can't be told that.
pub const HWCR_VALUE: u64 = 1 << 24;

/// What KVM would handle by itself and must not: without the in-kernel APIC it drops writes to the deadline
/// and does not tell us about the mode.
pub const FILTERED: [u32; 3] = [IA32_APIC_BASE, IA32_TSC_DEADLINE, HWCR];

/// Values at reset that differ from KVM's: MTRRs on with write-back as default type (fixed ranges stay off, as
/// they would make the first MiB uncached), and fast strings.
pub const AT_RESET: [(u32, u64); 2] = [(IA32_MTRR_DEF_TYPE, 0x806), (IA32_MISC_ENABLE, 1)];

/// What a read of an unknown register gives: zero for those that operating systems read without expecting a
/// fault, else `None`, which is #GP.
pub fn unknown_read(msr: u32) -> Option<u64> {
    match msr {
        // IA32_PLATFORM_ID, EBL_CR_POWERON, SMI_COUNT, CORE_C-state residencies, IA32_THERM_*, TEMPERATURE_TARGET,
        // RAPL units and energy counters.
        0x17
        | 0x2A
        | 0x34
        | 0x3F8..=0x3FD
        | 0x19A..=0x19C
        | 0x1A2
        | 0x606
        | 0x611
        | 0x619
        | 0x639
        | 0x641 => Some(0),
        // AMD: NB_CFG, SYSCFG, TOP_MEM, TOP_MEM2, MMIO configuration base, patch level, OSVW.
        0xC001_001F | 0xC001_0010 | 0xC001_001A | 0xC001_001D | 0xC001_0058 | 0x8B | 0xC001_0140
        | 0xC001_0141 => Some(0),
        _ => None,
    }
}

/// Is a write to an unknown register ignored? (Else it is #GP.)
pub fn unknown_write_is_ignored(msr: u32) -> bool {
    unknown_read(msr).is_some()
}
