//! The driver's side of one split ring: descriptors, the available ring, the used ring, and when to notify.
//! It writes whatever descriptors it is given, malformed ones included, and knows nothing of requests.
//! Published entries become visible by a release store of the available index; the used index is read
//! with acquire. All accesses go through `vm-memory`, because the other side is another process.

use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, GuestAddress, GuestMemoryRegion, MemoryRegionAddress, VolatileSlice};

use super::Error;
use super::memory::{Memory, Piece};

/// Bytes of a descriptor.
pub(crate) const DESCRIPTOR_BYTES: usize = 16;

/// One descriptor, as it stands in a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest physical address.
    pub address: u64,
    /// Length in bytes.
    pub bytes: u32,
    /// [`Self::NEXT`], [`Self::WRITE`], [`Self::INDIRECT`], or any nonsense.
    pub flags: u16,
    /// Index of the next descriptor, with [`Self::NEXT`].
    pub next: u16,
}

impl Descriptor {
    /// The chain goes on at `next`.
    pub const NEXT: u16 = 1;
    /// The device writes this buffer; without it, it reads it.
    pub const WRITE: u16 = 2;
    /// The buffer holds a table of descriptors.
    pub const INDIRECT: u16 = 4;

    pub(crate) fn to_bytes(self) -> [u8; DESCRIPTOR_BYTES] {
        let mut bytes = [0; DESCRIPTOR_BYTES];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.bytes.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// An element of the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Index of the chain's first descriptor, as the back end wrote it.
    pub head: u32,
    /// Bytes that the back end says it wrote.
    pub bytes: u32,
}

/// Byte offsets of a ring's three parts from its start, and their total.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) size: u16,
    pub(crate) available: usize,
    pub(crate) used: usize,
    pub(crate) bytes: usize,
}

impl Layout {
    /// Each part on pages of its own, so that no cache line is shared between what the two sides write.
    pub(crate) fn new(size: u16) -> Self {
        let entries = usize::from(size);
        let page = crate::page::PAGE_SIZE;
        let available = (entries * DESCRIPTOR_BYTES).next_multiple_of(page);
        let used = available + (6 + entries * 2).next_multiple_of(page);
        Self { size, available, used, bytes: used + (6 + entries * 8).next_multiple_of(page) }
    }

    /// Offset of the driver's wish when to be notified.
    fn used_event(self) -> usize {
        self.available + 4 + usize::from(self.size) * 2
    }

    /// Offset of the device's wish when to be notified.
    fn available_event(self) -> usize {
        self.used + 4 + usize::from(self.size) * 8
    }
}

/// Where a ring is: all that setting it up needs.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    piece: Piece,
    layout: Layout,
}

impl Place {
    /// Number of descriptors.
    pub(crate) fn size(&self) -> u16 {
        self.layout.size
    }

    /// The addresses in this process of descriptor table, available and used ring.
    pub(crate) fn user_addresses(&self) -> (u64, u64, u64) {
        let base = self.piece.region.as_ptr() as u64 + self.piece.offset as u64;
        (base, base + self.layout.available as u64, base + self.layout.used as u64)
    }

    /// The guest addresses of the same.
    #[cfg(test)]
    pub(crate) fn guest_addresses(&self) -> (GuestAddress, GuestAddress, GuestAddress) {
        let at = |offset: usize| GuestAddress(self.piece.address.0 + offset as u64);
        (at(0), at(self.layout.available), at(self.layout.used))
    }

    /// The available index that the driver has written.
    pub(crate) fn available_index(&self) -> u16 {
        load(&self.piece, self.layout.available + 2, Ordering::Acquire)
    }

    /// The used index that a back end has written.
    pub(crate) fn used_index(&self) -> u16 {
        load(&self.piece, self.layout.used + 2, Ordering::Acquire)
    }
}

/// The driver's side of one split ring.
#[derive(Debug)]
pub struct Ring {
    piece: Piece,
    layout: Layout,
    event_idx: bool,
    /// Entries put into the available ring, published or not.
    available_next: u16,
    /// The available index that the back end can see.
    available_published: u16,
    /// Used entries taken.
    used_next: u16,
    /// The used index when it was last read.
    used_seen: u16,
}

impl Ring {
    /// Makes an empty ring of `size` descriptors in `memory`.
    pub(crate) fn new(memory: &Memory, size: u16, event_idx: bool) -> Result<Self, Error> {
        if !size.is_power_of_two() || size > 1 << 15 {
            return Err(Error::Usage("a queue's size must be a power of two, 32768 at most"));
        }
        let layout = Layout::new(size);
        let piece = memory.allocate_piece(layout.bytes)?;
        let mut ring = Self {
            piece,
            layout,
            event_idx,
            available_next: 0,
            available_published: 0,
            used_next: 0,
            used_seen: 0,
        };
        ring.suppress_notifications();
        Ok(ring)
    }

    /// Number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.layout.size
    }

    /// Where the ring is, for the one who tells the back end.
    pub(crate) fn place(&self) -> Place {
        Place { piece: self.piece.clone(), layout: self.layout }
    }

    /// Guest address of a descriptor.
    #[must_use]
    pub fn descriptor_address(&self, index: u16) -> GuestAddress {
        GuestAddress(self.piece.address.0 + u64::from(index) * DESCRIPTOR_BYTES as u64)
    }

    /// Writes a descriptor into the table. An index past its end is taken modulo its size.
    pub fn write_descriptor(&mut self, index: u16, descriptor: Descriptor) {
        let index = usize::from(index & (self.layout.size - 1));
        if let Some(slice) = self.slice(index * DESCRIPTOR_BYTES, DESCRIPTOR_BYTES) {
            slice.copy_from(&descriptor.to_bytes());
        }
    }

    /// Puts a chain's head, or any number, into the available ring; the back end sees it after
    /// [`Self::publish`].
    pub fn push(&mut self, head: u16) {
        let at = usize::from(self.available_next & (self.layout.size - 1));
        self.store(self.layout.available + 4 + at * 2, head, Ordering::Relaxed);
        self.available_next = self.available_next.wrapping_add(1);
    }

    /// Shows all pushed entries to the back end. True when it wants to be kicked for them.
    #[must_use]
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.available_published, self.available_next);
        self.store(self.layout.available + 2, new, Ordering::Release);
        self.available_published = new;
        // The index must be visible before the back end's wish is read, or both sides may miss each other.
        fence(Ordering::SeqCst);
        if self.event_idx {
            needs_event(self.load(self.layout.available_event(), Ordering::Relaxed), new, old)
        } else {
            new != old && self.load(self.layout.used, Ordering::Relaxed) & 1 == 0
        }
    }

    /// Shows the back end an available index that no driver would write.
    pub fn publish_index(&mut self, index: u16) {
        self.store(self.layout.available + 2, index, Ordering::Release);
    }

    /// The next used entry, if there is one.
    ///
    /// # Errors
    /// When the back end's used index runs ahead of what was published.
    #[inline]
    pub fn take_used(&mut self) -> Result<Option<Used>, Error> {
        if self.used_next == self.used_seen && !self.refresh()? {
            return Ok(None);
        }
        let at = usize::from(self.used_next & (self.layout.size - 1));
        let mut entry = [0; 8];
        if let Some(slice) = self.slice(self.layout.used + 4 + at * 8, 8) {
            slice.copy_to(&mut entry);
        }
        self.used_next = self.used_next.wrapping_add(1);
        let entry = u64::from_le_bytes(entry);
        let low = u32::try_from(entry & u64::from(u32::MAX)).unwrap_or(u32::MAX);
        let high = u32::try_from(entry >> 32).unwrap_or(u32::MAX);
        Ok(Some(Used { head: low, bytes: high }))
    }

    /// Reads the used index again; true when there is something to take.
    fn refresh(&mut self) -> Result<bool, Error> {
        self.used_seen = self.load(self.layout.used + 2, Ordering::Acquire);
        let waiting = self.used_seen.wrapping_sub(self.used_next);
        let possible = self.available_published.wrapping_sub(self.used_next);
        if waiting > possible {
            return Err(Error::UsedIndex { used: self.used_seen, available: self.available_published });
        }
        Ok(waiting != 0)
    }

    /// Asks the back end to notify of the next used entry. True when one is there already: then take it
    /// instead of waiting.
    ///
    /// # Errors
    /// As for [`Self::take_used`].
    pub fn request_notification(&mut self) -> Result<bool, Error> {
        self.store(self.layout.available, 0, Ordering::Relaxed);
        self.store(self.layout.used_event(), self.used_next, Ordering::Relaxed);
        // The wish must be visible before the used index is read again, or a notification gets lost.
        fence(Ordering::SeqCst);
        self.refresh()
    }

    /// Tells the back end that nobody waits for notifications.
    pub fn suppress_notifications(&mut self) {
        // With EVENT_IDX the flag must stay 0, and an event just behind the index is 65535 entries away.
        self.store(self.layout.available, u16::from(!self.event_idx), Ordering::Relaxed);
        self.store(self.layout.used_event(), self.used_next.wrapping_sub(1), Ordering::Relaxed);
    }

    /// The available index that the back end can see.
    #[must_use]
    pub fn available_index(&self) -> u16 {
        self.available_published
    }

    /// How many used entries were taken.
    #[must_use]
    pub fn used_index(&self) -> u16 {
        self.used_next
    }

    #[inline]
    fn slice(&self, offset: usize, bytes: usize) -> Option<VolatileSlice<'_>> {
        slice_of(&self.piece, offset, bytes)
    }

    #[inline]
    fn store(&self, offset: usize, value: u16, order: Ordering) {
        if let Some(slice) = self.slice(offset, 2) {
            // Offsets are even by the layout, so the only error, misalignment, can't happen.
            let _ = slice.store(value.to_le(), 0, order);
        }
    }

    #[inline]
    fn load(&self, offset: usize, order: Ordering) -> u16 {
        load(&self.piece, offset, order)
    }
}

#[inline]
fn load(piece: &Piece, offset: usize, order: Ordering) -> u16 {
    slice_of(piece, offset, 2).and_then(|slice| slice.load(0, order).ok()).map_or(0, u16::from_le)
}

/// The memory at `offset` in a piece; `None` past the region's end.
#[inline]
pub(crate) fn slice_of(piece: &Piece, offset: usize, bytes: usize) -> Option<VolatileSlice<'_>> {
    piece.region.get_slice(MemoryRegionAddress((piece.offset + offset) as u64), bytes).ok()
}

/// Whether a step of an index from `old` to `new` passed the entry that the other side waits for
/// (virtio 1.2, 2.7.10).
fn needs_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(size: u16, event_idx: bool) -> (Memory, Ring) {
        let memory = Memory::with_bytes(1 << 20).unwrap();
        let ring = Ring::new(&memory, size, event_idx).unwrap();
        (memory, ring)
    }

    /// Does what a back end does for the next `count` available entries.
    fn complete(memory: &Memory, ring: &Ring, from: u16, count: u16) {
        for index in from..from.wrapping_add(count) {
            let at = u64::from(index & (ring.size() - 1));
            let mut head = [0; 2];
            let base = ring.piece.address.0;
            memory.read(GuestAddress(base + ring.layout.available as u64 + 4 + at * 2), &mut head).unwrap();
            let used = base + ring.layout.used as u64;
            let entry = u64::from(u16::from_le_bytes(head)) | 17 << 32;
            memory.write(GuestAddress(used + 4 + at * 8), &entry.to_le_bytes()).unwrap();
            memory.write(GuestAddress(used + 2), &(index.wrapping_add(1)).to_le_bytes()).unwrap();
        }
    }

    #[test]
    fn the_parts_have_the_sizes_of_the_specification_and_do_not_overlap() {
        for size in [1u16, 2, 128, 256, 1024, 32768] {
            let layout = Layout::new(size);
            let entries = usize::from(size);
            assert!(layout.available >= entries * 16);
            assert!(layout.used >= layout.available + 6 + entries * 2);
            assert!(layout.bytes >= layout.used + 6 + entries * 8);
            assert_eq!((layout.available % 2, layout.used % 4), (0, 0));
        }
    }

    #[test]
    fn descriptors_are_written_little_endian() {
        let (memory, mut ring) = ring(8, true);
        let descriptor =
            Descriptor { address: 0x0102_0304_0506_0708, bytes: 0x1122_3344, flags: 0x5566, next: 0x7788 };
        ring.write_descriptor(3, descriptor);
        let mut bytes = [0; 16];
        memory.read(ring.descriptor_address(3), &mut bytes).unwrap();
        assert_eq!(bytes, [8, 7, 6, 5, 4, 3, 2, 1, 0x44, 0x33, 0x22, 0x11, 0x66, 0x55, 0x88, 0x77]);
    }

    #[test]
    fn entries_come_back_in_order_past_the_wrap_of_the_index() {
        let (memory, mut ring) = ring(4, true);
        for round in 0..40_000u32 {
            let index = ring.available_index();
            ring.push(u16::try_from(round % 4).unwrap());
            let _ = ring.publish();
            assert_eq!(ring.take_used().unwrap(), None);
            complete(&memory, &ring, index, 1);
            assert_eq!(ring.take_used().unwrap(), Some(Used { head: round % 4, bytes: 17 }));
        }
        assert_eq!(ring.used_index(), 40_000);
    }

    #[test]
    fn a_used_index_ahead_of_the_available_one_is_an_error() {
        let (memory, mut ring) = ring(4, true);
        ring.push(0);
        let _ = ring.publish();
        complete(&memory, &ring, 0, 2);
        assert!(matches!(ring.take_used(), Err(Error::UsedIndex { used: 2, available: 1 })));
    }

    #[test]
    fn a_kick_is_wanted_only_when_the_awaited_entry_was_passed() {
        assert!(needs_event(0, 1, 0));
        assert!(!needs_event(1, 1, 0));
        assert!(needs_event(4, 8, 3));
        assert!(needs_event(0xffff, 0, 0xffff));
        assert!(!needs_event(0xfff0, 0, 0xffff));
        let (memory, mut ring) = ring(8, false);
        ring.push(0);
        assert!(ring.publish());
        memory.write(GuestAddress(ring.piece.address.0 + ring.layout.used as u64), &[1, 0]).unwrap();
        ring.push(1);
        assert!(!ring.publish());
    }

    #[test]
    fn what_is_there_already_is_not_waited_for() {
        let (memory, mut ring) = ring(4, true);
        ring.push(0);
        let _ = ring.publish();
        assert!(!ring.request_notification().unwrap());
        complete(&memory, &ring, 0, 1);
        assert!(ring.request_notification().unwrap());
    }
}
