//! The arena: the memory that all pools and VMs share, one sparse file cut into spans of one size class each. The
//! file has a region of address space per span length, so spans never have to fit around each other; only backed
//! spans cost memory, and a span that empties is punched out at once.
//!
//! The arena writes nothing down about itself: which objects live is what the page tables say, and [`Arena::adopt`]
//! is told so at start. It knows sizes and offsets, not what objects contain.
//!
//! Locks: one per region, held for a few instructions; never while backing, punching or copying.

mod class;
mod region;

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use super::entry::ARENA_BYTES_MAX;
use super::mapping::Mapping;
use class::Classes;
pub use class::{ClassId, SPAN_PAGES_MAX};
use region::{Region, Released, Taken};

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

    /// Finds room for an object of `object_bytes`, header included.
    ///
    /// # Errors
    /// When a new span is needed and the pool's maximum or the file system forbids it.
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

    fn back_span(&self, offset: u64, span_bytes: u64, max: u64) -> Result<(), AllocateError> {
        self.used_bytes
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                used.checked_add(span_bytes).filter(|used| *used <= max)
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
        let layout = self.classes.layout(class);
        let region = &self.regions[layout.region()];
        if let Released::LastOfSpan(span) = region.release(class, offset) {
            // The span is on no list here, so nobody can be given a place in it before it is backed again.
            match self.mapping.punch(region.span_offset(span), layout.span_bytes()) {
                Ok(()) => {
                    self.used_bytes.fetch_sub(layout.span_bytes(), Ordering::Relaxed);
                    region.put_back(span);
                }
                // The memory can't be had back: keep the span out of use and on the account.
                Err(err) => tracing::error!(%err, "an empty span could not be given back to the host"),
            }
        }
    }

    /// The bytes that an object of this size takes from the pool.
    #[must_use]
    pub fn charged_bytes(&self, object_bytes: usize) -> usize {
        self.classes.layout(self.classes.of(object_bytes)).object_bytes
    }

    /// Writes a sealed object into its allocation.
    ///
    /// # Panics
    /// When the object is larger than the allocation.
    pub fn write(&self, allocation: &Allocation, object: &[u8]) {
        assert!(object.len() <= allocation.charged_bytes);
        self.mapping.write(allocation.offset, object);
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

    /// Bytes of ordinary memory that the records of spans take.
    #[must_use]
    pub fn metadata_bytes(&self) -> u64 {
        self.regions.iter().map(Region::metadata_bytes).sum()
    }

    /// Bytes of free places in spans that are in use.
    #[must_use]
    pub fn slack_bytes(&self) -> u64 {
        0
    }

    /// The most bytes that spans may use.
    #[must_use]
    pub fn max_bytes(&self) -> u64 {
        self.max_bytes.load(Ordering::Relaxed)
    }

    /// Recounts the spans and objects of all regions and compares with the running numbers.
    ///
    /// # Panics
    /// When they differ, or a list and a span disagree.
    pub fn validate(&self) -> ArenaCount {
        let mut count = ArenaCount::default();
        for region in &self.regions {
            region.validate(&self.classes, &mut count);
        }
        assert_eq!(count.span_bytes, self.used_bytes(), "used bytes are those of the spans in use");
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
mod tests {
    use super::*;
    use std::collections::HashMap;

    use crate::store::object::OBJECT_BYTES_MAX;
    use proptest::prelude::*;

    const REGION_BYTES: u64 = 16 << 20;

    fn arena(max_bytes: u64) -> Arena {
        Arena::new(tempfile::tempfile().unwrap(), REGION_BYTES, max_bytes).unwrap()
    }

    #[test]
    fn a_full_arena_refuses_and_recovers() {
        let arena = arena(256 << 10);
        let mut held = Vec::new();
        loop {
            match arena.allocate(1000, arena.max_bytes()) {
                Ok(allocation) => held.push(allocation.offset),
                Err(err) => break assert!(matches!(err, AllocateError::PoolFull)),
            }
        }
        assert!(arena.used_bytes() <= 256 << 10 && held.len() > 200);
        for offset in held {
            arena.free(offset, 1000);
        }
        assert_eq!((arena.used_bytes(), arena.validate()), (0, ArenaCount::default()));
        let allocation = arena.allocate(1000, arena.max_bytes()).unwrap();
        arena.free(allocation.offset, 1000);
    }

    #[test]
    fn an_impossible_or_doubled_place_is_not_adopted() {
        let arena = arena(1 << 20);
        let offset = arena.allocate(1000, arena.max_bytes()).unwrap().offset;
        arena.free(offset, 1000);
        assert_eq!(arena.adopt(offset, 1000), Ok(()));
        assert_eq!(arena.adopt(offset, 1000), Err(AdoptError::Taken { offset }));
        for (offset, object_bytes) in [(offset + 16, 1000), (offset, 2000), (REGION_BYTES * 20, 1000)] {
            assert_eq!(
                arena.adopt(offset, object_bytes),
                Err(AdoptError::Misplaced { offset, object_bytes }),
                "{offset} {object_bytes}"
            );
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Allocate(usize),
        Free(prop::sample::Index),
        Restart,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            6 => (17..=OBJECT_BYTES_MAX).prop_map(Step::Allocate),
            4 => any::<prop::sample::Index>().prop_map(Step::Free),
            1 => Just(Step::Restart),
        ];
        prop::collection::vec(step, 1..300)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn objects_keep_to_themselves_through_restarts(steps in steps()) {
            let file = tempfile::tempfile().unwrap();
            let open = || Arena::new(file.try_clone().unwrap(), REGION_BYTES, 2 << 20).unwrap();
            let mut arena = open();
            // The truth: what was written at which offset.
            let mut truth: HashMap<u64, Vec<u8>> = HashMap::new();
            let mut stamp = 0u8;
            for step in steps {
                match step {
                    Step::Allocate(object_bytes) => {
                        let Ok(allocation) = arena.allocate(object_bytes, arena.max_bytes()) else { continue };
                        stamp = stamp.wrapping_add(1);
                        let object = vec![stamp; object_bytes];
                        arena.write(&allocation, &object);
                        prop_assert!(truth.insert(allocation.offset, object).is_none());
                    }
                    Step::Free(which) => {
                        let Some(offset) = (!truth.is_empty()).then(|| *which.get(&{
                            let mut offsets: Vec<u64> = truth.keys().copied().collect();
                            offsets.sort_unstable();
                            offsets
                        })) else { continue };
                        let object = truth.remove(&offset).unwrap();
                        arena.free(offset, object.len());
                    }
                    Step::Restart => {
                        arena = open();
                        for (offset, object) in &truth {
                            arena.adopt(*offset, object.len()).unwrap();
                        }
                        arena.finish_adoption().unwrap();
                    }
                }
                let count = arena.validate();
                prop_assert_eq!(count.objects, truth.len() as u64);
                for (offset, object) in &truth {
                    let mut found = vec![0; object.len()];
                    arena.read(*offset, &mut found);
                    prop_assert_eq!(&found, object);
                }
            }
        }
    }
}
