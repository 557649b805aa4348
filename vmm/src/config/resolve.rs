//! From raw keys to a checked specification.

use super::error::ConfigError;
use super::keys::{DeviceKey, DiskKeys, LaunchKeys, MemberKeys, MembersKey};
use super::shares::{self, ShareError};
use super::size::{format_size, parse_size};
use super::spec::{DiskSpec, HostPort, MemberSpec, OnMemberLoss, VmSpec};
use super::{files, plan};
use crate::layout;
use crate::member::PageTuning;
use dsm::addr::MAX_MEMBERS;
use migration::placement::Policy;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Most vCPUs: ids stay below the xAPIC's broadcast id 255 (SDM vol. 3, 11.6.2.1).
pub const MAX_CPUS: u32 = 254;
/// Least guest memory, bytes.
pub const MIN_MEMORY: u64 = 16 << 20;
/// Most guest memory, bytes: fits 46 physical address bits with the 32-bit hole.
pub const MAX_MEMORY: u64 = 16 << 40;
/// Members and vCPUs when nothing says how many.
pub const DEFAULT_MEMBERS: u32 = 2;
/// Memory when nothing says how much, bytes.
pub const DEFAULT_MEMORY: u64 = 512 << 20;
/// Command line when none is given.
pub const DEFAULT_CMDLINE: &str = "console=ttyS0";
/// Longest command line, bytes (`COMMAND_LINE_SIZE` of x86 Linux, less what spanvm appends).
pub const MAX_CMDLINE: usize = 1792;
/// Seconds in which a broken connection between members may be made again when nothing says how many: a member that only
/// the other side misses notices that after its deadline (20 s), and then there must be time left.
pub const DEFAULT_RECONNECT: u64 = 30;
/// Least that a member's budget exceeds its share of the memory by, in parts of the share: room for pages of other homes.
pub const BUDGET_ROOM: u64 = 16;
/// Seconds to wait for an answer during start when nothing says how long.
pub const DEFAULT_START_TIMEOUT: u64 = 60;

/// Checks keys, fills in defaults, splits what is to be split, and looks at every file that is on this host.
///
/// # Errors
/// The first thing that is wrong.
pub fn resolve(keys: LaunchKeys) -> Result<VmSpec, ConfigError> {
    let name = name(keys.name.as_deref())?;
    let kernel = keys.kernel.ok_or_else(|| ConfigError::Missing {
        key: "kernel",
        hint: "give a vmlinuz or vmlinux, for example --kernel /boot/vmlinuz".into(),
    })?;
    let members = members(keys.members, keys.on, keys.cpus, keys.memory.as_deref())?;
    let spec = VmSpec {
        name,
        kernel,
        initrd: keys.initrd,
        cmdline: cmdline(keys.cmdline)?,
        cpus: members.iter().map(|m| m.cpus).sum(),
        memory: members.iter().map(|m| m.memory).sum(),
        disks: disks(keys.disks.unwrap_or_default(), &members)?,
        rng: device("rng", keys.rng.unwrap_or(DeviceKey::On(true)), members.len())?,
        console: device("console", keys.console.unwrap_or(DeviceKey::On(false)), members.len())?,
        pages: PageTuning {
            hold_us: number("hold_us", keys.hold_us, 0, 1_000_000)?,
            always: false,
            reconnect_s: number("reconnect", keys.reconnect, 0, 3600)?.unwrap_or(DEFAULT_RECONNECT),
            busy_poll: keys.busy_poll,
            budget: None,
            shards: number("shards", keys.shards, 1, 64)?.and_then(|n| u16::try_from(n).ok()),
        },
        secret_file: keys.secret_file,
        start_timeout: start_timeout(keys.start_timeout)?,
        on_member_loss: match keys.on_member_loss.as_deref() {
            None | Some("pause") => OnMemberLoss::Pause,
            Some("end") => OnMemberLoss::End,
            Some("restore") => OnMemberLoss::Restore,
            Some(other) => {
                let (problem, hint) = ("is not known", "give pause, end or restore");
                return Err(ConfigError::value("on_member_loss", other, problem, hint));
            }
        },
        policy: policy(keys.policy.as_deref(), members.len())?,
        members,
    };
    windows(&spec)?;
    check_files(&spec)?;
    Ok(spec)
}

fn policy(given: Option<&str>, members: usize) -> Result<Policy, ConfigError> {
    let Some(text) = given else { return Ok(Policy::Static) };
    let wrong = |problem: &str, hint: &str| Err(ConfigError::value("policy", text, problem, hint));
    match text.parse() {
        Err(_) => wrong("is not known", "give static, balance or follow"),
        Ok(Policy::Static) => Ok(Policy::Static),
        Ok(_) if members < 2 => wrong("has nothing to place with one member", "give the VM more members"),
        Ok(policy) => Ok(policy),
    }
}

/// Patience during the start, in seconds if it is given.
///
/// # Errors
/// Out of range.
pub fn start_timeout(given: Option<i64>) -> Result<Duration, ConfigError> {
    let seconds = number("start_timeout", given, 1, 3600)?.unwrap_or(DEFAULT_START_TIMEOUT);
    Ok(Duration::from_secs(seconds))
}

fn name(given: Option<&str>) -> Result<String, ConfigError> {
    let Some(name) = given else { return Ok(format!("vm{}", std::process::id())) };
    check_name(name).map_err(|problem| {
        ConfigError::value(
            "name",
            format!("{name:?}"),
            problem,
            "use up to 48 letters, digits, '-', '_' or '.'",
        )
    })?;
    Ok(name.to_string())
}

/// Checks the name of a VM: it becomes a folder's name and a part of messages.
///
/// # Errors
/// What is wrong with it.
pub fn check_name(name: &str) -> Result<(), String> {
    match name.chars().next() {
        None => return Err("is empty".into()),
        Some(first) if !first.is_ascii_alphanumeric() => {
            return Err("does not start with a letter or digit".into());
        }
        Some(_) => {}
    }
    if name.len() > 48 {
        return Err("is longer than 48 bytes".into());
    }
    match name.chars().find(|c| !c.is_ascii_alphanumeric() && !matches!(c, '-' | '_' | '.')) {
        Some(odd) => Err(format!("has {odd:?} in it")),
        None => Ok(()),
    }
}

fn cmdline(given: Option<String>) -> Result<String, ConfigError> {
    let cmdline = given.unwrap_or_else(|| DEFAULT_CMDLINE.into());
    if cmdline.contains(['\0', '\n']) {
        return Err(ConfigError::value(
            "cmdline",
            format!("{cmdline:?}"),
            "has a control character",
            "give one line",
        ));
    }
    if cmdline.len() > MAX_CMDLINE {
        let problem = format!("is {} bytes, the most is {MAX_CMDLINE}", cmdline.len());
        return Err(ConfigError::value("cmdline", "...", problem, "shorten it"));
    }
    Ok(cmdline)
}

fn number(key: &'static str, given: Option<i64>, least: u64, most: u64) -> Result<Option<u64>, ConfigError> {
    let Some(given) = given else { return Ok(None) };
    match u64::try_from(given) {
        Ok(n) if (least..=most).contains(&n) => Ok(Some(n)),
        _ => Err(ConfigError::value(
            key,
            given,
            "is out of range",
            format!("give a number from {least} to {most}"),
        )),
    }
}

fn cpus(key: &'static str, given: i64) -> Result<u32, ConfigError> {
    match u32::try_from(given) {
        Ok(0) => Err(ConfigError::value(key, given, "no CPU at all", "give at least one for each member")),
        Ok(n) if n <= MAX_CPUS => Ok(n),
        _ => Err(ConfigError::value(
            key,
            given,
            "is out of range",
            format!("give a number from 1 to {MAX_CPUS}"),
        )),
    }
}

fn memory(key: &'static str, text: &str, least: u64) -> Result<u64, ConfigError> {
    let bad = |problem: String, hint: String| Err(ConfigError::value(key, text, problem, hint));
    let bytes = match parse_size(text) {
        Ok(bytes) => bytes,
        Err(problem) => return bad(problem, "write a number and its unit, such as 512M or 2G".into()),
    };
    if bytes < least {
        return bad("is too little".into(), format!("the least is {}", format_size(least)));
    }
    if bytes > MAX_MEMORY {
        return bad("is too much".into(), format!("the most is {}", format_size(MAX_MEMORY)));
    }
    if bytes % plan::GRAIN != 0 {
        return bad("is not a multiple of 2M".into(), "round it".into());
    }
    Ok(bytes)
}

fn members(
    members: Option<MembersKey>,
    on: Option<Vec<String>>,
    total_cpus: Option<i64>,
    total_memory: Option<&str>,
) -> Result<Vec<MemberSpec>, ConfigError> {
    let total_cpus = total_cpus.map(|n| cpus("cpus", n)).transpose()?;
    let total_memory = total_memory.map(|text| memory("memory", text, MIN_MEMORY)).transpose()?;
    let wishes = wishes(members, on, total_cpus)?;
    let hosts = hosts(&wishes)?;
    let count = u32::try_from(wishes.len()).unwrap_or(u32::MAX);

    let cpu_wishes = wishes
        .iter()
        .map(|w| w.cpus.map(|n| cpus("member", n).map(u64::from)).transpose())
        .collect::<Result<Vec<_>, _>>()?;
    let memory_wishes = wishes
        .iter()
        .map(|w| w.memory.as_deref().map(|text| memory("member", text, plan::GRAIN)).transpose())
        .collect::<Result<Vec<_>, _>>()?;

    let all_cpus =
        total_cpus.map(u64::from).unwrap_or_else(|| cpu_wishes.iter().map(|w| w.unwrap_or(1)).sum());
    if all_cpus > u64::from(MAX_CPUS) {
        return Err(ConfigError::value(
            "cpus",
            all_cpus,
            "is out of range",
            format!("the most is {MAX_CPUS}"),
        ));
    }
    if all_cpus < u64::from(count) {
        return Err(ConfigError::value(
            "cpus",
            all_cpus,
            format!("is fewer than the {count} members"),
            "every member needs a CPU: give more CPUs or fewer members",
        ));
    }
    let all_memory = match total_memory {
        Some(bytes) => bytes,
        None if memory_wishes.iter().all(Option::is_some) => {
            memory_wishes.iter().flatten().fold(0u64, |sum, n| sum.saturating_add(*n))
        }
        None => DEFAULT_MEMORY,
    };
    if !(MIN_MEMORY..=MAX_MEMORY).contains(&all_memory) {
        let hint = format!("give {} to {} in all", format_size(MIN_MEMORY), format_size(MAX_MEMORY));
        return Err(ConfigError::value("memory", format_size(all_memory), "is out of range", hint));
    }

    let cpu_parts = shares::split(all_cpus, 1, &cpu_wishes)
        .map_err(|e| share_error("cpus", all_cpus.to_string(), e, |n| n.to_string()))?;
    let memory_parts = shares::split(all_memory, plan::GRAIN, &memory_wishes)
        .map_err(|e| share_error("memory", format_size(all_memory), e, format_size))?;
    let budgets = wishes
        .iter()
        .zip(&memory_parts)
        .map(|(w, share)| w.budget.as_deref().map(|text| budget(text, *share)).transpose())
        .collect::<Result<Vec<_>, _>>()?;
    Ok(hosts
        .into_iter()
        .zip(cpu_parts.into_iter().zip(memory_parts))
        .zip(budgets)
        .map(|((host, (cpus, memory)), budget)| MemberSpec {
            host,
            cpus: u32::try_from(cpus).unwrap_or(MAX_CPUS),
            memory,
            budget,
        })
        .collect())
}

/// What a member may keep: pages that are homed with it and that nobody else wants have nowhere else to go.
fn budget(text: &str, share: u64) -> Result<u64, ConfigError> {
    let bytes = memory("member", text, plan::GRAIN)?;
    let least = share.saturating_add(share / BUDGET_ROOM).next_multiple_of(plan::GRAIN);
    if bytes < least {
        let problem = format!("is too little for a share of {}", format_size(share));
        let hint = format!("give at least {}, or a smaller share", format_size(least));
        return Err(ConfigError::value("member", format!("budget={text}"), problem, hint));
    }
    Ok(bytes)
}

fn share_error(key: &'static str, total: String, e: ShareError, show: impl Fn(u64) -> String) -> ConfigError {
    match e {
        ShareError::Sum(sum) => ConfigError::value(
            key,
            total,
            format!("is not the sum of the members' shares, {}", show(sum)),
            "correct one of them, or leave the total out",
        ),
        ShareError::TooLittleLeft(left, open) => ConfigError::value(
            key,
            total,
            format!("leaves {} for the {open} member(s) without a share of their own", show(left)),
            "raise it, or lower the given shares",
        ),
    }
}

/// One entry per member, from whichever of the forms was used.
fn wishes(
    members: Option<MembersKey>,
    on: Option<Vec<String>>,
    total_cpus: Option<u32>,
) -> Result<Vec<MemberKeys>, ConfigError> {
    let wishes = match (members, on) {
        (Some(MembersKey::Each(each)), None) => {
            if each.is_empty() {
                return Err(ConfigError::value("members", "[]", "no member at all", "give at least one"));
            }
            each
        }
        (Some(MembersKey::Each(each)), Some(on)) => {
            return Err(ConfigError::Conflict {
                first: format!("--on {}", on.join(",")),
                second: format!("{} --member ([[members]])", each.len()),
                problem: "the members are given twice".into(),
                hint: "name the hosts in one of the two".into(),
            });
        }
        (Some(MembersKey::Count(count)), on) => {
            let most = i64::try_from(MAX_MEMBERS).unwrap_or(i64::MAX);
            if !(1..=most).contains(&count) {
                return Err(ConfigError::value(
                    "members",
                    count,
                    "is out of range",
                    format!("give a number from 1 to {most}"),
                ));
            }
            match on {
                Some(on) if i64::try_from(on.len()) != Ok(count) => {
                    return Err(ConfigError::Conflict {
                        first: format!("--members {count}"),
                        second: format!("--on {}", on.join(",")),
                        problem: format!(
                            "the number of members is given twice, and {} hosts are named",
                            on.len()
                        ),
                        hint: "leave --members out".into(),
                    });
                }
                Some(on) => named(on),
                None => vec![MemberKeys::default(); usize::try_from(count).unwrap_or(1)],
            }
        }
        (None, Some(on)) => {
            if on.is_empty() {
                return Err(ConfigError::value(
                    "on",
                    "\"\"",
                    "no host at all",
                    "give HOST[:PORT],HOST[:PORT]",
                ));
            }
            named(on)
        }
        (None, None) => {
            let count = DEFAULT_MEMBERS.min(total_cpus.unwrap_or(DEFAULT_MEMBERS));
            vec![MemberKeys::default(); usize::try_from(count).unwrap_or(1)]
        }
    };
    if wishes.len() > MAX_MEMBERS {
        return Err(ConfigError::value(
            "members",
            wishes.len(),
            "are too many",
            format!("the most is {MAX_MEMBERS}"),
        ));
    }
    Ok(wishes)
}

fn named(on: Vec<String>) -> Vec<MemberKeys> {
    on.into_iter().map(|host| MemberKeys { host: Some(host), ..MemberKeys::default() }).collect()
}

fn hosts(wishes: &[MemberKeys]) -> Result<Vec<Option<HostPort>>, ConfigError> {
    let mut hosts: Vec<Option<HostPort>> = Vec::new();
    for text in wishes.iter().map(|w| w.host.as_deref()) {
        let host = match text {
            None => None,
            Some(text) => Some(text.parse::<HostPort>().map_err(|problem| {
                ConfigError::value("on", format!("{text:?}"), problem, "write it as HOST or HOST:PORT")
            })?),
        };
        if host.is_some() && hosts.contains(&host) {
            return Err(ConfigError::value(
                "on",
                text.unwrap_or_default(),
                "is given twice",
                "a host can be one member: name it once",
            ));
        }
        hosts.push(host);
    }
    if hosts.iter().any(Option::is_some) && hosts.iter().any(Option::is_none) {
        return Err(ConfigError::value(
            "member",
            "without host",
            "some members have a host and some have none",
            "give every member a host, or none",
        ));
    }
    Ok(hosts)
}

fn member_number(key: &'static str, given: i64, members: usize) -> Result<u16, ConfigError> {
    u16::try_from(given).ok().filter(|n| usize::from(*n) < members).ok_or_else(|| {
        ConfigError::value(
            key,
            format!("member={given}"),
            "there is no such member",
            format!("members are 0 to {}", members.saturating_sub(1)),
        )
    })
}

fn device(key: &'static str, given: DeviceKey, members: usize) -> Result<Option<u16>, ConfigError> {
    match given {
        DeviceKey::On(false) => Ok(None),
        DeviceKey::On(true) => Ok(Some(0)),
        DeviceKey::Member(n) => member_number(key, n, members).map(Some),
    }
}

fn disks(given: Vec<DiskKeys>, members: &[MemberSpec]) -> Result<Vec<DiskSpec>, ConfigError> {
    let mut disks: Vec<DiskSpec> = Vec::new();
    for disk in given {
        let member = member_number("disks", disk.member, members.len())?;
        let local = members.get(usize::from(member)).is_none_or(|m| m.host.is_none());
        let path = if local { absolute(&disk.path) } else { disk.path };
        if !path.is_absolute() {
            return Err(ConfigError::value(
                "disks",
                path.display(),
                "is a relative path on another host",
                "give an absolute path",
            ));
        }
        let same_host = |other: &DiskSpec| local || other.member == member;
        if disks.iter().any(|d| d.path == path && same_host(d) && !(d.readonly && disk.readonly)) {
            return Err(ConfigError::value(
                "disks",
                path.display(),
                "is given twice",
                "two disks can share an image only when both are readonly",
            ));
        }
        disks.push(DiskSpec { path, readonly: disk.readonly, member });
    }
    Ok(disks)
}

/// The path that no later change of folder can change; links are resolved where it exists.
fn absolute(path: &Path) -> PathBuf {
    path.canonicalize().or_else(|_| std::path::absolute(path)).unwrap_or_else(|_| path.to_path_buf())
}

/// Every virtio device takes one window and one IOAPIC pin.
fn windows(spec: &VmSpec) -> Result<(), ConfigError> {
    let most = usize::try_from(layout::IOAPIC_PINS - layout::VIRTIO_GSI_BASE).unwrap_or(0);
    let others = usize::from(spec.rng.is_some()) + usize::from(spec.console.is_some());
    if spec.disks.len() + others > most {
        return Err(ConfigError::value(
            "disks",
            format!("{} disks", spec.disks.len()),
            "are too many",
            format!("{} fit beside the other devices", most - others),
        ));
    }
    Ok(())
}

fn check_files(spec: &VmSpec) -> Result<(), ConfigError> {
    files::check_file("kernel", &spec.kernel)?;
    if let Some(initrd) = &spec.initrd {
        let size = files::check_file("initrd", initrd)?.len();
        if size >= spec.memory {
            let problem = format!("is {}, the guest has {}", format_size(size), format_size(spec.memory));
            return Err(ConfigError::value(
                "initrd",
                initrd.display(),
                problem,
                "give the guest more memory",
            ));
        }
    }
    if let Some(secret) = &spec.secret_file {
        crate::control::secret::load(secret)
            .map_err(|e| ConfigError::value("secret_file", secret.display(), e.to_string(), e.hint()))?;
    }
    for disk in spec.disks.iter() {
        let local = spec.members.get(usize::from(disk.member)).is_none_or(|m| m.host.is_none());
        if local {
            files::check_disk(&disk.path, disk.readonly)?;
        }
    }
    Ok(())
}
