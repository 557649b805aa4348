//! HTTP and JSON over the VM's Unix socket, for tools and for our own command line.
//!
//! | request | answer |
//! |---|---|
//! | `GET /vm` | [`super::view::VmInfo`] with fresh counters |
//! | `GET /vm/summary` | [`super::view::VmSummary`] |
//! | `GET /vm/console?follow=true` | what the serial console has put out; with `follow`, until it closes |
//! | `POST /vm/console/input` | types the body at the serial console |
//! | `POST /vm/pause` | stops the guest's vCPUs, devices and clock; body `{"by": "who", "limit_s": 5}` |
//! | `POST /vm/resume` | lets it go on; same body |
//! | `POST /vm/vcpus/migrate` | moves vCPUs; body `{"vcpus": [1, 2], "to": 1, "limit_s": 5}`; answer [`super::ops::moves::MoveReport`] |
//! | `POST /vm/vcpus/place` | who decides where vCPUs live, or what a policy would do; body [`PlaceBody`]; answer [`super::ops::place::PlaceReport`] |
//! | `GET /vm/events?after=0&wait_s=0` | [`super::events::Event`]s with a higher number; waits for one for at most so long |
//! | `POST /vm/members/drain` | takes a member out; body `{"member": 1, "limit_s": 5}`; answer [`super::ops::drain::DrainReport`] |
//! | `POST /vm/members/add` | adds one; body `{"host": "hostC:7700"}`, `null` for the coordinator's own; answer [`super::ops::add::AddReport`] |
//! | `POST /vm/migrate` | goes to other hosts; body `{"hosts": ["hostC:7700", null], "limit_s": 5}`; answer [`super::ops::relocate::RelocateReport`] |
//! | `GET /vm/members/progress` | how far that is: [`super::ops::drain::Progress`] |
//! | `POST /vm/members/cancel` | undoes it |
//! | `POST /vm/checkpoint` | saves the VM; body [`CheckpointBody`] |
//! | `POST /vm/recover` | a VM that is paused because it lost a member ends, for one that goes on from its checkpoint |
//! | `POST /vm/stop` | ends the VM; body `{"by": "who", "force": false}` |
//!
//! Errors are `{"error": "..."}` with a fitting status. Who can open the socket can do all of it: the folder is
//! readable by its owner only.

use super::end::End;
use super::events::Tell;
use super::ops::checkpoint::{self, CheckpointBody};
use super::ops::{OpError, Turn, add, drain, moves, pause, place, relocate};
use super::shared::Shared;
use crate::config::HostPort;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use hyper::body::Frame;
use serde::{Deserialize, Serialize};
use std::convert::Infallible;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::sync::mpsc;

/// Longest input that one request can type, bytes.
const MAX_INPUT: usize = 64 << 10;
/// Longest wait for the guest to take input.
const TYPE_LIMIT: Duration = Duration::from_secs(5);

/// Serves the API from now on.
///
/// # Errors
/// The socket can't be made.
pub fn serve(path: &Path, shared: Arc<Shared>) -> io::Result<tokio::task::JoinHandle<()>> {
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    let router = router(shared);
    Ok(tokio::spawn(async move {
        if let Err(e) = axum::serve(listener, router).await {
            tracing::error!("API: {e}");
        }
    }))
}

fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/vm", get(info))
        .route("/vm/summary", get(summary))
        .route("/vm/console", get(console))
        .route("/vm/console/input", post(input))
        .route("/vm/pause", post(pause_vm))
        .route("/vm/resume", post(resume_vm))
        .route("/vm/vcpus/migrate", post(migrate))
        .route("/vm/vcpus/place", post(place_vcpus))
        .route("/vm/events", get(events))
        .route("/vm/members/drain", post(drain_member))
        .route("/vm/members/add", post(add_member))
        .route("/vm/migrate", post(relocate_vm))
        .route("/vm/members/progress", get(members_progress))
        .route("/vm/members/cancel", post(cancel_members))
        .route("/vm/checkpoint", post(checkpoint_vm))
        .route("/vm/recover", post(recover))
        .route("/vm/stop", post(stop))
        .fallback(|| async { Refusal(StatusCode::NOT_FOUND, "no such resource".into()) })
        .layer(DefaultBodyLimit::max(MAX_INPUT))
        .with_state(shared)
}

/// The body of an error.
#[derive(Debug, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What is wrong.
    pub error: String,
}

struct Refusal(StatusCode, String);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, Json(ErrorBody { error: self.1 })).into_response()
    }
}

async fn info(State(shared): State<Arc<Shared>>) -> Response {
    Json(shared.fresh_info().await).into_response()
}

async fn summary(State(shared): State<Arc<Shared>>) -> Response {
    Json(shared.summary()).into_response()
}

/// Body of `POST /vm/stop`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StopBody {
    /// Who wants it, for the record.
    pub by: String,
    /// Kept for the time when the guest can be asked to power off: today both end the VM at once.
    pub force: bool,
}

/// Body of `POST /vm/pause` and `POST /vm/resume`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PauseBody {
    /// Who wants it, for the record.
    pub by: String,
    /// Longest time that it may take, seconds, above 0 and at most [`MAX_LIMIT`]; absent: [`pause::LIMIT`].
    pub limit_s: Option<f64>,
}

/// Longest limit of an operation that the caller can set, seconds.
pub const MAX_LIMIT: f64 = 10.0;

/// Body of `POST /vm/vcpus/migrate`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoveBody {
    /// The vCPUs.
    pub vcpus: Vec<u32>,
    /// The member to which they go.
    pub to: u16,
    /// As in [`PauseBody`].
    #[serde(default)]
    pub limit_s: Option<f64>,
}

fn limit(limit_s: Option<f64>) -> Result<Duration, Refusal> {
    let Some(seconds) = limit_s else { return Ok(pause::LIMIT) };
    if seconds > 0.0 && seconds <= MAX_LIMIT {
        return Ok(Duration::from_secs_f64(seconds));
    }
    Err(Refusal(StatusCode::BAD_REQUEST, format!("limit_s is {seconds}: above 0, at most {MAX_LIMIT}")))
}

/// The body of a request; an empty one is the default.
fn parse<T: serde::de::DeserializeOwned + Default>(body: &Bytes) -> Result<T, Refusal> {
    if body.is_empty() {
        return Ok(T::default());
    }
    serde_json::from_slice(body).map_err(|e| Refusal(StatusCode::BAD_REQUEST, e.to_string()))
}

impl From<OpError> for Refusal {
    fn from(e: OpError) -> Refusal {
        let status = match e {
            OpError::Refused(_) => StatusCode::CONFLICT,
            OpError::NotFound(_) => StatusCode::BAD_REQUEST,
            OpError::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Refusal(status, e.to_string())
    }
}

/// Runs an operation to its end, whether or not the client stays to hear of it, and writes down how it went.
async fn operate<T: Serialize + Tell + Send + 'static>(
    shared: &Arc<Shared>,
    kind: &'static str,
    work: impl Future<Output = Result<T, OpError>> + Send + 'static,
) -> Result<Response, Refusal> {
    let shared = shared.clone();
    let told = tokio::spawn(async move {
        let result = work.await;
        shared.events().told(kind, &result);
        result
    });
    match told.await {
        Ok(done) => Ok(Json(done?).into_response()),
        Err(e) => Err(Refusal(StatusCode::INTERNAL_SERVER_ERROR, e.to_string())),
    }
}

async fn pause_vm(State(shared): State<Arc<Shared>>, body: Bytes) -> Result<Response, Refusal> {
    let body: PauseBody = parse(&body)?;
    let limit = limit(body.limit_s)?;
    let turn = Turn::take_soon(&shared, "a pause").await?;
    let by = if body.by.is_empty() { "the API".into() } else { body.by };
    operate(&shared, "pause", async move { pause::pause(&turn, &by, limit).await }).await
}

async fn resume_vm(State(shared): State<Arc<Shared>>, body: Bytes) -> Result<Response, Refusal> {
    let limit = limit(parse::<PauseBody>(&body)?.limit_s)?;
    let turn = Turn::take_soon(&shared, "a resume").await?;
    operate(&shared, "resume", async move { pause::resume(&turn, limit).await }).await
}

async fn migrate(State(shared): State<Arc<Shared>>, body: Bytes) -> Result<Response, Refusal> {
    let body: MoveBody =
        serde_json::from_slice(&body).map_err(|e| Refusal(StatusCode::BAD_REQUEST, e.to_string()))?;
    let limit = limit(body.limit_s)?;
    let turn = Turn::take_soon(&shared, "a move of vCPUs").await?;
    operate(&shared, "move", async move { moves::migrate(&turn, &body.vcpus, body.to, limit).await }).await
}

/// Body of `POST /vm/vcpus/place`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlaceBody {
    /// `static`, `balance` or `follow`.
    pub policy: String,
    /// Say what it would do, and change nothing.
    #[serde(default)]
    pub explain: bool,
}

async fn place_vcpus(State(shared): State<Arc<Shared>>, body: Bytes) -> Result<Response, Refusal> {
    let body: PlaceBody =
        serde_json::from_slice(&body).map_err(|e| Refusal(StatusCode::BAD_REQUEST, e.to_string()))?;
    let policy = body.policy.parse().map_err(|e| Refusal(StatusCode::BAD_REQUEST, e))?;
    let report =
        if body.explain { place::explain(&shared, policy).await? } else { place::place(&shared, policy)? };
    Ok(Json(report).into_response())
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct EventsQuery {
    after: u64,
    wait_s: f64,
}

async fn events(
    State(shared): State<Arc<Shared>>,
    Query(query): Query<EventsQuery>,
) -> Result<Response, Refusal> {
    if !(0.0..=MAX_LIMIT).contains(&query.wait_s) {
        let reason = format!("wait_s is {}: 0 to {MAX_LIMIT}", query.wait_s);
        return Err(Refusal(StatusCode::BAD_REQUEST, reason));
    }
    let limit = Duration::from_secs_f64(query.wait_s);
    Ok(Json(shared.events().wait(query.after, limit).await).into_response())
}

/// Body of `POST /vm/members/drain`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrainBody {
    /// The member that is to leave.
    pub member: u16,
    /// Longest time that the move of a vCPU may take, as in [`PauseBody`].
    #[serde(default)]
    pub limit_s: Option<f64>,
}

async fn drain_member(State(shared): State<Arc<Shared>>, body: Bytes) -> Result<Response, Refusal> {
    let body: DrainBody =
        serde_json::from_slice(&body).map_err(|e| Refusal(StatusCode::BAD_REQUEST, e.to_string()))?;
    let limit = limit(body.limit_s)?;
    let turn = Turn::take_soon(&shared, format!("the drain of member {}", body.member)).await?;
    operate(&shared, "drain", async move { drain::drain(&turn, body.member, None, limit).await }).await
}

/// Body of `POST /vm/members/add`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddBody {
    /// Host (and port) of a node daemon; nothing for the coordinator's own host.
    #[serde(default)]
    pub host: Option<String>,
}

async fn add_member(State(shared): State<Arc<Shared>>, body: Bytes) -> Result<Response, Refusal> {
    let body: AddBody =
        serde_json::from_slice(&body).map_err(|e| Refusal(StatusCode::BAD_REQUEST, e.to_string()))?;
    let host = host_of(body.host)?;
    let turn = Turn::take_soon(&shared, "the addition of a member").await?;
    operate(&shared, "add", async move { add::add(&turn, host.as_ref()).await }).await
}

fn host_of(text: Option<String>) -> Result<Option<HostPort>, Refusal> {
    let bad = |e| Refusal(StatusCode::BAD_REQUEST, format!("host: {e}"));
    text.map(|host| host.parse()).transpose().map_err(bad)
}

/// Body of `POST /vm/migrate`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RelocateBody {
    /// Hosts, as in [`AddBody`].
    pub hosts: Vec<Option<String>>,
    /// Longest time that the move of a vCPU may take, as in [`PauseBody`].
    #[serde(default)]
    pub limit_s: Option<f64>,
}

async fn relocate_vm(State(shared): State<Arc<Shared>>, body: Bytes) -> Result<Response, Refusal> {
    let body: RelocateBody =
        serde_json::from_slice(&body).map_err(|e| Refusal(StatusCode::BAD_REQUEST, e.to_string()))?;
    let limit = limit(body.limit_s)?;
    let hosts = body.hosts.into_iter().map(host_of).collect::<Result<Vec<_>, _>>()?;
    let turn = Turn::take_soon(&shared, "the migration to other hosts").await?;
    operate(&shared, "migrate", async move { relocate::relocate(&turn, &hosts, limit).await }).await
}

async fn members_progress(State(shared): State<Arc<Shared>>) -> Response {
    Json(shared.ops().progress_now()).into_response()
}

async fn cancel_members(State(shared): State<Arc<Shared>>) -> Result<Response, Refusal> {
    let what = shared.ops().cancel()?;
    Ok((StatusCode::ACCEPTED, Json(serde_json::json!({ "cancelling": what }))).into_response())
}

async fn checkpoint_vm(State(shared): State<Arc<Shared>>, body: Bytes) -> Result<Response, Refusal> {
    let body: CheckpointBody = parse(&body)?;
    let limit = limit(body.limit_s)?;
    let turn = Turn::take_soon(&shared, "a checkpoint").await?;
    operate(&shared, "checkpoint", async move {
        let report = checkpoint::checkpoint(&turn, &body, limit).await?;
        if body.stop {
            let by = if body.by.is_empty() { "the API" } else { &body.by };
            turn.shared().stop(End::Stopped { by: format!("{by}, after {}", report.folder.display()) });
        }
        Ok(report)
    })
    .await
}

async fn recover(State(shared): State<Arc<Shared>>) -> Result<Response, Refusal> {
    if shared.make_way() {
        return Ok((StatusCode::ACCEPTED, Json(serde_json::json!({ "stopping": true }))).into_response());
    }
    Err(Refusal(StatusCode::CONFLICT, "the VM has not lost a member".into()))
}

async fn stop(State(shared): State<Arc<Shared>>, body: Bytes) -> Result<Response, Refusal> {
    let body: StopBody = parse(&body)?;
    let by = if body.by.is_empty() { "the API".into() } else { body.by };
    shared.stop(End::Stopped { by });
    Ok((StatusCode::ACCEPTED, Json(serde_json::json!({ "stopping": true }))).into_response())
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ConsoleQuery {
    follow: bool,
}

async fn console(
    State(shared): State<Arc<Shared>>,
    Query(query): Query<ConsoleQuery>,
) -> Result<Response, Refusal> {
    let console = shared.console().ok_or_else(no_console)?;
    let (to, from) = mpsc::channel::<Bytes>(4);
    tokio::task::spawn_blocking(move || {
        let mut reader = console.reader();
        let wait = if query.follow { Duration::from_millis(250) } else { Duration::ZERO };
        loop {
            let chunk = reader.read(64 << 10, wait);
            let nothing = chunk.bytes.is_empty();
            if (!nothing && to.blocking_send(chunk.bytes.into()).is_err()) || to.is_closed() {
                return;
            }
            if chunk.closed || (nothing && !query.follow) {
                return;
            }
        }
    });
    Ok(([("content-type", "application/octet-stream")], Body::new(Pieces(from))).into_response())
}

async fn input(State(shared): State<Arc<Shared>>, body: Bytes) -> Result<Response, Refusal> {
    let console = shared.console().ok_or_else(no_console)?;
    let typed = tokio::task::spawn_blocking(move || console.input(&body, TYPE_LIMIT)).await;
    match typed {
        Ok(Ok(())) => Ok(Json(serde_json::json!({ "typed": true })).into_response()),
        Ok(Err(e)) => Err(Refusal(StatusCode::CONFLICT, e.to_string())),
        Err(e) => Err(Refusal(StatusCode::INTERNAL_SERVER_ERROR, e.to_string())),
    }
}

fn no_console() -> Refusal {
    Refusal(StatusCode::SERVICE_UNAVAILABLE, "the VM has no console yet: it is still starting".into())
}

/// A response body that is as long as the channel lives.
struct Pieces(mpsc::Receiver<Bytes>);

impl hyper::body::Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|piece| piece.map(|piece| Ok(Frame::data(piece))))
    }
}
