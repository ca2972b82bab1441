//! The entry: the 8-byte record of one slot, and the only authority on where its page is. An entry of zero is
//! an empty slot, so a table that was never written is a table of empty slots.
//!
//! ```text
//!  63      56 55                                        3 2    0
//! ┌──────────┬───────────────────────────────────────────┬──────┐
//! │ check    │ value                                     │ kind │
//! └──────────┴───────────────────────────────────────────┴──────┘
//!  arena (1):        value = (payload length − 1) << 40 | offset in the arena / 16
//!  same-filled (2):  value = the word, sign-extended from 53 bits
//!  same-filled (3):  value = 32 bits that the word repeats twice
//!  lost (4):         value = 0
//!  file (5):         value = (object length − 1) << 40 | offset in the writeback file / 16
//! ```
//!
//! The check covers slot, value and kind, so that a damaged table is noticed, and an entry that was copied to
//! another slot too.

use super::object::{OBJECT_BYTES_MAX, PAYLOAD_MAX};
use crate::ids::Slot;
use crate::writeback::{FILE_BYTES_MAX, Place, RECORD_ALIGN};

const KIND_ARENA: u64 = 1;
const KIND_SAME_WORD: u64 = 2;
const KIND_SAME_HALF: u64 = 3;
const KIND_LOST: u64 = 4;
const KIND_FILE: u64 = 5;

const KIND_BITS: u32 = 3;
const VALUE_BITS: u32 = 53;
const CHECK_SHIFT: u32 = KIND_BITS + VALUE_BITS;
const BODY_MASK: u64 = (1 << CHECK_SHIFT) - 1;

const OFFSET_BITS: u32 = 40;
/// Objects start at multiples of this many bytes.
pub const OBJECT_ALIGN: u64 = 16;
/// The arena can't be longer than what an entry can point into.
pub const ARENA_BYTES_MAX: u64 = OBJECT_ALIGN << OFFSET_BITS;

/// Where an object lies in the arena, and how many bytes of payload it has (1 to 4096).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Location {
    /// Offset of the object's header in the arena, in bytes; a multiple of [`OBJECT_ALIGN`].
    pub offset: u64,
    /// Length of the payload behind the header, in bytes.
    pub payload_bytes: usize,
}

/// What one slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Nothing: reads as zeros.
    Empty,
    /// A page that repeats this word, and costs no pool memory.
    SameFilled(u64),
    /// An object in the arena.
    Arena(Location),
    /// A record in the writeback file.
    File(Place),
    /// A page that could not be kept. Loads fail until it is overwritten.
    Lost,
}

/// An entry that this version did not write: a damaged table, or another slot's entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the entry {raw:#018x} of slot {slot} fails its check")]
pub struct BadEntry {
    raw: u64,
    slot: Slot,
}

impl Entry {
    /// The entry of a page that repeats `word`, or `None` when the word doesn't fit and the page has to be kept
    /// as a small object.
    #[must_use]
    pub fn same_filled(word: u64) -> Option<Self> {
        same_filled_body(word).map(|_| Self::SameFilled(word))
    }

    /// Packs the entry for `slot`.
    ///
    /// # Panics
    /// When the entry can't be represented: a same-filled word that [`Entry::same_filled`] refused, or a location
    /// that the arena can't have handed out. Both are broken invariants of ours.
    #[must_use]
    pub fn pack(self, slot: Slot) -> u64 {
        let body = match self {
            Self::Empty => return 0,
            Self::SameFilled(word) => same_filled_body(word).expect("the word was checked to fit an entry"),
            Self::Arena(Location { offset, payload_bytes }) => {
                assert!((1..=PAYLOAD_MAX).contains(&payload_bytes) && offset.is_multiple_of(OBJECT_ALIGN));
                assert!(offset < ARENA_BYTES_MAX);
                let length = (payload_bytes as u64 - 1) << OFFSET_BITS;
                ((length | (offset / OBJECT_ALIGN)) << KIND_BITS) | KIND_ARENA
            }
            Self::File(Place { offset, object_bytes }) => {
                assert!((1..=OBJECT_BYTES_MAX).contains(&object_bytes));
                assert!(offset < FILE_BYTES_MAX && offset.is_multiple_of(RECORD_ALIGN as u64));
                let length = (object_bytes as u64 - 1) << OFFSET_BITS;
                ((length | (offset / RECORD_ALIGN as u64)) << KIND_BITS) | KIND_FILE
            }
            Self::Lost => KIND_LOST,
        };
        check(body, slot) << CHECK_SHIFT | body
    }

    /// Reads what [`Entry::pack`] made for the same slot.
    ///
    /// # Errors
    /// When the check fails or the kind is unknown.
    pub fn unpack(raw: u64, slot: Slot) -> Result<Self, BadEntry> {
        if raw == 0 {
            return Ok(Self::Empty);
        }
        let body = raw & BODY_MASK;
        if raw >> CHECK_SHIFT != check(body, slot) {
            return Err(BadEntry { raw, slot });
        }
        let value = body >> KIND_BITS;
        match body & ((1 << KIND_BITS) - 1) {
            KIND_ARENA => {
                let offset = (value & ((1 << OFFSET_BITS) - 1)) * OBJECT_ALIGN;
                let payload_bytes = usize::try_from((value >> OFFSET_BITS) + 1).unwrap_or(usize::MAX);
                if payload_bytes > PAYLOAD_MAX {
                    return Err(BadEntry { raw, slot });
                }
                Ok(Self::Arena(Location { offset, payload_bytes }))
            }
            KIND_SAME_WORD => Ok(Self::SameFilled(sign_extend(value))),
            KIND_SAME_HALF => Ok(Self::SameFilled((value & 0xffff_ffff) * 0x1_0000_0001)),
            KIND_LOST => Ok(Self::Lost),
            KIND_FILE => {
                let offset = (value & ((1 << OFFSET_BITS) - 1)) * RECORD_ALIGN as u64;
                let object_bytes = usize::try_from((value >> OFFSET_BITS) + 1).unwrap_or(usize::MAX);
                if object_bytes > OBJECT_BYTES_MAX {
                    return Err(BadEntry { raw, slot });
                }
                Ok(Self::File(Place { offset, object_bytes }))
            }
            _ => Err(BadEntry { raw, slot }),
        }
    }
}

fn same_filled_body(word: u64) -> Option<u64> {
    let value = word & ((1 << VALUE_BITS) - 1);
    let half = word & 0xffff_ffff;
    if sign_extend(value) == word {
        Some(value << KIND_BITS | KIND_SAME_WORD)
    } else if word >> 32 == half {
        Some(half << KIND_BITS | KIND_SAME_HALF)
    } else {
        None
    }
}

fn sign_extend(value: u64) -> u64 {
    let sign = 1 << (VALUE_BITS - 1);
    (value ^ sign).wrapping_sub(sign)
}

/// Eight bits over slot and body. A multiplicative hash is enough against stray writes; pages themselves carry a
/// real checksum. Never zero for a non-zero entry is not needed: the kind already tells it from an empty one.
fn check(body: u64, slot: Slot) -> u64 {
    let mixed = (body ^ u64::from(slot.0).rotate_left(40)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> CHECK_SHIFT
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_entry() -> impl Strategy<Value = Entry> {
        prop_oneof![
            Just(Entry::Empty),
            Just(Entry::Lost),
            any::<u32>().prop_map(|half| Entry::SameFilled(u64::from(half) * 0x1_0000_0001)),
            any::<i64>().prop_map(|word| Entry::SameFilled((word >> 11).cast_unsigned())),
            (0..ARENA_BYTES_MAX / OBJECT_ALIGN, 1..=PAYLOAD_MAX).prop_map(
                |(at, payload_bytes)| Entry::Arena(Location { offset: at * OBJECT_ALIGN, payload_bytes })
            ),
            (0..FILE_BYTES_MAX / 16, 1..=OBJECT_BYTES_MAX)
                .prop_map(|(at, object_bytes)| Entry::File(Place { offset: at * 16, object_bytes })),
        ]
    }

    proptest! {
        #[test]
        fn what_is_packed_is_unpacked(entry in any_entry(), slot: u32) {
            prop_assert_eq!(Entry::unpack(entry.pack(Slot(slot)), Slot(slot)), Ok(entry));
        }

        #[test]
        fn a_word_fits_or_is_refused(word: u64) {
            if let Some(entry) = Entry::same_filled(word) {
                prop_assert_eq!(Entry::unpack(entry.pack(Slot(7)), Slot(7)), Ok(Entry::SameFilled(word)));
            }
        }
    }

    #[test]
    fn common_fill_words_cost_no_memory() {
        for word in
            [0, u64::MAX, 0x0101_0101_0101_0101, 0xdead_beef_dead_beef, 42, i64::MIN.cast_unsigned() >> 12]
        {
            assert_eq!(Entry::same_filled(word), Some(Entry::SameFilled(word)), "{word:#x}");
        }
        assert_eq!(Entry::same_filled(0x0123_4567_89ab_cdef), None);
    }

    #[test]
    fn flipped_bits_and_foreign_slots_are_noticed() {
        let entry = Entry::Arena(Location { offset: 0x1234_5670, payload_bytes: 1300 });
        let raw = entry.pack(Slot(99));
        // Eight check bits can't catch everything, so count: at most a few of the single-bit flips may slip by.
        let missed = (0..64).filter(|bit| Entry::unpack(raw ^ (1 << bit), Slot(99)).is_ok()).count();
        assert!(missed <= 1, "{missed} single-bit flips went unnoticed");
        let missed = (0..1000).filter(|slot| *slot != 99 && Entry::unpack(raw, Slot(*slot)).is_ok()).count();
        assert!(missed < 20, "{missed} of 999 foreign slots went unnoticed");
    }
}
