//! The node daemon: a host's door for launchers and coordinators of other hosts.
//!
//! It spawns a child for each coordinator or member it is asked for and passes bytes between the child's
//! socket and the network. When a coordinator's connection is gone, its member is told by the closed socket
//! and killed if it does not go by itself. When the daemon dies, the kernel kills its children.

use super::auth::{self, AuthError};
use super::codec;
use super::coordinator::{Processes, Spawner};
use super::host::{Host, chain};
use super::rundir;
use super::secret::Secret;
use super::view::VmSummary;
use super::wire::{Inherit, NodeReply, NodeRequest, Role};
use super::{client, codec::Json};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::Semaphore;

/// Most connections at a time; others wait.
const MAX_CONNECTIONS: usize = 256;
/// Longest wait for a request after authentication.
const REQUEST: Duration = Duration::from_secs(10);
/// How long a member may take to go by itself once its coordinator is gone.
const GRACE: Duration = Duration::from_secs(12);

/// A daemon's settings.
pub struct Node {
    /// For people and logs.
    pub name: String,
    /// Shared with everybody who may talk to this node.
    pub secret: Option<Secret>,
    /// The runtime directory.
    pub root: PathBuf,
    /// This host.
    pub host: Arc<dyn Host>,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Why the daemon does not start.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The address needs a secret.
    #[error(transparent)]
    Auth(#[from] AuthError),
    /// The address can't be had.
    #[error("can't listen on {0}: {1}; is another node running? choose another address with --listen")]
    Listen(SocketAddr, std::io::Error),
}

impl Node {
    /// Takes the address.
    ///
    /// # Errors
    /// No secret for an address that needs one, or an address in use.
    pub async fn bind(&self, addr: SocketAddr) -> Result<TcpListener, NodeError> {
        auth::check_address(addr, self.secret.as_ref())?;
        TcpListener::bind(addr).await.map_err(|e| NodeError::Listen(addr, e))
    }

    /// Serves for ever.
    pub async fn serve(self: Arc<Self>, listener: TcpListener) {
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let Ok(slot) = slots.clone().acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, from)) => {
                    let node = self.clone();
                    tokio::spawn(async move {
                        if let Err(e) = node.connection(stream).await {
                            tracing::warn!("{from}: {e}");
                        }
                        drop(slot);
                    });
                }
                Err(e) => {
                    tracing::error!("accept: {e}");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            }
        }
    }

    async fn connection(&self, mut stream: TcpStream) -> Result<(), AuthError> {
        let _ = stream.set_nodelay(true);
        let peer = auth::accept(&mut stream, self.secret.as_ref(), &self.name).await?;
        let request = codec::within(REQUEST, codec::recv(&mut stream)).await?;
        tracing::info!("{peer}: {request:?}");
        match request {
            NodeRequest::Launch => self.child(stream, Role::Coordinator).await?,
            NodeRequest::Member => self.child(stream, Role::Member).await?,
            NodeRequest::Api { vm } => self.api(stream, &vm).await?,
            NodeRequest::List => {
                let vms = NodeReply::Vms(Json(list(&self.root).await));
                codec::send(&mut stream, &vms).await?;
            }
            NodeRequest::Facts => {
                let host = self.host.clone();
                let facts = tokio::task::spawn_blocking(move || host.facts()).await;
                let facts = match facts {
                    Ok(facts) => facts.map(Box::new).map_err(|e| chain(&e)),
                    Err(e) => Err(e.to_string()),
                };
                codec::send(&mut stream, &NodeReply::Facts(facts)).await?;
            }
        }
        Ok(())
    }

    async fn child(&self, mut stream: TcpStream, role: Role) -> Result<(), codec::CodecError> {
        let bind = Some(stream.local_addr()?.ip().to_canonical());
        let secret = self.secret.as_ref().map(|secret| secret.bytes().to_vec());
        let inherit = Inherit { role, secret, host: self.name.clone(), bind, die_with_parent: true };
        let (mut socket, child) = match Processes.spawn() {
            Ok(started) => started,
            Err(e) => {
                let refusal = NodeReply::Refused(format!("can't start a process: {e}"));
                return codec::send(&mut stream, &refusal).await;
            }
        };
        codec::within(REQUEST, codec::send(&mut socket, &inherit)).await?;
        codec::send(&mut stream, &NodeReply::Relay).await?;
        let relay = tokio::io::copy_bidirectional(&mut stream, &mut socket).await;
        tracing::info!("{role:?}: connection over: {relay:?}");
        drop(socket);
        let _ = stream.shutdown().await;
        if let Some(child) = child {
            match role {
                Role::Member => child.finish(GRACE).await,
                // It decides itself what the end of its launcher means.
                Role::Coordinator => drop(child.ended().await),
            }
        }
        Ok(())
    }

    async fn api(&self, mut stream: TcpStream, vm: &str) -> Result<(), codec::CodecError> {
        let missing = crate::config::resolve::check_name(vm).is_err() || rundir::remove_stale(&self.root, vm);
        let refusal = if missing {
            client::no_such_vm(vm, &self.root)
        } else {
            match UnixStream::connect(rundir::socket(&self.root, vm)).await {
                Ok(mut socket) => {
                    codec::send(&mut stream, &NodeReply::Relay).await?;
                    let _ = tokio::io::copy_bidirectional(&mut stream, &mut socket).await;
                    return Ok(());
                }
                Err(e) => format!("VM {vm} does not take connections: {e}"),
            }
        };
        codec::send(&mut stream, &NodeReply::Refused(refusal)).await
    }
}

/// The VMs whose coordinator runs on this host.
pub async fn list(root: &std::path::Path) -> Vec<VmSummary> {
    let mut vms = Vec::new();
    for name in rundir::running(root) {
        let client = client::VmClient::new(client::Place::Here(root.to_path_buf()), &name);
        match client.get("/vm/summary").await {
            Ok(vm) => vms.push(vm),
            Err(e) => tracing::warn!("{e}"),
        }
    }
    vms
}
