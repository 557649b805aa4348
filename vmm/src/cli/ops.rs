//! `spanvm pause`, `resume` and `vcpu`: operations on a running VM.

use super::output;
use super::vms::PlaceArgs;
use crate::control::api::{MAX_LIMIT, MoveBody, PauseBody};
use crate::control::client::VmClient;
use crate::control::end::End;
use crate::control::ops::moves::MoveReport;
use crate::control::ops::pause::PauseReport;
use clap::{Args, Subcommand};

/// Flags of `pause` and `resume`.
#[derive(Args, Debug)]
pub struct PauseArgs {
    /// Name of the VM.
    pub vm: String,
    /// Where it is.
    #[command(flatten)]
    pub place: PlaceArgs,
    /// Longest time that it may take; a VM that is not paused by then runs on.
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0, value_parser = seconds)]
    pub limit: f64,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

pub(super) fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if seconds > 0.0 && seconds <= MAX_LIMIT => Ok(seconds),
        _ => Err(format!("a number of seconds above 0, at most {MAX_LIMIT}")),
    }
}

fn body(by: &str, limit: f64) -> PauseBody {
    PauseBody { by: by.into(), limit_s: Some(limit) }
}

/// Pauses a VM.
///
/// # Errors
/// No such VM, or a member could not be paused.
pub async fn pause(args: PauseArgs) -> Result<u8, End> {
    let client = VmClient::new(args.place.place()?, &args.vm);
    let report: PauseReport = client.call("/vm/pause", &body("spanvm pause", args.limit)).await?;
    if args.json {
        output::json(&report)?;
    } else {
        let clock = if report.time_stopped { "its clock stands still" } else { "its clock runs on" };
        output::line(&format!("{} is paused after {:.1} ms; {clock}", args.vm, report.pause_ms));
    }
    Ok(0)
}

/// Lets a paused VM go on.
///
/// # Errors
/// No such VM, it is not paused, or a member did not answer.
pub async fn resume(args: PauseArgs) -> Result<u8, End> {
    let client = VmClient::new(args.place.place()?, &args.vm);
    client.call::<()>("/vm/resume", &body("spanvm resume", args.limit)).await?;
    if args.json {
        output::json(&serde_json::json!({ "vm": args.vm, "resumed": true }))?;
    } else {
        output::line(&format!("{} runs on", args.vm));
    }
    Ok(0)
}

/// What can be done to vCPUs.
#[derive(Debug, Subcommand)]
pub enum VcpuCommand {
    /// Move vCPUs to another member while the guest runs.
    Migrate(MigrateArgs),
    /// Let a policy move them: to where their page faults go, or away from crowded hosts.
    Place(super::place::PolicyArgs),
}

/// Flags of `vcpu`.
#[derive(Args, Debug)]
pub struct VcpuArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: VcpuCommand,
}

/// Flags of `vcpu migrate`.
#[derive(Args, Debug)]
pub struct MigrateArgs {
    /// Name of the VM.
    pub vm: String,
    /// The vCPUs, by number.
    #[arg(required = true, value_name = "ID")]
    pub vcpus: Vec<u32>,
    /// Number of the member to which they go.
    #[arg(long, value_name = "MEMBER")]
    pub to: u16,
    /// Move one after the other, and show each.
    #[arg(long)]
    pub watch: bool,
    /// Longest time that a move may take; a vCPU that has not left by then stays.
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0, value_parser = seconds)]
    pub limit: f64,
    /// Where it is.
    #[command(flatten)]
    pub place: PlaceArgs,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Runs a command on vCPUs.
///
/// # Errors
/// No such VM, vCPU or member; or a move failed: the text says where each vCPU is.
pub async fn vcpu(args: VcpuArgs) -> Result<u8, End> {
    let args = match args.command {
        VcpuCommand::Migrate(args) => args,
        VcpuCommand::Place(args) => return super::place::place(args).await,
    };
    let client = VmClient::new(args.place.place()?, &args.vm);
    let groups: Vec<Vec<u32>> =
        if args.watch { args.vcpus.iter().map(|id| vec![*id]).collect() } else { vec![args.vcpus.clone()] };
    let mut all = MoveReport::default();
    for vcpus in groups {
        let body = MoveBody { vcpus, to: args.to, limit_s: Some(args.limit) };
        let report: MoveReport = client.call("/vm/vcpus/migrate", &body).await?;
        if !args.json {
            for m in &report.moves {
                output::line(&format!(
                    "vCPU {}: member {} -> member {}, without it for {:.0} us, {} bytes",
                    m.vcpu, m.from, m.to, m.downtime_us, m.state_bytes
                ));
            }
        }
        all.moves.extend(report.moves);
        (all.epoch, all.total_ms) = (report.epoch, all.total_ms + report.total_ms);
    }
    if args.json {
        output::json(&all)?;
    }
    Ok(0)
}
