//! One VM's pages: store, load, invalidate, and the moves that the guest never sees. All of them end in
//! [`VmStore::publish`], the only place that changes an entry. Compressing, checking and decompressing happen outside
//! the VM's lock; under it there is only the entry, its numbers and, for a load, one copy of at most a page out of
//! the arena.
//!
//! An object is freed after its entry is gone, by the thread that replaced the entry; so whoever holds the lock and
//! reads an entry may copy its object, or pin its record in the file.

mod change;
mod check;
mod damage;
mod limits;
mod load;
mod lost;
mod moves;
mod read_back;
mod recompress;
mod share;
mod tag;
mod validate;

pub use check::Checked;
pub use limits::Limits;
pub use load::{Fetched, InFile, LoadError, Loaded, Source, UpdateError, Updated};
pub use read_back::ReadBack;
pub use recompress::{Glance, Recompressed};
pub use tag::Generation;
pub(super) use tag::Tag;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use change::{Cause, Change};

use super::accounting::{Accounting, Events, Held, Share, object_bytes};
use super::arena::AllocateError;
use super::codec::{Compressor, Encoder, Kept, Scratch};
use super::dictionaries::Dictionaries;
use super::entry::{Entry, Location};
use super::lru::Age;
use super::object;
use super::pool::{Pool, PoolId};
use super::room::Shared;
use super::sharing::Sharing;
use super::table::{CHUNK_SLOTS, Table};
use super::twins::Twins;
use crate::ids::{Owner, Slot, VmId};
use crate::page::Page;
use crate::writeback::Cipher;

/// The pages of one VM.
#[derive(Debug)]
pub struct VmStore {
    table: Table,
    dictionaries: Dictionaries,
    shared: Arc<Shared>,
    cipher: Cipher,
    numbers: Mutex<Numbers>,
    /// Where pages that are the same may be found: for the shrinker's thread, which never holds another lock with it.
    twins: Mutex<Twins>,
    /// This VM's part of [`Shared::unclaimed_bytes`].
    unclaimed_bytes: AtomicU64,
}

/// What changes under the VM's lock.
#[derive(Debug)]
struct Numbers {
    accounting: Accounting,
    sharing: Sharing,
    limits: Limits,
    /// The age of the page that left for the file last. What is as cold as that does not stay.
    left: Option<Age>,
    /// Pages that were found bad, each as it was then.
    bad: BTreeMap<Slot, Generation>,
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

/// What became of an entry that was to be published.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Published {
    Yes,
    /// The slot has another generation than the one expected.
    Stale,
    OverLimit,
}

impl VmStore {
    /// Serves the pages in `table`; what it holds already was counted, and which slots share what is known.
    #[must_use]
    pub fn new(
        table: Table,
        dictionaries: Dictionaries,
        shared: Arc<Shared>,
        limits: Limits,
        (held, sharing): (Held, Sharing),
    ) -> Self {
        let cipher = Cipher::new(table.key());
        let accounting = Accounting { held, ..Accounting::default() };
        let numbers = Numbers { accounting, sharing, limits, left: None, bad: BTreeMap::new() };
        let (numbers, unclaimed_bytes) = (Mutex::new(numbers), AtomicU64::new(0));
        let twins = Mutex::default();
        let vm = Self { table, dictionaries, shared, cipher, numbers, twins, unclaimed_bytes };
        vm.claim(&vm.numbers.lock());
        vm
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

    /// The dictionaries that its pages were made with.
    #[must_use]
    pub fn dictionaries(&self) -> &Dictionaries {
        &self.dictionaries
    }

    /// Bytes of memory that are kept for it beside its pages: the page table, tags, dictionaries, which pages are the same.
    #[must_use]
    pub fn metadata_bytes(&self) -> u64 {
        self.table.metadata_bytes() + self.dictionaries.memory_bytes() + self.sharing_bytes()
    }

    /// Bytes of the process's own memory among these: tags, which pages are the same.
    #[must_use]
    pub fn process_bytes(&self) -> u64 {
        let tags_bytes = self.table.backed_chunks().count() * CHUNK_SLOTS * size_of::<u32>();
        tags_bytes as u64 + self.sharing_bytes()
    }

    /// What the VM may hold.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.numbers.lock().limits
    }

    /// Changes what the VM may hold. Who is then above it shrinks in the background.
    pub fn set_limits(&self, limits: Limits) {
        let mut numbers = self.numbers.lock();
        numbers.limits = limits;
        self.claim(&numbers);
        drop(numbers);
        self.shared.bell.ring();
    }

    /// The VM's numbers.
    #[must_use]
    pub fn accounting(&self) -> Accounting {
        self.numbers.lock().accounting
    }

    /// Counts something that happened outside the store.
    pub fn count(&self, event: impl FnOnce(&mut Events)) {
        event(&mut self.numbers.lock().accounting.events);
    }

    /// Whether a store that found no room may find some soon: something can leave.
    #[must_use]
    pub fn may_wait(&self, err: &StoreError) -> bool {
        let at_limit = matches!(err, StoreError::Limit);
        self.shared.may_make_room(at_limit) && (!at_limit || self.limits().writeback)
    }

    /// Keeps the number of bytes that reserves may still claim up to date.
    fn claim(&self, numbers: &Numbers) {
        let unclaimed = numbers.limits.reserve_bytes.saturating_sub(numbers.accounting.held.pool_bytes);
        let before = self.unclaimed_bytes.load(Ordering::Relaxed);
        if unclaimed != before {
            // Only ever changed under this VM's lock.
            self.unclaimed_bytes.store(unclaimed, Ordering::Relaxed);
            self.shared.unclaimed_bytes.fetch_add(unclaimed.wrapping_sub(before), Ordering::Relaxed);
        }
    }

    /// The most bytes that the arena may have when this VM asks for more: all that others may not still claim.
    fn arena_max_bytes(&self) -> u64 {
        let others =
            self.shared.unclaimed_bytes().saturating_sub(self.unclaimed_bytes.load(Ordering::Relaxed));
        self.shared.arena.max_bytes().saturating_sub(others)
    }

    fn owner(&self, slot: Slot) -> Owner {
        Owner { vm: self.id(), slot }
    }

    fn charged_bytes(&self, entry: Entry) -> u64 {
        entry.location().map_or(0, |location| self.shared.arena.charged_bytes(object_bytes(location)) as u64)
    }

    /// What an entry adds to what is held. Its object is others' as well if more than `sharers_own` name it: 1 if this
    /// entry is counted among them.
    fn share(&self, entry: Entry, tag: Tag, sharing: &Sharing, sharers_own: usize) -> Share {
        let mut share = Share { entry, pool: tag.pool(), loaded: tag.is_loaded(), ..Share::NONE };
        share.charged_bytes = self.charged_bytes(entry);
        if let Entry::Shared(location) = entry {
            share.others = sharing.count(location) > sharers_own;
            share.pool = sharing.pool(location).unwrap_or(share.pool);
        }
        share
    }

    /// Stores `page` in `slot`. When this returns, it outlives the process.
    ///
    /// # Errors
    /// When there is no room; the slot then holds what it held before.
    pub fn store(&self, slot: Slot, page: &Page, now: Age, scratch: &mut Scratch) -> Result<(), StoreError> {
        self.try_store(slot, page, now, scratch).map(drop).inspect_err(|err| self.count_refused(err))
    }

    /// The same without counting a refusal: for whoever tries one store several times. Says where a load will find it.
    ///
    /// # Errors
    /// When there is no room.
    pub fn try_store(
        &self,
        slot: Slot,
        page: &Page,
        now: Age,
        scratch: &mut Scratch,
    ) -> Result<Source, StoreError> {
        self.store_if(slot, page, None, now, scratch).map(|stored| stored.unwrap_or(Source::Pool))
    }

    /// Counts a store, or a change of a part of a page, that found no room.
    pub fn count_refused(&self, err: &StoreError) {
        self.count(|events| match err {
            StoreError::Limit => events.limit_hit += 1,
            StoreError::PoolFull => events.pool_limit_hit += 1,
            StoreError::NoMemory(_) => events.reject_alloc_fail += 1,
        });
    }

    /// Stores the first page of a new VM, whatever the pool's maximum and the others' reserves leave: without it the VM
    /// can't be served.
    ///
    /// # Errors
    /// When the state directory has no memory left, or the VM's limit is less than a page.
    pub fn store_first(
        &self,
        slot: Slot,
        page: &Page,
        now: Age,
        scratch: &mut Scratch,
    ) -> Result<(), StoreError> {
        self.table.back(slot).map_err(StoreError::NoMemory)?;
        let Pool { id: pool, compressor } = self.shared.pools.current();
        let (coding, object) = scratch.compress(compressor, None, page);
        object::seal(object, self.owner(slot), coding);
        let entry = Entry::Arena(self.keep_within(object, u64::MAX)?);
        match self.publish(slot, Change { entry, pool, cause: Cause::Store(now) }, None) {
            Published::Yes => Ok(()),
            Published::Stale | Published::OverLimit => {
                self.free(entry);
                Err(StoreError::Limit)
            }
        }
    }

    /// Empties every slot.
    pub(super) fn invalidate_all(&self) {
        let mut from = Some(Slot(0));
        while let Some(slot) = from {
            from = self.invalidate_some(slot, Slot(self.slots()));
        }
    }

    /// Gives up what the VM may still claim: its pages are about to be dropped.
    pub(super) fn retire(&self) {
        self.set_limits(Limits { reserve_bytes: 0, ..self.limits() });
    }

    /// Stores `page` in `slot` unless the slot changed since `expected` was read. `None` when it has, else where it is now.
    fn store_if(
        &self,
        slot: Slot,
        page: &Page,
        expected: Option<Generation>,
        now: Age,
        scratch: &mut Scratch,
    ) -> Result<Option<Source>, StoreError> {
        let (entry, pool) = self.place(slot, page, scratch).inspect_err(|err| {
            if matches!(err, StoreError::NoMemory(_)) {
                self.shared.note_shortage();
            }
            self.shared.bell.ring();
        })?;
        let change = Change { entry, pool, cause: Cause::Store(now) };
        match self.publish(slot, change, expected) {
            Published::Yes if entry.location().is_some() => return Ok(Some(Source::Pool)),
            Published::Yes => return Ok(Some(Source::SameFilled)),
            Published::Stale => {
                self.free(entry);
                return Ok(None);
            }
            Published::OverLimit => self.free(entry),
        }
        self.shared.bell.ring();
        Err(StoreError::Limit)
    }

    /// Makes the entry that holds `page`: nobody else knows of it yet.
    fn place(&self, slot: Slot, page: &Page, scratch: &mut Scratch) -> Result<(Entry, PoolId), StoreError> {
        self.table.back(slot).map_err(StoreError::NoMemory)?;
        let Pool { id: pool, compressor } = self.shared.pools.current();
        let (coding, object) = match scratch.keep(compressor, self.encoder(compressor).as_deref(), page) {
            Kept::Entry(entry) => return Ok((entry, pool)),
            Kept::Object(coding, object) => (coding, object),
        };
        object::seal(object, self.owner(slot), coding);
        self.keep(object).map(|location| (Entry::Arena(location), pool))
    }

    /// Whether one page more makes no other leave.
    #[must_use]
    pub fn has_room_for_one(&self) -> bool {
        self.has_room(&self.numbers.lock())
    }

    /// What writes with the VM's dictionary, if the compressor uses one and the VM has one.
    fn encoder(&self, compressor: Compressor) -> Option<Arc<Encoder>> {
        self.dictionaries.encoder(compressor.dictionary_level()?)
    }

    /// Puts a sealed object into the arena.
    fn keep(&self, object: &[u8]) -> Result<Location, StoreError> {
        self.keep_within(object, self.arena_max_bytes())
    }

    fn keep_within(&self, object: &[u8], max_bytes: u64) -> Result<Location, StoreError> {
        let arena = &self.shared.arena;
        let allocation = arena.allocate(object.len(), max_bytes).map_err(|err| match err {
            AllocateError::PoolFull => StoreError::PoolFull,
            AllocateError::NoMemory(err) => StoreError::NoMemory(err),
        })?;
        arena.write(&allocation, object);
        if arena.used_bytes() > self.shared.marks(max_bytes).start_bytes {
            self.shared.bell.ring();
        }
        Ok(Location { offset: allocation.offset, payload_bytes: object.len() - object::HEADER_BYTES })
    }

    fn free(&self, entry: Entry) {
        match entry {
            Entry::Arena(location) | Entry::Shared(location) => {
                self.shared.arena.free(location.offset, object_bytes(location));
            }
            Entry::File(place) => {
                if let Some(file) = &self.shared.file {
                    file.free(place);
                }
            }
            Entry::Empty | Entry::SameFilled(_) | Entry::Lost => {}
        }
    }

    /// Replaces the entry of `slot`, if it still has the generation that is expected of it, and frees what it stood
    /// for, unless other slots share that. The slot's chunk is backed. A shared object that is published is held.
    fn publish(&self, slot: Slot, change: Change, expected: Option<Generation>) -> Published {
        let Change { entry, pool: made_by, cause } = change;
        let record = self.table.record(slot).expect("a slot is backed before an entry is made for it");
        let mut numbers = self.numbers.lock();
        let old_tag = Tag::of(record.tag);
        if expected.is_some_and(|expected| expected != old_tag.generation()) {
            return Published::Stale;
        }
        let old = match Entry::unpack(record.entry.load(Ordering::Relaxed), slot) {
            Ok(old) => old,
            Err(_) => self.write_damage_off(&mut numbers),
        };
        let old_age = Age::from_bits(record.age.load(Ordering::Relaxed));
        let pool = numbers.pool_of(entry).unwrap_or_else(|| self.shared.pools.counted_under(made_by));
        let tag = old_tag.next(pool, cause.is_loaded(old_tag, old_age));
        let new_share = self.share(entry, tag, &numbers.sharing, 0);
        let old_share = self.share(old, old_tag, &numbers.sharing, 1);
        let (more_bytes, less_bytes) = (new_share.pool_bytes(), old_share.pool_bytes());
        let pool_bytes = numbers.accounting.held.pool_bytes + more_bytes - less_bytes;
        let limit_bytes = numbers.limits.limit_bytes;
        if more_bytes > less_bytes && pool_bytes > limit_bytes && cause.is_limited() {
            return Published::OverLimit;
        }
        numbers.accounting.held.remove(old_share);
        numbers.accounting.held.add(new_share);
        let is_free = numbers.exchange(slot, old, entry, pool);
        cause.count(&mut numbers.accounting.events, old, entry);
        if old_tag.is_loaded() && cause.ends_a_page() {
            numbers.accounting.fates.dropped();
        }
        if numbers.limits.reserve_bytes > 0 {
            self.claim(&numbers);
        }
        if cause == Cause::WriteBack {
            numbers.left = Some(old_age);
        }
        record.age.store(cause.age(old_age).to_bits(), Ordering::Relaxed);
        // Everything before this is invisible after a crash; with it, the object that it names is complete.
        record.entry.store(entry.pack(slot), Ordering::Release);
        tag.keep_in(record.tag);
        drop(numbers);
        if is_free {
            self.free(old);
        }
        if limit_bytes != u64::MAX && pool_bytes > self.shared.marks(limit_bytes).start_bytes {
            self.shared.bell.ring();
        }
        Published::Yes
    }

    /// Drops the page in `slot`; it reads as zeros from now on.
    pub fn invalidate(&self, slot: Slot) {
        if self.table.record(slot).is_some_and(|record| record.entry.load(Ordering::Relaxed) != 0) {
            let change = Change { entry: Entry::Empty, pool: PoolId::EARLIER, cause: Cause::Invalidate };
            self.publish(slot, change, None);
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

    /// How long before `now` the page in `slot` was last used.
    #[must_use]
    pub fn age(&self, slot: Slot, now: Age) -> Option<Duration> {
        let record = self.table.record(slot)?;
        Some(Age::from_bits(record.age.load(Ordering::Relaxed)).until(now))
    }
}

impl Drop for VmStore {
    fn drop(&mut self) {
        let own = self.unclaimed_bytes.load(Ordering::Relaxed);
        self.shared.unclaimed_bytes.fetch_sub(own, Ordering::Relaxed);
    }
}
