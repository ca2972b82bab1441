//! Moves that the guest never sees: to the writeback file, within it, within the arena; `recompress` has those to another
//! codec. Each is the same three steps: copy out under the lock and note the generation; work without it; publish if the
//! generation is still the same, and drop the work if not.

use std::sync::atomic::Ordering;

use super::change::{Cause, Change};
use super::tag::{Generation, Tag};
use super::{Published, VmStore};
use crate::ids::{Owner, Slot};
use crate::store::accounting::object_bytes;
use crate::store::arena::Move;
use crate::store::codec::Scratch;
use crate::store::entry::{Entry, Location};
use crate::store::lru::Age;
use crate::store::pool::PoolId;
use crate::writeback::{Cipher, Place};

impl VmStore {
    /// What the VM's records in the writeback file are encrypted with.
    #[must_use]
    pub fn cipher(&self) -> &Cipher {
        &self.cipher
    }

    /// Appends a copy of the object in `slot` to `buffer`, as the slot's own even if others share it: its generation and
    /// length. `None` when the slot has no object in the arena, or was used since it was `found` cold with this age: then
    /// its turn has not come. One that is damaged is given up.
    pub fn isolate(&self, slot: Slot, found: Age, buffer: &mut Vec<u8>) -> Option<(Generation, usize)> {
        let record = self.table.record(slot)?;
        let numbers = self.numbers.lock();
        if Age::from_bits(record.age.load(Ordering::Relaxed)) != found {
            return None;
        }
        let entry = Entry::unpack(record.entry.load(Ordering::Relaxed), slot).ok()?;
        let location = entry.location()?;
        let (start, length) = (buffer.len(), object_bytes(location));
        buffer.resize(start + length, 0);
        self.shared.arena.read(location.offset, &mut buffer[start..]);
        let generation = Tag::of(record.tag).generation();
        drop(numbers);
        let copy = &mut buffer[start..];
        if self.is_damaged(slot, generation, entry, copy) || !self.make_own(slot, entry, copy) {
            buffer.truncate(start);
            return None;
        }
        Some((generation, length))
    }

    /// Publishes that the page in `slot` is at `place` in the writeback file. False when the slot has changed since
    /// `expected`; the place is then free again.
    pub fn write_back(&self, slot: Slot, expected: Generation, place: Place) -> bool {
        self.settle(slot, expected, Entry::File(place), PoolId::EARLIER, Cause::WriteBack) == Published::Yes
    }

    /// The generation of `slot` if its page is at `place` in the writeback file.
    #[must_use]
    pub fn generation_in_file(&self, slot: Slot, place: Place) -> Option<Generation> {
        if slot.0 >= self.slots() {
            return None;
        }
        let record = self.table.record(slot)?;
        let _numbers = self.numbers.lock();
        let entry = Entry::unpack(record.entry.load(Ordering::Relaxed), slot);
        (entry == Ok(Entry::File(place))).then(|| Tag::of(record.tag).generation())
    }

    /// Publishes that the record of `slot` was moved to `place`. False when the slot has changed since `expected`; the
    /// place is then free again.
    pub fn move_in_file(&self, slot: Slot, expected: Generation, place: Place) -> bool {
        self.settle(slot, expected, Entry::File(place), PoolId::EARLIER, Cause::Clean) == Published::Yes
    }

    /// Moves an object of the arena, for all who share it. False when it is not the slot's (any more): nothing was moved,
    /// and the place is still the caller's.
    pub fn relocate(&self, planned: &Move, scratch: &mut Scratch) -> bool {
        let Move { owner: owner @ Owner { slot, .. }, from, to } = planned;
        if owner.is_shared() {
            return self.relocate_shared(*from, to, scratch);
        }
        if slot.0 >= self.slots() {
            return false;
        }
        let Some(record) = self.table.record(*slot) else { return false };
        let numbers = self.numbers.lock();
        let tag = Tag::of(record.tag);
        let (entry, location) = match Entry::unpack(record.entry.load(Ordering::Relaxed), *slot) {
            Ok(entry @ Entry::Arena(location)) if location.offset == *from => (entry, location),
            _ => return false,
        };
        let object = scratch.object(object_bytes(location));
        self.shared.arena.read(*from, object);
        drop(numbers);
        if self.is_damaged(*slot, tag.generation(), entry, object) {
            return false;
        }
        self.shared.arena.write(to, object);
        let entry = Entry::Arena(Location { offset: to.offset, ..location });
        let change = Change { entry, pool: tag.pool(), cause: Cause::Compact };
        matches!(self.publish(*slot, change, Some(tag.generation())), Published::Yes)
    }

    pub(super) fn settle(
        &self,
        slot: Slot,
        expected: Generation,
        entry: Entry,
        made_by: PoolId,
        cause: Cause,
    ) -> Published {
        let change = Change { entry, pool: made_by, cause };
        let published = self.publish(slot, change, Some(expected));
        if published != Published::Yes {
            self.free(entry);
        }
        published
    }
}
