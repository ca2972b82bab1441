//! One VM's pages: store, load, invalidate. All three end in [`VmStore::publish`], the only place that changes an
//! entry. Compressing, checking and decompressing happen outside the VM's lock; under it there is only the entry,
//! its numbers and, for a load, one copy of at most a page out of the arena.
//!
//! An object is freed after its entry is gone, by the thread that replaced the entry; so whoever holds the lock and
//! reads an entry may copy its object.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::accounting::{Accounting, Held, object_bytes};
use super::arena::{AllocateError, Arena};
use super::codec::{CodecId, Compressor, Scratch};
use super::entry::{BadEntry, Entry, Location};
use super::lru::Age;
use super::object::{self, BadObject, Owner};
use super::same_filled;
use super::table::{CHUNK_SLOTS, Record, Table};
use crate::ids::{Slot, VmId};
use crate::page::{Page, ZERO_PAGE};

/// The pages of one VM.
#[derive(Debug)]
pub struct VmStore {
    table: Table,
    arena: Arc<Arena>,
    compressor: Compressor,
    limit_bytes: AtomicU64,
    accounting: Mutex<Accounting>,
}

/// Why a page was not stored. The slot holds what it held before.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The VM holds as much as it may.
    #[error("the VM is at its limit")]
    Limit,
    /// The pool holds as much as it may.
    #[error("the pool is at its maximum")]
    PoolFull,
    /// The state directory has no memory left.
    #[error("the state directory has no memory left")]
    NoMemory(#[source] std::io::Error),
}

/// Why a page was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The slot's entry is damaged.
    #[error(transparent)]
    Entry(#[from] BadEntry),
    /// The stored page is damaged or another's.
    #[error(transparent)]
    Object(#[from] BadObject),
    /// The payload does not become a page.
    #[error(transparent)]
    Decompress(#[from] super::codec::DecompressError),
    /// The page could not be kept.
    #[error("the page was lost")]
    Lost,
}

/// Tells whether an entry is still the one that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generation(u32);

/// What became of an entry that was to be published.
enum Published {
    Yes,
    /// The slot has another generation than the one expected.
    Stale,
    OverLimit,
}

impl VmStore {
    /// Serves the pages in `table`; what it holds already was counted as `held`.
    #[must_use]
    pub fn new(
        table: Table,
        arena: Arc<Arena>,
        compressor: Compressor,
        limit_bytes: u64,
        held: Held,
    ) -> Self {
        let accounting = Mutex::new(Accounting { held, ..Accounting::default() });
        Self { table, arena, compressor, limit_bytes: AtomicU64::new(limit_bytes), accounting }
    }

    /// The VM's number.
    #[must_use]
    pub fn id(&self) -> VmId {
        self.table.vm()
    }

    /// Slots on the VM's device.
    #[must_use]
    pub fn slots(&self) -> u32 {
        self.table.slots()
    }

    /// The page table, for whoever walks it.
    #[must_use]
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// The most pool bytes that the VM may hold.
    #[must_use]
    pub fn limit_bytes(&self) -> u64 {
        self.limit_bytes.load(Ordering::Relaxed)
    }

    /// The VM's numbers.
    #[must_use]
    pub fn accounting(&self) -> Accounting {
        *self.accounting.lock()
    }

    fn owner(&self, slot: Slot) -> Owner {
        Owner { vm: self.id(), slot }
    }

    fn charged_bytes(&self, entry: Entry) -> u64 {
        match entry {
            Entry::Arena(location) => self.arena.charged_bytes(object_bytes(location)) as u64,
            _ => 0,
        }
    }

    /// Stores `page` in `slot`. When this returns, it outlives the process.
    ///
    /// # Errors
    /// When there is no room; the slot then holds what it held before.
    pub fn store(&self, slot: Slot, page: &Page, now: Age, scratch: &mut Scratch) -> Result<(), StoreError> {
        self.store_if(slot, page, None, now, scratch).map(|_| ())
    }

    /// Stores `page` in `slot` unless the slot changed since `expected` was read. False when it has.
    fn store_if(
        &self,
        slot: Slot,
        page: &Page,
        expected: Option<Generation>,
        now: Age,
        scratch: &mut Scratch,
    ) -> Result<bool, StoreError> {
        let result = self.place(slot, page, scratch).and_then(|entry| {
            let published = self.publish(slot, entry, expected, now);
            if !matches!(published, Published::Yes) {
                self.free(entry);
            }
            match published {
                Published::Yes => Ok(true),
                Published::Stale => Ok(false),
                Published::OverLimit => Err(StoreError::Limit),
            }
        });
        if let Err(err) = &result {
            let events = &mut self.accounting.lock().events;
            *match err {
                StoreError::Limit => &mut events.limit_hit,
                StoreError::PoolFull => &mut events.pool_limit_hit,
                StoreError::NoMemory(_) => &mut events.reject_alloc_fail,
            } += 1;
        }
        result
    }

    /// Makes the entry that holds `page`: nobody else knows of it yet.
    fn place(&self, slot: Slot, page: &Page, scratch: &mut Scratch) -> Result<Entry, StoreError> {
        self.table.back(slot).map_err(StoreError::NoMemory)?;
        let (codec, object) = match same_filled::word_of(page) {
            Some(word) => match Entry::same_filled(word) {
                Some(entry) => return Ok(entry),
                None => scratch.same_filled(word),
            },
            None => scratch.compress(self.compressor, page),
        };
        object::seal(object, self.owner(slot), codec);
        let allocation =
            self.arena.allocate(object.len(), self.arena.max_bytes()).map_err(|err| match err {
                AllocateError::PoolFull => StoreError::PoolFull,
                AllocateError::NoMemory(err) => StoreError::NoMemory(err),
            })?;
        self.arena.write(&allocation, object);
        let payload_bytes = object.len() - object::HEADER_BYTES;
        Ok(Entry::Arena(Location { offset: allocation.offset, payload_bytes }))
    }

    fn free(&self, entry: Entry) {
        if let Entry::Arena(location) = entry {
            self.arena.free(location.offset, object_bytes(location));
        }
    }

    /// Replaces the entry of `slot`, if it still has the generation that is expected of it, and frees what it stood
    /// for. The slot's chunk is backed.
    fn publish(&self, slot: Slot, entry: Entry, expected: Option<Generation>, now: Age) -> Published {
        let record = self.table.record(slot).expect("a slot is backed before an entry is made for it");
        let new_bytes = self.charged_bytes(entry);
        let mut accounting = self.accounting.lock();
        let generation = record.generation.load(Ordering::Relaxed);
        if expected.is_some_and(|expected| expected.0 != generation) {
            return Published::Stale;
        }
        // An entry that fails its check names no object that could be freed; what it cost is found at the next start.
        let old = Entry::unpack(record.entry.load(Ordering::Relaxed), slot).unwrap_or(Entry::Empty);
        let old_bytes = self.charged_bytes(old);
        let pool_bytes = accounting.held.pool_bytes + new_bytes - old_bytes;
        if new_bytes > old_bytes && pool_bytes > self.limit_bytes() {
            return Published::OverLimit;
        }
        accounting.held.remove(old, old_bytes);
        accounting.held.add(entry, new_bytes);
        accounting.events.stores += u64::from(entry != Entry::Empty);
        accounting.events.invalidates += u64::from(old != Entry::Empty);
        record.age.store(now.to_bits(), Ordering::Relaxed);
        // Everything before this is invisible after a crash; with it, the object that it names is complete.
        record.entry.store(entry.pack(slot), Ordering::Release);
        record.generation.store(generation.wrapping_add(1), Ordering::Relaxed);
        drop(accounting);
        self.free(old);
        Published::Yes
    }

    /// Loads `slot` into `page`. The page stays stored: a disk is read as often as its guest likes.
    ///
    /// # Errors
    /// When the stored page is damaged; `page` then holds nothing of it.
    pub fn load(&self, slot: Slot, page: &mut Page, scratch: &mut Scratch) -> Result<(), LoadError> {
        self.load_generation(slot, page, scratch).map(|_| ())
    }

    fn load_generation(
        &self,
        slot: Slot,
        page: &mut Page,
        scratch: &mut Scratch,
    ) -> Result<Generation, LoadError> {
        let (entry, generation) = self.copy_out(slot, scratch);
        let result = entry.map_err(LoadError::from).and_then(|entry| match entry {
            Entry::Empty => {
                *page = ZERO_PAGE;
                Ok(())
            }
            Entry::SameFilled(word) => {
                same_filled::fill(page, word);
                Ok(())
            }
            Entry::Lost => Err(LoadError::Lost),
            Entry::Arena(location) => {
                let length = object_bytes(location);
                let (codec, _) = object::open(scratch.object(length), self.owner(slot))?;
                Ok(scratch.decompress(codec, length, page)?)
            }
        });
        if result.is_err() {
            self.accounting.lock().events.decompress_fail += 1;
        }
        result.map(|()| generation)
    }

    /// Reads the entry of `slot` and copies its object, if it has one, into the scratch buffer.
    fn copy_out(&self, slot: Slot, scratch: &mut Scratch) -> (Result<Entry, BadEntry>, Generation) {
        let record = self.table.record(slot);
        let mut accounting = self.accounting.lock();
        accounting.events.loads += 1;
        let Some(Record { entry, age, generation }) = record else {
            return (Ok(Entry::Empty), Generation(0));
        };
        let generation = Generation(generation.load(Ordering::Relaxed));
        let entry = Entry::unpack(entry.load(Ordering::Relaxed), slot);
        if let Ok(Entry::Arena(location)) = entry {
            self.arena.read(location.offset, scratch.object(object_bytes(location)));
            let loaded = Age::from_bits(age.load(Ordering::Relaxed)).loaded();
            age.store(loaded.to_bits(), Ordering::Relaxed);
        }
        (entry, generation)
    }

    /// Changes a part of the page in `slot`: loads it, applies `change`, stores it; and all of that again when
    /// somebody else stored to the slot in between, so that neither change is lost.
    ///
    /// # Errors
    /// Those of load and store.
    pub fn update(
        &self,
        slot: Slot,
        page: &mut Page,
        now: Age,
        scratch: &mut Scratch,
        mut change: impl FnMut(&mut Page),
    ) -> Result<(), UpdateError> {
        loop {
            let generation = self.load_generation(slot, page, scratch)?;
            change(page);
            if self.store_if(slot, page, Some(generation), now, scratch)? {
                return Ok(());
            }
        }
    }

    /// Drops the page in `slot`; it reads as zeros from now on.
    pub fn invalidate(&self, slot: Slot) {
        if self.table.record(slot).is_some_and(|record| record.entry.load(Ordering::Relaxed) != 0) {
            self.publish(slot, Entry::Empty, None, Age::from_bits(0));
        }
    }

    /// Drops the pages from `from` up to `end`, but no more than a chunk's worth of them at once. Returns the slot to
    /// go on from, or `None` when all is done.
    pub fn invalidate_some(&self, from: Slot, end: Slot) -> Option<Slot> {
        let from = self.table.next_backed_before(from, end)?;
        let chunk_end = from.0.saturating_add(u32::try_from(CHUNK_SLOTS / 4).unwrap_or(u32::MAX)).min(end.0);
        for slot in from.0..chunk_end {
            self.invalidate(Slot(slot));
        }
        (chunk_end < end.0).then_some(Slot(chunk_end))
    }

    /// Recounts what is held from the entries and compares with the running numbers.
    ///
    /// # Panics
    /// When they differ, or an object is not whole.
    #[must_use]
    pub fn validate(&self) -> Held {
        let mut held = Held::default();
        let accounting = self.accounting.lock();
        for slot in self.table.backed_slots() {
            let record = self.table.record(slot).expect("backed slots have records");
            let entry = Entry::unpack(record.entry.load(Ordering::Relaxed), slot).expect("entries are sound");
            if let Entry::Arena(location) = entry {
                let mut copy = vec![0; object_bytes(location)];
                self.arena.read(location.offset, &mut copy);
                let (codec, payload) = object::open(&copy, self.owner(slot)).expect("objects are sound");
                assert_eq!(codec == CodecId::Raw, payload.len() == object::PAYLOAD_MAX);
            }
            held.add(entry, self.charged_bytes(entry));
        }
        assert_eq!(held, accounting.held, "the running numbers are those of the entries");
        held
    }
}

/// Why a part of a page was not changed.
#[derive(Debug, thiserror::Error)]
pub enum UpdateError {
    /// The page could not be read first.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The changed page could not be stored.
    #[error(transparent)]
    Store(#[from] StoreError),
}
