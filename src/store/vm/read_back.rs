//! The way back from the writeback file into the pool: for a page that its guest loads again and again, and for pages that
//! are brought back ahead of their loads because their guest was given memory. Nobody is made to leave for either.

use super::change::{Cause, Change};
use super::tag::Generation;
use super::{Fetched, LoadError, Published, VmStore};
use crate::ids::Slot;
use crate::store::codec::Coding;
use crate::store::entry::Entry;
use crate::store::object;

/// What became of a page that was to be brought back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadBack {
    /// It is in the pool.
    Yes,
    /// It has changed since it was asked for: there is nothing to bring back.
    Stale,
    /// It stays in the file: the pool or the VM is at its mark.
    NoRoom,
}

impl VmStore {
    /// Brings a page back into the pool as it came from the file, if it is still the one that is stored and if there is room
    /// below the marks at which shrinking stops. That is no load: its age stays, and no refault is counted.
    ///
    /// # Errors
    /// Those of a load of this page; it stays where it is.
    pub fn read_back(&self, fetched: Fetched) -> Result<ReadBack, LoadError> {
        let (slot, expected, record) = fetched.into_parts();
        if !self.is_current(slot, expected) {
            return Ok(ReadBack::Stale);
        }
        let object = record?.open(self.owner(slot), &self.cipher)?;
        let (coding, _) = object::open(&object, self.owner(slot))?;
        if !self.has_room(&self.numbers.lock()) {
            return Ok(ReadBack::NoRoom);
        }
        Ok(self.bring_back(slot, expected, coding, &object, Cause::ReadBack))
    }

    /// Puts an object of the file into the arena and publishes it, if the slot has not changed. If there is no room it stays
    /// where it is.
    pub(super) fn bring_back(
        &self,
        slot: Slot,
        expected: Generation,
        coding: Coding,
        object: &[u8],
        cause: Cause,
    ) -> ReadBack {
        let Ok(location) = self.keep(object) else { return ReadBack::NoRoom };
        let pool = self.shared.pools.maker_of(coding);
        let entry = Entry::Arena(location);
        let published = self.publish(slot, Change { entry, pool, cause }, Some(expected));
        let outcome = match published {
            Published::Yes => return ReadBack::Yes,
            Published::Stale => ReadBack::Stale,
            Published::OverLimit => ReadBack::NoRoom,
        };
        self.free(entry);
        outcome
    }
}
