//! Calling a node daemon.

use super::auth::{self, AuthError};
use super::codec::{self, CodecError};
use super::end::End;
use super::secret::Secret;
use super::wire::{NodeReply, NodeRequest};
use crate::config::HostPort;
use std::time::Duration;
use tokio::net::TcpStream;

/// Longest wait for a node to answer a request.
const ANSWER: Duration = Duration::from_secs(15);
/// Longest wait for a connection.
pub const CONNECT: Duration = Duration::from_secs(10);

/// Connects, authenticates, asks, and returns the connection with the node's answer.
///
/// # Errors
/// [`End::Unreachable`] naming the host, or [`End::HostRefused`] with what it said.
pub async fn ask(
    host: &HostPort,
    secret: Option<&Secret>,
    me: &str,
    request: &NodeRequest,
) -> Result<(TcpStream, NodeReply), End> {
    let unreachable = |reason: String| End::Unreachable { host: host.to_string(), reason };
    let mut stream = connect(host).await.map_err(unreachable)?;
    let _ = stream.set_nodelay(true);
    auth::connect(&mut stream, secret, me).await.map_err(|e| {
        unreachable(match e {
            AuthError::Codec(CodecError::Timeout(after)) => {
                format!(
                    "took the connection but said nothing within {} s: is it a spanvm node?",
                    after.as_secs()
                )
            }
            AuthError::Codec(CodecError::Closed) => {
                "closed the connection at once: is it a spanvm node of the same version?".into()
            }
            e => e.to_string(),
        })
    })?;
    codec::within(ANSWER, codec::send(&mut stream, request)).await.map_err(|e| unreachable(e.to_string()))?;
    match codec::within(ANSWER, codec::recv(&mut stream)).await {
        Ok(NodeReply::Refused(reason)) => Err(End::HostRefused { host: host.to_string(), reason }),
        Ok(reply) => Ok((stream, reply)),
        Err(e) => Err(unreachable(format!("its node did not answer the request: {e}"))),
    }
}

/// As [`ask`], for requests after which the connection is somebody else's.
///
/// # Errors
/// As [`ask`].
pub async fn open(
    host: &HostPort,
    secret: Option<&Secret>,
    me: &str,
    request: &NodeRequest,
) -> Result<TcpStream, End> {
    match ask(host, secret, me, request).await? {
        (stream, NodeReply::Relay) => Ok(stream),
        (_, reply) => Err(End::Unreachable {
            host: host.to_string(),
            reason: format!("its node gave an answer that does not fit the question: {reply:?}"),
        }),
    }
}

async fn connect(host: &HostPort) -> Result<TcpStream, String> {
    let attempt = async {
        let addrs: Vec<_> = tokio::net::lookup_host((host.host.as_str(), host.port))
            .await
            .map_err(|e| format!("the name can't be resolved: {e}; check the spelling, or give an address"))?
            .collect();
        let mut last = "the name has no address".to_string();
        for addr in addrs {
            match TcpStream::connect(addr).await {
                Ok(stream) => return Ok(stream),
                Err(e) => last = format!("can't connect to {addr}: {e}; is `spanvm node` running there?"),
            }
        }
        Err(last)
    };
    tokio::time::timeout(CONNECT, attempt).await.unwrap_or_else(|_| {
        Err(format!(
            "no answer within {} s: check the address, the network and the firewall, and that `spanvm node` runs there",
            CONNECT.as_secs()
        ))
    })
}
