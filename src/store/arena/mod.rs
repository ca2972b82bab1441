//! The arena: the memory that all pools and VMs share, one sparse file cut into spans of one size class each. The
//! file has a region of address space per span length, so spans never have to fit around each other; only backed
//! spans cost memory, and a span that empties is punched out at once.
//!
//! The arena writes nothing down about itself: which objects live is what the page tables say, and [`Arena::adopt`]
//! is told so at start. It knows sizes and offsets; of what objects contain, only where their owner stands. Objects that
//! are scattered over many spans keep much memory in use: [`compact`] brings them together.
//!
//! Locks: one per region, held for a few instructions; never while backing, punching or copying.

mod class;
mod evacuation;
mod region;
mod span;
mod spans;

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use super::entry::ARENA_BYTES_MAX;
use super::mapping::Mapping;
use super::object::{self, OWNER_BYTES};
use crate::ids::Owner;
use class::Classes;
pub use class::{ClassId, SPAN_PAGES_MAX};
pub use evacuation::{Compacted, Evacuation, Move, compact};
use region::{Region, Released, Taken};

/// Where in an object its owner's words are, in bytes.
const OWNER_WORDS: [u64; 2] = [OWNER_BYTES.start as u64, OWNER_BYTES.start as u64 + 4];

/// The memory of all pools. Shared by reference; every method takes `&self`.
#[derive(Debug)]
pub struct Arena {
    mapping: Mapping,
    classes: Classes,
    /// One region per span length, shortest first.
    regions: Vec<Region>,
    region_bytes: u64,
    /// Bytes of backed spans, against which the maximum is held. Changes once per span, not per object.
    used_bytes: AtomicU64,
    max_bytes: AtomicU64,
}

/// A place for one object that nobody else has: write it, then publish its offset in an entry or free it.
#[derive(Debug)]
#[must_use = "an allocation that is neither published nor freed is leaked until the next start"]
pub struct Allocation {
    /// Offset of the object in the arena, in bytes.
    pub offset: u64,
    /// The bytes that the object takes from the pool: those of its size class.
    pub charged_bytes: usize,
}

/// Why there is no room for an object.
#[derive(Debug, thiserror::Error)]
pub enum AllocateError {
    /// A new span would exceed the pool's maximum.
    #[error("the pool is at its maximum")]
    PoolFull,
    /// The state directory's file system, or its address space, gave no memory.
    #[error("the state directory has no memory left")]
    NoMemory(#[source] io::Error),
}

/// Why a recovered entry can't be right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdoptError {
    /// The offset is not where an object of that size can start.
    #[error("no object of {object_bytes} bytes can lie at offset {offset:#x} of the arena")]
    Misplaced {
        /// The offset that the entry named.
        offset: u64,
        /// The bytes of header and payload.
        object_bytes: usize,
    },
    /// Another entry has that place already.
    #[error("two entries name the object at offset {offset:#x} of the arena")]
    Taken {
        /// The offset that both entries named.
        offset: u64,
    },
}

impl Arena {
    /// Maps `file` as an arena with `region_bytes` of address space per span length. The bytes per region are part
    /// of the file layout: the same file needs the same number each time.
    ///
    /// # Errors
    /// Those of mapping; `InvalidInput` when entries could not point at all of it.
    pub fn new(file: File, region_bytes: u64, max_bytes: u64) -> io::Result<Self> {
        let length = region_bytes
            .checked_mul(SPAN_PAGES_MAX as u64)
            .filter(|length| *length <= ARENA_BYTES_MAX)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let classes = Classes::new();
        let regions = (0..SPAN_PAGES_MAX).map(|index| Region::new(index, region_bytes, &classes)).collect();
        Ok(Self {
            mapping: Mapping::new(file, length)?,
            classes,
            regions,
            region_bytes,
            used_bytes: AtomicU64::new(0),
            max_bytes: AtomicU64::new(max_bytes),
        })
    }

    /// Its file, mapped.
    #[must_use]
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Keeps the host from swapping it out.
    ///
    /// # Errors
    /// Those of [`Mapping::lock`].
    pub fn lock(&self) -> io::Result<()> {
        self.mapping.lock()
    }

    /// Finds room for an object of `object_bytes`, header included. `max_bytes` is the most that spans may use once
    /// this object needs a new one: [`Arena::max_bytes`], or less for who leaves something to others.
    ///
    /// # Errors
    /// When a new span is needed and `max_bytes` or the file system forbids it.
    pub fn allocate(&self, object_bytes: usize, max_bytes: u64) -> Result<Allocation, AllocateError> {
        let class = self.classes.of(object_bytes);
        let layout = self.classes.layout(class);
        let region = &self.regions[layout.region()];
        let span = match region.take(class) {
            Taken::Object(offset) => return Ok(Allocation { offset, charged_bytes: layout.object_bytes }),
            Taken::NeedsSpan(span) => span.ok_or_else(|| {
                AllocateError::NoMemory(io::Error::other("the arena's address space is used up"))
            })?,
        };
        if let Err(err) = self.back_span(region.span_offset(span), layout.span_bytes(), max_bytes) {
            region.put_back(span);
            return Err(err);
        }
        let offset = region.open(span, class);
        Ok(Allocation { offset, charged_bytes: layout.object_bytes })
    }

    fn back_span(&self, offset: u64, span_bytes: u64, max_bytes: u64) -> Result<(), AllocateError> {
        self.used_bytes
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                used.checked_add(span_bytes).filter(|used| *used <= max_bytes)
            })
            .map_err(|_| AllocateError::PoolFull)?;
        self.mapping.back(offset, span_bytes).map_err(|err| {
            self.used_bytes.fetch_sub(span_bytes, Ordering::Relaxed);
            AllocateError::NoMemory(err)
        })
    }

    /// Frees an object that no entry names any more. A span that empties by this is given back to the host.
    pub fn free(&self, offset: u64, object_bytes: usize) {
        let class = self.classes.of(object_bytes);
        let region = &self.regions[self.classes.layout(class).region()];
        self.give_back(region, region.release(class, offset));
    }

    /// Gives an allocation back that was not published.
    pub fn discard(&self, allocation: Allocation) {
        // A place is of the class of the longest object that fits it.
        self.free(allocation.offset, allocation.charged_bytes);
    }

    /// Gives a span that has emptied back to the host. Returns its bytes, or 0 when there is no such span.
    fn give_back(&self, region: &Region, released: Released) -> u64 {
        let Released::LastOfSpan(span) = released else { return 0 };
        let span_bytes = region.span_bytes();
        // The span is on no list here, so nobody can be given a place in it before it is backed again.
        if let Err(err) = self.mapping.punch(region.span_offset(span), span_bytes) {
            // The memory can't be had back: keep the span out of use and on the account.
            tracing::error!(%err, "an empty span could not be given back to the host");
            return 0;
        }
        self.used_bytes.fetch_sub(span_bytes, Ordering::Relaxed);
        region.put_back(span);
        span_bytes
    }

    /// Begins to empty a sparse span into free places of other spans: the one, as far as the lists tell, for which
    /// the fewest bytes are copied for what is freed. `None` when no class has a span's worth of free places.
    #[must_use]
    pub fn evacuate(&self) -> Option<Evacuation<'_>> {
        let costs = self.regions.iter().filter_map(|region| Some((region.evacuation_cost()?, region)));
        let (_, region) = costs.min_by_key(|(cost, _)| *cost)?;
        Some(Evacuation::new(self, region, region.begin_evacuation()?))
    }

    /// Whose the object at `offset` says it is. The caller knows that its span is backed.
    fn object_owner(&self, offset: u64) -> Owner {
        let words = OWNER_WORDS.map(|at| self.mapping.half_word(offset + at).load(Ordering::Relaxed));
        object::owner_of(words.map(u32::from_le))
    }

    /// The bytes that an object of this size takes from the pool.
    #[must_use]
    pub fn charged_bytes(&self, object_bytes: usize) -> usize {
        self.classes.layout(self.classes.of(object_bytes)).object_bytes
    }

    /// Writes a sealed object into its allocation.
    ///
    /// # Panics
    /// When the object is larger than the allocation, or shorter than its header.
    pub fn write(&self, allocation: &Allocation, object: &[u8]) {
        assert!(object.len() <= allocation.charged_bytes);
        let (checksum, rest) = object.split_at(OWNER_BYTES.start);
        let (owner, rest) = rest.split_at(OWNER_BYTES.len());
        self.mapping.write(allocation.offset, checksum);
        // An evacuation may read the owner before the object is published: its words are only accessed as atomics.
        for (at, word) in OWNER_WORDS.into_iter().zip(owner.as_chunks().0) {
            let word = u32::from_ne_bytes(*word);
            self.mapping.half_word(allocation.offset + at).store(word, Ordering::Relaxed);
        }
        self.mapping.write(allocation.offset + OWNER_BYTES.end as u64, rest);
    }

    /// Copies an object out. The caller holds the lock under which the object would be freed.
    pub fn read(&self, offset: u64, object: &mut [u8]) {
        self.mapping.read(offset, object);
    }

    /// At start: takes note of an object that an entry names.
    ///
    /// # Errors
    /// When the place is impossible or taken, which means a damaged table.
    pub fn adopt(&self, offset: u64, object_bytes: usize) -> Result<(), AdoptError> {
        let class = self.classes.of(object_bytes);
        let layout = self.classes.layout(class);
        let region = &self.regions[layout.region()];
        let misplaced = AdoptError::Misplaced { offset, object_bytes };
        if offset / self.region_bytes != layout.region() as u64 {
            return Err(misplaced);
        }
        let opened = region.adopt(class, offset, misplaced)?;
        if opened {
            self.used_bytes.fetch_add(layout.span_bytes(), Ordering::Relaxed);
        }
        Ok(())
    }

    /// At start, after the last [`Arena::adopt`]: gives everything back to the host that no entry named.
    ///
    /// # Errors
    /// Those of punching holes.
    pub fn finish_adoption(&self) -> io::Result<()> {
        for region in &self.regions {
            for (offset, length) in region.finish_adoption(self.region_bytes) {
                self.mapping.punch(offset, length)?;
            }
        }
        Ok(())
    }

    /// Bytes of host memory behind spans.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }

    /// Bytes of the places that objects take. Objects come and go meanwhile: the sum is of no one moment.
    #[must_use]
    pub fn charged_bytes_total(&self) -> u64 {
        self.regions.iter().map(Region::charged_bytes).sum()
    }

    /// Bytes of spans in use that no object takes: free places, and what is left over behind the last place. Not all of
    /// it can be had back: up to a span of each class stays, some 2 MiB in all, which is much of a small arena.
    #[must_use]
    pub fn slack_bytes(&self) -> u64 {
        self.used_bytes().saturating_sub(self.charged_bytes_total())
    }

    /// The most that compaction could give back now, in bytes. It gives back less while objects can't be moved.
    #[must_use]
    pub fn gain_bytes(&self) -> u64 {
        self.regions.iter().map(Region::gain_bytes).sum()
    }

    /// Bytes of ordinary memory that the records of spans take.
    #[must_use]
    pub fn metadata_bytes(&self) -> u64 {
        self.regions.iter().map(Region::metadata_bytes).sum()
    }

    /// The most bytes that spans may use.
    #[must_use]
    pub fn max_bytes(&self) -> u64 {
        self.max_bytes.load(Ordering::Relaxed)
    }

    /// Changes that. Who is above it shrinks in the background.
    pub fn set_max_bytes(&self, max_bytes: u64) {
        self.max_bytes.store(max_bytes, Ordering::Relaxed);
    }

    /// Recounts the spans and objects of all regions and compares with the running numbers.
    ///
    /// # Panics
    /// When they differ, or a list and a span disagree; also when objects come and go meanwhile.
    pub fn validate(&self) -> ArenaCount {
        let mut count = ArenaCount::default();
        for region in &self.regions {
            region.validate(&self.classes, &mut count);
        }
        assert_eq!(count.span_bytes, self.used_bytes(), "used bytes are those of the spans in use");
        assert_eq!(
            count.span_bytes - count.charged_bytes,
            self.slack_bytes(),
            "slack is what is not charged"
        );
        count
    }
}

/// What [`Arena::validate`] counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ArenaCount {
    /// Objects in use.
    pub objects: u64,
    /// Bytes of their size classes.
    pub charged_bytes: u64,
    /// Bytes of the spans that hold them.
    pub span_bytes: u64,
}

#[cfg(test)]
mod tests;
