//! Entries that fail their check. A load of one is an error, and it stays as it is until somebody replaces it. Then the
//! numbers have to be right again although nobody knows what it stood for: they are counted anew, and what is missing is
//! what the damaged entries stood for. Its places in arena and file stay taken until the next start finds that no entry
//! names them.

use std::sync::atomic::Ordering;

use super::tag::Tag;
use super::{Numbers, VmStore};
use crate::store::accounting::Held;
use crate::store::entry::Entry;
use crate::store::pool::PoolId;

impl VmStore {
    /// Makes the pages of all damaged entries lost ones, under the VM's lock. Walks the whole table, because memory fails
    /// seldom; and makes them all lost at once, so that a table that was overwritten isn't walked for each.
    ///
    /// Returns the entry that stands for each of them from now on.
    pub(super) fn write_damage_off(&self, numbers: &mut Numbers) -> Entry {
        let mut held = Held::default();
        numbers.sharing.forget_sharers();
        for slot in self.table.backed_slots() {
            let Some(record) = self.table.record(slot) else { continue };
            let mut tag = Tag::of(record.tag);
            let entry = Entry::unpack(record.entry.load(Ordering::Relaxed), slot).unwrap_or_else(|_| {
                tag = tag.next(PoolId::EARLIER, false);
                tag.keep_in(record.tag);
                record.entry.store(Entry::Lost.pack(slot), Ordering::Release);
                Entry::Lost
            });
            held.add(self.share(entry, tag, &numbers.sharing, 0));
            numbers.exchange(slot, Entry::Lost, entry, tag.pool());
        }
        numbers.sharing.forget_unnamed();
        self.shared.write_off(self.table.name(), &numbers.accounting.held, &held);
        numbers.accounting.held = held;
        self.claim(numbers);
        Entry::Lost
    }
}
