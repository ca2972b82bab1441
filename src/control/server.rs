//! The daemon's side of the control socket: axum on one thread of its own, so that no client ever takes time from the
//! threads that serve pages. Knows the daemon as [`Host`]. Stops when its handle is dropped, and takes the
//! socket's file along.

use std::fs;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use tokio::sync::oneshot;

use super::api::{ClearError, ErrorBody, Host, STATUS_PATH};

/// How long a stop waits for answers that are under way.
const STOP_WAIT: Duration = Duration::from_secs(1);

/// The running server; dropping it stops the server and removes the socket.
#[derive(Debug)]
pub struct Server {
    path: Option<PathBuf>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `host` on `listener` (see [`super::socket::bind`]) until the handle is dropped.
    ///
    /// # Errors
    /// When the thread or its event loop can't be made.
    pub fn start(listener: UnixListener, host: Arc<dyn Host>) -> io::Result<Self> {
        let path = listener.local_addr()?.as_pathname().map(ToOwned::to_owned);
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let listener = {
            let _inside = runtime.enter();
            tokio::net::UnixListener::from_std(listener)?
        };
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new().name("control".to_owned()).spawn(move || {
            runtime.block_on(serve(listener, router(host), stopped));
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
    let serving = axum::serve(listener, router).with_graceful_shutdown(async move {
        let _ = drained.await;
    });
    let serving = tokio::spawn(serving.into_future());
    // The sender says nothing; that it is gone is the message.
    let _ = stopped.await;
    drop(drain);
    let _ = tokio::time::timeout(STOP_WAIT, serving).await;
}

fn router(host: Arc<dyn Host>) -> Router {
    Router::new()
        .route(STATUS_PATH, get(status))
        .route("/api/v1/vms/{name}/clear", post(clear_vm))
        .fallback(|| async { failure(StatusCode::NOT_FOUND, "there is nothing at this path") })
        .method_not_allowed_fallback(|| async {
            failure(StatusCode::METHOD_NOT_ALLOWED, "this path takes another method")
        })
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
        ClearError::Unknown { known, .. } => {
            let body = ErrorBody { error: message, known: Some(known) };
            (StatusCode::NOT_FOUND, Json(body)).into_response()
        }
        ClearError::Connected { .. } => failure(StatusCode::CONFLICT, &message),
        ClearError::Failed { .. } => failure(StatusCode::INTERNAL_SERVER_ERROR, &message),
    }
}

fn failure(status: StatusCode, error: &str) -> Response {
    (status, Json(ErrorBody { error: error.to_owned(), known: None })).into_response()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::time::Instant;

    use super::super::api::{Status, VmStatus};
    use super::super::client::{Client, ClientError};
    use super::super::socket;
    use super::*;

    struct FakeHost;

    impl Host for FakeHost {
        fn status(&self) -> Status {
            let vms = vec![VmStatus { name: "web1".to_owned(), stores: 7, ..VmStatus::default() }];
            Status { version: "1".to_owned(), vms, ..Status::default() }
        }

        fn clear_vm(&self, name: &str) -> Result<(), ClearError> {
            match name {
                "idle" => Ok(()),
                "web1" => Err(ClearError::Connected { name: name.to_owned() }),
                "bad" => Err(ClearError::Failed { message: "the disk is on fire".to_owned() }),
                _ => Err(ClearError::Unknown {
                    name: name.to_owned(),
                    known: vec!["idle".to_owned(), "web1".to_owned()],
                }),
            }
        }
    }

    fn started() -> (tempfile::TempDir, PathBuf, Server) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let server = Server::start(socket::bind(&path).unwrap(), Arc::new(FakeHost)).unwrap();
        (dir, path, server)
    }

    #[test]
    fn the_client_gets_the_status_that_the_host_gave() {
        let (_dir, path, _server) = started();
        let client = Client::new(path).unwrap();
        assert_eq!(client.status().unwrap(), FakeHost.status());
        assert_eq!(client.status().unwrap().vms[0].stores, 7);
    }

    #[test]
    fn a_clear_ends_as_the_host_says() {
        let (_dir, path, _server) = started();
        let client = Client::new(path).unwrap();
        client.clear_vm("idle").unwrap();
        let refusal = |name: &str| match client.clear_vm(name).unwrap_err() {
            ClientError::Refused { status, message } => (status, message),
            other => panic!("{other}"),
        };
        let (status, message) = refusal("web1");
        assert!(status == 409 && message.contains("power it off"), "{message}");
        assert_eq!(refusal("bad"), (500, "the disk is on fire".to_owned()));
        for name in ["nobody", "../status", "a b/\u{e9}?x"] {
            let (status, message) = refusal(name);
            assert!(status == 404 && message.contains("idle, web1"), "{message}");
            assert!(message.contains(&format!("{name:?}")), "{message}");
        }
    }

    #[test]
    fn what_does_not_exist_is_a_json_error() {
        let (_dir, path, _server) = started();
        let client = Client::new(path).unwrap();
        for (method, path, status) in [("GET", "/", 404), ("POST", STATUS_PATH, 405)] {
            let (given, body) = client.request(method, path).unwrap();
            assert_eq!(given, status);
            assert!(serde_json::from_slice::<ErrorBody>(&body).is_ok());
        }
    }

    #[test]
    fn a_dropped_server_is_gone_with_its_socket_even_if_a_client_stays_silent() {
        let (_dir, path, server) = started();
        let _silent = UnixStream::connect(&path).unwrap();
        let before = Instant::now();
        drop(server);
        assert!(before.elapsed() < Duration::from_secs(4));
        assert!(!path.exists());
        let error = Client::new(path.clone()).unwrap().status().unwrap_err();
        assert!(matches!(error, ClientError::NotRunning { .. }), "{error}");
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    }
}
