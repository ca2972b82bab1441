//! The daemon: which rooms start in which order, and what the control socket may ask of them. It stops by being
//! killed: everything that has to outlive it is in the state directory at every instant, so there is one way back,
//! and every start takes it.

mod balloons;
mod daemon;
mod draining;
mod keeper;
mod notify;
mod psi;
mod reload;
mod report;
mod sandbox;
mod served;
mod status;
mod vms;

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sys::signal::{SigSet, Signal};

use crate::config::{Config, ConfigError, Layers, STATE_DIR_DEFAULT};
use crate::control::access::{Access, GroupError};
use crate::control::server::Server;
use crate::control::server::scraped::Unbound;
use crate::control::socket::{BindError, Sockets};
use crate::private;
use crate::store::state::StateError;
use crate::writeback::OpenError;
use daemon::Daemon;

const RUNTIME_DIR_MODE: u32 = 0o750;
/// Where another group may give orders, it has to get to the control socket. Others may pass, and see nothing.
const SHARED_RUNTIME_DIR_MODE: u32 = 0o751;

/// Why the daemon can't run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The state directory can't be used.
    #[error(transparent)]
    State(StateError),
    /// The writeback file can't be made.
    #[error(
        "writeback.path = {path:?}: its directory is not there: make it with `mkdir -p {}`, or configure another path",
        path.parent().unwrap_or(path).display()
    )]
    WritebackDirectory {
        /// The file that was configured.
        path: PathBuf,
    },
    /// A socket can't be made.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// Memory can't be locked.
    #[error(
        "stored pages can't be locked in memory: that needs CAP_IPC_LOCK or an unlimited RLIMIT_MEMLOCK \
         (LimitMEMLOCK=infinity in a unit); or configure lock_memory = false"
    )]
    LockMemory(#[source] io::Error),
    /// The sockets can't have the group that was configured.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// The runtime directory can't be made.
    #[error(
        "can't create the runtime directory {}: make it for the daemon's user, or choose another runtime_dir",
        path.display()
    )]
    RuntimeDir {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// What is remembered can't be used, or not together with the configuration.
    #[error("the daemon can't start with what is remembered")]
    Config(#[source] ConfigError),
    /// A thread can't be started.
    #[error("a thread can't be started")]
    Thread(#[source] io::Error),
}

impl From<StateError> for ServeError {
    fn from(error: StateError) -> Self {
        match error {
            StateError::Writeback(OpenError::Io { path, source, .. })
                if source.kind() == io::ErrorKind::NotFound =>
            {
                Self::WritebackDirectory { path }
            }
            error => Self::State(error),
        }
    }
}

/// Runs the daemon until the process is killed. SIGHUP has it read the configuration again.
///
/// # Errors
/// When it can't start. A VM whose pages are damaged, or that is new and can't be made, doesn't keep it from starting.
pub fn serve(config: Config) -> Result<(), ServeError> {
    // Before there are threads: they all keep both blocked, and this one waits for the first. The second comes with the
    // error of a write for which LimitFSIZE= leaves no room, and would end the daemon.
    let mut hangup = SigSet::empty();
    hangup.add(Signal::SIGHUP);
    let mut blocked = hangup;
    blocked.add(Signal::SIGXFSZ);
    blocked.thread_block().map_err(|errno| ServeError::Thread(errno.into()))?;
    crate::heap::give_back_large_blocks();
    raise_open_files();
    // Sockets are for owner and group from their first moment: a VMM that is refused by one that is not yet may give up.
    rustix::process::umask(rustix::fs::Mode::RWXO);
    warn_unless_tmpfs(&config.state_dir);
    let control_path = config.control_socket();
    let layers = Layers::load(config).map_err(ServeError::Config)?;
    let config = layers.file.clone();
    let (access, control_access) = (
        Access::of_vms(config.socket_group.as_deref())?,
        Access::of_control(config.control_group.as_deref())?,
    );
    if let Err(err) = access.join().and_then(|()| control_access.join()) {
        tracing::warn!(%err, "the daemon can't join the group of its sockets: it may be unable to make more of them later");
    }
    let one_group = config.control_group.is_none() || control_access.gid() == access.gid();
    let runtime_dir_mode = if one_group { RUNTIME_DIR_MODE } else { SHARED_RUNTIME_DIR_MODE };
    make_runtime_dir(&config.runtime_dir, access.gid(), runtime_dir_mode)
        .map_err(|source| ServeError::RuntimeDir { path: config.runtime_dir.clone(), source })?;
    let sockets = Sockets::of_group(access.gid()).with_offered();
    let scraped = config.metrics.map(|address| (address, Unbound::new(address)));
    let sandboxed = config.sandbox;
    if sandboxed {
        // Landlock takes paths that exist. When the directory can't be made, opening the state says why.
        let _ = private::create_dir(&config.state_dir);
        let _ = config.vms_file.parent().map(private::create_dir);
        sandbox::enter(&sandbox::Files::of(&config));
    }
    // The state's lock comes first: whoever holds it is the daemon, and stale sockets are then nobody else's.
    notify::starting();
    let daemon = Arc::new(Daemon::open(layers, sockets)?);
    let control =
        daemon.sockets.lock().listen_as(&control_path, control_access.gid(), control_access.mode())?;
    daemon.listen()?;
    for path in daemon.sockets.lock().unused() {
        tracing::warn!(path = %path.display(), "systemd listens there for the daemon, and no VM has this socket");
    }
    let _server =
        Server::start(control, control_access, Arc::clone(&daemon) as _).map_err(ServeError::Thread)?;
    keeper::start(Arc::clone(&daemon)).map_err(ServeError::Thread)?;
    balloons::start(Arc::clone(&daemon), daemon.config.balloon_interval).map_err(ServeError::Thread)?;
    // An address that somebody else has is no reason to leave guests without their pages.
    if let Some((address, socket)) = scraped
        && let Err(err) = socket.and_then(|socket| socket.serve(daemon.clone()))
    {
        tracing::error!(%address, %err, "the metrics are on the control socket alone: the address can't be listened on");
    }
    if sandboxed {
        sandbox::drop_capabilities();
    }
    notify::start(Arc::clone(&daemon)).map_err(ServeError::Thread)?;
    tracing::info!(control = %control_path.display(), "ready");
    loop {
        // Interrupted by another signal, it waits again.
        if hangup.wait() == Ok(Signal::SIGHUP)
            && let Err(err) = notify::reloading(&daemon)
        {
            tracing::error!("{err}");
        }
    }
}

/// Makes the directory of the sockets so that their groups can pass. One that exists is somebody's decision.
fn make_runtime_dir(path: &Path, gid: u32, mode: u32) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(path)?;
    chown(path, None, Some(gid))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

/// A VM takes some descriptors and a VMM some more; the usual soft limit of 1024 is soon used up.
fn raise_open_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(err) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%err, "the limit of open files can't be raised");
    }
}

/// Pages in a directory on a disk would be written to it by the kernel, and not be gone after a reboot.
fn warn_unless_tmpfs(state_dir: &Path) {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    let mut existing = state_dir;
    while !existing.exists() {
        let Some(parent) = existing.parent() else { return };
        existing = parent;
    }
    if let Ok(found) = rustix::fs::statfs(existing)
        && found.f_type != TMPFS_MAGIC
    {
        tracing::warn!(
            state_dir = %state_dir.display(),
            "state_dir is not on a tmpfs: stored pages will be written to a disk, and outlive the host; configure a directory \
             of a tmpfs, such as {STATE_DIR_DEFAULT}"
        );
    }
}
