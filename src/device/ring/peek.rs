//! A look at a ring that had nothing to do when its last turn ended. Until the guest puts something on it, or somebody
//! calls it, there is nothing to do still; of many rings most are found like that, so that has to cost next to nothing.

use std::sync::atomic::Ordering;

use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::GuestMemory;
use crate::device::guest_memory::is_lost;

/// Bytes of the available ring before its index.
const INDEX_AT: u64 = 2;

/// What has to be seen for a ring to be left alone.
#[derive(Debug)]
pub struct Peek {
    memory: GuestMemory,
    index_at: GuestAddress,
    /// The index that the ring is at.
    index: u16,
}

impl Peek {
    /// At a queue whose last head was answered, in this memory.
    pub(in crate::device) fn at(queue: &impl QueueT, memory: GuestMemory) -> Self {
        let index_at = GuestAddress(queue.avail_ring().saturating_add(INDEX_AT));
        Self { memory, index_at, index: queue.next_avail() }
    }

    /// The same, at where the queue is now.
    pub(super) fn again(self, queue: &impl QueueT) -> Self {
        Self::at(queue, self.memory)
    }

    /// Whether the guest has put nothing on the ring since.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        let memory = self.memory.memory();
        let index = memory.load::<u16>(self.index_at, Ordering::Acquire).map(u16::from_le);
        // Zeros stand in for memory that the VMM has cut short.
        index.is_ok_and(|index| index == self.index && (index != 0 || !is_lost(&memory)))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use rustix::fs::{MemfdFlags, memfd_create};
    use vhost_user_backend::VringT;
    use vm_memory::FileOffset;

    use super::*;
    use crate::device::guest_memory::{Memory, Region};
    use crate::device::ring::Vring;

    const AVAILABLE: u64 = 0x1000;

    fn memory() -> (Memory, File) {
        let file = File::from(memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(1 << 16).unwrap();
        let kept = file.try_clone().unwrap();
        let region = Region::map(FileOffset::new(file, 0), 1 << 16, GuestAddress(0), None).unwrap();
        (Memory::from_regions(vec![region]).unwrap(), kept)
    }

    /// A peek at a ring that is at `index`, which its guest has written.
    fn peek_at(index: u16) -> (Peek, GuestMemory, File) {
        let (memory, file) = memory();
        memory.write_obj(index.to_le(), GuestAddress(AVAILABLE + INDEX_AT)).unwrap();
        let memory = GuestMemory::new(memory);
        let vring = Vring::new(memory.clone(), 16).unwrap();
        vring.set_queue_info(0, AVAILABLE, 0x2000).unwrap();
        vring.set_queue_next_avail(index);
        let peek = Peek::at(vring.get_ref().get_queue(), memory.clone());
        (peek, memory, file)
    }

    #[test]
    fn a_ring_is_idle_until_its_index_moves_or_its_memory_is_another() {
        for index in [0, 1, u16::MAX] {
            let (peek, memory, _file) = peek_at(index);
            assert!(peek.is_idle(), "{index}");
            let next = index.wrapping_add(1);
            memory.memory().write_obj(next.to_le(), GuestAddress(AVAILABLE + INDEX_AT)).unwrap();
            assert!(!peek.is_idle(), "{index}");
        }
        let (peek, shared, _file) = peek_at(7);
        let (other, _other_file) = memory();
        shared.lock().unwrap().replace(other);
        assert!(!peek.is_idle(), "the index is read in the memory of now");
        shared.lock().unwrap().replace(Memory::new());
        assert!(!peek.is_idle(), "there is none");
    }

    #[test]
    fn memory_that_was_cut_short_is_no_idle_ring() {
        for index in [0, 5] {
            let (peek, _memory, file) = peek_at(index);
            file.set_len(0).unwrap();
            assert!(!peek.is_idle(), "{index}");
        }
    }
}
