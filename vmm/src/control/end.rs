//! How a VM ends or why it did not start, with the words and the exit code of each.

use crate::member::VmExit;
use dsm::addr::MemberId;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Why a VM is over, or never was. `spanvm launch` ends with [`End::exit_code`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reboot, which this version answers by ending the VM.
    Reset,
    /// A vCPU triple-faulted.
    TripleFault {
        /// The vCPU.
        vcpu: u32,
        /// Its registers.
        registers: String,
    },
    /// Somebody stopped it.
    Stopped {
        /// Who, and how.
        by: String,
    },
    /// A member is gone or was cut off.
    MemberLost {
        /// Which.
        member: MemberId,
        /// Its host.
        host: String,
        /// What was seen.
        reason: String,
    },
    /// A host can't be a member of this VM.
    HostRefused {
        /// Which host.
        host: String,
        /// Why, and what to do.
        reason: String,
    },
    /// A host could not be reached, did not answer in time, or is not who it should be.
    Unreachable {
        /// Which host.
        host: String,
        /// What happened, and what to do.
        reason: String,
    },
    /// Flags, configuration or a file were wrong.
    BadInput(String),
    /// Anything else.
    Failed(String),
}

impl End {
    /// What the guest's own end means.
    pub fn from_exit(exit: VmExit) -> End {
        match exit {
            VmExit::PowerOff => End::PowerOff,
            VmExit::Reset => End::Reset,
            VmExit::TripleFault { vcpu, registers } => End::TripleFault { vcpu, registers },
            VmExit::Stopped { reason } => End::Stopped { by: reason },
        }
    }

    /// The exit code of `spanvm launch`.
    pub fn exit_code(&self) -> u8 {
        match self {
            End::PowerOff => 0,
            End::Failed(_) => 1,
            End::BadInput(_) => 2,
            End::HostRefused { .. } => 3,
            End::Unreachable { .. } => 4,
            End::MemberLost { .. } => 5,
            End::TripleFault { .. } => 6,
            End::Reset => 7,
            End::Stopped { .. } => 8,
        }
    }

    /// True when the guest or its user wanted this.
    pub fn is_regular(&self) -> bool {
        matches!(self, End::PowerOff | End::Reset | End::Stopped { .. })
    }
}

/// The table of exit codes for `--help`.
pub const EXIT_CODES: &str = "Exit codes of launch:
  0  the guest powered off
  1  the VM failed, or something else went wrong
  2  a flag, a key or a file was wrong; nothing was started
  3  a host can't be a member (no KVM, no userfaultfd, CPUs that don't match, ...)
  4  a host could not be reached, did not answer in time, or has another secret
  5  a member was lost
  6  a vCPU triple-faulted
  7  the guest asked for a reboot
  8  the VM was stopped";

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::PowerOff => f.write_str("the guest powered off"),
            End::Reset => f.write_str("the guest asked for a reboot"),
            End::TripleFault { vcpu, registers } => {
                write!(f, "vCPU {vcpu} triple-faulted (a fault while a double fault was delivered)")?;
                if registers.is_empty() { Ok(()) } else { write!(f, "\n{registers}") }
            }
            End::Stopped { by } => write!(f, "stopped: {by}"),
            End::MemberLost { member, host, reason } => {
                write!(f, "{member} on {host} is lost, and with it the pages that only it had: {reason}")
            }
            End::HostRefused { host, reason } => write!(f, "{host} can't be a member: {reason}"),
            End::Unreachable { host, reason } => write!(f, "{host}: {reason}"),
            End::BadInput(what) | End::Failed(what) => f.write_str(what),
        }
    }
}

/// [`EXIT_CODES`] and [`End::exit_code`] say the same.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_distinct_and_documented() {
        let text = String::new;
        let all = [
            End::PowerOff,
            End::Failed(text()),
            End::BadInput(text()),
            End::HostRefused { host: text(), reason: text() },
            End::Unreachable { host: text(), reason: text() },
            End::MemberLost { member: MemberId(1), host: text(), reason: text() },
            End::TripleFault { vcpu: 0, registers: text() },
            End::Reset,
            End::Stopped { by: text() },
        ];
        for (code, end) in (0u8..).zip(&all) {
            assert_eq!(end.exit_code(), code);
            assert!(EXIT_CODES.contains(&format!("\n  {code}  ")));
        }
    }
}
