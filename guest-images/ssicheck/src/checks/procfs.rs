//! What /proc says of a process.

use std::fs;
use std::path::PathBuf;

use crate::failure::{During, Failure};

/// The fields of /proc/PID/stat that the checks use (proc_pid_stat(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    /// Field 3: R, S, D, T, Z, ...
    pub state: char,
    /// Field 4.
    pub parent: i32,
    /// Field 39: the CPU it last ran on.
    pub processor: usize,
}

/// Reads /proc/PID/stat.
pub fn stat(pid: i32) -> Result<Stat, Failure> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).during(format!("reading {path}"))?;
    parse_stat(&text).ok_or_else(|| Failure::Other(format!("{path} is malformed: {text:?}")))
}

/// The command name (field 2) may itself contain blanks and parentheses: count from the last one.
fn parse_stat(text: &str) -> Option<Stat> {
    let (_, rest) = text.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    Some(Stat {
        state: fields.first()?.chars().next()?,
        parent: fields.get(1)?.parse().ok()?,
        processor: fields.get(36)?.parse().ok()?,
    })
}

/// Whether the process has a folder in /proc, seen by listing /proc as `ps` does.
pub fn listed(pid: i32) -> Result<bool, Failure> {
    let wanted = pid.to_string();
    let entries = fs::read_dir("/proc").during("listing /proc")?;
    Ok(entries.flatten().any(|e| e.file_name().to_str() == Some(&wanted)))
}

/// The affinity list in /proc/PID/status, as the kernel prints it.
pub fn allowed_list(pid: i32) -> Result<String, Failure> {
    let path = PathBuf::from(format!("/proc/{pid}/status"));
    let text = fs::read_to_string(&path).during(format!("reading {}", path.display()))?;
    let line = text.lines().find_map(|l| l.strip_prefix("Cpus_allowed_list:"));
    line.map(|l| l.trim().to_string())
        .ok_or_else(|| Failure::Other(format!("{} has no Cpus_allowed_list", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_parentheses_do_not_shift_the_fields() {
        let tail: Vec<String> = (5..=52).map(|n| n.to_string()).collect();
        let text = format!("7 (a) R (b c) S 1 {}", tail.join(" "));
        assert_eq!(parse_stat(&text), Some(Stat { state: 'S', parent: 1, processor: 39 }));
        assert_eq!(parse_stat("7 (x"), None);
        assert_eq!(parse_stat("7 (x) R 1"), None);
    }

    #[test]
    fn this_process_is_there() {
        let me = i32::try_from(std::process::id()).expect("a pid fits");
        assert_eq!(listed(me).ok(), Some(true));
        assert!(stat(me).is_ok() && allowed_list(me).is_ok());
    }
}
