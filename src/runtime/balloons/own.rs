//! Balloons of our own: a socket for each VM that has one, as long as it has one.

use std::fs;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::balloon::vmm::own::Own;
use crate::device::balloon::Balloon;
use crate::runtime::daemon::Daemon;
use crate::runtime::served::Served;

/// How long a VMM that is hung up on may take. It has nothing of the file's to wait for.
const HANG_UP_WAIT: Duration = Duration::from_secs(2);

/// A VM's balloon and its socket, which is closed with it.
pub(super) struct Door {
    daemon: Arc<Daemon>,
    balloon: Arc<Balloon>,
    listener: Arc<UnixListener>,
    path: PathBuf,
}

impl Door {
    /// Lets VMMs attach the balloon of a VM. `given_bytes` is how large it was to be when the daemon ended, if that is
    /// known: a guest that finds no balloon any more would take all back at once.
    pub(super) fn open(daemon: &Arc<Daemon>, vm: &Served, given_bytes: Option<u64>) -> io::Result<Self> {
        let path = daemon.config.balloon_socket_path(&vm.config.name);
        if let Some(directory) = path.parent() {
            // Who may pass is as with the directory above it.
            fs::create_dir_all(directory)?;
            fs::set_permissions(directory, fs::metadata(&daemon.config.runtime_dir)?.permissions())?;
        }
        let balloon = Arc::new(Balloon::new(Arc::clone(&vm.device)));
        if let Some(bytes) = given_bytes
            && let Err(err) = balloon.set_target(bytes)
        {
            tracing::warn!(vm = vm.config.name, %err, "the balloon begins empty");
        }
        let listener = daemon.sockets.lock().listen(&path).map_err(io::Error::other)?;
        balloon.listen(Arc::clone(&listener))?;
        Ok(Self { daemon: Arc::clone(daemon), balloon, listener, path })
    }

    /// What the controller asks and tells.
    pub(super) fn client(&self) -> Own {
        Own::new(Arc::clone(&self.balloon))
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        let connections = self.balloon.connections();
        // One that doesn't leave in time is left with a balloon that nobody changes.
        let _ = connections.shut(Some(HANG_UP_WAIT));
        connections.end_for_good();
        if let Err(err) = self.daemon.sockets.lock().close(&self.path, &self.listener) {
            tracing::warn!(path = %self.path.display(), %err, "a balloon's socket can't be removed");
        }
    }
}
