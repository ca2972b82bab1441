//! The daemon's side of the control socket: axum on one thread of its own, so that no client ever takes time from the
//! threads that serve pages. Knows the daemon as [`Host`]; what it answers to is in [`routes`]. Stops when its handle is dropped, and takes the
//! socket's file along.

mod bounded;
mod metrics;
mod routes;
pub mod scraped;

use std::fs;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::serve::IncomingStream;
use axum::{Extension, Json, Router};
use tokio::sync::oneshot;

use self::bounded::Bounded;
use super::access::Access;
use super::api::{ErrorBody, Host};
use crate::threads::{self, Role};

/// How long a stop waits for answers that are under way.
const STOP_WAIT: Duration = Duration::from_secs(1);
/// The longest body that is read; a change has a hundred bytes.
const CHANGE_BYTES_MAX: usize = 64 << 10;
/// Connections at once. A client has one, for a moment.
const CONNECTIONS_MAX: usize = 64;
/// How long a connection may be quiet: as long as any answer takes.
const QUIET_MAX: Duration = Duration::from_secs(60);
/// The end of what is said to whoever asked in a way that there is not.
const DESCRIBED: &str = "GET /api/v1/openapi.json describes all that is answered to";
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
    pub fn start(listener: Arc<UnixListener>, access: Access, host: Arc<dyn Host>) -> io::Result<Self> {
        // Systemd's is kept by others, too.
        let listener = Arc::try_unwrap(listener).or_else(|shared| shared.try_clone())?;
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
            "the control socket is for root, the daemon's user and the group that `control_group` names: run this as one \
             of them, or configure a group of yours",
        ),
    }
}

fn router(host: Arc<dyn Host>, access: Access) -> Router {
    let (router, description) = routes::described().split_for_parts();
    router
        .layer(Extension(routes::Description::of(&description)))
        .fallback(|| async {
            failure(StatusCode::NOT_FOUND, &format!("there is nothing at this path: {DESCRIBED}"))
        })
        .method_not_allowed_fallback(|| async {
            let error = format!("this path takes another method: {DESCRIBED}");
            failure(StatusCode::METHOD_NOT_ALLOWED, &error)
        })
        .layer(DefaultBodyLimit::max(CHANGE_BYTES_MAX))
        .layer(middleware::from_fn_with_state(access, let_in))
        .with_state(host)
}

fn failure(status: StatusCode, error: &str) -> Response {
    (status, Json(ErrorBody { error: error.to_owned(), known: None })).into_response()
}

#[cfg(test)]
mod tests;
