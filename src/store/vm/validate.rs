//! The recount: what a VM's entries say against what is counted and known of them. For tests, after each of their steps.

use std::sync::atomic::Ordering;

use super::VmStore;
use super::tag::Tag;
use crate::ids::Slot;
use crate::store::accounting::{Held, object_bytes};
use crate::store::codec::CodecId;
use crate::store::entry::Entry;
use crate::store::object;
use crate::store::sharing::Sharing;
use crate::store::table::Record;

impl VmStore {
    /// Recounts what is held from the entries and compares with the running numbers. `in_file` is called with every
    /// place in the writeback file that an entry names.
    ///
    /// # Panics
    /// When they differ, or an object is not whole.
    #[must_use]
    pub fn validate(&self, mut in_file: impl FnMut(crate::writeback::Place)) -> Held {
        let (mut held, mut sharing) = (Held::default(), Sharing::default());
        let numbers = self.numbers.lock();
        for slot in self.table.backed_slots() {
            let Record { entry, tag, .. } = self.table.record(slot).expect("backed slots have records");
            let entry = Entry::unpack(entry.load(Ordering::Relaxed), slot).expect("entries are sound");
            self.validate_object(slot, entry);
            let mut share = self.share(entry, Tag::of(tag), &sharing, 0);
            match entry {
                Entry::Shared(location) => {
                    share.pool = numbers.sharing.pool(location).expect("it is known while a slot names it");
                    sharing.join(location, slot, share.pool);
                }
                Entry::File(place) => in_file(place),
                Entry::Arena(_) | Entry::Empty | Entry::SameFilled(_) | Entry::Lost => {}
            }
            held.add(share);
        }
        assert_eq!(held, numbers.accounting.held, "the running numbers are those of the entries");
        numbers.sharing.validate(&sharing);
        let unclaimed = numbers.limits.reserve_bytes.saturating_sub(held.pool_bytes);
        assert_eq!(unclaimed, self.unclaimed_bytes.load(Ordering::Relaxed), "reserves are up to date");
        held
    }

    fn validate_object(&self, slot: Slot, entry: Entry) {
        let Some(location) = entry.location() else { return };
        let mut copy = vec![0; object_bytes(location)];
        self.shared.arena.read(location.offset, &mut copy);
        let (coding, payload) = object::open(&copy, entry.owner(self.id(), slot)).expect("objects are sound");
        assert_eq!(coding.codec == CodecId::Raw, payload.len() == object::PAYLOAD_MAX);
        let known = coding.dictionary.is_none_or(|number| self.dictionaries.get(number).is_some());
        assert!(known, "a dictionary stays as long as objects that were made with it");
    }
}
