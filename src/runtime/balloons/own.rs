//! Balloons of our own device: each has a socket in the runtime directory for as long as the controller has its VM, and no
//! VMM is asked anything. A socket that can't be made is a state like a VMM that is away, and is tried again.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::balloon::vmm::own::Own;
use crate::balloon::vmm::{GuestMemory, Unreachable, VmmClient};
use crate::device::balloon::Balloon;
use crate::device::complaints::Chain;
use crate::runtime::daemon::Daemon;

/// Whoever may connect to a socket there has to find it; the socket's own mode says who may.
const DIRECTORY_MODE: u32 = 0o755;
/// How long a VMM may take to see that its balloon is over.
const HANG_UP_WAIT: Duration = Duration::from_secs(1);

/// A VM's balloon, and the socket that it has.
pub(super) struct OwnBalloon {
    daemon: Arc<Daemon>,
    vm: String,
    open: Option<Open>,
    /// Why there is none.
    missing: Option<Unreachable>,
}

struct Open {
    daemon: Arc<Daemon>,
    balloon: Arc<Balloon>,
    client: Own,
    path: PathBuf,
    listener: Arc<UnixListener>,
}

impl OwnBalloon {
    /// That of the VM with this name, with a socket if that can be made by now: its VMM wants it whether anybody looks or not.
    pub(super) fn new(daemon: Arc<Daemon>, vm: &str) -> Self {
        let mut own = Self { daemon, vm: vm.to_owned(), open: None, missing: None };
        own.prepare();
        if let Some(err) = &own.missing {
            tracing::warn!(vm, %err, "the VM has no balloon yet");
        }
        own
    }

    /// The client, if there is a socket.
    fn client(&mut self) -> Result<&mut Own, Unreachable> {
        let missing =
            || self.missing.clone().unwrap_or(Unreachable::Late { waited_for: "the balloon's socket" });
        self.open.as_mut().map(|open| &mut open.client).ok_or_else(missing)
    }
}

impl VmmClient for OwnBalloon {
    /// Makes the socket if there is none. Another VM may have the name by now.
    fn prepare(&mut self) {
        if self.open.as_ref().is_some_and(|open| open.balloon.vm().is_removed()) {
            self.open = None;
        }
        if self.open.is_none() {
            let why = |err: io::Error| Chain(&err).to_string();
            let refused = |why| Unreachable::Refused { request: "a socket for the balloon", why };
            match Open::new(&self.daemon, &self.vm) {
                Ok(open) => (self.open, self.missing) = (Some(open), None),
                Err(err) => self.missing = Some(refused(why(err))),
            }
        }
    }

    fn look(&mut self, now: Instant) -> Result<GuestMemory, Unreachable> {
        self.client()?.look(now)
    }

    fn set_target(&mut self, bytes: u64, now: Instant) -> Result<(), Unreachable> {
        self.client()?.set_target(bytes, now)
    }
}

impl Open {
    fn new(daemon: &Arc<Daemon>, vm: &str) -> io::Result<Self> {
        let served = daemon.find(vm).ok_or_else(|| io::Error::other("the VM is gone"))?;
        let path = daemon.config.balloon_socket_path(vm);
        path.parent().map_or(Ok(()), make_directory)?;
        let listener = daemon.sockets.lock().listen(&path).map_err(io::Error::other)?;
        let balloon = Arc::new(Balloon::new(served.device));
        balloon.listen(Arc::clone(&listener))?;
        let client = Own::new(Arc::clone(&balloon), &path);
        Ok(Self { daemon: Arc::clone(daemon), balloon, client, path, listener })
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let connections = self.balloon.connections();
        // Its guest keeps what it has: nobody squeezes it any more.
        let shut = connections.shut(Some(HANG_UP_WAIT));
        connections.end_for_good();
        let closed = self.daemon.sockets.lock().close(&self.path, &self.listener);
        let (vm, path) = (self.balloon.vm().name(), self.path.display());
        if let Err(err) = shut {
            tracing::warn!(vm, %path, %err, "the VM's balloon is over, and its VMM doesn't see that");
        }
        if let Err(err) = closed {
            tracing::warn!(vm, %path, %err, "the socket of the VM's balloon can't be removed");
        }
    }
}

fn make_directory(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(err) if err.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made.and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(DIRECTORY_MODE))),
    }
}
