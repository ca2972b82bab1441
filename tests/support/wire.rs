//! vhost-user messages as bytes and file descriptors, for front ends that say what no VMM says.
#![allow(dead_code, reason = "not every test says everything")]

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

pub const GET_FEATURES: u32 = 1;
pub const SET_FEATURES: u32 = 2;
pub const SET_OWNER: u32 = 3;
pub const SET_MEM_TABLE: u32 = 5;
pub const SET_VRING_NUM: u32 = 8;
pub const SET_VRING_ADDR: u32 = 9;
pub const SET_VRING_BASE: u32 = 10;
pub const GET_VRING_BASE: u32 = 11;
pub const SET_VRING_KICK: u32 = 12;
pub const SET_VRING_CALL: u32 = 13;
pub const SET_VRING_ERR: u32 = 14;
pub const GET_PROTOCOL_FEATURES: u32 = 15;
pub const SET_PROTOCOL_FEATURES: u32 = 16;
pub const GET_QUEUE_NUM: u32 = 17;
pub const SET_VRING_ENABLE: u32 = 18;
pub const GET_CONFIG: u32 = 24;
pub const GET_INFLIGHT_FD: u32 = 31;
pub const SET_INFLIGHT_FD: u32 = 32;
pub const RESET_DEVICE: u32 = 34;
pub const ADD_MEM_REG: u32 = 37;
pub const REM_MEM_REG: u32 = 38;

/// Version 1, and an answer wanted.
pub const FLAGS: u32 = 1 | 8;
pub const HEADER_BYTES: usize = 12;
pub const PROTOCOL_FEATURES: u64 = 1 << 30;
/// Several queues, REPLY_ACK, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE, CONFIGURE_MEM_SLOTS.
pub const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 15;

pub fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a message is short");
    let mut bytes = half_words(&[request, flags, length]);
    bytes.extend(payload);
    bytes
}

pub fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

pub fn half_words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// One region, with as many fields as SET_MEM_TABLE and ADD_MEM_REG have.
pub fn region(guest: u64, bytes: u64, vmm: u64, offset: u64) -> Vec<u8> {
    [half_words(&[1, 0]), words(&[guest, bytes, vmm, offset])].concat()
}

/// Where a queue's table, used ring and available ring are.
pub fn addresses(queue: u32, table: u64, used: u64, available: u64) -> Vec<u8> {
    [half_words(&[queue, 0]), words(&[table, used, available, 0])].concat()
}

/// The queues and their size, behind where the region is.
pub fn inflight(bytes: u64, queues: u32, queue_size: u32) -> Vec<u8> {
    [words(&[bytes, 0]), half_words(&[queues | queue_size << 16, 0])].concat()
}

/// Sends all of the bytes, the descriptors with the first of them. False when the other end is gone.
pub fn send(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
    let (mut sent, mut fds) = (0, fds);
    while sent < bytes.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)), "sixteen descriptors at most");
        }
        let rest = [IoSlice::new(&bytes[sent..])];
        match sendmsg(stream, &rest, &mut control, SendFlags::NOSIGNAL) {
            Ok(count) => sent += count,
            Err(_) => return false,
        }
        fds = &[];
    }
    true
}

/// Receives so many bytes, and the last descriptor that came with them.
pub fn receive(stream: &UnixStream, count: usize) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let (mut bytes, mut got, mut fd) = (vec![0; count], 0, None);
    while got < count {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut rest = [IoSliceMut::new(&mut bytes[got..])];
        let received = recvmsg(stream, &mut rest, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                fd = fds.last().or(fd);
            }
        }
        if received.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        got += received.bytes;
    }
    Ok((bytes, fd))
}
