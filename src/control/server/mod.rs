//! The daemon's side of the control socket: axum on one thread of its own, so that no client ever takes time from the
//! threads that serve pages. Knows the daemon as [`Host`]. Stops when its handle is dropped, and takes the
//! socket's file along.

mod bounded;
mod metrics;
pub mod scraped;

use std::fs;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Path, Request, State};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::IncomingStream;
use axum::{Json, Router};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;

use self::bounded::Bounded;
use super::access::Access;
use super::api::{CHECK_PATH, ClearError, ErrorBody, Host, METRICS_PATH, POOL_PATH, STATUS_PATH, SetError};
use crate::threads::{self, Role};

/// How long a stop waits for answers that are under way.
const STOP_WAIT: Duration = Duration::from_secs(1);
/// The longest body that is read; a change has a hundred bytes.
const CHANGE_BYTES_MAX: usize = 64 << 10;
/// Connections at once. A client has one, for a moment.
const CONNECTIONS_MAX: usize = 64;
/// How long a connection may be quiet: as long as any answer takes.
const QUIET_MAX: Duration = Duration::from_secs(60);
/// Threads that ask the host; requests beyond them wait their turn.
const ASKING_THREADS_MAX: usize = 8;

/// The running server; dropping it stops the server and removes the socket.
#[derive(Debug)]
pub struct Server {
    path: Option<PathBuf>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `host` on `listener` (see [`super::socket`]) until the handle is dropped, to whom `access` lets in.
    ///
    /// # Errors
    /// When the thread or its event loop can't be made.
    pub fn start(listener: UnixListener, access: Access, host: Arc<dyn Host>) -> io::Result<Self> {
        let path = listener.local_addr()?.as_pathname().map(ToOwned::to_owned);
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .max_blocking_threads(ASKING_THREADS_MAX)
            .enable_all()
            .build()?;
        let listener = {
            let _inside = runtime.enter();
            tokio::net::UnixListener::from_std(listener)?
        };
        let (stop, stopped) = oneshot::channel();
        let thread = threads::spawn("control", Role::Listener, move || {
            runtime.block_on(serve(listener, router(host, access), stopped));
            // A clear that is still at work keeps its thread; the process ends without it, and recovery copes.
            runtime.shutdown_timeout(STOP_WAIT);
        })?;
        Ok(Self { path, stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // While we still listen, so that it can't be the socket of the daemon that comes after us.
        if let Some(path) = &self.path {
            let _ = fs::remove_file(path);
        }
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn serve(listener: tokio::net::UnixListener, router: Router, stopped: oneshot::Receiver<()>) {
    let (drain, drained) = oneshot::channel::<()>();
    let listener = Bounded::new(listener, CONNECTIONS_MAX, QUIET_MAX);
    let service = router.into_make_service_with_connect_info::<Peer>();
    let serving = axum::serve(listener, service).with_graceful_shutdown(async move {
        let _ = drained.await;
    });
    let serving = tokio::spawn(serving.into_future());
    // The sender says nothing; that it is gone is the message.
    let _ = stopped.await;
    drop(drain);
    let _ = tokio::time::timeout(STOP_WAIT, serving).await;
}

/// Who is at the other end of a connection: user and group, where the kernel knows them.
#[derive(Clone, Copy, Debug)]
struct Peer(Option<(u32, u32)>);

impl Connected<IncomingStream<'_, Bounded<tokio::net::UnixListener>>> for Peer {
    fn connect_info(stream: IncomingStream<'_, Bounded<tokio::net::UnixListener>>) -> Self {
        Self(stream.io().stream().peer_cred().ok().map(|peer| (peer.uid(), peer.gid())))
    }
}

async fn let_in(
    State(access): State<Access>,
    ConnectInfo(Peer(peer)): ConnectInfo<Peer>,
    request: Request,
    next: Next,
) -> Response {
    match peer {
        Some((uid, gid)) if access.allows(uid, gid) => next.run(request).await,
        _ => failure(
            StatusCode::FORBIDDEN,
            "the control socket is for root, the daemon's user and the group of the socket: see `socket_group`",
        ),
    }
}

fn router(host: Arc<dyn Host>, access: Access) -> Router {
    Router::new()
        .route(STATUS_PATH, get(status))
        .route(METRICS_PATH, get(metrics::get))
        .route(POOL_PATH, post(set_pool))
        .route(CHECK_PATH, post(begin_check).get(check))
        .route("/api/v1/vms/{name}", post(set_vm))
        .route("/api/v1/vms/{name}/clear", post(clear_vm))
        .route("/api/v1/vms/{name}/release", post(release_vm))
        .fallback(|| async { failure(StatusCode::NOT_FOUND, "there is nothing at this path") })
        .method_not_allowed_fallback(|| async {
            failure(StatusCode::METHOD_NOT_ALLOWED, "this path takes another method")
        })
        .layer(DefaultBodyLimit::max(CHANGE_BYTES_MAX))
        .layer(middleware::from_fn_with_state(access, let_in))
        .with_state(host)
}

async fn status(State(host): State<Arc<dyn Host>>) -> Response {
    // The host takes locks, which has no place on an event loop.
    match tokio::task::spawn_blocking(move || host.status()).await {
        Ok(status) => Json(status).into_response(),
        Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

async fn clear_vm(State(host): State<Arc<dyn Host>>, Path(name): Path<String>) -> Response {
    let outcome = tokio::task::spawn_blocking(move || host.clear_vm(&name)).await;
    let error = match outcome {
        Ok(Ok(())) => return Json(serde_json::json!({})).into_response(),
        Ok(Err(error)) => error,
        Err(error) => ClearError::Failed { message: error.to_string() },
    };
    let message = error.to_string();
    match error {
        ClearError::Unknown { known, .. } => unknown(message, known),
        ClearError::Connected { .. } => failure(StatusCode::CONFLICT, &message),
        ClearError::Failed { .. } => failure(StatusCode::INTERNAL_SERVER_ERROR, &message),
    }
}

async fn set_vm(
    State(host): State<Arc<dyn Host>>,
    Path(name): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Response {
    set(body, move |change| host.set_vm(&name, change)).await
}

async fn set_pool(State(host): State<Arc<dyn Host>>, body: Result<Bytes, BytesRejection>) -> Response {
    set(body, move |change| host.set_pool(change)).await
}

async fn release_vm(State(host): State<Arc<dyn Host>>, Path(name): Path<String>) -> Response {
    change(move || host.release_vm(&name)).await
}

async fn begin_check(State(host): State<Arc<dyn Host>>, body: Result<Bytes, BytesRejection>) -> Response {
    set(body, move |order| host.begin_check(order)).await
}

async fn check(State(host): State<Arc<dyn Host>>) -> Response {
    match tokio::task::spawn_blocking(move || host.check()).await {
        Ok(Some(status)) => Json(status).into_response(),
        Ok(None) => failure(StatusCode::NOT_FOUND, "no check was begun since the daemon started"),
        Err(error) => failure(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

/// Makes the change that the body describes, and answers with what it led to.
async fn set<C: DeserializeOwned + Send + 'static, S: Serialize + Send + 'static>(
    body: Result<Bytes, BytesRejection>,
    apply: impl FnOnce(C) -> Result<S, SetError> + Send + 'static,
) -> Response {
    // Whatever content type it claims to be: `curl -d` says that JSON is a form.
    let wanted = match body.map(|body| serde_json::from_slice(&body)) {
        Ok(Ok(wanted)) => wanted,
        Ok(Err(error)) => {
            return failure(StatusCode::BAD_REQUEST, &format!("the body is no such change: {error}"));
        }
        Err(rejection) => return failure(rejection.status(), &rejection.body_text()),
    };
    change(move || apply(wanted)).await
}

async fn change<S: Serialize + Send + 'static>(
    apply: impl FnOnce() -> Result<S, SetError> + Send + 'static,
) -> Response {
    let error = match tokio::task::spawn_blocking(apply).await {
        Ok(Ok(status)) => return Json(status).into_response(),
        Ok(Err(error)) => error,
        Err(error) => SetError::Failed { message: error.to_string() },
    };
    let message = error.to_string();
    match error {
        SetError::Unknown { known, .. } => unknown(message, known),
        SetError::Invalid { .. } => failure(StatusCode::BAD_REQUEST, &message),
        SetError::Failed { .. } => failure(StatusCode::INTERNAL_SERVER_ERROR, &message),
    }
}

fn unknown(error: String, known: Vec<String>) -> Response {
    (StatusCode::NOT_FOUND, Json(ErrorBody { error, known: Some(known) })).into_response()
}

fn failure(status: StatusCode, error: &str) -> Response {
    (status, Json(ErrorBody { error: error.to_owned(), known: None })).into_response()
}

#[cfg(test)]
mod tests;
