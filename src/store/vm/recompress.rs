//! Compressing pages anew, for another pool: a move like the others (see `moves`), by somebody who knows what for.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::change::Cause;
use super::tag::{Generation, Tag};
use super::{LoadError, Published, StoreError, VmStore};
use crate::ids::Slot;
use crate::page::{Page, ZERO_PAGE};
use crate::store::accounting::object_bytes;
use crate::store::codec::{CodecId, Coding, Compressor, Scratch};
use crate::store::entry::{Entry, Location};
use crate::store::lru::Age;
use crate::store::object;
use crate::store::pool::{Pool, PoolId};

/// What became of a page that was to be compressed anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recompressed {
    /// There was nothing to do, or nothing was gained by it.
    Kept,
    /// It is in the other pool now, with a payload of so many bytes.
    Moved(usize),
    /// It is the same as another page of that pool, and kept as that from now on.
    Shared,
    /// To be tried again when there is room, in the pool or below its VM's limit.
    NoRoom,
    /// The slot was changed or its object moved meanwhile: what is there now is looked at in the next pass.
    Changed,
}

impl Recompressed {
    /// This, if its entry was published; else what became of the page.
    pub(super) fn if_is(self, published: Published) -> Self {
        match published {
            Published::Yes => self,
            Published::Stale => Self::Changed,
            Published::OverLimit => Self::NoRoom,
        }
    }
}

/// What is known of an object without looking at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Glance {
    /// The pool that made it.
    pub pool: PoolId,
    /// How long it was not used.
    pub age: Duration,
    /// Whether it was loaded since it was stored.
    pub loaded: bool,
}

impl VmStore {
    /// What there is in `slot`, if it is an object in the arena: read without the VM's lock, so it may have changed
    /// already.
    #[must_use]
    pub fn glance(&self, slot: Slot, now: Age) -> Option<Glance> {
        let record = self.table.record(slot)?;
        let entry = Entry::unpack(record.entry.load(Ordering::Relaxed), slot);
        let (tag, age) = (Tag::of(record.tag), Age::from_bits(record.age.load(Ordering::Relaxed)));
        entry.ok()?.location().map(|_| Glance {
            pool: tag.pool(),
            age: age.until(now),
            loaded: age.is_loaded(),
        })
    }

    /// Moves the page in `slot` to the pool `to`, if it is in the arena and another pool made it. A page that would be kept
    /// no smaller there only changes its pool on the books. One that gets cold and is the same as another cold one shares
    /// the other's object.
    pub fn recompress(&self, slot: Slot, to: Pool, scratch: &mut Scratch) -> Recompressed {
        let Some((entry, location, tag)) = self.of_other_pool(slot, to.id, scratch) else {
            return Recompressed::Kept;
        };
        let (expected, mut page) = (tag.generation(), ZERO_PAGE);
        let length = object_bytes(location);
        let made = match self.decode(entry.owner(self.id(), slot), length, &mut page, scratch) {
            Ok(made) => made,
            Err(err) => {
                if matches!(err, LoadError::Object(_)) {
                    self.is_damaged(slot, expected, entry, scratch.object(length));
                }
                self.adopt_into(slot, expected, to.id);
                return Recompressed::Kept;
            }
        };
        let hint = self.hint(&page, to.id);
        if let Some(hint) = hint
            && let Some(shared) = self.share_with_twin(slot, (entry, expected), (&page, hint), to, scratch)
        {
            return shared;
        }
        // What leaves others behind frees nothing, however much smaller it is.
        if hint.is_none() && to.compressor != Compressor::Lz4 && self.shares_with_others(entry) {
            self.adopt_into(slot, expected, to.id);
            return Recompressed::Kept;
        }
        let outcome = match self.compress_anew(slot, length, (&page, made, tag.pool()), to, scratch) {
            Ok(Some(location)) => {
                let entry = Entry::Arena(location);
                let published = self.settle(slot, expected, entry, to.id, Cause::Recompress);
                Recompressed::Moved(location.payload_bytes).if_is(published)
            }
            Ok(None) => {
                self.adopt_into(slot, expected, to.id);
                Recompressed::Kept
            }
            Err(_) => Recompressed::NoRoom,
        };
        if let Some(hint) = hint
            && matches!(outcome, Recompressed::Moved(_) | Recompressed::Kept)
        {
            self.twins.lock().insert(hint, slot);
        }
        outcome
    }

    fn shares_with_others(&self, entry: Entry) -> bool {
        match entry {
            Entry::Shared(location) => self.numbers.lock().sharing.count(location) > 1,
            _ => false,
        }
    }

    fn of_other_pool(
        &self,
        slot: Slot,
        pool: PoolId,
        scratch: &mut Scratch,
    ) -> Option<(Entry, Location, Tag)> {
        let record = self.table.record(slot)?;
        let _numbers = self.numbers.lock();
        let tag = Tag::of(record.tag);
        let entry = Entry::unpack(record.entry.load(Ordering::Relaxed), slot).ok()?;
        let location = entry.location().filter(|_| tag.pool() != pool)?;
        self.shared.arena.read(location.offset, scratch.object(object_bytes(location)));
        Some((entry, location, tag))
    }

    /// Compresses `page` anew, whose object of `length` bytes a pool has made in some way. `None` when that gains nothing.
    fn compress_anew(
        &self,
        slot: Slot,
        length: usize,
        (page, made, pool): (&Page, Coding, PoolId),
        Pool { compressor, .. }: Pool,
        scratch: &mut Scratch,
    ) -> Result<Option<Location>, StoreError> {
        if self.would_be_the_same(made, pool, compressor) {
            return Ok(None);
        }
        let (coding, object) = scratch.compress(compressor, self.encoder(compressor).as_deref(), page);
        // A faster codec is chosen for its speed, not for its size.
        let faster = compressor == Compressor::Lz4;
        let charged = |bytes| self.shared.arena.charged_bytes(bytes);
        if coding.codec == CodecId::Raw || (!faster && charged(object.len()) >= charged(length)) {
            return Ok(None);
        }
        object::seal(object, self.owner(slot), coding);
        let length = object.len();
        // A dictionary stays in memory for months, and a bit of it that flips would spoil all that is made with it.
        let mut back = ZERO_PAGE;
        if self.decode(self.owner(slot), length, &mut back, scratch).is_err() || back != *page {
            return Ok(None);
        }
        self.keep(scratch.object(length)).map(Some)
    }

    /// Whether what was `made` by `pool` is what this compressor would make.
    fn would_be_the_same(&self, made: Coding, pool: PoolId, compressor: Compressor) -> bool {
        match (made.codec, compressor) {
            (CodecId::SameFilled, _) => true,
            // lz4 has no levels: what an earlier daemon wrote with it is what this one would write.
            (CodecId::Lz4, Compressor::Lz4) => true,
            // The same dictionary is seldom used by two pools, and what an earlier daemon wrote with it not worth the time.
            (CodecId::Zstd, Compressor::ZstdWithDictionary(_)) => {
                let current = self.dictionaries.current().map(|dictionary| dictionary.number());
                pool == PoolId::EARLIER && made.dictionary.is_some() && made.dictionary == current
            }
            _ => false,
        }
    }

    /// Counts the object of `slot` under another pool.
    fn adopt_into(&self, slot: Slot, expected: Generation, pool: PoolId) {
        let Some(record) = self.table.record(slot) else { return };
        let mut numbers = self.numbers.lock();
        let tag = Tag::of(record.tag);
        let Ok(entry) = Entry::unpack(record.entry.load(Ordering::Relaxed), slot) else { return };
        if tag.generation() != expected || entry.location().is_none() {
            return;
        }
        let pool = self.shared.pools.counted_under(pool);
        // A shared object is counted once, and goes with the first of its sharers.
        let before = numbers.pool_of(entry).unwrap_or(tag.pool());
        if let Entry::Shared(location) = entry {
            numbers.sharing.set_pool(location, pool);
            // Those that share it are where it is: none is looked at for a pool that it has left.
            let sharers = numbers.sharing.at(location.offset).map_or(&[][..], |(_, sharers)| sharers);
            for record in sharers.iter().filter_map(|sharer| self.table.record(*sharer)) {
                Tag::of(record.tag).made_by(pool).keep_in(record.tag);
            }
        }
        let objects = &mut numbers.accounting.held.objects_by_pool;
        objects[before.index()] -= 1;
        objects[pool.index()] += 1;
        tag.made_by(pool).keep_in(record.tag);
    }
}
