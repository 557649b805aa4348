//! The local APIC, as x2APIC (MSRs, through CPL 0) or xAPIC (MMIO page, straight from CPL 3).

use crate::machine;
use bare_support::cast::low32;

/// How the local APIC is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// MSRs 0x800..0x8FF.
    X2,
    /// The page at 0xFEE0_0000.
    X,
}

const IA32_APIC_BASE: u32 = 0x1B;
const XAPIC: u64 = 0xFEE0_0000;
/// Register offsets as in xAPIC mode; the MSR is 0x800 plus a sixteenth of it (SDM vol. 3, table 11-6).
const ID: u32 = 0x20;
const TPR: u32 = 0x80;
const SVR: u32 = 0xF0;
const LVT_LINT0: u32 = 0x350;
const ICR: u32 = 0x300;
const ICR_HIGH: u32 = 0x310;
/// LVT timer, initial count, current count, divide configuration.
pub const LVT_TIMER: u32 = 0x320;
/// Initial count of the timer.
pub const TIMER_INITIAL: u32 = 0x380;
/// Divide configuration of the timer.
pub const TIMER_DIVIDE: u32 = 0x3E0;
/// IA32_TSC_DEADLINE.
pub const TSC_DEADLINE: u32 = 0x6E0;

/// ICR: INIT, level, asserted.
const INIT: u32 = 0x4500;
/// ICR: start-up, vector in the low byte.
const STARTUP: u32 = 0x4600;
/// ICR: fixed delivery, edge, asserted.
const FIXED: u32 = 0x4000;

/// Destinations that the ICR names without an id (SDM vol. 3, 11.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shorthand {
    /// The sender.
    Me = 1,
    /// Every CPU.
    All = 2,
    /// Every CPU but the sender.
    Others = 3,
}

impl Mode {
    /// Name as on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::X2 => "x2apic",
            Self::X => "xapic",
        }
    }

    /// Reads a register.
    pub fn read(self, register: u32) -> u32 {
        match self {
            Self::X2 => low32(machine::rdmsr(0x800 + register / 16)),
            // SAFETY: the APIC's page is mapped and holds no memory of the guest's.
            Self::X => unsafe { ((XAPIC + u64::from(register)) as *const u32).read_volatile() },
        }
    }

    /// Writes a register.
    pub fn write(self, register: u32, value: u32) {
        match self {
            Self::X2 => machine::wrmsr(0x800 + register / 16, value.into()),
            // SAFETY: as for `read`.
            Self::X => unsafe { ((XAPIC + u64::from(register)) as *mut u32).write_volatile(value) },
        }
    }

    /// Turns this CPU's APIC on in this mode, spurious vector 0xFF, no priority threshold.
    pub fn enable(self) {
        let bits = match self {
            Self::X2 => 0xC00,
            Self::X => 0x800,
        };
        machine::wrmsr(IA32_APIC_BASE, machine::rdmsr(IA32_APIC_BASE) | bits);
        self.write(SVR, 0x1FF);
        self.write(TPR, 0);
        // Firmware may have left a PIC wired through.
        self.write(LVT_LINT0, 1 << 16);
    }

    /// This CPU's APIC id.
    pub fn id(self) -> u32 {
        match self {
            Self::X2 => self.read(ID),
            Self::X => self.read(ID) >> 24,
        }
    }

    fn send(self, target: u32, command: u32) {
        match self {
            Self::X2 => machine::wrmsr(0x800 + ICR / 16, u64::from(target) << 32 | u64::from(command)),
            Self::X => {
                self.write(ICR_HIGH, target << 24);
                self.write(ICR, command);
            }
        }
    }

    /// INIT to an APIC id.
    pub fn init(self, target: u32) {
        self.send(target, INIT);
    }

    /// Start-up IPI: real mode at `vector << 12`.
    pub fn startup(self, target: u32, vector: u8) {
        self.send(target, STARTUP | u32::from(vector));
    }

    /// A fixed interrupt.
    pub fn ipi(self, target: u32, vector: u8) {
        self.send(target, FIXED | u32::from(vector));
    }

    /// A fixed interrupt by destination shorthand.
    pub fn ipi_to(self, who: Shorthand, vector: u8) {
        self.send(0, FIXED | (who as u32) << 18 | u32::from(vector));
    }
}
