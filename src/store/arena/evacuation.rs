//! Evacuation: emptying a sparse span by moving its objects into free places of other spans, so that the span can be
//! given back to the host. The arena picks the span and the places; who knows the entries does the moving. No new
//! span is ever opened for it, so it works in a full pool and never makes the arena larger.
//!
//! While a span is evacuated its objects are loaded and freed as ever, but it stays backed until the evacuation ends,
//! whoever frees its last object: what is read here is there to be read.

use super::region::{Region, Source};
use super::{Allocation, Arena};
use crate::ids::Owner;

/// A span that is being evacuated. Dropping it ends the evacuation: an empty span is given back to the host, one
/// with objects left is used as before.
#[derive(Debug)]
pub struct Evacuation<'a> {
    arena: &'a Arena,
    region: &'a Region,
    source: Source,
}

/// An object to move, and where to.
#[derive(Debug)]
#[must_use = "the place to move to is published, or given to `Arena::discard`"]
pub struct Move {
    /// Whose the object seems to be. Only a hint, since the place may be allocated and not written yet, or written
    /// and not published: the object is that owner's if, under its lock, the owner's entry names `from`.
    pub owner: Owner,
    /// Offset of the object in the arena, in bytes.
    pub from: u64,
    /// A place of the same size class in another span.
    pub to: Allocation,
}

impl<'a> Evacuation<'a> {
    pub(super) fn new(arena: &'a Arena, region: &'a Region, source: Source) -> Self {
        Self { arena, region, source }
    }

    /// The next object to move. `None` when every object was tried, or no other span of the class has room any more.
    pub fn next_move(&mut self) -> Option<Move> {
        let (from, to) = self.region.next_move(&mut self.source)?;
        let to = Allocation { offset: to, charged_bytes: self.region.layout(self.source.class).object_bytes };
        Some(Move { owner: self.arena.object_owner(from), from, to })
    }

    /// Whether every object was tried, those that were freed meanwhile aside.
    #[must_use]
    pub fn is_exhausted(&self) -> bool {
        self.source.untried.is_empty()
    }

    /// Ends the evacuation and returns the bytes that went back to the host: those of the span, or none.
    pub fn end(self) -> u64 {
        let freed_bytes = self.give_back();
        // What `drop` would do is done.
        std::mem::forget(self);
        freed_bytes
    }

    fn give_back(&self) -> u64 {
        self.arena.give_back(self.region, self.region.end_evacuation(&self.source))
    }
}

impl Drop for Evacuation<'_> {
    fn drop(&mut self) {
        self.give_back();
    }
}

/// What [`compact`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compacted {
    /// Objects that were moved.
    pub moved: usize,
    /// Objects that could not be moved.
    pub refused: usize,
    /// Bytes of spans that were given back to the host.
    pub freed_bytes: u64,
}

/// Empties sparse spans, those first that give most back for what is copied, until no class has a span's worth of
/// free places or `moves_max` objects were tried.
///
/// `relocate` copies the object and publishes its new place, which frees the old one, and returns true; or it finds
/// that the entry names another place by now, leaves everything as it is, and returns false.
pub fn compact(arena: &Arena, moves_max: usize, mut relocate: impl FnMut(&Move) -> bool) -> Compacted {
    let mut compacted = Compacted::default();
    while compacted.moved + compacted.refused < moves_max {
        let Some(mut evacuation) = arena.evacuate() else { break };
        while compacted.moved + compacted.refused < moves_max
            && let Some(object) = evacuation.next_move()
        {
            if relocate(&object) {
                compacted.moved += 1;
            } else {
                arena.discard(object.to);
                compacted.refused += 1;
            }
        }
        let exhausted = evacuation.is_exhausted();
        let freed_bytes = evacuation.end();
        compacted.freed_bytes += freed_bytes;
        if freed_bytes == 0 && !exhausted {
            // New objects took the room that there was: the class is not so sparse any more.
            break;
        }
    }
    compacted
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread::ScopedJoinHandle;

    use parking_lot::Mutex;

    use crate::ids::{Slot, VmId};
    use crate::store::codec::CodecId;
    use crate::store::object::{self, HEADER_BYTES};

    /// xorshift64*: the same numbers in every run.
    struct Random(u64);

    impl Random {
        fn below(&mut self, end: usize) -> usize {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            let high = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
            usize::try_from(high).unwrap() % end
        }

        /// Many small ones and few large ones, 1.1 KiB on average: what heaps compress to.
        fn object_bytes(&mut self) -> usize {
            let share = self.below(1000);
            HEADER_BYTES + 60 + 4036 * share * share * share / 1_000_000_000
        }
    }

    /// A VM reduced to what matters here: where each slot's object is, and how long it is.
    struct Vm {
        id: VmId,
        slots: Mutex<Vec<Option<(u64, usize)>>>,
    }

    impl Vm {
        fn new(id: u32, slots: usize) -> Self {
            Self { id: VmId(id), slots: Mutex::new(vec![None; slots]) }
        }

        fn owner(&self, slot: usize) -> Owner {
            Owner { vm: self.id, slot: Slot(u32::try_from(slot).unwrap()) }
        }

        fn store(&self, arena: &Arena, slot: usize, object_bytes: usize) {
            let mut object = vec![u8::try_from(object_bytes % 256).unwrap(); object_bytes];
            object::seal(&mut object, self.owner(slot), CodecId::Raw);
            let allocation = arena.allocate(object_bytes, arena.max_bytes()).unwrap();
            arena.write(&allocation, &object);
            let old = self.slots.lock()[slot].replace((allocation.offset, object_bytes));
            free(arena, old);
        }

        fn invalidate(&self, arena: &Arena, slot: usize) {
            let old = self.slots.lock()[slot].take();
            free(arena, old);
        }

        fn check(&self, arena: &Arena, slot: usize) {
            let mut object = Vec::new();
            {
                let slots = self.slots.lock();
                let Some((offset, object_bytes)) = slots[slot] else { return };
                object.resize(object_bytes, 0);
                arena.read(offset, &mut object);
            }
            let (_, payload) = object::open(&object, self.owner(slot)).unwrap();
            assert!(payload.iter().all(|byte| usize::from(*byte) == object.len() % 256));
        }

        /// What the store does to move an object, its lock held throughout.
        fn relocate(&self, arena: &Arena, moving: &Move) -> bool {
            let mut slots = self.slots.lock();
            let Some(Some(entry)) = slots.get_mut(moving.owner.slot.index()) else { return false };
            if moving.owner.vm != self.id || entry.0 != moving.from {
                return false;
            }
            let mut object = vec![0; entry.1];
            arena.read(moving.from, &mut object);
            arena.write(&moving.to, &object);
            entry.0 = moving.to.offset;
            arena.free(moving.from, object.len());
            true
        }

        fn object_bytes(&self) -> u64 {
            self.slots.lock().iter().flatten().map(|(_, object_bytes)| *object_bytes as u64).sum()
        }
    }

    fn free(arena: &Arena, old: Option<(u64, usize)>) {
        if let Some((offset, object_bytes)) = old {
            arena.free(offset, object_bytes);
        }
    }

    fn arena(max_bytes: u64) -> Arena {
        Arena::new(tempfile::tempfile().unwrap(), max_bytes, max_bytes).unwrap()
    }

    #[test]
    fn what_is_left_of_a_full_arena_is_brought_together() {
        let arena = arena(256 << 20);
        let (vm, mut random) = (Vm::new(1, 100_000), Random(9));
        let mut slots = 0;
        // Less than a span of each class stays unused, 1.8 MiB in all: 12 % of the objects that are left of 64 MiB.
        while arena.used_bytes() < 96 << 20 {
            vm.store(&arena, slots, random.object_bytes());
            slots += 1;
        }
        for slot in 0..slots {
            if random.below(4) != 0 {
                vm.invalidate(&arena, slot);
            }
        }
        let (before_bytes, gain_bytes) = (arena.used_bytes(), arena.gain_bytes());
        let mut moved_bytes = 0;
        let compacted = compact(&arena, usize::MAX, |object| {
            moved_bytes += object.to.charged_bytes as u64;
            vm.relocate(&arena, object)
        });
        arena.validate();
        (0..slots).for_each(|slot| vm.check(&arena, slot));
        assert_eq!(before_bytes - arena.used_bytes(), compacted.freed_bytes);
        assert_eq!((compacted.freed_bytes, compacted.refused), (gain_bytes, 0));
        let (used_bytes, live_bytes) = (arena.used_bytes(), vm.object_bytes());
        assert!(used_bytes * 100 <= live_bytes * 112, "{used_bytes} bytes for {live_bytes} of objects");
        assert!(moved_bytes * 3 <= compacted.freed_bytes, "{moved_bytes} copied: {compacted:?}");
    }

    #[test]
    fn objects_survive_evacuations_while_workers_store_and_free() {
        const SLOTS: usize = 2000;
        let arena = arena(64 << 20);
        let vms = [Vm::new(1, SLOTS), Vm::new(2, SLOTS)];
        let work = |vm: &Vm| {
            let mut random = Random(u64::from(vm.id.0));
            for step in 0..60_000 {
                // Waves: mostly stores, then mostly frees, so that spans become sparse.
                let (slot, stores_in_8) = (random.below(SLOTS), if step / 5000 % 2 == 0 { 6 } else { 2 });
                match random.below(8) {
                    choice if choice < stores_in_8 => {
                        // Few classes, so that each has many spans.
                        vm.store(&arena, slot, 300 + random.below(8) * 300);
                    }
                    7 => vm.check(&arena, slot),
                    _ => vm.invalidate(&arena, slot),
                }
            }
        };
        let relocate = |object: &Move| {
            let vm = vms.iter().find(|vm| vm.id == object.owner.vm);
            vm.is_some_and(|vm| vm.relocate(&arena, object))
        };
        let moved = std::thread::scope(|scope| {
            let workers = vms.each_ref().map(|vm| scope.spawn(move || work(vm)));
            let mut moved = 0;
            while !workers.iter().all(ScopedJoinHandle::is_finished) {
                moved += compact(&arena, 500, relocate).moved;
            }
            moved
        });
        assert!(moved > 0, "evacuations and work overlapped");
        compact(&arena, usize::MAX, relocate);
        for vm in &vms {
            (0..SLOTS).for_each(|slot| vm.check(&arena, slot));
        }
        let held = vms.iter().map(|vm| vm.slots.lock().iter().flatten().count()).sum::<usize>();
        assert_eq!(arena.validate().objects, held as u64);
    }
}
