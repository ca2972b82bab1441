//! Looking at stored pages without using them: no age changes, no load is counted, nothing moves and nothing is mended.
//! What is found bad stays, for its load to fail; here is only taken note of it, so that each is told once.

use std::sync::atomic::Ordering;

use super::tag::Tag;
use super::{Fetched, InFile, LoadError, VmStore};
use crate::ids::Slot;
use crate::page::{Page, ZERO_PAGE};
use crate::store::accounting::object_bytes;
use crate::store::codec::Scratch;
use crate::store::entry::Entry;
use crate::store::table::Record;

/// The most bad pages of a VM that are remembered at once, and so the most that are counted: of what isn't remembered
/// nobody knows whether it was counted before. With more than that, nobody reads each of their lines.
const BAD_MAX: usize = 1024;

/// What a slot holds, if it is sound.
#[derive(Debug)]
pub enum Checked {
    /// Nothing.
    Empty,
    /// A page that repeats a word: its entry passes its check, and there is nothing else.
    SameFilled,
    /// An object of so many bytes in the arena, which becomes a page.
    Arena(usize),
    /// Something in the writeback file: [`VmStore::fetch`] it, and [`VmStore::check_fetched`] what comes.
    InFile(InFile),
}

impl VmStore {
    /// Looks whether the page in `slot` could be loaded. What is in the arena is in `page` then; else `page` stays as it
    /// was.
    ///
    /// # Errors
    /// Those that a load would end with; `page` then holds nothing of it.
    pub fn check(&self, slot: Slot, page: &mut Page, scratch: &mut Scratch) -> Result<Checked, LoadError> {
        let Some(Record { entry, tag, .. }) = self.table.record(slot) else { return Ok(Checked::Empty) };
        if entry.load(Ordering::Relaxed) == 0 {
            return Ok(Checked::Empty);
        }
        let numbers = self.numbers.lock();
        let entry = Entry::unpack(entry.load(Ordering::Relaxed), slot)?;
        let length = match entry {
            Entry::Empty => return Ok(Checked::Empty),
            Entry::SameFilled(_) => return Ok(Checked::SameFilled),
            Entry::Lost => return Err(LoadError::Lost),
            Entry::File(place) => {
                let file = self.shared.file.as_ref().ok_or(LoadError::FileMissing)?;
                let pin = file.begin_read(place).ok_or(LoadError::NotInFile)?;
                return Ok(Checked::InFile(InFile { slot, generation: Tag::of(tag).generation(), pin }));
            }
            Entry::Arena(location) | Entry::Shared(location) => {
                let length = object_bytes(location);
                self.shared.arena.read(location.offset, scratch.object(length));
                length
            }
        };
        drop(numbers);
        self.decode(entry.owner(self.id(), slot), length, page, scratch)?;
        Ok(Checked::Arena(length))
    }

    /// Looks whether what came from the file is the page. False when the slot has changed since it was asked for, and
    /// there is nothing to say.
    ///
    /// # Errors
    /// Those that a load would end with.
    pub fn check_fetched(&self, fetched: Fetched, scratch: &mut Scratch) -> Result<bool, LoadError> {
        let Fetched { slot, generation, record } = fetched;
        if !self.is_current(slot, generation) {
            return Ok(false);
        }
        let object = record?.open(self.owner(slot), &self.cipher)?;
        scratch.object(object.len()).copy_from_slice(&object);
        self.decode(self.owner(slot), object.len(), &mut ZERO_PAGE.clone(), scratch)?;
        Ok(true)
    }

    /// Takes note that the page in `slot` is bad. True when that is news: then it is to be told.
    pub fn note_bad(&self, slot: Slot) -> bool {
        let Some(record) = self.table.record(slot) else { return false };
        let mut numbers = self.numbers.lock();
        let generation = Tag::of(record.tag).generation();
        if numbers.bad.len() >= BAD_MAX {
            // Those that were overwritten are bad no longer.
            numbers.bad.retain(|slot, generation| self.is_current(*slot, *generation));
            if numbers.bad.len() >= BAD_MAX {
                return false;
            }
        }
        let is_news = numbers.bad.insert(slot, generation) != Some(generation);
        numbers.accounting.events.bad_pages += u64::from(is_news);
        is_news
    }
}
