//! The TCP address at which Prometheus may ask for the metrics, and nothing else: one thread that asks the host itself,
//! so that it need not be allowed to start others. What it may ask of the kernel is in [`crate::threads`].

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use axum::{Router, routing};
use rustix::fd::OwnedFd;
use rustix::net::{self, AddressFamily, SocketFlags, SocketType, sockopt};

use super::bounded::Bounded;
use super::metrics;
use crate::control::api::{Host, METRICS_PATH};
use crate::threads::{self, Role};

/// Connections at once. A Prometheus keeps one.
const CONNECTIONS_MAX: usize = 16;
/// How long a connection may be quiet: some scrapes, so that one that is kept is worth it.
const QUIET_MAX: Duration = Duration::from_secs(150);
/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;

/// A socket that is bound to nothing yet: made before the daemon gives up networks, used once its VMs are served.
#[derive(Debug)]
pub struct Unbound {
    socket: OwnedFd,
    address: SocketAddr,
}

impl Unbound {
    /// A socket for `address`.
    ///
    /// # Errors
    /// When the system has no such sockets.
    pub fn new(address: SocketAddr) -> io::Result<Self> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        // A predecessor's connections may still be there for a minute.
        sockopt::set_socket_reuseaddr(&socket, true)?;
        Ok(Self { socket, address })
    }

    /// Serves `host`'s metrics, on a thread of its own, until the process ends.
    ///
    /// # Errors
    /// When the address can't be listened on, or there can be no thread.
    pub fn serve(self, host: Arc<dyn Host>) -> io::Result<()> {
        net::bind(&self.socket, &self.address)?;
        net::listen(&self.socket, BACKLOG)?;
        let listener = TcpListener::from(self.socket);
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let listener = {
            let _inside = runtime.enter();
            tokio::net::TcpListener::from_std(listener)?
        };
        let listener = Bounded::new(listener, CONNECTIONS_MAX, QUIET_MAX);
        threads::spawn("metrics", Role::Scraped, move || {
            if let Err(err) = runtime.block_on(axum::serve(listener, router(host)).into_future()) {
                tracing::error!(%err, "the metrics are not served any more");
            }
        })?;
        Ok(())
    }
}

fn router(host: Arc<dyn Host>) -> Router {
    Router::new()
        .route(METRICS_PATH, routing::get(get))
        .fallback(|| async { (StatusCode::NOT_FOUND, "there is nothing here but /metrics\n") })
        .with_state(host)
}

async fn get(State(host): State<Arc<dyn Host>>, headers: HeaderMap) -> Response {
    // Nobody else waits for this thread, and what the host locks is locked for moments.
    let exposition = metrics::wanted(&headers);
    metrics::answer(exposition, host.metrics(exposition))
}
