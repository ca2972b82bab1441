//! The socket's side of a device: taking connections, and answering a VMM's messages until it hangs up.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vhost::vhost_user::{BackendReqHandler, Error as VhostError};

use super::HOW_TO_SHARE;
use super::attached::Attached;
use super::complaints::{Chain, Complaint};
use super::connections::Connections;
use super::ring::Ending;
use super::session::Session;
use super::signals;
use super::vm::DeviceVm;
use crate::threads::{self, Role};

/// Hands every connection to `attach`, on a thread of its own whose name begins with `thread`, until the socket is shut or
/// somebody connects while `is_over`.
///
/// # Errors
/// When the thread can't be started.
pub(super) fn accept(
    listener: Arc<UnixListener>,
    thread: &str,
    vm: Arc<DeviceVm>,
    is_over: impl Fn() -> bool + Send + 'static,
    attach: impl Fn(UnixStream) -> io::Result<()> + Send + 'static,
) -> io::Result<()> {
    threads::spawn(format!("{thread}-{}", vm.name()), Role::Listener, move || {
        for stream in listener.incoming() {
            if is_over() {
                return;
            }
            if let Err(err) = stream.and_then(&attach) {
                if vm.complaints().is_news(Complaint::Connection) {
                    tracing::warn!(vm = vm.name(), "a connection was refused: {}", Chain(&err));
                }
                // Out of file descriptors or threads: that doesn't end by trying again at once.
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    })?;
    Ok(())
}

/// Answers messages until the VMM hangs up or says something that can't be.
pub(super) fn serve<D: Attached>(
    stream: UnixStream,
    session: Session<D>,
    vm: &DeviceVm,
    connections: &Connections,
) {
    // One that can't go on comes back ten times a second.
    if !connections.is_failing() && vm.comings().is_told() {
        tracing::info!(vm = vm.name(), device = D::NAME, "a VMM connected");
    }
    let session = Arc::new(Mutex::new(session));
    let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(&session));
    let end = loop {
        if let Err(err) = D::until_message(&session) {
            break err;
        }
        // Whatever a message makes this thread do is done for this VM.
        let pages = vm.pages();
        let _working = pages.as_ref().map(|pages| signals::blame::working(pages.table()));
        if let Err(err) = handler.handle_request() {
            break err;
        }
    };
    // The connection stays open until the rings have stopped: a VMM that sees it close may come back at once.
    let pages = vm.pages();
    let _working = pages.as_ref().map(|pages| signals::blame::working(pages.table()));
    if let Ok(mut session) = session.lock() {
        session.stop_all(Ending::LeaveInFlight);
    }
    connections.set_failing(true);
    match end {
        VhostError::Disconnected | VhostError::PartialMessage | VhostError::SocketBroken(_) => {
            connections.set_failing(false);
            if vm.comings().is_told() {
                tracing::info!(vm = vm.name(), device = D::NAME, "the VMM disconnected");
            }
        }
        _ if !vm.complaints().is_news(Complaint::Connection) => {}
        VhostError::InvalidParam | VhostError::InvalidMessage => tracing::warn!(
            vm = vm.name(),
            "the VMM sent a message that can't be used; if its memory is not shared: {HOW_TO_SHARE}"
        ),
        err => tracing::warn!(vm = vm.name(), "the connection was ended: {}", Chain(&err)),
    }
}
