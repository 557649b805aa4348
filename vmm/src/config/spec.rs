//! A checked specification: every value is in range and all shares sum up.

use crate::member::PageTuning;
use migration::placement::Policy;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// TCP port of a node daemon unless another is given.
pub const DEFAULT_NODE_PORT: u16 = 7410;

/// Host (name or address) and port of a node daemon.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HostPort {
    /// Name or address; an IPv6 address without its brackets.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

impl FromStr for HostPort {
    type Err = String;

    /// `HOST`, `HOST:PORT`, `[V6]`, `[V6]:PORT`.
    fn from_str(text: &str) -> Result<HostPort, String> {
        let text = text.trim();
        let (host, port) = if let Some(rest) = text.strip_prefix('[') {
            let (host, rest) = rest.split_once(']').ok_or("a bracket is not closed")?;
            (host, rest.strip_prefix(':'))
        } else if text.matches(':').count() > 1 {
            (text, None)
        } else {
            match text.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            }
        };
        if host.is_empty() || host.contains(|c: char| c.is_whitespace() || c == '/' || c == ',') {
            return Err("not a host name or address".into());
        }
        let port = match port {
            None => DEFAULT_NODE_PORT,
            Some(port) => match port.parse() {
                Ok(0) | Err(_) => return Err(format!("{port:?} is not a port")),
                Ok(port) => port,
            },
        };
        Ok(HostPort { host: host.to_string(), port })
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// One member and its share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberSpec {
    /// Its host's node daemon, or `None` for a member that the launcher starts itself.
    pub host: Option<HostPort>,
    /// vCPUs that start there, at least one.
    pub cpus: u32,
    /// Bytes of guest memory whose home is there, a multiple of 2 MiB, not zero.
    pub memory: u64,
    /// Bytes of guest memory that it keeps at most; `None` for no limit.
    #[serde(default)]
    pub budget: Option<u64>,
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// Raw image or block device on its member's host; absolute.
    pub path: PathBuf,
    /// The guest can't write to it.
    pub readonly: bool,
    /// The member whose host has it.
    pub member: u16,
}

/// A VM as it is to be started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSpec {
    /// Name: a letter or digit, then letters, digits, `-`, `_`, `.`; at most 48 bytes.
    pub name: String,
    /// Kernel on the launcher's host.
    pub kernel: PathBuf,
    /// Initial RAM disk on the launcher's host.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Number of vCPUs, the sum over the members.
    pub cpus: u32,
    /// Guest memory in bytes, the sum over the members.
    pub memory: u64,
    /// The members; the first one boots the guest and coordinates.
    pub members: Vec<MemberSpec>,
    /// virtio-mmio disks, in the guest's order.
    pub disks: Vec<DiskSpec>,
    /// Member of the virtio random-number device, if there is one.
    pub rng: Option<u16>,
    /// Member of the virtio console, if there is one.
    pub console: Option<u16>,
    /// Knobs of the page engine.
    pub pages: PageTuning,
    /// File on the launcher's host with the secret that nodes and members share.
    pub secret_file: Option<PathBuf>,
    /// Longest wait for any one answer while the VM starts.
    pub start_timeout: Duration,
    /// What follows the loss of a member. Checkpoints of older versions don't have it.
    #[serde(default)]
    pub on_member_loss: OnMemberLoss,
    /// Who decides where vCPUs live.
    #[serde(default)]
    pub policy: Policy,
}

/// What follows the loss of a member.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnMemberLoss {
    /// With a checkpoint it stays paused, and says why, until `spanvm recover` brings it back; without one it is over.
    #[default]
    Pause,
    /// It is over; `spanvm recover` brings it back.
    End,
    /// It is restored from its newest checkpoint, on the hosts that answer.
    Restore,
}

impl VmSpec {
    /// True when node daemons start the members, false when the launcher does.
    pub fn uses_nodes(&self) -> bool {
        self.members.iter().any(|m| m.host.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_ports() {
        for (text, shown) in [
            ("a", "a:7410"),
            ("a:1", "a:1"),
            ("10.0.0.1:99", "10.0.0.1:99"),
            ("fe80::1", "[fe80::1]:7410"),
            ("[fe80::1]:5", "[fe80::1]:5"),
        ] {
            assert_eq!(text.parse::<HostPort>().unwrap().to_string(), shown);
        }
        for text in ["", ":5", "a:0", "a:x", "a:70000", "[fe80::1", "a b", "a/b"] {
            assert!(text.parse::<HostPort>().is_err(), "{text}");
        }
    }
}
