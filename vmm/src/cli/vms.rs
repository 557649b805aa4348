//! `spanvm ps`, `info`, `console` and `stop`.

use super::output;
use super::terminal::{self, RawInput};
use crate::config::HostPort;
use crate::config::size::format_size;
use crate::control::api::StopBody;
use crate::control::client::{Place, VmClient};
use crate::control::end::End;
use crate::control::launcher::Wish;
use crate::control::view::{VmInfo, VmSummary};
use crate::control::wire::{NodeReply, NodeRequest};
use crate::control::{node, node_client, rundir};
use clap::Args;
use http_body_util::BodyExt;
use hyper::Method;
use hyper::body::Bytes;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Longest wait for a VM to be gone after it was told to stop.
const STOP: Duration = Duration::from_secs(30);

/// Where the VM's coordinator is.
#[derive(Args, Debug)]
pub struct PlaceArgs {
    /// Host whose node daemon to ask [default: this host, without a daemon].
    #[arg(long, value_name = "HOST[:PORT]")]
    pub on: Option<String>,
    /// File with the secret shared with that node.
    #[arg(long, value_name = "FILE")]
    pub secret_file: Option<PathBuf>,
}

impl PlaceArgs {
    /// The VM's place.
    ///
    /// # Errors
    /// A bad host name, or a secret that can't be read.
    pub fn place(&self) -> Result<Place, End> {
        let Some(on) = &self.on else { return Ok(Place::Here(rundir::root())) };
        Ok(Place::Node { host: host(on)?, secret: super::node::load(self.secret_file.as_deref())? })
    }
}

fn host(text: &str) -> Result<HostPort, End> {
    text.parse().map_err(|e| End::BadInput(format!("--on {text}: {e}; write it as HOST or HOST:PORT")))
}

/// Flags of `ps`.
#[derive(Args, Debug)]
pub struct PsArgs {
    /// Hosts whose node daemons to ask [default: this host, without a daemon].
    #[arg(long, value_name = "HOST[:PORT],..", value_delimiter = ',')]
    pub on: Vec<String>,
    /// File with the secret shared with those nodes.
    #[arg(long, value_name = "FILE")]
    pub secret_file: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Lists VMs by the host of their coordinator.
///
/// # Errors
/// A host that can't be asked.
pub async fn ps(args: PsArgs) -> Result<u8, End> {
    let mut vms = Vec::new();
    if args.on.is_empty() {
        vms = node::list(&rundir::root()).await;
    } else {
        let secret = super::node::load(args.secret_file.as_deref())?;
        for on in &args.on {
            let host = host(on)?;
            match node_client::ask(&host, secret.as_ref(), "spanvm", &NodeRequest::List).await? {
                (_, NodeReply::Vms(found)) => vms.extend(found.0),
                (_, other) => {
                    return Err(End::Failed(format!("{host}: an answer that does not fit: {other:?}")));
                }
            }
        }
    }
    if args.json {
        output::json(&vms)?;
    } else {
        output::line(&ps_table(&vms));
    }
    Ok(0)
}

fn ps_table(vms: &[VmSummary]) -> String {
    let rows = vms.iter().map(|vm| {
        vec![
            vm.name.clone(),
            vm.status.to_string(),
            vm.cpus.to_string(),
            format_size(vm.memory),
            vm.hosts.join(","),
            vm.pid.to_string(),
            output::duration(vm.uptime_s),
        ]
    });
    output::table(
        &["NAME", "STATUS", "CPUS", "MEMORY", "HOSTS", "PID", "UPTIME"],
        &["CPUS", "MEMORY", "PID"],
        rows,
    )
}

/// Flags of `info`.
#[derive(Args, Debug)]
pub struct InfoArgs {
    /// Name of the VM.
    pub vm: String,
    /// Where it is.
    #[command(flatten)]
    pub place: PlaceArgs,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Shows one VM.
///
/// # Errors
/// No such VM, or it does not answer.
pub async fn info(args: InfoArgs) -> Result<u8, End> {
    let info: VmInfo = VmClient::new(args.place.place()?, &args.vm).get("/vm").await?;
    if args.json {
        output::json(&info)?;
    } else {
        output::line(&info_text(&info));
    }
    Ok(0)
}

fn info_text(info: &VmInfo) -> String {
    let reason = info.reason.as_ref().map_or(String::new(), |reason| format!(" ({reason})"));
    let head = format!(
        "{}: {}{reason}, up {}\n{} vCPUs, placement {}, {} of memory, {} members, topology epoch {}\nkernel {}\n  {}\n",
        info.name,
        info.status,
        output::duration(info.uptime_s),
        info.cpus,
        info.policy,
        format_size(info.memory),
        info.members.len(),
        info.epoch,
        info.kernel,
        info.cmdline,
    );
    let rows = info.members.iter().map(|m| {
        vec![
            m.id.to_string(),
            m.host.clone(),
            m.pid.to_string(),
            m.addr.map_or("-".into(), |addr| addr.to_string()),
            ranges(&m.vcpus),
            format_size(m.memory_home),
            format_size(m.memory_held),
            m.memory_budget.map_or("-".into(), format_size),
            m.faults.local().to_string(),
            m.faults.read_remote.to_string(),
            m.faults.write_remote.to_string(),
            m.faults.upgrade_remote.to_string(),
            m.ipis_local.to_string(),
            m.ipis_remote.to_string(),
            m.exits.to_string(),
        ]
    });
    let heads = [
        "MEMBER", "HOST", "PID", "ADDRESS", "VCPUS", "HOME", "HELD", "BUDGET", "LOCAL", "R-READ", "R-WRITE",
        "R-UPGR", "IPI", "R-IPI", "EXITS",
    ];
    let table = output::table(&heads, &heads[5..], rows);
    format!(
        "{head}\n{table}\n\nHOME: memory that starts there; HELD: memory with a copy there now; LOCAL: page faults \
         answered there;\nR-READ, R-WRITE, R-UPGR: page faults that another member answered; IPI, R-IPI: interrupts \
         sent to vCPUs of the same member, of others"
    )
}

/// `0-3,5` for `[0, 1, 2, 3, 5]`.
fn ranges(ids: &[u32]) -> String {
    let mut parts: Vec<(u32, u32)> = Vec::new();
    for id in ids {
        match parts.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(*id) => *last = *id,
            _ => parts.push((*id, *id)),
        }
    }
    let show = |(first, last): &(u32, u32)| {
        if first == last { first.to_string() } else { format!("{first}-{last}") }
    };
    if parts.is_empty() { "-".into() } else { parts.iter().map(show).collect::<Vec<_>>().join(",") }
}

/// Flags of `stop`.
#[derive(Args, Debug)]
pub struct StopArgs {
    /// Name of the VM.
    pub vm: String,
    /// Where it is.
    #[command(flatten)]
    pub place: PlaceArgs,
    /// End it at once. (The guest has no power button yet, so a stop without it does the same.)
    #[arg(long)]
    pub force: bool,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Ends a VM and waits until it is gone.
///
/// # Errors
/// No such VM, or it does not end.
pub async fn stop(args: StopArgs) -> Result<u8, End> {
    let client = VmClient::new(args.place.place()?, &args.vm);
    let body = serde_json::to_vec(&StopBody { by: "spanvm stop".into(), force: args.force })
        .map_err(|e| End::Failed(e.to_string()))?;
    client.post("/vm/stop", body).await?;
    let since = Instant::now();
    while client.get::<VmSummary>("/vm/summary").await.is_ok() {
        if since.elapsed() > STOP {
            return Err(End::Failed(format!(
                "VM {} was told to stop and still runs after {} s",
                args.vm,
                STOP.as_secs()
            )));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    if args.json {
        output::json(
            &serde_json::json!({ "vm": args.vm, "stopped": true, "after_s": since.elapsed().as_secs_f64() }),
        )?;
    } else {
        output::line(&format!("{} is stopped", args.vm));
    }
    Ok(0)
}

/// Flags of `console`.
#[derive(Args, Debug)]
pub struct ConsoleArgs {
    /// Name of the VM.
    pub vm: String,
    /// Where it is.
    #[command(flatten)]
    pub place: PlaceArgs,
    /// Print what there is and return.
    #[arg(long)]
    pub dump: bool,
    /// Type this and a newline, and return.
    #[arg(long, value_name = "TEXT", conflicts_with = "dump")]
    pub send: Option<String>,
}

/// Shows the console's past and future, and types what the user types.
///
/// # Errors
/// No such VM, or no console.
pub async fn console(args: ConsoleArgs) -> Result<u8, End> {
    let client = VmClient::new(args.place.place()?, &args.vm);
    if let Some(text) = args.send {
        client.post("/vm/console/input", (text + "\n").into_bytes()).await?;
        return Ok(0);
    }
    let path = if args.dump { "/vm/console" } else { "/vm/console?follow=true" };
    let mut body = client.request(Method::GET, path, Bytes::new()).await?.into_body();
    let raw = if args.dump { None } else { Some(RawInput::take()) };
    let (wish_tx, mut wishes) = mpsc::channel(16);
    if raw.as_ref().is_some_and(RawInput::is_on) {
        terminal::read_input(wish_tx.clone());
    }
    terminal::watch_signals(wish_tx);
    loop {
        tokio::select! {
            frame = body.frame() => match frame {
                Some(Ok(frame)) => {
                    if let Ok(bytes) = frame.into_data() {
                        let mut out = std::io::stdout().lock();
                        if out.write_all(&bytes).and_then(|()| out.flush()).is_err() {
                            return Ok(0);
                        }
                    }
                }
                Some(Err(_)) | None => return Ok(0),
            },
            wish = wishes.recv() => match wish {
                Some(Wish::Input(bytes)) => client.post("/vm/console/input", bytes).await?,
                Some(Wish::Stop) | None => return Ok(0),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_vcpus() {
        assert_eq!(ranges(&[]), "-");
        assert_eq!(ranges(&[0]), "0");
        assert_eq!(ranges(&[0, 1, 2, 5, 7, 8]), "0-2,5,7-8");
    }
}
