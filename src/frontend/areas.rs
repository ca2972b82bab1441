//! Where a queue's requests stand in guest memory: for each tag a header, a status byte, a data buffer and,
//! if wanted, an indirect table, at addresses that follow from the tag alone. All are made once.

use vm_memory::{Bytes, GuestAddress, VolatileSlice};

use super::Error;
use super::memory::{Memory, Piece};
use super::negotiation::Options;
use super::request::{HEADER_BYTES, Op, Status};
use super::ring::{DESCRIPTOR_BYTES, Descriptor, Ring, slice_of};

/// Bytes from one tag's header to the next tag's; the status byte has the second half, a cache line that
/// the device doesn't read headers from.
const FRAME_BYTES: usize = 128;
const STATUS_OFFSET: usize = 64;

// The same lengths in the type that descriptors count in.
const HEADER_LENGTH: u32 = 16;
const DESCRIPTOR_LENGTH: u32 = 16;
const _: () = assert!(HEADER_LENGTH as usize == HEADER_BYTES);
const _: () = assert!(DESCRIPTOR_LENGTH as usize == DESCRIPTOR_BYTES);

/// The memory of a queue's requests.
#[derive(Debug)]
pub(super) struct Areas {
    frames: Piece,
    data: Piece,
    tables: Option<Piece>,
    tags: u16,
    pub(super) data_bytes: usize,
    descriptors_per_tag: u16,
    indirect_entries: u16,
}

impl Areas {
    pub(super) fn new(memory: &Memory, options: &Options) -> Result<Self, Error> {
        let descriptors_per_tag = options.queue_size.checked_div(options.depth).unwrap_or(0);
        if descriptors_per_tag < if options.indirect_entries == 0 { 3 } else { 1 } {
            return Err(Error::Usage("the queue is too small for so many requests in flight"));
        }
        if (1..3).contains(&options.indirect_entries) {
            return Err(Error::Usage("an indirect table needs three entries at least"));
        }
        let tags = usize::from(options.depth);
        let table_bytes = tags * usize::from(options.indirect_entries) * DESCRIPTOR_BYTES;
        Ok(Self {
            frames: memory.allocate_piece(tags * FRAME_BYTES)?,
            data: memory.allocate_piece(tags * options.data_bytes)?,
            tables: if table_bytes == 0 { None } else { Some(memory.allocate_piece(table_bytes)?) },
            tags: options.depth,
            data_bytes: options.data_bytes,
            descriptors_per_tag,
            indirect_entries: options.indirect_entries,
        })
    }

    pub(super) fn header_address(&self, tag: u16) -> GuestAddress {
        GuestAddress(self.frames.address.0 + u64::from(tag) * FRAME_BYTES as u64)
    }

    pub(super) fn status_address(&self, tag: u16) -> GuestAddress {
        GuestAddress(self.header_address(tag).0 + STATUS_OFFSET as u64)
    }

    pub(super) fn data_address(&self, tag: u16) -> GuestAddress {
        GuestAddress(self.data.address.0 + u64::from(tag) * self.data_bytes as u64)
    }

    pub(super) fn table_address(&self, tag: u16) -> Option<u64> {
        let bytes = u64::from(self.indirect_entries) * DESCRIPTOR_BYTES as u64;
        self.tables.as_ref().map(|tables| tables.address.0 + u64::from(tag) * bytes)
    }

    /// The tag's `n`th descriptor in the ring.
    #[inline]
    pub(super) fn descriptor_index(&self, tag: u16, n: u16) -> u16 {
        tag.wrapping_mul(self.descriptors_per_tag).wrapping_add(n)
    }

    /// The tag whose chains begin at this descriptor.
    #[inline]
    pub(super) fn tag_of(&self, head: u32) -> Option<u16> {
        let head = u16::try_from(head).ok()?;
        let tag = head / self.descriptors_per_tag;
        (head % self.descriptors_per_tag == 0 && tag < self.tags).then_some(tag)
    }

    pub(super) fn descriptors_per_tag(&self) -> u16 {
        self.descriptors_per_tag
    }

    #[inline]
    pub(super) fn data_slice(
        &self,
        tag: u16,
        offset: usize,
        bytes: usize,
    ) -> Result<VolatileSlice<'_>, Error> {
        let outside =
            || Error::Address { address: self.data_address(tag).0.saturating_add(offset as u64), bytes };
        let fits = offset.checked_add(bytes).is_some_and(|end| end <= self.data_bytes);
        if !fits || tag >= self.tags {
            return Err(outside());
        }
        slice_of(&self.data, usize::from(tag) * self.data_bytes + offset, bytes).ok_or_else(outside)
    }

    /// Writes a request's header and clears its status byte.
    #[inline]
    pub(super) fn write_frame(&self, tag: u16, op: Op) {
        if let Some(frame) = slice_of(&self.frames, usize::from(tag) * FRAME_BYTES, FRAME_BYTES) {
            frame.copy_from(&op.header());
            // In bounds by the frame's size.
            let _ = frame.write_obj(Status::UNWRITTEN, STATUS_OFFSET);
        }
    }

    /// The device's answer, as it stands now.
    #[inline]
    pub(super) fn status(&self, tag: u16) -> Status {
        slice_of(&self.frames, usize::from(tag) * FRAME_BYTES + STATUS_OFFSET, 1)
            .and_then(|slice| slice.read_obj::<u8>(0).ok())
            .map_or(Status::Unwritten, Status::from)
    }

    /// Writes the descriptors of header, buffers and status: into the ring, or into the tag's indirect table
    /// if tags have these.
    pub(super) fn lay_out(
        &self,
        ring: &mut Ring,
        tag: u16,
        buffers: &[(GuestAddress, u32)],
        device_writes: bool,
    ) -> Result<(), Error> {
        let indirect = self.tables.is_some();
        let room = if indirect { self.indirect_entries } else { self.descriptors_per_tag };
        if buffers.len() + 2 > usize::from(room) {
            return Err(Error::Usage("the request takes more descriptors than its tag has"));
        }
        let mut index = if indirect { 0 } else { self.descriptor_index(tag, 0) };
        self.put(ring, tag, index, (self.header_address(tag), HEADER_LENGTH), Descriptor::NEXT);
        let data_flags = Descriptor::NEXT | if device_writes { Descriptor::WRITE } else { 0 };
        for buffer in buffers {
            index += 1;
            self.put(ring, tag, index, *buffer, data_flags);
        }
        index += 1;
        self.put(ring, tag, index, (self.status_address(tag), 1), Descriptor::WRITE);
        if let Some(address) = self.table_address(tag) {
            let bytes = (u32::from(index) + 1) * DESCRIPTOR_LENGTH;
            let table = Descriptor { address, bytes, flags: Descriptor::INDIRECT, next: 0 };
            ring.write_descriptor(self.descriptor_index(tag, 0), table);
        }
        Ok(())
    }

    fn put(&self, ring: &mut Ring, tag: u16, index: u16, buffer: (GuestAddress, u32), flags: u16) {
        let next = if flags & Descriptor::NEXT == 0 { 0 } else { index + 1 };
        let descriptor = Descriptor { address: buffer.0.0, bytes: buffer.1, flags, next };
        let Some(tables) = &self.tables else { return ring.write_descriptor(index, descriptor) };
        let entry = usize::from(tag) * usize::from(self.indirect_entries) + usize::from(index);
        if let Some(slice) = slice_of(tables, entry * DESCRIPTOR_BYTES, DESCRIPTOR_BYTES) {
            slice.copy_from(&descriptor.to_bytes());
        }
    }
}
