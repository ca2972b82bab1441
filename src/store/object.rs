//! The object: one compressed page in the arena, behind a header that says whose it is. Header and payload are
//! written once and never changed; a checksum covers both, and every load verifies it before the guest sees a byte.
//!
//! ```text
//!  0          4       8       12                  14
//! ┌──────────┬───────┬───────┬───────────────────┬─────────┐
//! │ crc32c   │ VM    │ slot  │ codec, dictionary │ payload │   little-endian
//! └──────────┴───────┴───────┴───────────────────┴─────────┘
//!  of all that follows        3 bits, 13 bits (0 = none)
//! ```
//! An object that several slots of a VM share names the slot [`u32::MAX`], which no disk has.
//! Its length stands in the entry alone: a checksum over more or fewer bytes than were written doesn't match.

use super::codec::{CodecId, Coding, DictionaryNumber};
use crate::ids::{Owner, Slot, VmId};
use crate::page::PAGE_SIZE;

/// Bytes of an object's header.
pub const HEADER_BYTES: usize = 14;
/// The longest payload: a page that is kept raw.
pub const PAYLOAD_MAX: usize = PAGE_SIZE;
/// The longest object.
pub const OBJECT_BYTES_MAX: usize = HEADER_BYTES + PAYLOAD_MAX;

/// Where the owner stands in the header: VM and slot, a word each.
pub const OWNER_BYTES: std::ops::Range<usize> = 4..12;

const DICTIONARY_BITS: u32 = 13;

/// Why an object was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadObject {
    /// Header or payload changed since they were written.
    #[error("the checksum of the stored page does not match")]
    Checksum,
    /// The object is intact but somebody else's.
    #[error("the stored page belongs to VM {vm}, slot {slot}")]
    Owner {
        /// The VM that the header names.
        vm: VmId,
        /// The slot that the header names.
        slot: Slot,
    },
    /// The header can't have been written by this version.
    #[error("the stored page has an unknown codec or dictionary")]
    Header,
}

/// Completes the object in `object`, whose payload is in place behind the header's room.
///
/// # Panics
/// When `object` is shorter than a header or longer than [`OBJECT_BYTES_MAX`], or the dictionary's number is no number of
/// 13 bits.
pub fn seal(object: &mut [u8], owner: Owner, coding: impl Into<Coding>) {
    let payload_bytes = object.len() - HEADER_BYTES;
    assert!((1..=PAYLOAD_MAX).contains(&payload_bytes));
    object[4..8].copy_from_slice(&owner.vm.0.to_le_bytes());
    object[8..12].copy_from_slice(&owner.slot.0.to_le_bytes());
    let Coding { codec, dictionary } = coding.into();
    let dictionary = dictionary.map_or(0, DictionaryNumber::get);
    assert!(dictionary < 1 << DICTIONARY_BITS);
    object[12..14].copy_from_slice(&((codec as u16) << DICTIONARY_BITS | dictionary).to_le_bytes());
    let checksum = crc32c::crc32c(&object[4..]);
    object[..4].copy_from_slice(&checksum.to_le_bytes());
}

/// The owner that the words at [`OWNER_BYTES`] name.
#[must_use]
pub fn owner_of([vm, slot]: [u32; 2]) -> Owner {
    Owner { vm: VmId(vm), slot: Slot(slot) }
}

/// Verifies a copied-out object and returns how its payload was made, and that.
///
/// # Errors
/// When the checksum fails, the object is not `owner`'s, or the header makes no sense.
pub fn open(object: &[u8], owner: Owner) -> Result<(Coding, &[u8]), BadObject> {
    let (header, payload) = object.split_at_checked(HEADER_BYTES).ok_or(BadObject::Header)?;
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    if word(0) != crc32c::crc32c(&object[4..]) {
        return Err(BadObject::Checksum);
    }
    let found = owner_of([word(4), word(8)]);
    if found != owner {
        return Err(BadObject::Owner { vm: found.vm, slot: found.slot });
    }
    let described = u16::from_le_bytes([header[12], header[13]]);
    let codec = CodecId::from_bits(described >> DICTIONARY_BITS).ok_or(BadObject::Header)?;
    let dictionary = DictionaryNumber::new(described & ((1 << DICTIONARY_BITS) - 1));
    if dictionary.is_some() && codec != CodecId::Zstd {
        return Err(BadObject::Header);
    }
    Ok((Coding { codec, dictionary }, payload))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: Owner = Owner { vm: VmId(3), slot: Slot(77) };

    fn sealed(payload: &[u8]) -> Vec<u8> {
        let mut object = vec![0; HEADER_BYTES];
        object.extend_from_slice(payload);
        seal(&mut object, OWNER, CodecId::Lz4);
        object
    }

    #[test]
    fn a_sealed_object_opens_for_its_owner_only() {
        let object = sealed(b"payload");
        assert_eq!(open(&object, OWNER), Ok((CodecId::Lz4.into(), &b"payload"[..])));
        let other = Owner { vm: VmId(4), ..OWNER };
        assert_eq!(open(&object, other), Err(BadObject::Owner { vm: VmId(3), slot: Slot(77) }));
        let other = Owner { slot: Slot(78), ..OWNER };
        assert_eq!(open(&object, other), Err(BadObject::Owner { vm: VmId(3), slot: Slot(77) }));
    }

    #[test]
    fn the_dictionary_is_named_and_only_zstd_has_one() {
        let dictionary = DictionaryNumber::new((1 << DICTIONARY_BITS) - 1);
        let mut object = sealed(b"payload");
        let coding = Coding { codec: CodecId::Zstd, dictionary };
        seal(&mut object, OWNER, coding);
        assert_eq!(open(&object, OWNER).map(|(coding, _)| coding), Ok(coding));
        seal(&mut object, OWNER, Coding { codec: CodecId::Lz4, dictionary });
        assert_eq!(open(&object, OWNER), Err(BadObject::Header));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let object = sealed(&[5; 100]);
        for bit in 0..object.len() * 8 {
            let mut damaged = object.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(open(&damaged, OWNER), Err(BadObject::Checksum), "bit {bit}");
        }
        for length in 0..object.len() {
            assert!(open(&object[..length], OWNER).is_err(), "length {length}");
        }
    }

    #[test]
    fn a_whole_raw_page_fits() {
        let mut object = vec![9; OBJECT_BYTES_MAX];
        seal(&mut object, OWNER, CodecId::Raw);
        assert_eq!(
            open(&object, OWNER).map(|(codec, payload)| (codec, payload.len())),
            Ok((CodecId::Raw.into(), 4096))
        );
    }
}
