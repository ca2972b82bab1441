//! The way back to the VMM, by which the balloon says that its configuration space has changed: the driver looks there
//! how large the balloon is to be only when it is told. A VMM hands a socket over in SET_BACKEND_REQ_FD. The `vhost`
//! crate (0.18) wraps that socket in a type which knows other messages but not this one, so the one message is taken off
//! the connection before the crate sees it, and the one that goes back is written here.

use std::io;
use std::os::unix::net::UnixStream;

use rustix::net::{RecvFlags, SendFlags, SocketType, sockopt};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const HEADER_BYTES: usize = 12;
const SET_BACKEND_REQ_FD: u32 = 21;
const CONFIG_CHANGE: u32 = 2;
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// A message's header: what it is, its flags, and how many bytes follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    request: u32,
    flags: u32,
    size: u32,
}

impl Header {
    fn decode(bytes: [u8; HEADER_BYTES]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l] = bytes;
        let [request, flags, size] = [[a, b, c, d], [e, f, g, h], [i, j, k, l]].map(u32::from_ne_bytes);
        Self { request, flags, size }
    }

    fn encode(self) -> Vec<u8> {
        [self.request, self.flags, self.size].into_iter().flat_map(u32::to_ne_bytes).collect()
    }

    fn hands_a_channel_over(self) -> bool {
        self.request == SET_BACKEND_REQ_FD && self.flags & (VERSION_MASK | REPLY) == VERSION && self.size == 0
    }
}

/// Where a VMM listens to its device.
#[derive(Debug)]
pub struct Channel(UnixStream);

impl Channel {
    /// Takes the next message off a VMM's connection if it hands a channel over. Waits for nothing.
    ///
    /// # Errors
    /// When the connection is broken, or what was handed over is no stream socket.
    pub fn take(connection: &UnixStream, replies: bool) -> io::Result<Option<Self>> {
        let mut bytes = [0; HEADER_BYTES];
        let looked = rustix::net::recv(connection, &mut bytes[..], RecvFlags::PEEK | RecvFlags::DONTWAIT);
        // Whatever is wrong with the connection, reading the message finds it out.
        let there = looked.is_ok_and(|(_, bytes)| bytes == HEADER_BYTES);
        let header = Header::decode(bytes);
        if !there || !header.hands_a_channel_over() {
            return Ok(None);
        }
        let (_, file) = connection.recv_with_fd(&mut bytes).map_err(io::Error::from)?;
        let channel = file.map(|file| UnixStream::from(std::os::fd::OwnedFd::from(file)));
        let channel = channel.filter(is_stream);
        if replies && header.flags & NEED_REPLY != 0 {
            let answer = Header { flags: VERSION | REPLY, size: 8, ..header }.encode();
            let failed = u64::from(channel.is_none()).to_ne_bytes();
            let _ = rustix::net::send(connection, &[answer, failed.to_vec()].concat(), SendFlags::NOSIGNAL)?;
        }
        let refused = || io::Error::new(io::ErrorKind::InvalidInput, "a channel that is no stream socket");
        channel.map(|channel| Some(Self(channel))).ok_or_else(refused)
    }

    /// Says that the configuration space has changed. Waits for nobody: a VMM that has not read what it was told before
    /// will look at what holds now.
    ///
    /// # Errors
    /// When nobody listens any more.
    pub fn config_changed(&self) -> io::Result<()> {
        let message = Header { request: CONFIG_CHANGE, flags: VERSION, size: 0 }.encode();
        match rustix::net::send(&self.0, &message, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
            Err(err) => Err(err.into()),
        }
    }
}

fn is_stream(socket: &UnixStream) -> bool {
    let domain = sockopt::socket_domain(socket);
    domain == Ok(rustix::net::AddressFamily::UNIX) && sockopt::socket_type(socket) == Ok(SocketType::STREAM)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;

    use super::*;

    fn hand_over(flags: u32, fd: Option<i32>) -> (UnixStream, io::Result<Option<Channel>>) {
        let (vmm, connection) = UnixStream::pair().unwrap();
        let header = Header { request: SET_BACKEND_REQ_FD, flags, size: 0 }.encode();
        match fd {
            Some(fd) => vmm.send_with_fd(&header[..], fd).unwrap(),
            None => (&vmm).write(&header).unwrap(),
        };
        let taken = Channel::take(&connection, true);
        (vmm, taken)
    }

    #[test]
    fn a_change_is_told_through_the_socket_that_was_handed_over() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let (mut vmm, taken) = hand_over(VERSION | NEED_REPLY, Some(theirs.as_raw_fd()));
        drop(theirs);
        let channel = taken.unwrap().unwrap();
        let mut reply = [0; 20];
        vmm.read_exact(&mut reply).unwrap();
        assert_eq!(reply[..12], Header { request: 21, flags: 5, size: 8 }.encode());
        assert_eq!(reply[12..], [0; 8]);
        channel.config_changed().unwrap();
        let mut told = [0; 12];
        ours.read_exact(&mut told).unwrap();
        assert_eq!(told[..], Header { request: 2, flags: 1, size: 0 }.encode());
        drop(ours);
        assert!(channel.config_changed().is_err());
    }

    #[test]
    fn a_vmm_that_does_not_listen_keeps_nobody_waiting() {
        let (_ours, theirs) = UnixStream::pair().unwrap();
        let channel = Channel(theirs);
        for _ in 0..100_000 {
            channel.config_changed().unwrap();
        }
    }

    #[test]
    fn what_is_no_socket_is_refused_aloud() {
        let null = std::fs::File::open("/dev/null").unwrap();
        for fd in [Some(null.as_raw_fd()), None] {
            let (mut vmm, taken) = hand_over(VERSION | NEED_REPLY, fd);
            assert!(taken.is_err());
            let mut reply = [0; 20];
            vmm.read_exact(&mut reply).unwrap();
            assert_ne!(reply[12..], [0; 8]);
        }
    }

    #[test]
    fn other_messages_stay_where_they_are() {
        let (mut vmm, mut connection) = UnixStream::pair().unwrap();
        assert!(Channel::take(&connection, true).unwrap().is_none(), "nothing is there");
        for (request, flags, size) in [(20, 1, 0), (21, 2, 0), (21, 5, 0), (21, 1, 8)] {
            let header = Header { request, flags, size }.encode();
            vmm.write_all(&header).unwrap();
            assert!(Channel::take(&connection, true).unwrap().is_none());
            let mut read = [0; 12];
            connection.read_exact(&mut read).unwrap();
            assert_eq!(read[..], header);
        }
        vmm.write_all(&[21, 0, 0]).unwrap();
        drop(vmm);
        assert!(Channel::take(&connection, true).unwrap().is_none(), "it was cut");
    }
}
