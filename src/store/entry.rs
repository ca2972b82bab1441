//! The entry: the 8-byte record of one slot, and the only authority on where its page is. An entry of zero is
//! an empty slot, so a table that was never written is a table of empty slots.
//!
//! ```text
//!  63      56 55                                        3 2    0
//! ┌──────────┬───────────────────────────────────────────┬──────┐
//! │ check    │ value                                     │ kind │
//! └──────────┴───────────────────────────────────────────┴──────┘
//!  arena (3):        value = (payload length − 1) << 40 | offset in the arena / 16
//!  shared (3):       value = 1 << 52 | (payload length − 1) << 40 | offset in the arena / 16
//!  same-filled (5):  value = the word, sign-extended from 53 bits
//!  same-filled (6):  value = 32 bits that the word repeats twice
//!  lost (6):         value = 1 << 32
//!  file (7):         value = (object length − 1) << 40 | offset in the writeback file / 16
//! ```
//!
//! The check is a CRC over slot, value and kind: two entries of one slot differ in at least four bits, and so do an
//! entry and the same one of a slot whose number differs in one bit. Every kind has two bits set, so that an empty slot
//! differs from every entry in two: one flipped bit in a table is always noticed, and made nothing else of.

use super::object::{OBJECT_BYTES_MAX, PAYLOAD_MAX};
use crate::ids::{Owner, Slot, VmId};
use crate::writeback::{FILE_BYTES_MAX, Place, RECORD_ALIGN};

const KIND_ARENA: u64 = 3;
const KIND_SAME_WORD: u64 = 5;
const KIND_SAME_HALF: u64 = 6;
const KIND_FILE: u64 = 7;
/// One more than the largest value of a repeated half word.
const VALUE_LOST: u64 = 1 << 32;
/// Tells an object that several slots may name from one that is a slot's own.
const VALUE_SHARED: u64 = 1 << 52;

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
    /// An object in the arena that is the slot's own.
    Arena(Location),
    /// An object in the arena that other slots of the VM may name as well: their pages are the same.
    Shared(Location),
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

    /// The object in the arena that the entry names, its own or a shared one.
    #[must_use]
    pub fn location(self) -> Option<Location> {
        match self {
            Self::Arena(location) | Self::Shared(location) => Some(location),
            Self::Empty | Self::SameFilled(_) | Self::File(_) | Self::Lost => None,
        }
    }

    /// Whose the object of `slot` of `vm` says it is, if this is the slot's entry: nobody else decides that.
    #[must_use]
    pub fn owner(self, vm: VmId, slot: Slot) -> Owner {
        match self {
            Self::Shared(_) => Owner::shared(vm),
            Self::Empty | Self::SameFilled(_) | Self::Arena(_) | Self::File(_) | Self::Lost => {
                Owner { vm, slot }
            }
        }
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
            Self::Arena(location) => arena_value(location) << KIND_BITS | KIND_ARENA,
            Self::Shared(location) => (VALUE_SHARED | arena_value(location)) << KIND_BITS | KIND_ARENA,
            Self::File(Place { offset, object_bytes }) => {
                assert!((1..=OBJECT_BYTES_MAX).contains(&object_bytes));
                assert!(offset < FILE_BYTES_MAX && offset.is_multiple_of(RECORD_ALIGN as u64));
                let length = (object_bytes as u64 - 1) << OFFSET_BITS;
                ((length | (offset / RECORD_ALIGN as u64)) << KIND_BITS) | KIND_FILE
            }
            Self::Lost => VALUE_LOST << KIND_BITS | KIND_SAME_HALF,
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
                let length = (value & !VALUE_SHARED) >> OFFSET_BITS;
                let payload_bytes = usize::try_from(length + 1).unwrap_or(usize::MAX);
                let location = Location { offset, payload_bytes };
                Ok(if value & VALUE_SHARED == 0 { Self::Arena(location) } else { Self::Shared(location) })
            }
            KIND_SAME_WORD => Ok(Self::SameFilled(sign_extend(value))),
            KIND_SAME_HALF if value < VALUE_LOST => Ok(Self::SameFilled(value * 0x1_0000_0001)),
            KIND_SAME_HALF if value == VALUE_LOST => Ok(Self::Lost),
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

/// Where an object lies, as 52 bits.
fn arena_value(Location { offset, payload_bytes }: Location) -> u64 {
    assert!((1..=PAYLOAD_MAX).contains(&payload_bytes) && offset.is_multiple_of(OBJECT_ALIGN));
    assert!(offset < ARENA_BYTES_MAX);
    ((payload_bytes as u64 - 1) << OFFSET_BITS) | (offset / OBJECT_ALIGN)
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

/// x⁸ + x² + x + 1: up to 119 bits before the check, any three flipped bits are noticed. Here there are 88.
const POLYNOMIAL: u8 = 0x07;
/// Bytes that the check covers: seven of the body, four of the slot.
const CHECKED_BYTES: usize = 11;

/// What each byte adds to the check, by its distance from it.
static CHECK_TABLES: [[u8; 256]; CHECKED_BYTES] = check_tables();

#[allow(clippy::cast_possible_truncation, reason = "the index of a table of 256")]
const fn check_tables() -> [[u8; 256]; CHECKED_BYTES] {
    let mut tables = [[0; 256]; CHECKED_BYTES];
    let mut byte = 0;
    while byte < 256 {
        let mut remainder = byte as u8;
        let mut at = 0;
        while at < CHECKED_BYTES {
            let mut bit = 0;
            while bit < 8 {
                let carry = remainder >> 7;
                remainder = (remainder << 1) ^ (carry * POLYNOMIAL);
                bit += 1;
            }
            tables[at][byte] = remainder;
            at += 1;
        }
        byte += 1;
    }
    tables
}

/// The CRC of slot and body, in this order.
fn check(body: u64, slot: Slot) -> u64 {
    let ([b0, b1, b2, b3, b4, b5, b6, _], [s0, s1, s2, s3]) = (body.to_le_bytes(), slot.0.to_le_bytes());
    let bytes = [b0, b1, b2, b3, b4, b5, b6, s0, s1, s2, s3];
    let parts = CHECK_TABLES.iter().zip(bytes).map(|(table, byte)| table[usize::from(byte)]);
    parts.fold(0, |check, part| check ^ part).into()
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
            (0..ARENA_BYTES_MAX / OBJECT_ALIGN, 1..=PAYLOAD_MAX).prop_map(|(at, payload_bytes)| {
                Entry::Shared(Location { offset: at * OBJECT_ALIGN, payload_bytes })
            }),
            (0..FILE_BYTES_MAX / 16, 1..=OBJECT_BYTES_MAX)
                .prop_map(|(at, object_bytes)| Entry::File(Place { offset: at * 16, object_bytes })),
        ]
    }

    proptest! {
        #[test]
        fn what_is_packed_is_unpacked(entry in any_entry(), slot: u32) {
            prop_assert_eq!(Entry::unpack(entry.pack(Slot(slot)), Slot(slot)), Ok(entry));
        }

        /// The code is linear, so one entry of each kind would do to show it for two used ones.
        #[test]
        fn a_flipped_bit_is_noticed_and_so_are_two(entry in any_entry(), slot: u32) {
            let (raw, slot) = (entry.pack(Slot(slot)), Slot(slot));
            for first in 0..64 {
                let damaged = raw ^ 1 << first;
                prop_assert!(Entry::unpack(damaged, slot).is_err(), "{entry:?}, bit {first}");
                for second in 0..first {
                    let unnoticed = Entry::unpack(damaged ^ 1 << second, slot);
                    // Two bits may be all that tells an entry from an empty slot.
                    let one_is_empty = entry == Entry::Empty || unnoticed == Ok(Entry::Empty);
                    prop_assert!(unnoticed.is_err() || one_is_empty, "{entry:?}, bits {first} and {second}");
                }
            }
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
    fn the_check_is_the_crc_that_it_says() {
        // The published check value of this polynomial is that of the digits 1 to 9.
        let body = u64::from_be_bytes(*b"\x003456789");
        assert_eq!(check(body, Slot(u32::from_be_bytes(*b"\0\x0012"))), 0xf4);
    }

    #[test]
    fn a_shared_object_is_nobodys_own() {
        let location = Location { offset: 0x1230, payload_bytes: PAYLOAD_MAX };
        let (vm, slot) = (VmId(3), Slot(9));
        assert_eq!(Entry::Arena(location).owner(vm, slot), Owner { vm, slot });
        assert_eq!(Entry::Shared(location).owner(vm, slot), Owner { vm, slot: Slot(u32::MAX) });
        assert_ne!(Entry::Shared(location).pack(slot), Entry::Arena(location).pack(slot));
    }

    #[test]
    fn foreign_slots_are_noticed() {
        let raw = Entry::Arena(Location { offset: 0x1234_5670, payload_bytes: 1300 }).pack(Slot(99));
        for slot in (0..32).map(|bit| 99 ^ 1 << bit) {
            assert!(Entry::unpack(raw, Slot(slot)).is_err(), "slot {slot}");
        }
        // Of those that differ in more bits, eight check bits let one of 256 slip by.
        let missed = (0..1000).filter(|slot| *slot != 99 && Entry::unpack(raw, Slot(*slot)).is_ok()).count();
        assert!(missed < 20, "{missed} of 999 foreign slots went unnoticed");
    }
}
