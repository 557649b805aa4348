//! `spanvm doctor`: what this host can do, and what to change.

use super::output;
use crate::control::end::End;
use crate::control::fit;
use crate::control::host::chain;
use crate::member::{HostFacts, Virtualization};
use clap::Args;
use serde::Serialize;

/// Flags.
#[derive(Args, Debug)]
pub struct DoctorArgs {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// How good or bad a fact is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Works, but could be better or limits what can be done.
    Warn,
    /// This host can't be a member.
    Fail,
}

/// One line of the table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub check: &'static str,
    /// How it is.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do about it.
    pub advice: Option<String>,
}

#[derive(Serialize)]
struct Report {
    usable: bool,
    findings: Vec<Finding>,
    facts: Option<HostFacts>,
}

/// Looks at this host; code 3 when it can't be a member.
///
/// # Errors
/// Output that can't be made.
pub async fn run(args: DoctorArgs) -> Result<u8, End> {
    let probed =
        tokio::task::spawn_blocking(HostFacts::probe).await.map_err(|e| End::Failed(e.to_string()))?;
    let (findings, facts) = match probed {
        Ok(facts) => (findings(&facts), Some(facts)),
        Err(e) => {
            let found = Finding { check: "host", verdict: Verdict::Fail, found: chain(&e), advice: None };
            (vec![found], None)
        }
    };
    let usable = findings.iter().all(|f| f.verdict != Verdict::Fail);
    if args.json {
        output::json(&Report { usable, findings, facts })?;
    } else {
        let rows = findings.iter().map(|f| {
            let verdict = match f.verdict {
                Verdict::Ok => "ok",
                Verdict::Warn => "warn",
                Verdict::Fail => "FAIL",
            };
            let advice = f.advice.as_ref().map_or(String::new(), |advice| format!("; {advice}"));
            vec![f.check.to_string(), verdict.to_string(), format!("{}{advice}", f.found)]
        });
        output::line(&output::table(&["CHECK", "", "FOUND"], &[], rows));
    }
    Ok(if usable { 0 } else { 3 })
}

/// What facts mean: pure.
fn findings(facts: &HostFacts) -> Vec<Finding> {
    let finding = |check, verdict, found: String, advice: Option<&str>| Finding {
        check,
        verdict,
        found,
        advice: advice.map(str::to_string),
    };
    let software = facts.virtualization == Virtualization::Software;
    let intel = facts.virtualization == Virtualization::Intel;
    vec![
        finding("kernel", Verdict::Ok, format!("Linux {}", facts.kernel), None),
        finding("cpu", Verdict::Ok, format!("{}, {} online", facts.cpu_model, facts.cpus), None),
        finding("memory", Verdict::Ok, format!("{} MiB", facts.memory_mib), None),
        finding("userfaultfd", Verdict::Ok, "works for KVM's faults".into(), None),
        finding(
            "kvm",
            if software { Verdict::Warn } else { Verdict::Ok },
            fit::kind(facts.virtualization).into(),
            software.then_some(
                "bare-metal test guests run, Linux does not: use a host with VT-x or AMD-V for it",
            ),
        ),
        finding(
            "nested paging",
            if facts.nested_paging { Verdict::Ok } else { Verdict::Warn },
            if facts.nested_paging {
                "on".into()
            } else {
                "off (shadow paging): VMs of one member only".into()
            },
            (!facts.nested_paging).then_some("load kvm_intel with ept=1, kvm_amd with npt=1"),
        ),
        finding(
            "page walks",
            if facts.page_walks_write && !software { Verdict::Warn } else { Verdict::Ok },
            if facts.page_walks_write {
                "count as writes, so page tables that members share bounce".into()
            } else {
                "don't count as writes".into()
            },
            (facts.page_walks_write && intel).then_some("load kvm_intel with eptad=0"),
        ),
        finding(
            "tsc",
            if facts.invariant_tsc { Verdict::Ok } else { Verdict::Warn },
            format!(
                "{} kHz, {}, {}",
                facts.tsc_khz,
                if facts.invariant_tsc { "invariant" } else { "not invariant" },
                if facts.tsc_scaling { "can be scaled" } else { "can't be scaled" }
            ),
            (!facts.invariant_tsc).then_some("time is exact only while the CPU's frequency does not change"),
        ),
        finding("vcpus", Verdict::Ok, format!("{} recommended at most", facts.max_vcpus), None),
    ]
}
