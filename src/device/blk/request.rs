//! A request as a type: what a descriptor chain asks for, checked before anything is done. Pure parsing: it reads
//! the 16-byte header from guest memory, once, and never trusts a length or a number. Data may be split over descriptors
//! in any way (virtio 1.x, "Message Framing"), so only the sums count.

use vm_memory::GuestAddress;

use super::config_space::{RANGES_MAX, SECTOR_BYTES};
use crate::device::chain::{DescriptorTable, walk};
use crate::device::segments::Segments;
use crate::device::view::View;

/// Bytes that one request may move. Linux sends 1.25 MiB at most; a request has to end before its ring can stop, so a
/// guest must not be able to make one that takes long.
const LENGTH_MAX: u64 = 4 << 20;
const REQUEST_HEADER_BYTES: usize = 16;
const RANGE_BYTES: u64 = 16;

const VIRTIO_BLK_T_IN: u32 = 0;
const VIRTIO_BLK_T_OUT: u32 = 1;
const VIRTIO_BLK_T_FLUSH: u32 = 4;
const VIRTIO_BLK_T_GET_ID: u32 = 8;
const VIRTIO_BLK_T_DISCARD: u32 = 11;
const VIRTIO_BLK_T_WRITE_ZEROES: u32 = 13;

/// What the driver is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// Not done.
    IoErr = 1,
    /// Not a request that this device knows.
    Unsupported = 2,
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Read from the disk into the data segments.
    Load,
    /// Write the data segments to the disk.
    Store,
    /// Make everything written durable. It is already.
    Flush,
    /// The disk's serial number.
    GetId,
    /// Drop ranges of the disk; the data segments name them.
    Discard,
    /// Zero ranges of the disk; the data segments name them.
    WriteZeroes,
}

/// A well-formed request.
#[derive(Clone, Debug)]
pub struct Request {
    /// What to do.
    pub kind: Kind,
    /// Where on the disk, in bytes from its start; a multiple of [`SECTOR_BYTES`].
    pub position: u64,
    /// How much data, in bytes: the sum of the segments.
    pub length: u64,
    /// The data: readable by us for a store, a discard and a write-zeroes, writable for the others.
    pub data: Segments,
    /// Where the status byte goes.
    pub status: GuestAddress,
}

/// A chain that is no request that can be carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// There is room for an answer: this one.
    Answer(GuestAddress, Status),
    /// There is none: the head goes back with nothing written.
    NoAnswer,
}

/// Reads the chain at `head` and says what it asks for. `capacity` is the disk's size in bytes.
///
/// # Errors
/// When it is not a request that can be carried out; the error says how to answer.
pub fn parse(
    memory: &View<'_>,
    table: DescriptorTable,
    head: u16,
    capacity: u64,
) -> Result<Request, Malformed> {
    let mut chain = walk(memory, table, head).ok_or(Malformed::NoAnswer)?;
    let status = chain.writable.take_last_byte().ok_or(Malformed::NoAnswer)?;
    let refuse = |with: Status| Malformed::Answer(status, with);
    if chain.unreachable {
        return Err(refuse(Status::IoErr));
    }
    let header = take_header(memory, &mut chain.readable).ok_or(refuse(Status::IoErr))?;
    let [kind @ .., _, _, _, _, _, _, _, _, _, _, _, _] = header;
    let [_, _, _, _, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    let (kind, data, unwanted) = match u32::from_le_bytes(kind) {
        VIRTIO_BLK_T_IN => (Kind::Load, chain.writable, chain.readable),
        VIRTIO_BLK_T_OUT => (Kind::Store, chain.readable, chain.writable),
        VIRTIO_BLK_T_FLUSH => (Kind::Flush, Segments::default(), Segments::default()),
        VIRTIO_BLK_T_GET_ID => (Kind::GetId, chain.writable, chain.readable),
        VIRTIO_BLK_T_DISCARD => (Kind::Discard, chain.readable, chain.writable),
        VIRTIO_BLK_T_WRITE_ZEROES => (Kind::WriteZeroes, chain.readable, chain.writable),
        _ => return Err(refuse(Status::Unsupported)),
    };
    let length = data.length();
    let position = sector.checked_mul(SECTOR_BYTES);
    let possible = unwanted.is_empty()
        && match kind {
            Kind::Load | Kind::Store => {
                let end = position.and_then(|position| position.checked_add(length));
                length <= LENGTH_MAX
                    && length.is_multiple_of(SECTOR_BYTES)
                    && end.is_some_and(|end| end <= capacity)
            }
            Kind::Discard | Kind::WriteZeroes => {
                length.is_multiple_of(RANGE_BYTES)
                    && (1..=u64::from(RANGES_MAX) * RANGE_BYTES).contains(&length)
            }
            Kind::GetId => length > 0,
            Kind::Flush => true,
        };
    if !possible {
        return Err(refuse(Status::IoErr));
    }
    Ok(Request { kind, position: position.unwrap_or(0), length, data, status })
}

fn take_header(memory: &View<'_>, segments: &mut Segments) -> Option<[u8; REQUEST_HEADER_BYTES]> {
    let mut header = [0; REQUEST_HEADER_BYTES];
    let mut rest = &mut header[..];
    while !rest.is_empty() {
        let (address, length) = segments.take_front(rest.len())?;
        let (now, later) = rest.split_at_mut_checked(length)?;
        memory.copy_out(address, now).ok()?;
        rest = later;
    }
    Some(header)
}
