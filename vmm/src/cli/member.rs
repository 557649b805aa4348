//! `spanvm member`: members join and leave a running VM.

use super::output;
use super::vms::PlaceArgs;
use crate::config::HostPort;
use crate::control::api::{AddBody, DrainBody, RelocateBody};
use crate::control::client::VmClient;
use crate::control::end::End;
use crate::control::ops::add::AddReport;
use crate::control::ops::drain::{DrainReport, Progress};
use crate::control::ops::relocate::RelocateReport;
use clap::{Args, Subcommand};
use std::io::IsTerminal;
use std::time::Duration;

/// Longest wait for a drain; it takes as long as its pages take.
const LONGEST: Duration = Duration::from_secs(24 * 3600);
/// Between two looks at the progress.
const LOOK: Duration = Duration::from_millis(500);

/// What can be done to members.
#[derive(Debug, Subcommand)]
pub enum MemberCommand {
    /// Take a member out while the guest runs: its vCPUs, homes and pages go to the others, then its process ends.
    Drain(DrainArgs),
    /// Add a member while the guest runs: a process on this host or on another. It gets homes, and can take vCPUs.
    Add(AddArgs),
    /// Undo the drain or the addition that is under way: the VM is as it was.
    Cancel(CancelArgs),
}

/// Flags of `member`.
#[derive(Args, Debug)]
pub struct MemberArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: MemberCommand,
}

/// Flags of what moves vCPUs between members.
#[derive(Args, Debug)]
pub struct HowArgs {
    /// Longest time that the move of one vCPU may take.
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0, value_parser = super::ops::seconds)]
    pub limit: f64,
    /// Where the VM is.
    #[command(flatten)]
    pub place: PlaceArgs,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Flags of `member drain`.
#[derive(Args, Debug)]
pub struct DrainArgs {
    /// Name of the VM.
    pub vm: String,
    /// Number of the member.
    pub member: u16,
    /// How it is done.
    #[command(flatten)]
    pub how: HowArgs,
}

/// Flags of `member add`.
#[derive(Args, Debug)]
pub struct AddArgs {
    /// Name of the VM.
    pub vm: String,
    /// Host (HOST or HOST:PORT) of a node daemon, or `local` for the coordinator's own host.
    #[arg(value_name = "HOST|local")]
    pub host: String,
    /// Where the VM is.
    #[command(flatten)]
    pub place: PlaceArgs,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Flags of `migrate`.
#[derive(Args, Debug)]
pub struct MigrateArgs {
    /// Name of the VM.
    pub vm: String,
    /// Where it is to be: hosts (HOST or HOST:PORT, or `local`), separated by commas; one member each. Those that have one keep
    /// it, all other members leave.
    #[arg(long, value_name = "HOST,...", value_delimiter = ',', required = true)]
    pub to: Vec<String>,
    /// How it is done.
    #[command(flatten)]
    pub how: HowArgs,
}

/// Flags of `member cancel`.
#[derive(Args, Debug)]
pub struct CancelArgs {
    /// Name of the VM.
    pub vm: String,
    /// Where it is.
    #[command(flatten)]
    pub place: PlaceArgs,
}

/// Runs a command on members.
///
/// # Errors
/// No such VM or member, or it was not done: the text says how things stand.
pub async fn member(args: MemberArgs) -> Result<u8, End> {
    match args.command {
        MemberCommand::Drain(args) => drain(args).await,
        MemberCommand::Add(args) => add(args).await,
        MemberCommand::Cancel(args) => {
            let client = VmClient::new(args.place.place()?, &args.vm);
            client.post("/vm/members/cancel", "").await?;
            output::line("it is being undone");
            Ok(0)
        }
    }
}

/// Waits for an operation, shows how far it is, and undoes it on ^C.
async fn watched<T>(
    client: &VmClient,
    work: impl Future<Output = Result<T, End>>,
    quiet: bool,
) -> Result<T, End> {
    tokio::pin!(work);
    let shows = !quiet && std::io::stderr().is_terminal();
    let mut shown = String::new();
    loop {
        tokio::select! {
            done = &mut work => return done,
            _ = tokio::signal::ctrl_c() => {
                eprintln!("undoing it");
                // If it is over by now there is nothing to undo.
                let _ = client.post("/vm/members/cancel", "").await;
            }
            () = tokio::time::sleep(LOOK), if shows => {
                if let Ok(progress) = client.get::<Progress>("/vm/members/progress").await {
                    let line = describe(&progress);
                    if !line.is_empty() && line != shown {
                        eprintln!("{line}");
                        shown = line;
                    }
                }
            }
        }
    }
}

/// A host as the API takes it: nothing for `local`.
fn host(text: String) -> Result<Option<String>, End> {
    let host = Some(text).filter(|host| host != "local");
    match host.as_ref().map(|host| (host, host.parse::<HostPort>())) {
        Some((host, Err(e))) => Err(End::BadInput(format!("{host:?}: {e}"))),
        _ => Ok(host),
    }
}

/// Brings a VM to other hosts.
///
/// # Errors
/// No such VM, or it was not done: the text says how things stand.
pub async fn migrate(args: MigrateArgs) -> Result<u8, End> {
    let client = VmClient::new(args.how.place.place()?, &args.vm);
    let hosts = args.to.into_iter().map(host).collect::<Result<_, _>>()?;
    let body = RelocateBody { hosts, limit_s: Some(args.how.limit) };
    let work = client.call_slow::<RelocateReport>("/vm/migrate", &body, LONGEST);
    let report = watched(&client, work, args.how.json).await?;
    if args.how.json {
        output::json(&report)?;
    } else {
        let stays = if report.stays { "; the coordinator's process stays where it is" } else { "" };
        output::line(&format!(
            "{} members added, {} vCPUs moved, {} members left in {:.1} s{stays}",
            report.added.len(),
            report.vcpus.len() + report.drained.iter().map(|d| d.vcpus.len()).sum::<usize>(),
            report.drained.len(),
            report.total_ms / 1e3
        ));
    }
    Ok(0)
}

async fn add(args: AddArgs) -> Result<u8, End> {
    let client = VmClient::new(args.place.place()?, &args.vm);
    let body = AddBody { host: host(args.host)? };
    let work = client.call_slow::<AddReport>("/vm/members/add", &body, LONGEST);
    let report = watched(&client, work, args.json).await?;
    if args.json {
        output::json(&report)?;
    } else {
        output::line(&format!(
            "member {} on {} (process {}) is home of {} MiB; pause {:.0} ms, {:.1} s in all",
            report.member,
            report.host,
            report.pid,
            report.memory_home >> 20,
            report.pause_ms,
            report.total_ms / 1e3
        ));
    }
    Ok(0)
}

async fn drain(args: DrainArgs) -> Result<u8, End> {
    let client = VmClient::new(args.how.place.place()?, &args.vm);
    let body = DrainBody { member: args.member, limit_s: Some(args.how.limit) };
    let work = client.call_slow::<DrainReport>("/vm/members/drain", &body, LONGEST);
    let report = watched(&client, work, args.how.json).await?;
    if args.how.json {
        output::json(&report)?;
    } else {
        output::line(&format!(
            "member {} has left: {} vCPUs, {} pages in {:.1} s; pauses {:.0} ms and {:.0} ms",
            report.member,
            report.vcpus.len(),
            report.pages,
            report.evict_ms / 1e3,
            report.pauses_ms[0],
            report.pauses_ms[1]
        ));
    }
    Ok(0)
}

fn describe(progress: &Progress) -> String {
    if progress.what.is_empty() {
        return String::new();
    }
    let mut line = format!("{}: {}", progress.what, progress.step);
    if progress.pages > 0 {
        line += &format!(
            "; {} of {} pages left, {:.0} a second",
            progress.pages_left, progress.pages, progress.rate
        );
        if let Some(seconds) = progress.seconds_left {
            line += &format!(", {seconds:.0} s to go");
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_in_words() {
        assert_eq!(describe(&Progress::default()), "");
        let progress = Progress {
            what: "the drain of member 1".into(),
            step: "its pages go home".into(),
            pages_left: 100,
            pages: 300,
            rate: 50.0,
            seconds_left: Some(2.0),
        };
        let line = "the drain of member 1: its pages go home; 100 of 300 pages left, 50 a second, 2 s to go";
        assert_eq!(describe(&progress), line);
    }
}
