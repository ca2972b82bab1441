//! Moves that the guest never sees: to the writeback file, within it, within the arena, to another codec. Each is
//! the same three steps: copy out under the lock and note the generation; work without it; publish if the
//! generation is still the same, and drop the work if not.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::change::{Cause, Change};
use super::tag::{Generation, Tag};
use super::{Published, StoreError, VmStore};
use crate::ids::{Owner, Slot};
use crate::page::ZERO_PAGE;
use crate::store::accounting::object_bytes;
use crate::store::arena::Move;
use crate::store::codec::{CodecId, Compressor, Scratch};
use crate::store::entry::{Entry, Location};
use crate::store::lru::Age;
use crate::store::object;
use crate::store::pool::PoolId;
use crate::writeback::{Cipher, Place};

/// What became of a page that was to be compressed anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recompressed {
    /// There was nothing to do.
    Kept,
    /// It is in the current pool now.
    Moved,
    /// It was used a moment ago: to be tried again when it is idle.
    NotIdle,
    /// To be tried again when there is room, in the pool or below its VM's limit; or it changed meanwhile.
    NoRoom,
}

impl VmStore {
    /// What the VM's records in the writeback file are encrypted with.
    #[must_use]
    pub fn cipher(&self) -> &Cipher {
        &self.cipher
    }

    /// Appends a copy of the object in `slot` to `buffer`: its generation and length. `None` when the slot has no object
    /// in the arena, or was used since it was `found` cold with this age: then its turn has not come. One that is damaged
    /// is given up.
    pub fn isolate(&self, slot: Slot, found: Age, buffer: &mut Vec<u8>) -> Option<(Generation, usize)> {
        let record = self.table.record(slot)?;
        let numbers = self.numbers.lock();
        if Age::from_bits(record.age.load(Ordering::Relaxed)) != found {
            return None;
        }
        let Ok(Entry::Arena(location)) = Entry::unpack(record.entry.load(Ordering::Relaxed), slot) else {
            return None;
        };
        let (start, length) = (buffer.len(), object_bytes(location));
        buffer.resize(start + length, 0);
        self.shared.arena.read(location.offset, &mut buffer[start..]);
        let generation = Tag::of(record.tag).generation();
        drop(numbers);
        if self.is_damaged(slot, generation, &buffer[start..]) {
            buffer.truncate(start);
            return None;
        }
        Some((generation, length))
    }

    /// Publishes that the page in `slot` is at `place` in the writeback file. False when the slot has changed since
    /// `expected`; the place is then free again.
    pub fn write_back(&self, slot: Slot, expected: Generation, place: Place) -> bool {
        self.settle(slot, expected, Entry::File(place), PoolId::EARLIER, Cause::WriteBack)
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
        self.settle(slot, expected, Entry::File(place), PoolId::EARLIER, Cause::Clean)
    }

    /// Moves an object of the arena. False when it is not the slot's (any more): nothing was moved, and the place is
    /// still the caller's.
    pub fn relocate(&self, planned: &Move, scratch: &mut Scratch) -> bool {
        let Move { owner: Owner { slot, .. }, from, to } = planned;
        if slot.0 >= self.slots() {
            return false;
        }
        let Some(record) = self.table.record(*slot) else { return false };
        let numbers = self.numbers.lock();
        let tag = Tag::of(record.tag);
        let location = match Entry::unpack(record.entry.load(Ordering::Relaxed), *slot) {
            Ok(Entry::Arena(location)) if location.offset == *from => location,
            _ => return false,
        };
        let object = scratch.object(object_bytes(location));
        self.shared.arena.read(*from, object);
        drop(numbers);
        if self.is_damaged(*slot, tag.generation(), object) {
            return false;
        }
        self.shared.arena.write(to, object);
        let entry = Entry::Arena(Location { offset: to.offset, ..location });
        let change = Change { entry, pool: tag.pool(), cause: Cause::Compact };
        matches!(self.publish(*slot, change, Some(tag.generation())), Published::Yes)
    }

    /// Moves the page in `slot` to the current pool, if it is in the arena, another pool made it, and it was last used
    /// at least `idle_min` before `now`. A page that the current compressor would keep no smaller only changes its pool on
    /// the books.
    pub fn recompress(
        &self,
        slot: Slot,
        now: Age,
        idle_min: Duration,
        scratch: &mut Scratch,
    ) -> Recompressed {
        let (current, compressor) = self.shared.pools.current();
        let Some((location, tag)) = self.of_other_pool(slot, current, scratch) else {
            return Recompressed::Kept;
        };
        if self.age(slot, now).is_some_and(|age| age < idle_min) {
            return Recompressed::NotIdle;
        }
        let Ok((codec, _)) = object::open(scratch.object(object_bytes(location)), self.owner(slot)) else {
            self.is_damaged(slot, tag.generation(), scratch.object(object_bytes(location)));
            return Recompressed::Kept;
        };
        // lz4 has no levels: what an earlier daemon wrote with it is what this one would write.
        let same = codec == CodecId::SameFilled || (codec, compressor) == (CodecId::Lz4, Compressor::Lz4);
        let anew =
            if same { Ok(None) } else { self.compress_anew(slot, location, codec, compressor, scratch) };
        match anew {
            Ok(Some(entry)) if self.settle(slot, tag.generation(), entry, current, Cause::Recompress) => {
                Recompressed::Moved
            }
            Ok(Some(_)) | Err(_) => Recompressed::NoRoom,
            Ok(None) => {
                self.adopt_into(slot, tag.generation(), current);
                Recompressed::Kept
            }
        }
    }

    fn of_other_pool(&self, slot: Slot, current: PoolId, scratch: &mut Scratch) -> Option<(Location, Tag)> {
        let record = self.table.record(slot)?;
        let _numbers = self.numbers.lock();
        let tag = Tag::of(record.tag);
        match Entry::unpack(record.entry.load(Ordering::Relaxed), slot) {
            Ok(Entry::Arena(location)) if tag.pool() != current => {
                self.shared.arena.read(location.offset, scratch.object(object_bytes(location)));
                Some((location, tag))
            }
            _ => None,
        }
    }

    /// Compresses the object in the scratch buffer anew. `None` when it would not get smaller.
    fn compress_anew(
        &self,
        slot: Slot,
        location: Location,
        codec: CodecId,
        compressor: Compressor,
        scratch: &mut Scratch,
    ) -> Result<Option<Entry>, StoreError> {
        let mut page = ZERO_PAGE;
        if scratch.decompress(codec, object_bytes(location), &mut page).is_err() {
            return Ok(None);
        }
        let (codec, object) = scratch.compress(compressor, &page);
        // A faster codec is chosen for its speed, not for its size.
        let faster = compressor == Compressor::Lz4;
        if codec == CodecId::Raw || (!faster && object.len() >= object_bytes(location)) {
            return Ok(None);
        }
        object::seal(object, self.owner(slot), codec);
        self.keep(object).map(|location| Some(Entry::Arena(location)))
    }

    /// Counts the object of `slot` under another pool.
    fn adopt_into(&self, slot: Slot, expected: Generation, current: PoolId) {
        let Some(record) = self.table.record(slot) else { return };
        let mut numbers = self.numbers.lock();
        let tag = Tag::of(record.tag);
        let entry = Entry::unpack(record.entry.load(Ordering::Relaxed), slot);
        if tag.generation() != expected || !matches!(entry, Ok(Entry::Arena(_))) {
            return;
        }
        let current = self.shared.pools.counted_under(current);
        let objects = &mut numbers.accounting.held.objects_by_pool;
        objects[tag.pool().index()] -= 1;
        objects[current.index()] += 1;
        tag.made_by(current).keep_in(record.tag);
    }

    fn settle(&self, slot: Slot, expected: Generation, entry: Entry, made_by: PoolId, cause: Cause) -> bool {
        let change = Change { entry, pool: made_by, cause };
        let published = matches!(self.publish(slot, change, Some(expected)), Published::Yes);
        if !published {
            self.free(entry);
        }
        published
    }
}
