//! Compressing pages anew, for another pool: a move like the others (see `moves`), by somebody who knows what for.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::change::Cause;
use super::tag::{Generation, Tag};
use super::{LoadError, StoreError, VmStore};
use crate::ids::Slot;
use crate::page::ZERO_PAGE;
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
    /// To be tried again when there is room, in the pool or below its VM's limit; or it changed meanwhile.
    NoRoom,
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
        matches!(entry, Ok(Entry::Arena(_))).then(|| Glance {
            pool: tag.pool(),
            age: age.until(now),
            loaded: age.is_loaded(),
        })
    }

    /// Moves the page in `slot` to the pool `to`, if it is in the arena and another pool made it. A page that would be kept
    /// no smaller there only changes its pool on the books.
    pub fn recompress(&self, slot: Slot, to: Pool, scratch: &mut Scratch) -> Recompressed {
        let Some((location, tag)) = self.of_other_pool(slot, to.id, scratch) else {
            return Recompressed::Kept;
        };
        match self.compress_anew(slot, location, tag, to, scratch) {
            Ok(Some(made)) => {
                let (entry, payload_bytes) = (Entry::Arena(made), made.payload_bytes);
                match self.settle(slot, tag.generation(), entry, to.id, Cause::Recompress) {
                    true => Recompressed::Moved(payload_bytes),
                    false => Recompressed::NoRoom,
                }
            }
            Ok(None) => {
                self.adopt_into(slot, tag.generation(), to.id);
                Recompressed::Kept
            }
            Err(_) => Recompressed::NoRoom,
        }
    }

    fn of_other_pool(&self, slot: Slot, pool: PoolId, scratch: &mut Scratch) -> Option<(Location, Tag)> {
        let record = self.table.record(slot)?;
        let _numbers = self.numbers.lock();
        let tag = Tag::of(record.tag);
        match Entry::unpack(record.entry.load(Ordering::Relaxed), slot) {
            Ok(Entry::Arena(location)) if tag.pool() != pool => {
                self.shared.arena.read(location.offset, scratch.object(object_bytes(location)));
                Some((location, tag))
            }
            _ => None,
        }
    }

    /// Compresses the object in the scratch buffer anew. `None` when that gains nothing.
    fn compress_anew(
        &self,
        slot: Slot,
        location: Location,
        tag: Tag,
        Pool { compressor, .. }: Pool,
        scratch: &mut Scratch,
    ) -> Result<Option<Location>, StoreError> {
        let length = object_bytes(location);
        let mut page = ZERO_PAGE;
        let made = match self.decode(slot, length, &mut page, scratch) {
            Ok(coding) => coding,
            Err(err) => {
                if matches!(err, LoadError::Object(_)) {
                    self.is_damaged(slot, tag.generation(), scratch.object(length));
                }
                return Ok(None);
            }
        };
        if self.would_be_the_same(made, tag.pool(), compressor) {
            return Ok(None);
        }
        let (coding, object) = scratch.compress(compressor, self.encoder(compressor).as_deref(), &page);
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
        if self.decode(slot, length, &mut back, scratch).is_err() || back != page {
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
        let entry = Entry::unpack(record.entry.load(Ordering::Relaxed), slot);
        if tag.generation() != expected || !matches!(entry, Ok(Entry::Arena(_))) {
            return;
        }
        let pool = self.shared.pools.counted_under(pool);
        let objects = &mut numbers.accounting.held.objects_by_pool;
        objects[tag.pool().index()] -= 1;
        objects[pool.index()] += 1;
        tag.made_by(pool).keep_in(record.tag);
    }
}
