//! `spanvm node`.

use super::output;
use crate::config::spec::DEFAULT_NODE_PORT;
use crate::control::end::End;
use crate::control::host::RealHost;
use crate::control::launcher::hostname;
use crate::control::node::Node;
use crate::control::rundir;
use crate::control::secret::{self, Secret};
use clap::Args;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Flags.
#[derive(Args, Debug)]
pub struct NodeArgs {
    /// Address to listen on, IP[:PORT] [default: 127.0.0.1:7410].
    #[arg(long, value_name = "IP[:PORT]")]
    pub listen: Option<String>,
    /// File with the secret shared by all nodes and launchers; needed unless it listens on loopback.
    #[arg(long, value_name = "FILE")]
    pub secret_file: Option<PathBuf>,
    /// Name of this host for people [default: the host name].
    #[arg(long)]
    pub name: Option<String>,
}

/// Serves until a signal comes.
///
/// # Errors
/// A bad address or secret, or an address in use.
pub async fn run(args: NodeArgs) -> Result<u8, End> {
    let addr = listen_address(args.listen.as_deref())?;
    let secret = load(args.secret_file.as_deref())?;
    let name = args.name.unwrap_or_else(hostname);
    if name.is_empty() || name.len() > 64 || name.chars().any(char::is_control) {
        return Err(End::BadInput(format!("--name {name:?}: give 1 to 64 printable characters")));
    }
    let node = Arc::new(Node { name, secret, root: rundir::root(), host: Arc::new(RealHost) });
    let listener = node.bind(addr).await.map_err(|e| End::BadInput(format!("--listen {addr}: {e}")))?;
    let local = listener.local_addr().map_err(|e| End::Failed(e.to_string()))?;
    let _ = writeln!(std::io::stderr(), "spanvm: node {} listens on {local}", node.name);
    let (stop, stopped) = tokio::sync::oneshot::channel();
    crate::control::child::on_termination(move || {
        let _ = stop.send(());
    });
    tokio::select! {
        () = node.serve(listener) => Ok(1),
        _ = stopped => {
            output::line("spanvm: node ends, and its members with it");
            Ok(0)
        }
    }
}

/// Reads a secret for a command.
///
/// # Errors
/// A file that can't be used.
pub fn load(path: Option<&Path>) -> Result<Option<Secret>, End> {
    path.map(|path| {
        secret::load(path)
            .map_err(|e| End::BadInput(format!("--secret-file {}: {e}; {}", path.display(), e.hint())))
    })
    .transpose()
}

fn listen_address(text: Option<&str>) -> Result<SocketAddr, End> {
    let Some(text) = text else { return Ok((Ipv4Addr::LOCALHOST, DEFAULT_NODE_PORT).into()) };
    text.parse::<SocketAddr>()
        .or_else(|_| text.trim_matches(['[', ']']).parse::<IpAddr>().map(|ip| (ip, DEFAULT_NODE_PORT).into()))
        .map_err(|_| {
            End::BadInput(format!(
                "--listen {text}: not an IP address; write it as 10.0.0.1 or 10.0.0.1:7410"
            ))
        })
}
