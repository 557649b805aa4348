//! `spanvm checkpoint`, `restore` and `recover`.

use super::launch::{Session, StartArgs};
use super::output;
use super::vms::PlaceArgs;
use crate::config::{HostPort, OnMemberLoss, VmSpec, resolve};
use crate::control::client::VmClient;
use crate::control::end::End;
use crate::control::launcher;
use crate::control::ops::checkpoint::{CheckpointBody, CheckpointReport};
use crate::control::recovery;
use crate::control::restore::{Machine, RestoreOrder};
use crate::member::PageTuning;
use clap::Args;
use migration::checkpoint::{Manifest, manifest, newest};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longest time that one checkpoint may take.
const LONGEST: Duration = Duration::from_secs(3600);

/// Flags of `checkpoint`.
#[derive(Args, Debug)]
pub struct CheckpointArgs {
    /// Name of the VM.
    pub vm: String,
    /// Folder of the guest's checkpoints, on the host of the VM's first member. Made if it does not exist.
    #[arg(long, value_name = "DIR")]
    pub to: PathBuf,
    /// Where the VM is.
    #[command(flatten)]
    pub place: PlaceArgs,
    /// Save all pages, even where those that changed would do.
    #[arg(long)]
    pub full: bool,
    /// End the VM afterwards; the guest does not run on.
    #[arg(long, conflicts_with = "every")]
    pub stop: bool,
    /// Make another one every so many seconds, until the VM ends or this command is interrupted.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub every: Option<u32>,
    /// End after so many checkpoints.
    #[arg(long, value_name = "N", requires = "every", value_parser = clap::value_parser!(u32).range(1..))]
    pub count: Option<u32>,
    /// Longest time for each step while the guest stands still; one that takes longer fails, and the guest goes on.
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0, value_parser = super::ops::seconds)]
    pub limit: f64,
    /// Print JSON, a line for each checkpoint.
    #[arg(long)]
    pub json: bool,
}

/// Saves a VM, once or again and again.
///
/// # Errors
/// No such VM, or the checkpoint failed; the VM runs on, and the checkpoint before is whole.
pub async fn checkpoint(args: CheckpointArgs) -> Result<u8, End> {
    let to = if args.place.on.is_some() {
        args.to.clone()
    } else {
        std::path::absolute(&args.to)
            .map_err(|e| End::BadInput(format!("--to {}: {e}", args.to.display())))?
    };
    let client = VmClient::new(args.place.place()?, &args.vm);
    let body = CheckpointBody {
        to,
        full: args.full,
        stop: args.stop,
        by: "spanvm checkpoint".into(),
        limit_s: Some(args.limit),
    };
    let mut made = 0;
    loop {
        let start = Instant::now();
        let report: CheckpointReport = client.call_slow("/vm/checkpoint", &body, LONGEST).await?;
        made += 1;
        if args.json {
            output::line(&serde_json::to_string(&report).map_err(|e| End::Failed(e.to_string()))?);
        } else {
            output::line(&text(&report));
        }
        let Some(every) = args.every.filter(|_| args.count.is_none_or(|count| made < count)) else {
            return Ok(0);
        };
        tokio::time::sleep(Duration::from_secs(every.into()).saturating_sub(start.elapsed())).await;
    }
}

fn text(report: &CheckpointReport) -> String {
    let kind = if report.full { "full" } else { "what changed" };
    let mut text = format!(
        "{}: {kind}, {} pages, {:.1} MiB; the guest stood still for {:.0} ms, safe after {:.0} ms",
        report.folder.display(),
        report.pages,
        mebibytes(report.bytes),
        report.pause_ms,
        report.total_ms
    );
    for warning in &report.warnings {
        text.push_str("\nwarning: ");
        text.push_str(warning);
    }
    text
}

#[allow(clippy::cast_precision_loss)] // For people.
fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Flags of `restore`.
#[derive(Args, Debug)]
pub struct RestoreArgs {
    /// Folder of checkpoints, of which the newest is taken, or of one of them; on the host of the first member.
    pub dir: PathBuf,
    /// Name of the VM [default: that of the checkpoint].
    #[arg(long)]
    pub name: Option<String>,
    /// Members on this host [default: as many as the VM had].
    #[arg(long, value_name = "N", conflicts_with = "on", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub members: Option<u16>,
    /// Hosts of the members, whose node daemons to ask; the first one has DIR.
    #[arg(long, value_name = "HOST[:PORT],..", value_delimiter = ',')]
    pub on: Vec<String>,
    /// How it is to start.
    #[command(flatten)]
    pub start: StartArgs,
}

/// Brings a VM back from its newest checkpoint; returns the exit code.
///
/// # Errors
/// Flags that make no sense, or a checkpoint on this host that can't be read.
pub async fn restore(args: RestoreArgs) -> Result<u8, End> {
    let hosts = hosts(&args.on)?;
    let is_local = hosts.is_empty();
    let saved = if is_local { Some(look(&args.dir)?) } else { None };
    let hosts = match (&saved, args.members) {
        (Some(saved), members) => vec![None; members.map_or(saved.members.len(), usize::from).max(1)],
        (None, _) => hosts,
    };
    let name = match (args.name, &saved) {
        (Some(name), _) => name,
        (None, Some(saved)) => saved.name.clone(),
        (None, None) => return Err(End::BadInput("--on: give the VM's --name, too".into())),
    };
    let dir = if is_local {
        std::path::absolute(&args.dir).map_err(|e| End::BadInput(format!("{}: {e}", args.dir.display())))?
    } else {
        args.dir
    };
    start(name, RestoreOrder { dir: Some(dir), hosts }, args.start).await
}

/// Flags of `recover`.
#[derive(Args, Debug)]
pub struct RecoverArgs {
    /// Name of the VM that lost a member.
    pub vm: String,
    /// Members on this host [default: as many as the VM had].
    #[arg(long, value_name = "N", conflicts_with = "on", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub members: Option<u16>,
    /// Hosts of the members, whose node daemons to ask; the first one was the VM's first and has its checkpoints
    /// [default: those of its hosts that answer].
    #[arg(long, value_name = "HOST[:PORT],..", value_delimiter = ',')]
    pub on: Vec<String>,
    /// How it is to start.
    #[command(flatten)]
    pub start: StartArgs,
}

/// Brings a VM that lost a member back from its newest checkpoint, under its name; returns the exit code.
///
/// # Errors
/// No checkpoint of it is known, or the host that has them does not answer.
pub async fn recover(mut args: RecoverArgs) -> Result<u8, End> {
    let mut hosts = hosts(&args.on)?;
    if hosts.is_empty() {
        let record = recovery::here(&args.vm)?;
        args.start.secret_file = args.start.secret_file.or(record.secret_file);
        hosts = match args.members {
            Some(members) => vec![None; members.into()],
            None => {
                let secret = super::node::load(args.start.secret_file.as_deref())?;
                recovery::remaining(&record.hosts, secret.as_ref()).await
            }
        };
        if let Some(Some(first)) =
            record.hosts.first().filter(|first| args.members.is_none() && hosts.first() != Some(first))
        {
            return Err(End::Unreachable {
                host: first.to_string(),
                reason: format!(
                    "does not answer, and has the checkpoints of {} in {}",
                    args.vm,
                    record.dir.display()
                ),
            });
        }
    }
    start(args.vm, RestoreOrder { dir: None, hosts }, args.start).await
}

fn hosts(on: &[String]) -> Result<Vec<Option<HostPort>>, End> {
    let parse = |on: &String| on.parse().map(Some).map_err(|e| End::BadInput(format!("--on {on}: {e}")));
    on.iter().map(parse).collect()
}

async fn start(name: String, order: RestoreOrder, start: StartArgs) -> Result<u8, End> {
    let patience = resolve::start_timeout(start.start_timeout).map_err(|e| End::BadInput(e.to_string()))?;
    let manner = start.manner();
    let wish = wish(name, &order.hosts, start.secret_file, patience);
    let (mut session, wishes) = Session::new(&wish, manner, start.quiet);
    let launched = launcher::restore(wish, order, manner, session.terminal(), wishes).await;
    Ok(session.over(launched))
}

/// A specification of which only the name, the hosts, the secret and the patience count.
pub(crate) fn wish(
    name: String,
    hosts: &[Option<HostPort>],
    secret_file: Option<PathBuf>,
    start_timeout: Duration,
) -> VmSpec {
    let member = |host: &Option<HostPort>| crate::config::MemberSpec {
        host: host.clone(),
        cpus: 1,
        memory: 0,
        budget: None,
    };
    VmSpec {
        name,
        kernel: PathBuf::new(),
        initrd: None,
        cmdline: String::new(),
        cpus: 0,
        memory: 0,
        members: hosts.iter().map(member).collect(),
        disks: Vec::new(),
        rng: None,
        console: None,
        pages: PageTuning::default(),
        secret_file,
        start_timeout,
        on_member_loss: OnMemberLoss::default(),
        policy: Default::default(),
    }
}

/// What the newest checkpoint in a folder on this host says of its VM.
fn look(dir: &Path) -> Result<VmSpec, End> {
    let input = |e: migration::checkpoint::CheckpointError| End::BadInput(e.to_string());
    let path = newest(dir).map_err(input)?.join(manifest::MANIFEST);
    let manifest: Manifest<Machine> = manifest::read(&path).map_err(input)?;
    Ok(manifest.machine.spec)
}
