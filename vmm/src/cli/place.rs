//! `spanvm vcpu place`.

use super::output;
use super::vms::PlaceArgs;
use crate::control::api::PlaceBody;
use crate::control::client::VmClient;
use crate::control::end::End;
use crate::control::ops::place::PlaceReport;
use clap::Args;
use migration::placement::Policy;
use migration::placement::planner::Round;
use std::time::Duration;

/// Longest wait for what a policy would do: it looks for some seconds.
const LOOK: Duration = Duration::from_secs(60);

/// Flags of `vcpu place`.
#[derive(Args, Debug)]
pub struct PolicyArgs {
    /// Name of the VM.
    pub vm: String,
    /// Who decides from now on: nobody but `spanvm vcpu migrate`, the load of the hosts, or the page faults of the vCPUs.
    #[arg(long, value_name = "static|balance|follow")]
    pub policy: Policy,
    /// Say what it would do, with the figures, and change nothing.
    #[arg(long)]
    pub explain: bool,
    /// Where it is.
    #[command(flatten)]
    pub place: PlaceArgs,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Sets the policy, or says what it would do.
///
/// # Errors
/// No such VM, or nothing to place.
pub async fn place(args: PolicyArgs) -> Result<u8, End> {
    let client = VmClient::new(args.place.place()?, &args.vm);
    let body = PlaceBody { policy: args.policy.to_string(), explain: args.explain };
    let report: PlaceReport = client.call_slow("/vm/vcpus/place", &body, LOOK).await?;
    if args.json {
        output::json(&report)?;
    } else if let Some(round) = &report.round {
        output::line(&explained(&report, round));
    } else {
        output::line(&format!("{}: the policy is {}", args.vm, report.policy));
    }
    Ok(0)
}

fn explained(report: &PlaceReport, round: &Round) -> String {
    let fault = round.fault_s.map_or("no faults".into(), |s| format!("a fault takes {:.0} us", s * 1e6));
    let head = format!(
        "policy {} (the one that decides: {})\nall vCPUs wait {:.3} of each second for other members; {fault}; a move takes \
         {:.1} ms\n",
        report.policy,
        report.active,
        round.waits,
        round.downtime_s * 1e3
    );
    if report.policy == Policy::Static {
        return format!("{head}\nit moves nothing");
    }
    if round.candidates.is_empty() {
        return format!("{head}\nno move would gain anything");
    }
    let rows = round.candidates.iter().map(|c| {
        vec![
            c.vcpu.to_string(),
            c.from.to_string(),
            c.to.to_string(),
            format!("{:.3}", c.own),
            format!("{:.3}", c.gain),
            format!("{:.1}", c.cost_s * 1e3),
            c.verdict.to_string(),
        ]
    });
    let heads = ["VCPU", "FROM", "TO", "OWN", "GAIN", "COST-MS", "VERDICT"];
    let legend = match report.policy {
        Policy::Balance => {
            "OWN: what the vCPU computes, in processors; GAIN: how much more even the load would be"
        }
        _ => {
            "OWN: what the vCPU waits for that member, of each second; GAIN: that, and what others wait for its own member because \
             of it"
        }
    };
    format!("{head}\n{}\n\n{legend}; COST-MS: once", output::table(&heads, &heads[..6], rows))
}
