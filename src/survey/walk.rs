//! The walk over all entries of a VM: pages by age, and the slots of a sample. Takes no lock, so an entry and its age
//! may be of two moments. An object that several pages share is charged once, as the store does it, and among the
//! youngest of them: it stays as long as one of them is used.

use std::collections::HashMap;
use std::collections::hash_map;
use std::sync::atomic::Ordering;
use std::time::Duration;

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
    /// Slots whose pages are in the arena, one of each object, each with the same chance, in order.
    pub sample: Vec<Slot>,
}

/// Walks over all pages of `vm` as they are at `now`. `sample_max` of those in the arena are chosen; which ones follows
/// from `seed`.
#[must_use]
pub fn walk(vm: &VmStore, arena: &Arena, now: Age, sample_max: usize, seed: u64) -> Walked {
    let mut ages = Ages::default();
    let mut sample = Reservoir::new(sample_max, seed);
    let mut shared = Objects::default();
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
            let age = Age::from_bits(age.load(Ordering::Relaxed)).until(now);
            let is_first = match entry {
                Entry::Shared(location) => shared.note(location.offset, age, pages.pool_bytes),
                entry => entry.location().is_some(),
            };
            if is_first {
                sample.offer(slot);
            }
            let charged_later = matches!(entry, Entry::Shared(_));
            ages.add(age, if charged_later { Pages { pool_bytes: 0, ..pages } } else { pages });
        }
    }
    for (age, pool_bytes) in shared.0.into_values() {
        ages.add(age, Pages { pool_bytes, ..Pages::default() });
    }
    let mut sample = sample.into_kept();
    sample.sort_unstable();
    Walked { ages, sample }
}

/// Objects that pages share, by their offsets: the age of the youngest of those pages, and what the object is charged.
#[derive(Default)]
struct Objects(HashMap<u64, (Duration, u64)>);

impl Objects {
    /// Notes one of the pages. Whether it is the first of its object's.
    fn note(&mut self, offset: u64, age: Duration, pool_bytes: u64) -> bool {
        match self.0.entry(offset) {
            hash_map::Entry::Vacant(object) => {
                object.insert((age, pool_bytes));
                true
            }
            hash_map::Entry::Occupied(mut object) => {
                let (youngest, _) = object.get_mut();
                *youngest = age.min(*youngest);
                false
            }
        }
    }
}

/// One page, by what its entry says; `None` without one.
fn pages_of(entry: Entry, arena: &Arena) -> Option<Pages> {
    let none = Pages::default();
    match entry {
        Entry::Empty | Entry::Lost => None,
        Entry::SameFilled(_) => Some(Pages { memory_pages: 1, same_filled_pages: 1, ..none }),
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
