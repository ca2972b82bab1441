//! Pages of a VM that are the same: kept as one object, which is nobody's own. They are found where a page gets cold
//! (`recompress`), by a hint and then by all their bytes; here they come to share an object, and here such an object moves.
//!
//! Each of it is the same three steps as any move, once for each slot, and a daemon that dies between two of them leaves
//! slots with objects of their own or with two shared ones: both are right. The object that some have joined and others
//! not yet is held meanwhile, so that it does not go with the first that leaves.

use std::sync::atomic::Ordering;

use super::change::{Cause, Change};
use super::tag::{Generation, Tag};
use super::{Numbers, Published, Recompressed, VmStore};
use crate::ids::{Owner, Slot};
use crate::page::{Page, ZERO_PAGE};
use crate::store::accounting::object_bytes;
use crate::store::arena::Allocation;
use crate::store::codec::{Coding, Scratch};
use crate::store::entry::{Entry, Location};
use crate::store::object;
use crate::store::pool::{Pool, PoolId};
use crate::store::twins::{Hint, Twins};

/// Objects that take less of the pool are not worth what knowing their sharers takes, unless there are many: so is none that only
/// repeats a word.
const WORTHWHILE_BYTES_MIN: u64 = 48;

/// A page that may be the same as another, its object in the scratch buffer. A shared one is held.
struct Twin {
    slot: Slot,
    generation: Generation,
    entry: Entry,
    location: Location,
}

impl Numbers {
    /// The pool that the shared object is counted under that an entry names.
    pub(super) fn pool_of(&self, entry: Entry) -> Option<PoolId> {
        match entry {
            Entry::Shared(location) => self.sharing.pool(location),
            _ => None,
        }
    }

    /// Takes note that `slot` names `new` instead of `old`. Whether the place of what `old` names is free by that.
    pub(super) fn exchange(&mut self, slot: Slot, old: Entry, new: Entry, pool: PoolId) -> bool {
        if let Entry::Shared(location) = new {
            self.sharing.join(location, slot, pool);
        }
        match old {
            Entry::Shared(location) => self.sharing.leave(location, slot),
            _ => true,
        }
    }
}

impl VmStore {
    /// Bytes of memory that are kept for knowing which pages are the same.
    pub(super) fn sharing_bytes(&self) -> u64 {
        let twins_bytes = self.twins.lock().memory_bytes();
        twins_bytes + self.numbers.lock().sharing.memory_bytes()
    }

    /// What a page that goes to the pool `to` is looked up by; `None` when others like it are not looked for.
    pub(super) fn hint(&self, page: &Page, to: PoolId) -> Option<Hint> {
        let is_cold = self.shared.pools.cold().is_some_and(|cold| cold.id == to);
        if !is_cold {
            return None;
        }
        let pages = self.numbers.lock().accounting.held.arena_pages();
        let mut twins = self.twins.lock();
        if !self.shared.deduplicates() {
            *twins = Twins::default();
            return None;
        }
        twins.begin(pages).then(|| Hint::of(page))
    }

    /// Lets `slot`, whose entry is `found` and whose page is `page`, share the object of a page of the pool `to` that is
    /// the same. `None` when there is none to be had.
    pub(super) fn share_with_twin(
        &self,
        slot: Slot,
        (found, expected): (Entry, Generation),
        (page, hint): (&Page, Hint),
        to: Pool,
        scratch: &mut Scratch,
    ) -> Option<Recompressed> {
        let twin = self.twins.lock().find(hint, slot)?;
        let twin = self.look_at_twin(twin, found, to.id, scratch)?;
        let mut other = ZERO_PAGE;
        let (owner, length) = (twin.entry.owner(self.id(), twin.slot), object_bytes(twin.location));
        let same = self.decode(owner, length, &mut other, scratch).ok().filter(|_| other == *page);
        let held = match twin.entry {
            Entry::Shared(location) => Some(location),
            _ => same.and_then(|coding| self.lend(&twin, coding, to.id, scratch)),
        }?;
        let outcome = same.map(|_| {
            self.twins.lock().count_saved(self.charged_bytes(Entry::Shared(held)));
            let change = Change { entry: Entry::Shared(held), pool: to.id, cause: Cause::Share };
            Recompressed::Shared.if_is(self.publish(slot, change, Some(expected)))
        });
        self.let_go(held);
        outcome
    }

    /// Copies the object of a page that may be the same into the scratch buffer, if it is one of the pool `to`, and not the
    /// one that was `found` where another is looked for.
    fn look_at_twin(&self, slot: Slot, found: Entry, to: PoolId, scratch: &mut Scratch) -> Option<Twin> {
        let record = self.table.record(slot)?;
        let mut numbers = self.numbers.lock();
        let tag = Tag::of(record.tag);
        let entry = Entry::unpack(record.entry.load(Ordering::Relaxed), slot).ok()?;
        let location = entry.location()?;
        if entry == found {
            // They share it already, and have since before the daemon started.
            drop(numbers);
            self.twins.lock().count_saved(self.charged_bytes(entry));
            return None;
        }
        if tag.pool() != to || self.charged_bytes(entry) < WORTHWHILE_BYTES_MIN {
            return None;
        }
        if matches!(entry, Entry::Shared(_)) && !numbers.sharing.hold(location) {
            return None;
        }
        self.shared.arena.read(location.offset, scratch.object(object_bytes(location)));
        Some(Twin { slot, generation: tag.generation(), entry, location })
    }

    /// Makes a shared object of the twin's own, which is in the scratch buffer, and lets the twin name it. It is held then.
    fn lend(&self, twin: &Twin, coding: Coding, pool: PoolId, scratch: &mut Scratch) -> Option<Location> {
        let object = scratch.object(object_bytes(twin.location));
        object::seal(object, Owner::shared(self.id()), coding);
        let location = self.keep(object).ok()?;
        self.numbers.lock().sharing.hold(location);
        let change = Change { entry: Entry::Shared(location), pool, cause: Cause::Lend };
        if matches!(self.publish(twin.slot, change, Some(twin.generation)), Published::Yes) {
            return Some(location);
        }
        self.let_go(location);
        None
    }

    /// Holds a shared object no more.
    fn let_go(&self, location: Location) {
        let is_free = self.numbers.lock().sharing.release(location);
        if is_free {
            self.free(Entry::Shared(location));
        }
    }

    /// Makes a copy of the object that `entry` names one of the slot's own. False when that is not one that this build
    /// knows.
    pub(super) fn make_own(&self, slot: Slot, entry: Entry, copy: &mut [u8]) -> bool {
        let Entry::Shared(_) = entry else { return true };
        let opened = object::open(copy, entry.owner(self.id(), slot)).map(|(coding, _)| coding);
        opened.map(|coding| object::seal(copy, self.owner(slot), coding)).is_ok()
    }

    /// Moves a shared object for all who share it, one after the other: until the last the old one stays.
    pub(super) fn relocate_shared(&self, from: u64, to: &Allocation, scratch: &mut Scratch) -> bool {
        let numbers = self.numbers.lock();
        let Some((location, sharers)) = numbers.sharing.at(from) else { return false };
        let entry = Entry::Shared(location);
        let known = |slot: &Slot| {
            let record = self.table.record(*slot)?;
            let names_it = Entry::unpack(record.entry.load(Ordering::Relaxed), *slot) == Ok(entry);
            names_it.then(|| (*slot, Tag::of(record.tag)))
        };
        // A damaged entry among them keeps the object where it is.
        let Some(sharers) = sharers.iter().map(known).collect::<Option<Vec<_>>>() else { return false };
        let object = scratch.object(object_bytes(location));
        self.shared.arena.read(from, object);
        drop(numbers);
        let damaged = |(slot, tag): &(Slot, Tag)| self.is_damaged(*slot, tag.generation(), entry, object);
        let Some(first) = sharers.first() else { return false };
        if damaged(first) {
            // Given up by one of them, it is by all.
            for sharer in &sharers[1..] {
                let _ = damaged(sharer);
            }
            return false;
        }
        self.shared.arena.write(to, object);
        let moved = Location { offset: to.offset, ..location };
        self.numbers.lock().sharing.hold(moved);
        for (slot, tag) in sharers {
            let change = Change { entry: Entry::Shared(moved), pool: tag.pool(), cause: Cause::Compact };
            // Who has left meanwhile does not mind.
            let _ = self.publish(slot, change, Some(tag.generation()));
        }
        !self.numbers.lock().sharing.release(moved)
    }
}
