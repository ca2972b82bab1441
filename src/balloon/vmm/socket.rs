//! A connection to a VMM's Unix socket on which nothing takes longer than until its call's deadline: connecting to one
//! whose queue is full included, which would otherwise wait for as long as the VMM hangs.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::Unreachable;

/// When a call must have its answer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadline(Instant);

impl Deadline {
    /// So long from now on.
    pub(super) fn after(time_out: Duration) -> Self {
        Self(Instant::now() + time_out)
    }

    /// What is left of it.
    fn left(self, waited_for: &'static str) -> Result<Duration, Unreachable> {
        let left = self.0.saturating_duration_since(Instant::now());
        // A time-out of zero would be none at all.
        if left.is_zero() { Err(Unreachable::Late { waited_for }) } else { Ok(left) }
    }
}

/// An open connection.
#[derive(Debug)]
pub(super) struct Socket {
    stream: UnixStream,
    path: PathBuf,
}

impl Socket {
    /// Connects to the socket at `path`.
    pub(super) fn connect(path: &Path, deadline: Deadline) -> Result<Self, Unreachable> {
        let waited_for = "room in the queue of its socket, which others' connections fill";
        let left = deadline.left(waited_for)?;
        let connected = || -> Result<UnixStream, Errno> {
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
            set_socket_timeout(&socket, Timeout::Send, Some(left))?;
            connect(&socket, &SocketAddrUnix::new(path)?)?;
            Ok(socket.into())
        };
        let stream = connected().map_err(|error| unconnected(path, error, waited_for))?;
        Ok(Self { stream, path: path.to_owned() })
    }

    /// Sends all of `bytes`.
    pub(super) fn send(
        &mut self,
        bytes: &[u8],
        deadline: Deadline,
        waited_for: &'static str,
    ) -> Result<(), Unreachable> {
        let left = deadline.left(waited_for)?;
        let sent = self.stream.set_write_timeout(Some(left)).and_then(|()| self.stream.write_all(bytes));
        sent.map_err(|error| self.broken(&error, waited_for))
    }

    /// Receives some bytes, as many as fit at most; none when the other side has hung up.
    pub(super) fn receive(
        &mut self,
        into: &mut [u8],
        deadline: Deadline,
        waited_for: &'static str,
    ) -> Result<usize, Unreachable> {
        loop {
            let left = deadline.left(waited_for)?;
            let read = self.stream.set_read_timeout(Some(left)).and_then(|()| self.stream.read(into));
            match read {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                read => return read.map_err(|error| self.broken(&error, waited_for)),
            }
        }
    }

    /// Where it leads.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn broken(&self, error: &io::Error, waited_for: &'static str) -> Unreachable {
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => Unreachable::Late { waited_for },
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => Unreachable::hung_up(&self.path),
            _ => Unreachable::Gone { socket: self.path.clone(), why: error.to_string() },
        }
    }
}

/// What it means that there is no connection.
fn unconnected(path: &Path, error: Errno, waited_for: &'static str) -> Unreachable {
    let (socket, why) = (path.to_owned(), io::Error::from(error).to_string());
    match error {
        Errno::AGAIN => Unreachable::Late { waited_for },
        Errno::ACCESS | Errno::PERM => Unreachable::Forbidden { socket, why },
        _ => Unreachable::Gone { socket, why },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balloon::Word;
    use std::os::unix::net::UnixListener;

    const SHORT: Duration = Duration::from_millis(50);

    fn state(path: &Path) -> Word {
        Socket::connect(path, Deadline::after(SHORT)).unwrap_err().word()
    }

    #[test]
    fn where_nobody_listens_the_vmm_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        assert_eq!(state(&path), Word::VmmGone, "there is none");
        drop(UnixListener::bind(&path).unwrap());
        assert_eq!(state(&path), Word::VmmGone, "it is left over");
        assert_eq!(state(&dir.path().join("n".repeat(200))), Word::VmmGone, "there can be none");
    }

    /// Root, as whom these tests may run, is denied nothing.
    #[test]
    fn a_socket_of_somebody_elses_is_forbidden() {
        let state = unconnected(Path::new("/run/qmp.sock"), Errno::ACCESS, "a test");
        assert_eq!(state.word(), Word::VmmForbidden);
        assert!(
            state.to_string().starts_with("/run/qmp.sock may not be connected to (Permission"),
            "{state}"
        );
    }

    #[test]
    fn a_full_queue_is_waited_for_no_longer_than_anything_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let first = Socket::connect(&path, Deadline::after(Duration::from_secs(60))).unwrap();
        assert_eq!(state(&path), Word::VmmLate);
        assert_eq!(first.path(), path);
    }
}
