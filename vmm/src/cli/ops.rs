//! `spanvm pause` and `resume`: operations on a running VM.

use super::output;
use super::vms::PlaceArgs;
use crate::control::api::{MAX_LIMIT, PauseBody};
use crate::control::client::VmClient;
use crate::control::end::End;
use crate::control::ops::pause::PauseReport;
use clap::Args;

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

fn seconds(text: &str) -> Result<f64, String> {
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
