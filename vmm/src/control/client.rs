//! Talking to a VM's API: through its Unix socket on this host, or through the node daemon of its host.

use super::api::ErrorBody;
use super::end::End;
use super::node_client;
use super::rundir;
use super::secret::Secret;
use super::wire::NodeRequest;
use crate::config::HostPort;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;

/// Longest wait for the answer to a request (its body may take longer).
const ANSWER: Duration = Duration::from_secs(15);
/// Longest answer that is read whole, bytes.
const MAX_BODY: usize = 16 << 20;

/// Where a VM's coordinator is.
#[derive(Clone, Debug)]
pub enum Place {
    /// On this host, under this runtime directory.
    Here(PathBuf),
    /// Behind this node.
    Node {
        /// The node.
        host: HostPort,
        /// Secret shared with it.
        secret: Option<Secret>,
    },
}

/// One VM's API.
#[derive(Clone, Debug)]
pub struct VmClient {
    place: Place,
    vm: String,
}

impl VmClient {
    /// A client; nothing is connected yet.
    pub fn new(place: Place, vm: &str) -> VmClient {
        VmClient { place, vm: vm.to_string() }
    }

    /// Sends one request and returns the response once its head is there.
    ///
    /// # Errors
    /// No such VM, no answer, or an answer that says no.
    pub async fn request(&self, method: Method, path: &str, body: Bytes) -> Result<Response<Incoming>, End> {
        self.request_within(method, path, body, ANSWER).await
    }

    async fn request_within(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        limit: Duration,
    ) -> Result<Response<Incoming>, End> {
        let exchange = async {
            match &self.place {
                Place::Here(root) => self.send(self.local(root).await?, method, path, body).await,
                Place::Node { host, secret } => {
                    let request = NodeRequest::Api { vm: self.vm.clone() };
                    let stream = node_client::open(host, secret.as_ref(), "spanvm", &request).await?;
                    self.send(stream, method, path, body).await
                }
            }
        };
        tokio::time::timeout(limit, exchange).await.unwrap_or_else(|_| {
            Err(self.failed(format!("did not answer within {} s: is its process stopped?", limit.as_secs())))
        })
    }

    /// `GET` of a JSON document.
    ///
    /// # Errors
    /// As [`VmClient::request`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, End> {
        let response = self.request(Method::GET, path, Bytes::new()).await?;
        let body = self.body(response).await?;
        serde_json::from_slice(&body).map_err(|e| self.failed(format!("gave an answer that is none: {e}")))
    }

    /// `POST`; the answer's body does not matter.
    ///
    /// # Errors
    /// As [`VmClient::request`].
    pub async fn post(&self, path: &str, body: impl Into<Bytes>) -> Result<(), End> {
        let response = self.request(Method::POST, path, body.into()).await?;
        self.body(response).await.map(drop)
    }

    /// `POST` with a JSON body and a JSON answer.
    ///
    /// # Errors
    /// As [`VmClient::request`].
    pub async fn call<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl serde::Serialize,
    ) -> Result<T, End> {
        let body = serde_json::to_vec(body).map_err(|e| End::Failed(e.to_string()))?;
        let response = self.request(Method::POST, path, body.into()).await?;
        let body = self.body(response).await?;
        serde_json::from_slice(&body).map_err(|e| self.failed(format!("gave an answer that is none: {e}")))
    }

    /// As [`VmClient::call`], for what takes as long as it takes: up to `limit`.
    ///
    /// # Errors
    /// As [`VmClient::request`].
    pub async fn call_slow<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl serde::Serialize,
        limit: Duration,
    ) -> Result<T, End> {
        let body = serde_json::to_vec(body).map_err(|e| End::Failed(e.to_string()))?;
        let response = self.request_within(Method::POST, path, body.into(), limit).await?;
        let body = self.body(response).await?;
        serde_json::from_slice(&body).map_err(|e| self.failed(format!("gave an answer that is none: {e}")))
    }

    async fn local(&self, root: &Path) -> Result<UnixStream, End> {
        let path = rundir::socket(root, &self.vm);
        if crate::config::resolve::check_name(&self.vm).is_err() || rundir::remove_stale(root, &self.vm) {
            return Err(End::BadInput(no_such_vm(&self.vm, root)));
        }
        UnixStream::connect(&path)
            .await
            .map_err(|e| self.failed(format!("does not take connections at {}: {e}", path.display())))
    }

    async fn send<S>(
        &self,
        stream: S,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>, End>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let broken = |e: hyper::Error| self.failed(format!("broke off: {e}"));
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "spanvm")
            .body(Full::new(body))
            .map_err(|e| self.failed(e.to_string()))?;
        let response = sender.send_request(request).await.map_err(broken)?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let body = self.body(response).await?;
        let reason = serde_json::from_slice::<ErrorBody>(&body)
            .map_or_else(|_| String::from_utf8_lossy(&body).into_owned(), |body| body.error);
        Err(match status {
            StatusCode::BAD_REQUEST => End::BadInput(format!("{}: {reason}", self.vm)),
            _ => self.failed(format!("says no: {reason}")),
        })
    }

    async fn body(&self, response: Response<Incoming>) -> Result<Bytes, End> {
        let body = http_body_util::Limited::new(response.into_body(), MAX_BODY);
        match tokio::time::timeout(ANSWER, body.collect()).await {
            Ok(Ok(body)) => Ok(body.to_bytes()),
            Ok(Err(e)) => Err(self.failed(format!("broke off: {e}"))),
            Err(_) => Err(self.failed("stopped in the middle of an answer".into())),
        }
    }

    fn failed(&self, reason: String) -> End {
        End::Failed(format!("VM {} {reason}", self.vm))
    }
}

/// Names what there is instead.
pub fn no_such_vm(vm: &str, root: &Path) -> String {
    let others = rundir::running(root);
    let hint = if others.is_empty() {
        "no VM runs here (look at other hosts with --on HOST)".to_string()
    } else {
        format!("these do: {}", others.join(", "))
    };
    format!("no VM named {vm:?} runs on this host; {hint}")
}
