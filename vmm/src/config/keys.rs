//! The raw keys, as flags and as TOML, and how one overrides the other.

use super::error::ConfigError;
use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::fmt;
use std::path::{Path, PathBuf};

/// Every key, absent unless given. Nothing is checked yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LaunchKeys {
    /// Name of the VM.
    pub name: Option<String>,
    /// Kernel image.
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: Option<String>,
    /// vCPUs in all.
    pub cpus: Option<i64>,
    /// Memory in all, such as `2G`.
    pub memory: Option<String>,
    /// Members: how many local ones, or one table each.
    pub members: Option<MembersKey>,
    /// Hosts of the members, as `HOST[:PORT]`.
    pub on: Option<Vec<String>>,
    /// Disks.
    pub disks: Option<Vec<DiskKeys>>,
    /// The random-number device: on, off, or on that member.
    pub rng: Option<DeviceKey>,
    /// The virtio console: on, off, or on that member.
    pub console: Option<DeviceKey>,
    /// Longest hold time of a page, microseconds.
    pub hold_us: Option<i64>,
    /// Number of userfaultfds per member.
    pub shards: Option<i64>,
    /// Whether members look for what a quick peer says next instead of sleeping until it comes.
    pub busy_poll: Option<bool>,
    /// For so many seconds a connection between members that broke may be made again; 0 for not at all.
    pub reconnect: Option<i64>,
    /// File with the shared secret.
    pub secret_file: Option<PathBuf>,
    /// Longest wait for any one answer during start, seconds.
    pub start_timeout: Option<i64>,
    /// What follows the loss of a member: `end` or `restore`.
    pub on_member_loss: Option<String>,
    /// Who decides where vCPUs live: `static`, `balance` or `follow`.
    pub policy: Option<String>,
}

/// `members = 2` or `[[members]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MembersKey {
    /// So many, on this host unless `on` says where.
    Count(i64),
    /// One entry each.
    Each(Vec<MemberKeys>),
}

/// One `[[members]]` entry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MemberKeys {
    /// `HOST[:PORT]` of its node daemon.
    pub host: Option<String>,
    /// Its vCPUs.
    pub cpus: Option<i64>,
    /// Its memory, such as `1G`.
    pub memory: Option<String>,
    /// What it may keep of the guest's memory, such as `1200M`; all of it unless given.
    pub budget: Option<String>,
}

/// One `[[disks]]` entry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskKeys {
    /// Image file or block device on its member's host.
    pub path: PathBuf,
    /// The guest can't write to it.
    #[serde(default)]
    pub readonly: bool,
    /// Its member; the first one unless given.
    #[serde(default)]
    pub member: i64,
}

/// `true`, `false`, or a member's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKey {
    /// On the first member, or not at all.
    On(bool),
    /// On this member.
    Member(i64),
}

impl LaunchKeys {
    /// Reads a TOML file. Relative paths of kernel, initrd, secret and disks are taken from the file's folder.
    ///
    /// # Errors
    /// An unreadable file, a syntax error, an unknown key, a value of the wrong type.
    pub fn from_file(path: &Path) -> Result<LaunchKeys, ConfigError> {
        let file = |problem: String, hint: &str| ConfigError::File {
            path: path.to_path_buf(),
            problem,
            hint: hint.to_string(),
        };
        super::files::check_file("config", path)?;
        let text = std::fs::read_to_string(path)
            .map_err(|e| file(e.to_string(), "give a TOML file that can be read"))?;
        let mut keys: LaunchKeys = toml::from_str(&text).map_err(|e| {
            file(e.to_string().trim_end().to_string(), "`spanvm launch --help` lists the keys")
        })?;
        keys.anchor(path.parent().unwrap_or(Path::new("")));
        Ok(keys)
    }

    /// Makes relative paths relative to `folder`. Disk paths on other hosts are absolute already or get
    /// refused later.
    fn anchor(&mut self, folder: &Path) {
        let remote = self.on.is_some()
            || matches!(&self.members, Some(MembersKey::Each(all)) if all.iter().any(|m| m.host.is_some()));
        for path in [&mut self.kernel, &mut self.initrd, &mut self.secret_file].into_iter().flatten() {
            *path = folder.join(&path);
        }
        if !remote {
            for disk in self.disks.iter_mut().flatten() {
                disk.path = folder.join(&disk.path);
            }
        }
    }

    /// These keys where they are given, `below` where they are not. Lists are replaced as a whole, and
    /// `members` and `on` are one choice: giving either replaces both.
    pub fn over(self, below: LaunchKeys) -> LaunchKeys {
        let (members, on) = if self.members.is_some() || self.on.is_some() {
            (self.members, self.on)
        } else {
            (below.members, below.on)
        };
        LaunchKeys {
            name: self.name.or(below.name),
            kernel: self.kernel.or(below.kernel),
            initrd: self.initrd.or(below.initrd),
            cmdline: self.cmdline.or(below.cmdline),
            cpus: self.cpus.or(below.cpus),
            memory: self.memory.or(below.memory),
            members,
            on,
            disks: self.disks.or(below.disks),
            rng: self.rng.or(below.rng),
            console: self.console.or(below.console),
            hold_us: self.hold_us.or(below.hold_us),
            shards: self.shards.or(below.shards),
            busy_poll: self.busy_poll.or(below.busy_poll),
            reconnect: self.reconnect.or(below.reconnect),
            secret_file: self.secret_file.or(below.secret_file),
            start_timeout: self.start_timeout.or(below.start_timeout),
            on_member_loss: self.on_member_loss.or(below.on_member_loss),
            policy: self.policy.or(below.policy),
        }
    }
}

/// Splits `a=1,b=2,c` into pairs; a word without `=` has no value.
fn pairs(text: &str) -> impl Iterator<Item = (&str, Option<&str>)> {
    text.split(',').map(|part| match part.split_once('=') {
        Some((key, value)) => (key.trim(), Some(value.trim())),
        None => (part.trim(), None),
    })
}

impl MemberKeys {
    /// Parses a `--member host=H,cpus=N,memory=SIZE,budget=SIZE` flag.
    ///
    /// # Errors
    /// An unknown or repeated word, or a number that is none.
    pub fn from_flag(text: &str) -> Result<MemberKeys, ConfigError> {
        let bad = |problem: String| {
            ConfigError::value(
                "member",
                text,
                problem,
                "write it as host=H:PORT,cpus=2,memory=1G,budget=1200M",
            )
        };
        let mut keys = MemberKeys::default();
        for (key, value) in pairs(text) {
            let value =
                value.filter(|v| !v.is_empty()).ok_or_else(|| bad(format!("{key:?} has no value")))?;
            let twice = match key {
                "host" => keys.host.replace(value.to_string()).is_some(),
                "memory" => keys.memory.replace(value.to_string()).is_some(),
                "budget" => keys.budget.replace(value.to_string()).is_some(),
                "cpus" => {
                    let cpus = value.parse().map_err(|_| bad(format!("cpus={value} is not a number")))?;
                    keys.cpus.replace(cpus).is_some()
                }
                _ => return Err(bad(format!("{key:?} is not a member's key"))),
            };
            if twice {
                return Err(bad(format!("{key} is given twice")));
            }
        }
        Ok(keys)
    }
}

impl DiskKeys {
    /// Parses a `--disk PATH[,readonly][,member=N]` flag.
    ///
    /// # Errors
    /// No path, or an unknown word.
    pub fn from_flag(text: &str) -> Result<DiskKeys, ConfigError> {
        let bad = |problem: String| {
            ConfigError::value("disks", text, problem, "write it as PATH, PATH,readonly or PATH,member=1")
        };
        let (path, rest) = match text.split_once(',') {
            Some((path, rest)) => (path, Some(rest)),
            None => (text, None),
        };
        let path = path.strip_prefix("path=").unwrap_or(path);
        if path.is_empty() {
            return Err(bad("has no path".into()));
        }
        let mut keys = DiskKeys { path: PathBuf::from(path), ..DiskKeys::default() };
        for (key, value) in rest.into_iter().flat_map(pairs) {
            match (key, value) {
                ("readonly" | "ro", None) | ("readonly", Some("true")) => keys.readonly = true,
                ("readonly", Some("false")) => keys.readonly = false,
                ("member", Some(value)) => {
                    keys.member =
                        value.parse().map_err(|_| bad(format!("member={value} is not a number")))?;
                }
                _ => return Err(bad(format!("{key:?} is not a disk's key"))),
            }
        }
        Ok(keys)
    }
}

impl DeviceKey {
    /// Parses `on`, `off` or a member's number.
    ///
    /// # Errors
    /// Anything else.
    pub fn from_flag(key: &'static str, text: &str) -> Result<DeviceKey, ConfigError> {
        match text {
            "on" | "true" => Ok(DeviceKey::On(true)),
            "off" | "false" => Ok(DeviceKey::On(false)),
            _ => text.parse().map(DeviceKey::Member).map_err(|_| {
                ConfigError::value(key, text, "not on, off or a member", "give on, off or a member's number")
            }),
        }
    }
}

impl<'de> Deserialize<'de> for DeviceKey {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<DeviceKey, D::Error> {
        struct Key;
        impl Visitor<'_> for Key {
            type Value = DeviceKey;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("true, false, or a member's number")
            }
            fn visit_bool<E: de::Error>(self, on: bool) -> Result<DeviceKey, E> {
                Ok(DeviceKey::On(on))
            }
            fn visit_i64<E: de::Error>(self, member: i64) -> Result<DeviceKey, E> {
                Ok(DeviceKey::Member(member))
            }
        }
        from.deserialize_any(Key)
    }
}

impl<'de> Deserialize<'de> for MembersKey {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<MembersKey, D::Error> {
        struct Key;
        impl<'de> Visitor<'de> for Key {
            type Value = MembersKey;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of members, or one [[members]] table for each")
            }
            fn visit_i64<E: de::Error>(self, count: i64) -> Result<MembersKey, E> {
                Ok(MembersKey::Count(count))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<MembersKey, A::Error> {
                let mut each = Vec::new();
                while let Some(member) = seq.next_element()? {
                    each.push(member);
                }
                Ok(MembersKey::Each(each))
            }
        }
        from.deserialize_any(Key)
    }
}
