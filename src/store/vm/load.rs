//! Loads, and changes of a part of a page, which begin with one. A page of the arena is copied out under the VM's
//! lock; a record of the file is pinned there, read by whoever has the time to wait, and handed back in. Nothing of
//! a page gets out before it was verified.

use std::sync::atomic::Ordering;

use super::change::Cause;
use super::tag::{Generation, Tag};
use super::{Numbers, StoreError, VmStore};
use crate::ids::{Owner, Slot};
use crate::page::{Page, ZERO_PAGE};
use crate::store::accounting::object_bytes;
use crate::store::codec::{Coding, DecompressError, DictionaryNumber, Scratch};
use crate::store::entry::{BadEntry, Entry};
use crate::store::lru::Age;
use crate::store::object::{self, BadObject};
use crate::store::same_filled;
use crate::store::table::Record;
use crate::writeback::{BadRecord, Pin, ReadError, RecordBytes};

/// Where a page comes from, the fastest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// Its entry says it all: it repeats one word, or its slot is empty.
    SameFilled,
    /// An object in the arena.
    Pool,
    /// A record in the writeback file.
    File,
}

/// Where a page was found.
#[derive(Debug)]
#[must_use = "the page may not be there yet"]
pub enum Loaded {
    /// It is in the caller's buffer.
    Page(Source),
    /// It is in the writeback file: [`VmStore::fetch`] it and load again with what came.
    InFile(InFile),
}

/// A page in the writeback file, which stays readable while this lives.
#[derive(Debug)]
pub struct InFile {
    pub(super) slot: Slot,
    pub(super) generation: Generation,
    pub(super) pin: Pin,
}

/// What the writeback file gave for a page.
#[derive(Debug)]
pub struct Fetched {
    pub(super) slot: Slot,
    pub(super) generation: Generation,
    pub(super) record: Result<RecordBytes, ReadError>,
}

impl Fetched {
    /// The slot that it was read for.
    #[must_use]
    pub fn slot(&self) -> Slot {
        self.slot
    }

    pub(super) fn into_parts(self) -> (Slot, Generation, Result<RecordBytes, ReadError>) {
        (self.slot, self.generation, self.record)
    }
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
    Decompress(#[from] DecompressError),
    /// The dictionary that the payload was made with is damaged or gone.
    #[error("dictionary {0} of the VM, which the page was compressed with, is damaged or gone")]
    Dictionary(DictionaryNumber),
    /// The record in the writeback file is damaged or another's.
    #[error(transparent)]
    Record(#[from] BadRecord),
    /// The writeback file can't be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The entry names a place in the writeback file where nothing is.
    #[error("the page is not in the writeback file")]
    NotInFile,
    /// The page is in a file that was not to be had when the daemon started.
    #[error("the page is in a writeback file that is missing: see `ballast status`")]
    FileMissing,
    /// The page could not be kept.
    #[error("the page was lost")]
    Lost,
}

impl LoadError {
    /// Whether the stored page itself is bad; else the file may give it another time, or another start find the file.
    #[must_use]
    pub fn is_damage(&self) -> bool {
        !matches!(self, Self::Read(_) | Self::FileMissing)
    }
}

/// What became of a change.
#[derive(Debug)]
#[must_use = "the page may have to be fetched first"]
pub enum Updated {
    /// It is done.
    Done,
    /// The page is in the writeback file: [`VmStore::fetch`] it and update again with what came.
    InFile(InFile),
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

/// What an entry said, and a copy of its object if it has one in the arena.
enum Found {
    Entry(Entry),
    InFile(Pin),
}

/// Whether a page that was last loaded from the file when it was `before` would still be in the pool, had it been there,
/// and by far: one that came back only to leave again is written for nothing.
fn would_stay(before: Age, numbers: &Numbers, now: Age) -> bool {
    let copies = numbers.accounting.fates.factor();
    numbers.left.is_none_or(|left| before.coldness(now, copies) < left.coldness(now, copies) / 2)
}

impl VmStore {
    /// Loads `slot` into `page`. The page stays stored: a disk is read as often as its guest likes. `fetched` is what
    /// an earlier call of this asked for; it is used if the slot has not changed since.
    ///
    /// # Errors
    /// When the stored page is damaged or can't be read; `page` then holds nothing of it.
    pub fn load(
        &self,
        slot: Slot,
        fetched: Option<Fetched>,
        page: &mut Page,
        now: Age,
        scratch: &mut Scratch,
    ) -> Result<Loaded, LoadError> {
        self.load_generation(slot, fetched, page, now, scratch).map(|(loaded, _)| loaded)
    }

    fn load_generation(
        &self,
        slot: Slot,
        fetched: Option<Fetched>,
        page: &mut Page,
        now: Age,
        scratch: &mut Scratch,
    ) -> Result<(Loaded, Generation), LoadError> {
        if let Some(fetched) = fetched.filter(|fetched| fetched.slot == slot) {
            let generation = fetched.generation;
            let result = self.load_fetched(fetched, page, now, scratch);
            if self.count_failure(result)? {
                return Ok((Loaded::Page(Source::File), generation));
            }
        }
        let (found, generation) = self.copy_out(slot, now, scratch);
        let result = found.and_then(|found| match found {
            Found::InFile(pin) => Ok(Loaded::InFile(InFile { slot, generation, pin })),
            Found::Entry(entry) => {
                let source = if entry.location().is_some() { Source::Pool } else { Source::SameFilled };
                self.unpack(slot, entry, page, scratch).map(|()| Loaded::Page(source))
            }
        });
        self.count_failure(result).map(|loaded| (loaded, generation))
    }

    fn count_failure<T>(&self, result: Result<T, LoadError>) -> Result<T, LoadError> {
        result.inspect_err(|err| {
            self.count(|events| match err {
                // The page may be as good as ever: whoever sees this looks at the file, not at memory.
                LoadError::Read(_) | LoadError::Record(_) | LoadError::NotInFile | LoadError::FileMissing => {
                    events.file_load_fail += 1
                }
                LoadError::Entry(_)
                | LoadError::Object(_)
                | LoadError::Decompress(_)
                | LoadError::Dictionary(_)
                | LoadError::Lost => {
                    events.decompress_fail += 1;
                }
            });
        })
    }

    /// Makes a page of what `entry` says, and of its object in the scratch buffer.
    fn unpack(
        &self,
        slot: Slot,
        entry: Entry,
        page: &mut Page,
        scratch: &mut Scratch,
    ) -> Result<(), LoadError> {
        match entry {
            Entry::Empty => *page = ZERO_PAGE,
            Entry::SameFilled(word) => same_filled::fill(page, word),
            Entry::Lost | Entry::File(_) => return Err(LoadError::Lost),
            Entry::Arena(location) | Entry::Shared(location) => {
                let owner = entry.owner(self.id(), slot);
                self.decode(owner, object_bytes(location), page, scratch)?;
            }
        }
        Ok(())
    }

    /// Makes a page of the object of `owner` in the first `length` bytes of the scratch buffer; how it was made.
    ///
    /// # Errors
    /// When it is damaged, another's, or made with a dictionary that is not to be had.
    pub(super) fn decode(
        &self,
        owner: Owner,
        length: usize,
        page: &mut Page,
        scratch: &mut Scratch,
    ) -> Result<Coding, LoadError> {
        let (coding, _) = object::open(scratch.object(length), owner)?;
        let dictionary = match coding.dictionary {
            None => None,
            Some(number) => Some(self.dictionaries.get(number).ok_or(LoadError::Dictionary(number))?),
        };
        scratch.decompress(coding.codec, dictionary, length, page)?;
        Ok(coding)
    }

    /// Reads the entry of `slot`, copies its object, if it has one, into the scratch buffer, or pins its record.
    fn copy_out(
        &self,
        slot: Slot,
        now: Age,
        scratch: &mut Scratch,
    ) -> (Result<Found, LoadError>, Generation) {
        let record = self.table.record(slot);
        let mut numbers = self.numbers.lock();
        let events = &mut numbers.accounting.events;
        let Some(Record { entry, age, tag }) = record else {
            events.loads += 1;
            return (Ok(Found::Entry(Entry::Empty)), Generation::FIRST);
        };
        let known = Tag::of(tag);
        let generation = known.generation();
        let entry = match Entry::unpack(entry.load(Ordering::Relaxed), slot) {
            Ok(Entry::File(place)) => {
                let file = self.shared.file.as_ref().ok_or(LoadError::FileMissing);
                let pin = file.and_then(|file| file.begin_read(place).ok_or(LoadError::NotInFile));
                return (pin.map(Found::InFile), generation);
            }
            Ok(entry) => entry,
            Err(err) => return (Err(err.into()), generation),
        };
        events.loads += 1;
        if let Some(location) = entry.location() {
            self.shared.arena.read(location.offset, scratch.object(object_bytes(location)));
            let before = Age::from_bits(age.load(Ordering::Relaxed));
            events.refault(before.until(now));
            age.store(now.loaded().to_bits(), Ordering::Relaxed);
            if known.is_loaded() {
                numbers.accounting.fates.loaded_again();
            } else {
                known.loaded().keep_in(tag);
                numbers.accounting.held.duplicate_pages += 1;
            }
        }
        (Ok(Found::Entry(entry)), generation)
    }

    /// Makes a page of a record. False when the slot has changed since it was asked for.
    fn load_fetched(
        &self,
        fetched: Fetched,
        page: &mut Page,
        now: Age,
        scratch: &mut Scratch,
    ) -> Result<bool, LoadError> {
        let Fetched { slot, generation: expected, record } = fetched;
        if !self.is_current(slot, expected) {
            return Ok(false);
        }
        let object = record?.open(self.owner(slot), &self.cipher)?;
        scratch.object(object.len()).copy_from_slice(&object);
        let coding = self.decode(self.owner(slot), object.len(), page, scratch)?;
        let Some(comes_back) = self.note_load_from_file(slot, expected, now) else { return Ok(false) };
        if comes_back {
            self.bring_back(slot, expected, coding, &object, Cause::Promote(now));
        }
        Ok(true)
    }

    pub(super) fn is_current(&self, slot: Slot, expected: Generation) -> bool {
        self.table.record(slot).is_some_and(|record| Tag::of(record.tag).generation() == expected)
    }

    /// Counts a load from the file. Whether the page should come back into the pool; `None` when the slot has changed.
    fn note_load_from_file(&self, slot: Slot, expected: Generation, now: Age) -> Option<bool> {
        let record = self.table.record(slot)?;
        let mut numbers = self.numbers.lock();
        if Tag::of(record.tag).generation() != expected {
            return None;
        }
        let before = Age::from_bits(record.age.load(Ordering::Relaxed));
        record.age.store(now.loaded().to_bits(), Ordering::Relaxed);
        let comes_back = before.is_loaded() && (self.has_room(&numbers) || would_stay(before, &numbers, now));
        let events = &mut numbers.accounting.events;
        events.loads += 1;
        events.loaded_from_file += 1;
        events.refault(before.until(now));
        Some(comes_back)
    }

    /// Whether one page more makes no other leave.
    pub(super) fn has_room(&self, numbers: &Numbers) -> bool {
        let below = |used, max| used < self.shared.marks(max).stop_bytes;
        let limit_bytes = numbers.limits.limit_bytes;
        below(self.shared.arena.used_bytes(), self.arena_max_bytes())
            && (limit_bytes == u64::MAX || below(numbers.accounting.held.pool_bytes, limit_bytes))
    }

    /// The pages among the slots from `from` up to `end` that are in the writeback file, `count` at most: what a
    /// request will need next.
    #[must_use]
    pub fn in_file(&self, from: Slot, end: Slot, count: usize) -> Vec<InFile> {
        let Some(file) = &self.shared.file else { return Vec::new() };
        let mut found = Vec::new();
        for slot in (from.0..end.0.min(self.slots())).map(Slot) {
            if found.len() >= count {
                break;
            }
            let Some(record) = self.table.record(slot) else { continue };
            let _numbers = self.numbers.lock();
            if let Ok(Entry::File(place)) = Entry::unpack(record.entry.load(Ordering::Relaxed), slot)
                && let Some(pin) = file.begin_read(place)
            {
                found.push(InFile { slot, generation: Tag::of(record.tag).generation(), pin });
            }
        }
        found
    }

    /// Reads pages from the writeback file. Returns at once; `done` is called when all are there, on another thread,
    /// and must only pass them on.
    pub fn fetch(&self, wanted: Vec<InFile>, done: impl FnOnce(Vec<Fetched>) + Send + 'static) {
        let Some(file) = &self.shared.file else { return done(Vec::new()) };
        let (slots, pins): (Vec<_>, Vec<_>) =
            wanted.into_iter().map(|InFile { slot, generation, pin }| ((slot, generation), pin)).unzip();
        file.read(
            pins,
            Box::new(move |records| {
                let fetched = slots.into_iter().zip(records);
                done(
                    fetched
                        .map(|((slot, generation), record)| Fetched { slot, generation, record })
                        .collect(),
                );
            }),
        );
    }

    /// Changes a part of the page in `slot`: loads it, applies `change`, stores it; and all of that again when
    /// somebody else stored to the slot in between, so that neither change is lost. `fetched` is what an earlier call
    /// asked for. A refusal is not counted: see [`VmStore::count_refused`].
    ///
    /// # Errors
    /// Those of load and store.
    pub fn update(
        &self,
        slot: Slot,
        mut fetched: Option<Fetched>,
        page: &mut Page,
        now: Age,
        scratch: &mut Scratch,
        mut change: impl FnMut(&mut Page),
    ) -> Result<Updated, UpdateError> {
        loop {
            match self.load_generation(slot, fetched.take(), page, now, scratch)? {
                (Loaded::InFile(in_file), _) => return Ok(Updated::InFile(in_file)),
                (Loaded::Page(_), generation) => {
                    change(page);
                    if self.store_if(slot, page, Some(generation), now, scratch)?.is_some() {
                        return Ok(Updated::Done);
                    }
                }
            }
        }
    }
}
