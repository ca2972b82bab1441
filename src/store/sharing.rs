//! Which slots share which object: the pages of one VM that are the same are kept once. Nothing of this is stored. It is
//! rebuilt from the entries at start and changes with them, under the VM's lock, in `VmStore::publish` alone. Knows no
//! entries, no arena and nothing of other VMs: an object is never shared between two of them.
//!
//! An object goes with the last slot that names it. Who has just made one, or looks at one that another slot is to name,
//! holds it meanwhile.

use std::collections::BTreeMap;

use super::entry::Location;
use super::pool::PoolId;
use crate::ids::Slot;

/// The most slots that share an object: so many pages does a flipped bit in it cost, and so many entries are published
/// when it moves.
pub const SHARERS_MAX: usize = 256;

/// What an object costs here beside its slots, roughly: its part of a node of the map, and a short allocation.
const OBJECT_BYTES: usize = 96;

/// Places for sharers that an object may have in vain.
const SPARE_PLACES: usize = 4;

/// The shared objects of one VM, by their offsets in the arena.
#[derive(Clone, Debug, Default)]
pub struct Sharing {
    /// A map without moments in which it is made anew as a whole: the VM's lock is held.
    objects: BTreeMap<u64, Object>,
    sharers: usize,
}

/// One object.
#[derive(Clone, Debug)]
struct Object {
    payload_bytes: usize,
    /// The pool that it is counted under.
    pool: PoolId,
    /// In no order.
    sharers: Vec<Slot>,
    /// Whether somebody needs it who is no slot.
    held: bool,
}

/// Two entries of a table name an object at the same place, and not the same one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "two entries name a shared object at offset {offset:#x} of the arena, of {} and {} bytes", payload_bytes[0],
    payload_bytes[1]
)]
pub struct Contradiction {
    /// The offset that both entries name, in bytes.
    pub offset: u64,
    /// The lengths of its payload that they name.
    pub payload_bytes: [usize; 2],
}

impl Sharing {
    /// How many slots share the object at `location`.
    #[must_use]
    pub fn count(&self, location: Location) -> usize {
        self.objects.get(&location.offset).map_or(0, |object| object.sharers.len())
    }

    /// The pool that it is counted under.
    #[must_use]
    pub fn pool(&self, location: Location) -> Option<PoolId> {
        let object = self.objects.get(&location.offset)?;
        (!object.sharers.is_empty()).then_some(object.pool)
    }

    /// Counts it under another one.
    pub fn set_pool(&mut self, location: Location, pool: PoolId) {
        if let Some(object) = self.objects.get_mut(&location.offset) {
            object.pool = pool;
        }
    }

    /// The object at `offset`, and who shares it.
    #[must_use]
    pub fn at(&self, offset: u64) -> Option<(Location, &[Slot])> {
        let object = self.objects.get(&offset)?;
        Some((Location { offset, payload_bytes: object.payload_bytes }, &object.sharers))
    }

    /// At start: whether an entry that names this object names one that an entry before it named, too.
    ///
    /// # Errors
    /// When that is another object at the same place.
    pub fn knows(&self, location: Location) -> Result<bool, Contradiction> {
        let Location { offset, payload_bytes } = location;
        match self.objects.get(&offset) {
            None => Ok(false),
            Some(object) if object.payload_bytes == payload_bytes => Ok(true),
            Some(object) => {
                Err(Contradiction { offset, payload_bytes: [object.payload_bytes, payload_bytes] })
            }
        }
    }

    /// `slot` names the object from now on; `pool` is what it is counted under if nobody named it before.
    pub fn join(&mut self, location: Location, slot: Slot, pool: PoolId) {
        let object = self.object(location);
        if object.sharers.is_empty() {
            object.pool = pool;
        }
        object.sharers.push(slot);
        self.sharers += 1;
    }

    /// `slot` names it no longer. True when nobody needs it any more: its place is free once the entry is gone.
    ///
    /// # Panics
    /// When the slot did not name it.
    pub fn leave(&mut self, location: Location, slot: Slot) -> bool {
        let object =
            self.objects.get_mut(&location.offset).expect("an object is known while a slot names it");
        let at = object.sharers.iter().position(|sharer| *sharer == slot).expect("a sharer leaves once");
        object.sharers.swap_remove(at);
        // A guest may make many share an object and leave it one by one: what was known of them goes as well.
        let (count, places) = (object.sharers.len(), object.sharers.capacity());
        if places > SPARE_PLACES && places >= 4 * count {
            object.sharers.shrink_to(2 * count);
        }
        self.sharers -= 1;
        self.forget_unused(location)
    }

    /// Keeps an object from going although no slot names it, or not yet. False when somebody does already, or it has as
    /// many sharers as it may.
    pub fn hold(&mut self, location: Location) -> bool {
        let object = self.object(location);
        let may = !object.held && object.sharers.len() < SHARERS_MAX;
        object.held |= may;
        may
    }

    /// Ends that. True when nobody needs it any more: its place is the caller's.
    pub fn release(&mut self, location: Location) -> bool {
        self.object(location).held = false;
        self.forget_unused(location)
    }

    /// Forgets who shares what, and not what is held: before the entries are read again.
    pub fn forget_sharers(&mut self) {
        self.objects.values_mut().for_each(|object| object.sharers.clear());
        self.sharers = 0;
    }

    /// Forgets the objects that no entry has named since.
    pub fn forget_unnamed(&mut self) {
        self.objects.retain(|_, object| object.held || !object.sharers.is_empty());
    }

    /// Bytes of ordinary memory that it takes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        (self.objects.len() * OBJECT_BYTES + 2 * self.sharers * size_of::<Slot>()) as u64
    }

    /// Compares with what the entries say.
    ///
    /// # Panics
    /// When the same slots don't share the same objects, or something is still held.
    pub fn validate(&self, of_entries: &Self) {
        let sorted = |sharing: &Self| -> Vec<_> {
            let of_object = |(offset, object): (&u64, &Object)| {
                assert!(!object.held, "who held an object has let go of it");
                let mut sharers = object.sharers.clone();
                sharers.sort_unstable();
                (*offset, object.payload_bytes, sharers)
            };
            sharing.objects.iter().map(of_object).collect()
        };
        assert_eq!(sorted(self), sorted(of_entries), "who shares what is what the entries say");
    }

    fn object(&mut self, Location { offset, payload_bytes }: Location) -> &mut Object {
        let fresh = || Object { payload_bytes, pool: PoolId::EARLIER, sharers: Vec::new(), held: false };
        self.objects.entry(offset).or_insert_with(fresh)
    }

    fn forget_unused(&mut self, location: Location) -> bool {
        let unused = |object: &Object| !object.held && object.sharers.is_empty();
        let gone = self.objects.get(&location.offset).is_some_and(unused);
        if gone {
            self.objects.remove(&location.offset);
        }
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Location = Location { offset: 4096, payload_bytes: 100 };
    const OTHER: Location = Location { offset: 8192, payload_bytes: 200 };

    #[test]
    fn an_object_goes_with_its_last_sharer() {
        let mut sharing = Sharing::default();
        for slot in [7, 3, 9] {
            sharing.join(PLACE, Slot(slot), PoolId::from_bits(2));
        }
        sharing.join(OTHER, Slot(4), PoolId::EARLIER);
        assert_eq!((sharing.count(PLACE), sharing.pool(PLACE)), (3, Some(PoolId::from_bits(2))));
        assert!(!sharing.leave(PLACE, Slot(3)) && !sharing.leave(PLACE, Slot(7)));
        assert_eq!(sharing.at(PLACE.offset), Some((PLACE, &[Slot(9)][..])));
        assert!(sharing.leave(PLACE, Slot(9)));
        assert_eq!((sharing.count(PLACE), sharing.pool(PLACE), sharing.count(OTHER)), (0, None, 1));
    }

    #[test]
    fn what_is_held_stays() {
        let mut sharing = Sharing::default();
        assert!(sharing.hold(PLACE) && !sharing.hold(PLACE));
        sharing.join(PLACE, Slot(1), PoolId::EARLIER);
        assert!(!sharing.leave(PLACE, Slot(1)), "it is held");
        assert!(sharing.release(PLACE), "by nobody any more");
        sharing.join(PLACE, Slot(1), PoolId::EARLIER);
        assert!(sharing.hold(PLACE) && !sharing.release(PLACE));
        assert!(sharing.leave(PLACE, Slot(1)));
    }

    #[test]
    fn there_is_an_end_to_sharers() {
        let mut sharing = Sharing::default();
        for slot in 0..256 {
            assert!(sharing.hold(PLACE));
            sharing.join(PLACE, Slot(slot), PoolId::EARLIER);
            assert!(!sharing.release(PLACE));
        }
        assert!(!sharing.hold(PLACE));
        assert!(!sharing.leave(PLACE, Slot(5)) && sharing.hold(PLACE));
    }

    #[test]
    fn another_object_at_the_same_place_is_a_contradiction() {
        let mut sharing = Sharing::default();
        assert_eq!(sharing.knows(PLACE), Ok(false));
        sharing.join(PLACE, Slot(1), PoolId::EARLIER);
        assert_eq!(sharing.knows(PLACE), Ok(true));
        let longer = Location { payload_bytes: 101, ..PLACE };
        let payload_bytes = [100, 101];
        assert_eq!(sharing.knows(longer), Err(Contradiction { offset: 4096, payload_bytes }));
    }

    #[test]
    fn what_no_entry_names_is_forgotten_when_they_are_read_again() {
        let mut sharing = Sharing::default();
        sharing.join(PLACE, Slot(1), PoolId::from_bits(3));
        sharing.join(PLACE, Slot(2), PoolId::from_bits(3));
        sharing.join(OTHER, Slot(3), PoolId::EARLIER);
        let mut read = Sharing::default();
        sharing.forget_sharers();
        for of_entries in [&mut sharing, &mut read] {
            of_entries.join(PLACE, Slot(2), PoolId::from_bits(3));
        }
        sharing.forget_unnamed();
        sharing.validate(&read);
        assert_eq!((sharing.count(OTHER), sharing.pool(PLACE)), (0, Some(PoolId::from_bits(3))));
    }

    #[test]
    fn what_is_known_of_sharers_goes_with_them() {
        let (mut sharing, location) = (Sharing::default(), Location { offset: 64, payload_bytes: 900 });
        for slot in (0..256).map(Slot) {
            sharing.join(location, slot, PoolId::EARLIER);
        }
        for slot in (1..256).map(Slot) {
            assert!(!sharing.leave(location, slot));
            let sharers = &sharing.objects[&64].sharers;
            assert!(sharers.capacity() <= 4 * sharers.len().max(SPARE_PLACES), "{}", sharers.capacity());
        }
        assert!(sharing.leave(location, Slot(0)) && sharing.memory_bytes() == 0);
    }
}
