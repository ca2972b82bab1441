//! What an entry is changed to, and what follows from why: for the page's age, its tag and the counters.

use super::tag::Tag;
use crate::store::accounting::Events;
use crate::store::entry::{Entry, Location};
use crate::store::lru::Age;
use crate::store::object;
use crate::store::pool::PoolId;

/// What an entry is changed to, and what for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Change {
    pub entry: Entry,
    /// The pool that made the entry's object.
    pub pool: PoolId,
    pub cause: Cause,
}

/// Why an entry changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// The guest wrote the page.
    Store(Age),
    /// The guest gave it up.
    Invalidate,
    /// It goes to the writeback file.
    WriteBack,
    /// It comes back from there.
    Promote(Age),
    /// It is brought back from there, and nobody has asked for it.
    ReadBack,
    /// Its object goes elsewhere in the arena.
    Compact,
    /// Its record goes elsewhere in the file.
    Clean,
    /// Its object was compressed anew.
    Recompress,
    /// Its object becomes one that others may share.
    Lend,
    /// It is the same as another page, whose object it shares from now on.
    Share,
    /// It is damaged.
    GiveUp,
}

impl Cause {
    /// The age of a page after this happened to it.
    pub fn age(self, before: Age) -> Age {
        match self {
            Self::Store(now) => now,
            // It comes back because it is loaded.
            Self::Promote(now) => now.loaded(),
            Self::Invalidate | Self::GiveUp => Age::from_bits(0),
            // From here on the mark tells whether it was loaded from the file.
            Self::WriteBack => before.not_loaded(),
            // It was not used: its age says, as before, which page leaves first should room be wanted.
            Self::ReadBack | Self::Compact | Self::Clean | Self::Recompress | Self::Lend | Self::Share => {
                before
            }
        }
    }

    /// Whether the page counts as one that its guest has a copy of after this, which had this tag and age `before`.
    pub fn is_loaded(self, before: Tag, age: Age) -> bool {
        match self {
            Self::Promote(_) => true,
            // Its guest may have loaded it from there.
            Self::ReadBack => age.is_loaded(),
            Self::Store(_) | Self::Invalidate | Self::WriteBack | Self::GiveUp => false,
            Self::Compact | Self::Clean | Self::Recompress | Self::Lend | Self::Share => before.is_loaded(),
        }
    }

    /// Whether a VM's limit may forbid it. What moves for one slot after the other takes its room twice for a moment.
    pub fn is_limited(self) -> bool {
        self != Self::Compact
    }

    /// Whether its guest wants nothing more of what the slot held.
    pub fn ends_a_page(self) -> bool {
        matches!(self, Self::Store(_) | Self::Invalidate)
    }

    /// Counts it.
    pub fn count(self, events: &mut Events, old: Entry, new: Entry) {
        match self {
            Self::Store(_) => {
                events.stores += 1;
                events.invalidates += u64::from(old != Entry::Empty);
                if let Entry::Arena(Location { payload_bytes, .. }) = new {
                    events.reject_compress_poor += u64::from(payload_bytes == object::PAYLOAD_MAX);
                    events.compressed_bytes.count(payload_bytes);
                }
            }
            Self::Invalidate => events.invalidates += u64::from(old != Entry::Empty),
            Self::WriteBack => events.written_back_pages += 1,
            Self::Promote(_) => events.promoted_pages += 1,
            Self::ReadBack => events.read_back_pages += 1,
            Self::Compact => events.compacted_pages += 1,
            Self::Recompress => events.recompressed_pages += 1,
            Self::Share => {
                events.recompressed_pages += 1;
                events.deduplicated_pages += 1;
            }
            Self::GiveUp => events.given_up_pages += 1,
            Self::Clean | Self::Lend => {}
        }
    }
}
