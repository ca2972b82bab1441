//! The walk over all entries of a VM: pages by age, and the slots of a sample. Takes no lock, so an entry and its age
//! may be of two moments.

use std::sync::atomic::Ordering;

use super::ages::{Ages, Pages};
use super::reservoir::Reservoir;
use crate::ids::Slot;
use crate::store::accounting::object_bytes;
use crate::store::arena::Arena;
use crate::store::entry::Entry;
use crate::store::lru::Age;
use crate::store::vm::VmStore;
use crate::writeback::record_bytes;

/// What a walk found.
#[derive(Debug)]
pub struct Walked {
    /// All pages.
    pub ages: Ages,
    /// Slots whose pages are in the arena, each with the same chance, in order.
    pub sample: Vec<Slot>,
}

/// Walks over all pages of `vm` as they are at `now`. `sample_max` of those in the arena are chosen; which ones follows
/// from `seed`.
#[must_use]
pub fn walk(vm: &VmStore, arena: &Arena, now: Age, sample_max: usize, seed: u64) -> Walked {
    let mut ages = Ages::default();
    let mut sample = Reservoir::new(sample_max, seed);
    for chunk in vm.table().backed_chunks() {
        let slots = (chunk.first.0..).map(Slot);
        for (slot, (entry, age)) in slots.zip(chunk.entries.iter().zip(chunk.ages)) {
            let raw = entry.load(Ordering::Relaxed);
            // Most slots are empty, and an entry that fails its check is no page.
            if raw == 0 {
                continue;
            }
            let Ok(entry) = Entry::unpack(raw, slot) else { continue };
            let Some(pages) = pages_of(entry, arena) else { continue };
            if entry.location().is_some() {
                sample.offer(slot);
            }
            ages.add(Age::from_bits(age.load(Ordering::Relaxed)).until(now), pages);
        }
    }
    let mut sample = sample.into_kept();
    sample.sort_unstable();
    Walked { ages, sample }
}

/// One page, by what its entry says; `None` without one.
fn pages_of(entry: Entry, arena: &Arena) -> Option<Pages> {
    let none = Pages::default();
    match entry {
        Entry::Empty | Entry::Lost => None,
        Entry::SameFilled(_) => Some(Pages { memory_pages: 1, same_filled_pages: 1, ..none }),
        // A shared object counts for each of its pages: what it saves is told elsewhere.
        Entry::Arena(location) | Entry::Shared(location) => {
            let object_bytes = object_bytes(location);
            Some(Pages {
                memory_pages: 1,
                pool_bytes: arena.charged_bytes(object_bytes) as u64,
                record_bytes: record_bytes(object_bytes) as u64,
                ..none
            })
        }
        Entry::File(place) => Some(Pages {
            file_pages: 1,
            file_pool_bytes: arena.charged_bytes(place.object_bytes) as u64,
            record_bytes: place.record_bytes() as u64,
            ..none
        }),
    }
}
