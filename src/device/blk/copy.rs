//! Between guest memory and ours, and between positions on the disk and slots.

use std::ops::Range;

use vm_memory::{GuestAddress, GuestMemoryError};

use crate::device::guest_memory::is_lost;
use crate::device::segments::Segments;
use crate::device::view::View;
use crate::ids::Slot;
use crate::page::{PAGE_SIZE, PAGE_SIZE_U64};

/// Guest memory that is not there.
pub(super) struct Unreachable;

impl From<GuestMemoryError> for Unreachable {
    fn from(_: GuestMemoryError) -> Self {
        Self
    }
}

/// The slot at `position` of the disk.
pub(super) fn slot_of(position: u64) -> Slot {
    // A position on the disk was checked against its capacity, which is less than 2^32 pages.
    Slot(u32::try_from(position / PAGE_SIZE_U64).unwrap_or(u32::MAX))
}

/// The slot at `position` and the part of its page that a run of `length` bytes covers.
pub(super) fn first_page(position: u64, length: u64) -> (Slot, Range<usize>) {
    let from = usize::try_from(position % PAGE_SIZE_U64).unwrap_or(0);
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    (slot_of(position), from..from.saturating_add(length).min(PAGE_SIZE))
}

/// Copies the beginning of the data segments to `target`. What a VMM took away meanwhile is not taken for zeros.
pub(super) fn gather(memory: &View<'_>, data: &Segments, mut target: &mut [u8]) -> Result<(), Unreachable> {
    for segment in data.left() {
        if target.is_empty() {
            break;
        }
        let length = target.len().min(segment.length as usize);
        let (now, later) = std::mem::take(&mut target).split_at_mut_checked(length).ok_or(Unreachable)?;
        memory.copy_out(segment.address, now)?;
        target = later;
    }
    if target.is_empty() && !is_lost(memory.memory()) { Ok(()) } else { Err(Unreachable) }
}

/// Takes `length` bytes off the front of the data segments.
pub(super) fn advance(data: &mut Segments, mut length: usize) {
    while length > 0 {
        let Some((_, taken)) = data.take_front(length) else { return };
        length = length.saturating_sub(taken);
    }
}

/// Moves `source` to the data segments, as far as they reach, by one of the ways into guest memory.
pub(super) fn scatter(
    data: &mut Segments,
    mut source: &[u8],
    mut copy_in: impl FnMut(GuestAddress, &[u8]) -> Result<(), GuestMemoryError>,
) -> Result<(), Unreachable> {
    while let Some((address, length)) = data.take_front(source.len()).filter(|(_, length)| *length > 0) {
        let (now, later) = source.split_at_checked(length).ok_or(Unreachable)?;
        copy_in(address, now)?;
        source = later;
    }
    Ok(())
}
