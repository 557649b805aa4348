//! Results, and how they are shown.

use std::fmt::Write as _;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::checks::Check;
use crate::topology::Topology;

/// The result of one sub-check.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SubResult {
    /// Its name, unique within the check.
    pub name: String,
    /// Whether the machine behaved as one.
    pub ok: bool,
    /// What was done, or what went wrong.
    pub note: String,
    /// Wall time in seconds.
    pub wall_s: f64,
    /// Numbers for tools, such as iteration counts.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub data: Value,
}

/// The result of one check.
#[derive(Clone, Debug)]
pub struct CheckResult {
    /// Which.
    pub check: Check,
    /// All sub-checks that finished, in order.
    pub subs: Vec<SubResult>,
    /// Why the check as a whole failed (hung, died), beyond its sub-checks.
    pub problem: Option<String>,
    /// Wall time in seconds.
    pub wall_s: f64,
}

impl CheckResult {
    /// A check passes if it ran to its end, did something, and every sub-check passed.
    pub fn pass(&self) -> bool {
        self.problem.is_none() && !self.subs.is_empty() && self.subs.iter().all(|s| s.ok)
    }

    fn word(&self) -> &'static str {
        if self.pass() { "pass" } else { "fail" }
    }

    /// Why it failed, or a summary of what it did.
    fn headline(&self) -> String {
        if let Some(problem) = &self.problem {
            return problem.clone();
        }
        match self.subs.iter().find(|s| !s.ok) {
            Some(sub) => format!("{}: {}", sub.name, sub.note),
            None if self.subs.is_empty() => "nothing was checked".into(),
            None => {
                let count = self.subs.len();
                // For litmus tests the count is the worth of the result.
                let least = self.subs.iter().filter_map(|s| s.data.get("iterations")?.as_u64()).min();
                let least = least.map_or(String::new(), |n| format!(", at least {n} iterations each"));
                format!("{count} of {count} sub-checks{least}")
            }
        }
    }
}

/// Seconds, to the millisecond.
pub fn seconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1000.0).round() / 1000.0
}

/// Whether every check of a round passed; an empty round did not.
pub fn all_pass(results: &[CheckResult]) -> bool {
    !results.is_empty() && results.iter().all(CheckResult::pass)
}

/// The JSON object of one round.
pub fn to_json(results: &[CheckResult], topology: &Topology, round: u64) -> Value {
    let mut conformance = Map::new();
    let mut details = Map::new();
    for result in results {
        let name = result.check.name().to_string();
        conformance.insert(name.clone(), json!(result.word()));
        details.insert(
            name,
            json!({
                "result": result.word(),
                "wall_s": result.wall_s,
                "problem": result.problem,
                "subs": result.subs,
            }),
        );
    }
    json!({
        "conformance": conformance,
        "details": details,
        "pass": all_pass(results),
        "round": round,
        "wall_s": results.iter().map(|r| r.wall_s).sum::<f64>(),
        "cpus": topology.cpus.len(),
        "nodes": topology.nodes,
        "cpu_list": topology.cpus,
    })
}

/// The table row(s) of one check: one line, and one more per failed sub-check.
pub fn to_rows(result: &CheckResult) -> String {
    let mut text = format!(
        "{:<18} {:<5} {:>7.1} s  {}\n",
        result.check.name(),
        result.word(),
        result.wall_s,
        result.headline()
    );
    for sub in result.subs.iter().filter(|s| !s.ok) {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "    {:<30} fail  {}", sub.name, sub.note);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sub(ok: bool) -> SubResult {
        SubResult { name: "s".into(), ok, note: "n".into(), wall_s: 0.0, data: Value::Null }
    }

    fn result(subs: Vec<SubResult>, problem: Option<String>) -> CheckResult {
        CheckResult { check: Check::Time, subs, problem, wall_s: 1.0 }
    }

    #[test]
    fn only_a_whole_check_passes() {
        assert!(result(vec![sub(true)], None).pass());
        assert!(!result(vec![], None).pass());
        assert!(!result(vec![sub(true), sub(false)], None).pass());
        assert!(!result(vec![sub(true)], Some("hung".into())).pass());
        assert!(!all_pass(&[]));
    }

    #[test]
    fn json_has_the_rows_that_tools_read() {
        let topology = Topology { cpus: vec![], spread: vec![], nodes: 2 };
        let json = to_json(&[result(vec![sub(false)], None)], &topology, 1);
        assert_eq!(json["conformance"]["time"], "fail");
        assert_eq!(json["nodes"], 2);
    }
}
