//! How a listening Unix socket comes to be: the control socket and those of the VMs. One that systemd listens on for
//! the daemon is taken as it is; one that a killed daemon left behind is replaced; one that a live daemon listens on is
//! not, and nothing but a socket is ever removed. When the daemon is killed, the sockets that it made end before the
//! connections that were made to them.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use listenfd::ListenFd;
use rustix::fd::OwnedFd;
use rustix::fs::Mode;
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Resource, getrlimit};

/// Who may connect to a VM's socket: the owner and the group. A VMM that runs as another user joins the group.
const SOCKET_MODE: u32 = 0o660;
/// Connections that wait to be accepted; each VM has one VMM, so more than a few are a client gone wild.
const BACKLOG: i32 = 64;

/// The first descriptor of a listening socket, or the first of the upper half where there are fewer. Linux ends what a
/// dead process had open with the highest descriptor first, and connections get the lowest ones that are free. A VMM that
/// sees its connection end and is at once taken on by the socket of a daemon that is no more gives up, if it is
/// cloud-hypervisor up to v53; one that is refused tries again.
const DESCRIPTOR_MIN: u64 = 1 << 16;

/// Why a socket can't be listened on.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another process listens on it.
    #[error("the socket {} is in use by a running daemon: stop that one, or choose another runtime_dir", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something else has its name.
    #[error("{} is in the way: it is not a socket, so it is left alone; remove it or choose another runtime_dir", path.display())]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// The system refused.
    #[error("the socket {} can't be made: its directory must be one that the daemon's user may write", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Where listening sockets come from.
#[derive(Debug)]
pub struct Sockets {
    /// The group of those that are made.
    gid: u32,
    /// Those that systemd made, and listens on while no daemon runs: they are told apart by their paths.
    offered: Vec<Offered>,
}

/// A socket of systemd's. It is kept although its VM goes: another of the same name may come.
#[derive(Debug)]
struct Offered {
    path: PathBuf,
    socket: Arc<UnixListener>,
    used: bool,
}

impl Sockets {
    /// Sockets of this group; none are offered.
    #[must_use]
    pub fn of_group(gid: u32) -> Self {
        Self { gid, offered: Vec::new() }
    }

    /// The same with those that this process was started with (see `sd_listen_fds(3)`). What can't be used is left
    /// alone and told of.
    #[must_use]
    pub fn with_offered(mut self) -> Self {
        let mut offered = ListenFd::from_env();
        for index in 0..offered.len() {
            let path_of = |socket: &UnixListener| socket.local_addr().ok()?.as_pathname().map(Path::to_owned);
            match offered.take_unix_listener(index) {
                Ok(Some(socket)) if path_of(&socket).is_some() => {
                    let path = path_of(&socket);
                    let socket = Arc::new(socket);
                    self.offered.extend(path.map(|path| Offered { path, socket, used: false }));
                }
                Ok(_) => tracing::warn!(index, "systemd offers a socket without a path, which is not used"),
                Err(err) => {
                    tracing::warn!(index, %err, "systemd offers something that is no Unix stream socket")
                }
            }
        }
        self
    }

    /// Listens on `path` for a VMM, as owner and group only; the directory must exist.
    ///
    /// # Errors
    /// When another process listens there, when something else has this name, or when the system refuses.
    pub fn listen(&mut self, path: &Path) -> Result<Arc<UnixListener>, BindError> {
        self.listen_as(path, self.gid, SOCKET_MODE)
    }

    /// Listens on `path` with this group and mode.
    ///
    /// # Errors
    /// As for [`Self::listen`].
    pub fn listen_as(&mut self, path: &Path, gid: u32, mode: u32) -> Result<Arc<UnixListener>, BindError> {
        match self.offered.iter_mut().find(|offered| offered.path == path) {
            Some(offered) => {
                offered.used = true;
                Ok(Arc::clone(&offered.socket))
            }
            None => bind(path, gid, mode).map(Arc::new),
        }
    }

    /// Has the thread that accepts on a socket look up, for good; its file goes, unless it is systemd's.
    ///
    /// # Errors
    /// Those of removing the file.
    pub fn close(&self, path: &Path, socket: &UnixListener) -> io::Result<()> {
        if self.offered.iter().any(|offered| offered.path == path) {
            // Shut, it would be no use to anybody any more. When it is full, somebody has knocked already.
            let address = SocketAddrUnix::new(path)?;
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let caller = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            let _ = net::connect(&caller, &address);
            return Ok(());
        }
        // While we still listen, so that it can't be somebody else's.
        let removed = fs::remove_file(path);
        let _ = net::shutdown(socket, net::Shutdown::Read);
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// The paths of those that were offered and that nobody has asked for.
    pub fn unused(&self) -> impl Iterator<Item = &Path> {
        self.offered.iter().filter(|offered| !offered.used).map(|offered| offered.path.as_path())
    }
}

fn bind(path: &Path, gid: u32, mode: u32) -> Result<UnixListener, BindError> {
    let io = |source: io::Error| BindError::Io { path: path.to_owned(), source };
    let address = SocketAddrUnix::new(path).map_err(|errno| io(errno.into()))?;
    remove_stale(path, &address)?;
    listen(&address, mode)
        .map_err(|errno| match errno {
            // Somebody came first since we looked.
            Errno::ADDRINUSE => BindError::InUse { path: path.to_owned() },
            errno => io(errno.into()),
        })?
        .into_listener(path, gid, mode)
        .map_err(io)
}

/// A socket that listens, with a mode that the umask may have narrowed.
struct Listening(OwnedFd);

impl Listening {
    fn into_listener(self, path: &Path, gid: u32, mode: u32) -> io::Result<UnixListener> {
        if fs::metadata(path)?.gid() != gid {
            chown(path, None, Some(gid))?;
        }
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        Ok(UnixListener::from(above_all_connections(self.0)))
    }
}

/// The same socket with a descriptor that none of its connections will exceed; where there is none, as it was.
fn above_all_connections(socket: OwnedFd) -> OwnedFd {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let min = DESCRIPTOR_MIN.min(limit / 2);
    let moved = i32::try_from(min).ok().and_then(|min| fcntl_dupfd_cloexec(&socket, min).ok());
    moved.unwrap_or(socket)
}

fn listen(address: &SocketAddrUnix, mode: u32) -> Result<Listening, Errno> {
    let fd = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // Linux gives the file the mode that the unbound socket has: so there is no moment at which others could connect.
    rustix::fs::fchmod(&fd, Mode::from_raw_mode(mode))?;
    net::bind(&fd, address)?;
    net::listen(&fd, BACKLOG)?;
    Ok(Listening(fd))
}

/// Removes the socket that a dead process left at `path`.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), BindError> {
    let io = |source: io::Error| BindError::Io { path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io(error)),
        // A regular file refuses connections as well, but is nobody's socket.
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(BindError::NotASocket { path: path.to_owned() });
        }
        Ok(_) => {}
    }
    // Without blocking: a live daemon whose backlog is full is live all the same.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(|errno| io(errno.into()))?;
    match net::connect(&probe, address) {
        Ok(()) | Err(Errno::AGAIN | Errno::INPROGRESS) => Err(BindError::InUse { path: path.to_owned() }),
        Err(Errno::CONNREFUSED) => match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io(error)),
            _ => Ok(()),
        },
        Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(io(errno.into())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn listen_at(path: &Path) -> Result<Arc<UnixListener>, BindError> {
        Sockets::of_group(rustix::process::getegid().as_raw()).listen(path)
    }

    #[test]
    fn a_new_socket_is_for_owner_and_group() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        let _listener = listen_at(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_socket_has_the_group_that_is_wanted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        // Only root may give a file any group.
        let gid = if rustix::process::geteuid().is_root() { 12 } else { rustix::process::getegid().as_raw() };
        let _listener = Sockets::of_group(gid).listen(&path).unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!((metadata.gid(), metadata.permissions().mode() & 0o777), (gid, 0o660));
    }

    #[test]
    fn a_socket_that_is_closed_accepts_no_more_and_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        let mut sockets = Sockets::of_group(rustix::process::getegid().as_raw());
        let listener = sockets.listen(&path).unwrap();
        let accepting = Arc::clone(&listener);
        let thread = std::thread::spawn(move || accepting.accept().map(drop));
        sockets.close(&path, &listener).unwrap();
        assert!(thread.join().unwrap().is_err() && !path.exists());
        sockets.listen(&path).unwrap();
    }

    #[test]
    fn a_socket_of_systemds_stays_when_it_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        let socket = Arc::new(UnixListener::bind(&path).unwrap());
        let mut sockets = Sockets::of_group(0);
        sockets.offered.push(Offered { path: path.clone(), socket, used: false });
        for _ in 0..2 {
            let listener = sockets.listen(&path).unwrap();
            let accepting = Arc::clone(&listener);
            let thread = std::thread::spawn(move || accepting.accept().map(drop));
            sockets.close(&path, &listener).unwrap();
            thread.join().unwrap().unwrap();
        }
        assert!(path.exists() && sockets.unused().next().is_none());
    }

    #[test]
    fn a_stale_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        drop(listen_at(&path).unwrap());
        assert!(path.exists());
        let _listener = listen_at(&path).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_live_socket_is_refused_and_stays_live_even_with_a_full_backlog() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        let _listener = listen_at(&path).unwrap();
        let mut refused = 0;
        for _ in 0..BACKLOG + 3 {
            let error = listen_at(&path).unwrap_err();
            assert!(matches!(error, BindError::InUse { .. }), "{error}");
            refused += 1;
        }
        assert_eq!(refused, BACKLOG + 3);
    }

    #[test]
    fn what_is_not_a_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        fs::write(&path, "precious").unwrap();
        let error = listen_at(&path).unwrap_err();
        assert!(matches!(error, BindError::NotASocket { .. }), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_missing_directory_or_a_long_path_is_an_error_with_the_path() {
        for path in ["/nonexistent/a.sock".to_owned(), format!("/tmp/{}", "x".repeat(120))] {
            let error = listen_at(Path::new(&path)).unwrap_err();
            assert!(error.to_string().contains(&path), "{error}");
        }
    }
}
