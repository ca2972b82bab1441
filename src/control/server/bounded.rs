//! A listener that takes so many connections at once and no more: others wait in the kernel's queue, which is short. A
//! connection on which nothing has come or gone for long is ended, so that clients that say nothing don't keep others out.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, sleep};

/// A listener with so many places.
pub(super) struct Bounded<L> {
    listener: L,
    places: Arc<Semaphore>,
    quiet_max: Duration,
}

impl<L: Listener> Bounded<L> {
    pub(super) fn new(listener: L, connections_max: usize, quiet_max: Duration) -> Self {
        Self { listener, places: Arc::new(Semaphore::new(connections_max)), quiet_max }
    }
}

impl<L: Listener> Listener for Bounded<L> {
    type Io = Connection<L::Io>;
    type Addr = L::Addr;

    async fn accept(&mut self) -> (Connection<L::Io>, L::Addr) {
        let place = Arc::clone(&self.places).acquire_owned().await.ok();
        let (stream, address) = Listener::accept(&mut self.listener).await;
        let quiet = Box::pin(sleep(self.quiet_max));
        (Connection { stream, quiet, quiet_max: self.quiet_max, _place: place }, address)
    }

    fn local_addr(&self) -> io::Result<L::Addr> {
        self.listener.local_addr()
    }
}

/// A connection that has one of the places, until it is dropped.
pub(super) struct Connection<S> {
    stream: S,
    /// When it has been quiet for too long.
    quiet: Pin<Box<Sleep>>,
    quiet_max: Duration,
    _place: Option<OwnedSemaphorePermit>,
}

impl<S> Connection<S> {
    /// The connection itself, for whoever asks who is at its other end.
    pub(super) fn stream(&self) -> &S {
        &self.stream
    }

    /// What came of reading or writing, unless that has been waited for too long.
    fn unless_quiet<T>(
        &mut self,
        context: &mut Context<'_>,
        outcome: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if outcome.is_ready() {
            self.quiet.as_mut().reset(Instant::now() + self.quiet_max);
            return outcome;
        }
        self.quiet.as_mut().poll(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Connection<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.stream).poll_read(context, buffer);
        self.unless_quiet(context, outcome)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Connection<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.unless_quiet(context, outcome)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream as Client;

    use super::*;
    use tokio::net::UnixListener;

    #[test]
    fn a_connection_that_says_nothing_makes_room_for_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = UnixListener::bind(&path).unwrap();
            let mut bounded = Bounded::new(listener, 1, Duration::from_millis(20));
            for _ in 0..3 {
                let mut client = Client::connect(&path).unwrap();
                let (mut connection, _) = bounded.accept().await;
                let mut bytes = [0; 8];
                let mut buffer = ReadBuf::new(&mut bytes);
                let read =
                    std::future::poll_fn(|context| Pin::new(&mut connection).poll_read(context, &mut buffer));
                assert_eq!(read.await.unwrap_err().kind(), io::ErrorKind::TimedOut);
                drop(connection);
                assert_eq!(client.read(&mut [0]).unwrap(), 0);
            }
        });
    }
}
