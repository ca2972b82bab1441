//! Pages that are given up: what is stored of them was read, twice, and is not what was written. Their slots are lost,
//! an error to load until the guest writes them again, and their places are free. Only those who move pages give them
//! up; a load that finds damage says so and leaves the page, which may be asked for again.

use std::sync::atomic::Ordering;

use super::change::{Cause, Change};
use super::tag::{Generation, Tag};
use super::{Fetched, InFile, Published, VmStore};
use crate::ids::Slot;
use crate::store::accounting::object_bytes;
use crate::store::entry::Entry;
use crate::store::object::{self, BadObject};
use crate::store::pool::PoolId;
use crate::writeback::SegmentIndex;

/// What passes no check. Something that another version may have written is none of it.
fn is_damaged(result: Result<impl Sized, BadObject>) -> bool {
    matches!(result, Err(BadObject::Checksum | BadObject::Owner { .. }))
}

impl VmStore {
    /// Everything of the VM in a segment of the writeback file.
    #[must_use]
    pub fn in_segment(&self, segment: SegmentIndex) -> Vec<InFile> {
        let mut found = Vec::new();
        for chunk in self.table().backed_chunks() {
            for (slot, entry) in (chunk.first.0..).map(Slot).zip(chunk.entries) {
                // Looked at again under the lock.
                let entry = Entry::unpack(entry.load(Ordering::Relaxed), slot);
                if matches!(entry, Ok(Entry::File(place)) if place.segment() == Some(segment)) {
                    found.extend(self.in_file(slot, Slot(slot.0.saturating_add(1)), 1));
                }
            }
        }
        found
    }

    /// Gives up a page whose record has come from the file, a second time, and is damaged, if its slot has not changed.
    pub fn give_up_if_damaged(&self, fetched: Fetched) {
        let (slot, expected, record) = fetched.into_parts();
        if let Ok(record) = record
            && let Err(err) = record.open(self.owner(slot), self.cipher())
        {
            self.give_up(slot, expected, &err);
        }
    }

    /// Whether the `copy` of the object that the `entry` of `slot` names is no good. If another copy is none either, the
    /// page is given up: of those that share an object, this one.
    pub(super) fn is_damaged(&self, slot: Slot, expected: Generation, entry: Entry, copy: &[u8]) -> bool {
        let owner = entry.owner(self.id(), slot);
        if !is_damaged(object::open(copy, owner)) {
            return false;
        }
        let Some(again) = self.copy_again(slot, expected) else { return true };
        if let Err(err) = object::open(&again, owner)
            && is_damaged(Err::<(), _>(err))
        {
            self.give_up(slot, expected, &err);
        }
        true
    }

    fn copy_again(&self, slot: Slot, expected: Generation) -> Option<Vec<u8>> {
        let record = self.table.record(slot)?;
        let _numbers = self.numbers.lock();
        if Tag::of(record.tag).generation() != expected {
            return None;
        }
        let location = Entry::unpack(record.entry.load(Ordering::Relaxed), slot).ok()?.location()?;
        let mut copy = vec![0; object_bytes(location)];
        self.shared.arena.read(location.offset, &mut copy);
        Some(copy)
    }

    fn give_up(&self, slot: Slot, expected: Generation, err: &dyn std::error::Error) -> bool {
        let change = Change { entry: Entry::Lost, pool: PoolId::EARLIER, cause: Cause::GiveUp };
        if !matches!(self.publish(slot, change, Some(expected)), Published::Yes) {
            return false;
        }
        // A disk or memory that is going bad has more of them: the log grows with the logarithm of their number.
        let given_up = self.accounting().events.given_up_pages;
        if given_up.is_power_of_two() {
            let vm = self.table.name();
            tracing::error!(vm, %slot, given_up, %err, "a stored page is damaged and was given up: its slot is lost");
        }
        true
    }
}
