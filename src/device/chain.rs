//! Descriptor chains: which memory a guest names with one, for whatever device. Pure: it reads descriptors from guest
//! memory, each byte once, and never trusts a length, an index or a flag. What the memory holds is the device's matter.

use virtio_queue::desc::split::Descriptor;
use vm_memory::GuestAddress;

use super::segments::{Segment, Segments};
use super::view::View;

/// Descriptors in one chain, indirect ones included. The longest queue that the device accepts has this many places.
const CHAIN_MAX: usize = 1024;
/// Bytes of a descriptor.
pub const DESCRIPTOR_BYTES: u32 = 16;

/// Where the descriptors of a queue are.
#[derive(Clone, Copy, Debug)]
pub struct DescriptorTable {
    /// The table's address.
    pub address: GuestAddress,
    /// Its length, in descriptors.
    pub size: u16,
}

/// The memory that a chain names.
#[derive(Debug, Default)]
pub struct Chain {
    /// What the device reads.
    pub readable: Segments,
    /// What it writes.
    pub writable: Segments,
    /// Part of it lies outside the memory that the VMM shares, as that of a DIMM that was plugged in without
    /// `share=on` does. A disk's request has to be failed aloud then: a driver that reuses its status bytes, as Linux
    /// does, takes silence for success.
    pub unreachable: bool,
}

/// Follows a chain. `None` when it loops, leaves its table, nests indirect tables, mixes directions or is too long.
#[inline]
#[must_use]
pub fn walk(memory: &View<'_>, mut table: DescriptorTable, head: u16) -> Option<Chain> {
    let mut chain = Chain::default();
    let mut indirect = false;
    let mut next = head;
    let mut left = CHAIN_MAX;
    loop {
        left = left.checked_sub(1)?;
        if next >= table.size {
            return None;
        }
        let at = u64::from(next).checked_mul(u64::from(DESCRIPTOR_BYTES))?;
        let address = GuestAddress(table.address.0.checked_add(at)?);
        let descriptor: Descriptor = memory.read(address)?;
        if descriptor.refers_to_indirect_table() {
            let whole = descriptor.len().is_multiple_of(DESCRIPTOR_BYTES);
            // An indirect descriptor may be the last of a chain, but not the first of several tables.
            if indirect || descriptor.has_next() || !whole {
                return None;
            }
            let size = u16::try_from(descriptor.len() / DESCRIPTOR_BYTES).ok().filter(|size| *size > 0)?;
            table = DescriptorTable { address: descriptor.addr(), size };
            indirect = true;
            next = 0;
            continue;
        }
        let segment = Segment { address: descriptor.addr(), length: descriptor.len() };
        if segment.length == 0 {
            return None;
        }
        chain.unreachable |= !memory.is_there(segment.address, segment.length as usize);
        if descriptor.is_write_only() {
            chain.writable.push(segment);
        } else if chain.writable.is_empty() {
            chain.readable.push(segment);
        } else {
            return None;
        }
        if !descriptor.has_next() {
            return Some(chain);
        }
        next = descriptor.next();
    }
}
