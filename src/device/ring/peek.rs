//! A look at a ring that had nothing to do when its last turn ended. Until the guest puts something on it, or somebody
//! calls it, there is nothing to do still; of many rings most are found like that, so that has to cost next to nothing.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use crate::device::guest_memory::Memory;

/// Bytes of the available ring before its index.
const INDEX_AT: u64 = 2;

/// What has to be seen for a ring to be left alone.
#[derive(Debug)]
pub struct Peek {
    /// Not kept alive by this: the VMM may take it away.
    memory: Weak<Memory>,
    index_at: GuestAddress,
    /// The index that the ring is at.
    index: u16,
}

impl Peek {
    /// At a queue whose last head was answered.
    pub(in crate::device) fn at(queue: &impl QueueT, memory: &Arc<Memory>) -> Self {
        Self::with(queue, Arc::downgrade(memory))
    }

    fn with(queue: &impl QueueT, memory: Weak<Memory>) -> Self {
        let index_at = GuestAddress(queue.avail_ring().saturating_add(INDEX_AT));
        Self { memory, index_at, index: queue.next_avail() }
    }

    /// Whether it was left with this memory.
    pub(super) fn is_of(&self, memory: &Memory) -> bool {
        // What was there is not freed as long as this points to it, so there is nothing else at its address.
        std::ptr::eq(self.memory.as_ptr(), memory)
    }

    /// The same, at where the queue is now: a counter less to change for whoever leaves one in every turn.
    pub(super) fn again(self, queue: &impl QueueT) -> Self {
        Self::with(queue, self.memory)
    }

    /// Whether the guest has put nothing on the ring since.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        let index = |memory: Arc<Memory>| memory.load::<u16>(self.index_at, Ordering::Acquire).ok();
        self.memory.upgrade().and_then(index).is_some_and(|index| u16::from_le(index) == self.index)
    }
}
