//! The guest memory of a request: runs of it, in order, used up from the front. A request has hardly ever more than a
//! few, which then take no memory of their own.

use smallvec::SmallVec;
use vm_memory::GuestAddress;

/// A run of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it starts.
    pub address: GuestAddress,
    /// How long it is, in bytes; never zero.
    pub length: u32,
}

/// Runs of guest memory of which none is empty.
#[derive(Clone, Debug, Default)]
pub struct Segments {
    all: SmallVec<[Segment; 3]>,
    /// How many of them are used up.
    used: usize,
}

impl Segments {
    /// Adds a run behind the others.
    pub(super) fn push(&mut self, segment: Segment) {
        self.all.push(segment);
    }

    /// What is left.
    pub fn left(&self) -> &[Segment] {
        self.all.get(self.used..).unwrap_or_default()
    }

    /// Whether nothing is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.left().is_empty()
    }

    /// Bytes that are left.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.left().iter().map(|segment| u64::from(segment.length)).sum()
    }

    /// Takes at most `length` bytes off the front of the first run: where they are, and how many.
    pub fn take_front(&mut self, length: usize) -> Option<(GuestAddress, usize)> {
        let front = self.all.get_mut(self.used)?;
        let taken = u32::try_from(length).unwrap_or(u32::MAX).min(front.length);
        let address = front.address;
        front.length = front.length.checked_sub(taken)?;
        // Beyond the end of all addresses there is nothing, at whichever of them.
        front.address = GuestAddress(address.0.saturating_add(u64::from(taken)));
        if front.length == 0 {
            self.used = self.used.saturating_add(1);
        }
        Some((address, taken as usize))
    }

    /// Takes the last byte: where it is.
    pub(super) fn take_last_byte(&mut self) -> Option<GuestAddress> {
        let last = self.all.last_mut()?;
        last.length = last.length.checked_sub(1)?;
        let address = GuestAddress(last.address.0.checked_add(u64::from(last.length))?);
        if last.length == 0 {
            self.all.pop();
        }
        Some(address)
    }
}
