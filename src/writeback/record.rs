//! The record: one object as it stands in the writeback file, encrypted for its VM behind a header that says whose
//! it is. VM and slot are authenticated, the place is not: cleaning moves records as they are.
//!
//! ```text
//!  0               8    12     16             18         20         24
//! ┌───────────────┬────┬──────┬──────────────┬──────────┬──────────┬────────────┬─────┬─────────┐
//! │ write counter │ VM │ slot │ object bytes │ reserved │ crc32c   │ ciphertext │ tag │ to 16   │
//! └───────────────┴────┴──────┴──────────────┴──────────┴──────────┴────────────┴─────┴─────────┘
//!  the nonce, with four zeros behind             0        of 0–19 and 24–tag     16     zeros
//! ```
//!
//! The checksum tells a failing disk from the wrong key, and finds records without any key; the tag is what makes a
//! record trustworthy.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use aes_gcm::aead::inout::InOutBuf;
use aes_gcm::{AeadInOut, Aes256Gcm, KeyInit, Nonce, Tag};

use super::io::Buffer;
use super::place::{
    OBJECT_BYTES_MAX, OBJECT_BYTES_MIN, RECORD_HEADER_BYTES, TAG_BYTES, record_bytes, sealed_bytes,
};
use crate::ids::{Owner, Slot, VmId};

/// Encrypts and decrypts the records of one VM (AES-256-GCM).
#[derive(Clone)]
pub struct Cipher(Aes256Gcm);

impl Cipher {
    /// The cipher of the VM whose key this is. A key must be random, belong to one VM of one state directory, and
    /// be forgotten with it: counters repeat only with another state.
    #[must_use]
    pub fn new(key: &[u8; 32]) -> Self {
        Self(Aes256Gcm::new(key.into()))
    }
}

impl fmt::Debug for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cipher(..)")
    }
}

/// What is authenticated with a record without being in it: another owner's record doesn't open.
fn associated_data(owner: Owner) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&owner.vm.0.to_le_bytes());
    bytes[4..].copy_from_slice(&owner.slot.0.to_le_bytes());
    bytes
}

/// Why a record was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRecord {
    /// What was read is not what was written, or not the record that the place names.
    #[error("the checksum of the record in the writeback file does not match")]
    Checksum,
    /// The record is intact but somebody else's.
    #[error("the record in the writeback file belongs to VM {vm}, slot {slot}")]
    Owner {
        /// The VM that the header names.
        vm: VmId,
        /// The slot that the header names.
        slot: Slot,
    },
    /// The record was not written with this VM's key, or was changed by somebody who mended the checksum.
    #[error("the record in the writeback file is not authentic")]
    NotAuthentic,
}

/// A header as it was read, not verified.
#[derive(Clone, Copy, Debug)]
struct Header {
    counter: u64,
    owner: Owner,
    object_bytes: usize,
    checksum: u32,
}

impl Header {
    /// `None` when this version can't have written it.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let header = bytes.first_chunk::<RECORD_HEADER_BYTES>()?;
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| header[at + i]));
        let object_bytes = usize::from(u16::from_le_bytes([header[16], header[17]]));
        let possible =
            (OBJECT_BYTES_MIN..=OBJECT_BYTES_MAX).contains(&object_bytes) && header[18..20] == [0, 0];
        possible.then(|| Self {
            counter: u64::from_le_bytes(std::array::from_fn(|i| header[i])),
            owner: Owner { vm: VmId(word(8)), slot: Slot(word(12)) },
            object_bytes,
            checksum: word(20),
        })
    }
}

fn nonce(counter: u64) -> Nonce<aes_gcm::aead::consts::U12> {
    let mut bytes = [0; 12];
    bytes[..8].copy_from_slice(&counter.to_le_bytes());
    bytes.into()
}

fn checksum(sealed: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&sealed[..20]), &sealed[RECORD_HEADER_BYTES..])
}

/// Writes the record of `object` into `target`, which is as long as [`record_bytes`] says.
///
/// # Panics
/// When `object` or `target` has an impossible length.
pub(super) fn seal(target: &mut [u8], counter: u64, owner: Owner, cipher: &Cipher, object: &[u8]) {
    assert!((OBJECT_BYTES_MIN..=OBJECT_BYTES_MAX).contains(&object.len()), "an object of impossible length");
    assert_eq!(target.len(), record_bytes(object.len()));
    let (sealed, padding) = target.split_at_mut(sealed_bytes(object.len()));
    padding.fill(0);
    let object_bytes = u16::try_from(object.len()).expect("an object is little more than a page");
    sealed[..8].copy_from_slice(&counter.to_le_bytes());
    sealed[8..16].copy_from_slice(&associated_data(owner));
    sealed[16..18].copy_from_slice(&object_bytes.to_le_bytes());
    sealed[18..20].fill(0);
    let (text, tag) = sealed[RECORD_HEADER_BYTES..].split_at_mut(object.len());
    text.copy_from_slice(object);
    let made = cipher
        .0
        .encrypt_inout_detached(&nonce(counter), &associated_data(owner), InOutBuf::from(text))
        .expect("an object is far shorter than what one nonce can encrypt");
    tag.copy_from_slice(&made);
    let checksum = checksum(sealed);
    sealed[20..24].copy_from_slice(&checksum.to_le_bytes());
}

/// A record as it came from the file, not verified yet. Several share the buffer of the transfer that brought them.
#[derive(Debug)]
pub struct RecordBytes {
    buffer: Arc<Buffer>,
    range: Range<usize>,
}

impl RecordBytes {
    /// The record of `object_bytes` at `start` in `buffer`.
    pub(super) fn new(buffer: Arc<Buffer>, start: usize, object_bytes: usize) -> Self {
        Self { buffer, range: start..start + sealed_bytes(object_bytes) }
    }

    /// Verifies the record, decrypts it and returns the object. This costs a few microseconds: do it on the thread
    /// that needs the page.
    ///
    /// # Errors
    /// When the record is damaged, not `owner`'s, or not written with this key.
    pub fn open(self, owner: Owner, cipher: &Cipher) -> Result<Vec<u8>, BadRecord> {
        let object_bytes = self.range.len() - RECORD_HEADER_BYTES - TAG_BYTES;
        open(&self.buffer.bytes()[self.range], object_bytes, owner, cipher)
    }
}

/// Verifies and decrypts the record of an object of `object_bytes` that `bytes` begin with.
pub(super) fn open(
    bytes: &[u8],
    object_bytes: usize,
    owner: Owner,
    cipher: &Cipher,
) -> Result<Vec<u8>, BadRecord> {
    let sealed = bytes.get(..sealed_bytes(object_bytes)).ok_or(BadRecord::Checksum)?;
    let header = Header::parse(sealed).ok_or(BadRecord::Checksum)?;
    if header.checksum != checksum(sealed) || header.object_bytes != object_bytes {
        return Err(BadRecord::Checksum);
    }
    if header.owner != owner {
        return Err(BadRecord::Owner { vm: header.owner.vm, slot: header.owner.slot });
    }
    let (text, tag) = sealed[RECORD_HEADER_BYTES..].split_at(object_bytes);
    let tag: [u8; TAG_BYTES] = tag.try_into().map_err(|_| BadRecord::Checksum)?;
    let mut object = text.to_vec();
    cipher
        .0
        .decrypt_inout_detached(
            &nonce(header.counter),
            &associated_data(owner),
            InOutBuf::from(&mut object[..]),
            &Tag::from(tag),
        )
        .map_err(|_| BadRecord::NotAuthentic)?;
    Ok(object)
}

/// The length of the object in the record that `bytes` begin with, and whose it is; `None` when there is no intact
/// one. The padding belongs to the record: with it, a record that is found can be moved as it is.
pub(super) fn intact_at_start(bytes: &[u8]) -> Option<(Owner, usize)> {
    let Header { owner, object_bytes, checksum: expected, .. } = Header::parse(bytes)?;
    let record = bytes.get(..record_bytes(object_bytes))?;
    (checksum(&record[..sealed_bytes(object_bytes)]) == expected).then_some((owner, object_bytes))
}

#[cfg(test)]
mod tests {
    use super::super::place::BLOCK_BYTES;
    use super::*;

    const OWNER: Owner = Owner { vm: VmId(3), slot: Slot(77) };

    fn sealed(counter: u64, object: &[u8]) -> Vec<u8> {
        let mut record = vec![0xee; record_bytes(object.len())];
        seal(&mut record, counter, OWNER, &Cipher::new(&[7; 32]), object);
        record
    }

    fn buffer(bytes: &[u8]) -> Arc<Buffer> {
        let mut buffer = Buffer::zeroed(bytes.len().next_multiple_of(BLOCK_BYTES));
        buffer.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
        Arc::new(buffer)
    }

    fn open(record: &[u8], object_bytes: usize, owner: Owner, key: u8) -> Result<Vec<u8>, BadRecord> {
        RecordBytes::new(buffer(record), 0, object_bytes).open(owner, &Cipher::new(&[key; 32]))
    }

    #[test]
    fn a_record_opens_for_its_owner_and_key_only() {
        let record = sealed(9, &[5; 100]);
        assert_eq!(open(&record, 100, OWNER, 7), Ok(vec![5; 100]));
        assert_eq!(open(&record, 100, OWNER, 8), Err(BadRecord::NotAuthentic));
        let other = Owner { slot: Slot(78), ..OWNER };
        let found = BadRecord::Owner { vm: VmId(3), slot: Slot(77) };
        assert_eq!(open(&record, 100, other, 7), Err(found));
        assert_eq!(open(&record, 99, OWNER, 7), Err(BadRecord::Checksum));
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let record = sealed(1 << 40, &[0x3c; 61]);
        for bit in 0..sealed_bytes(61) * 8 {
            let mut damaged = record.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(open(&damaged, 61, OWNER, 7), Err(BadRecord::Checksum), "bit {bit}");
        }
    }

    #[test]
    fn a_mended_checksum_does_not_make_a_record_authentic() {
        let record = sealed(5, &[0x3c; 61]);
        for bit in (0..sealed_bytes(61) * 8).filter(|bit| !(64..192).contains(bit)) {
            let mut forged = record.clone();
            forged[bit / 8] ^= 1 << (bit % 8);
            let mended = checksum(&forged[..sealed_bytes(61)]);
            forged[20..24].copy_from_slice(&mended.to_le_bytes());
            assert_eq!(open(&forged, 61, OWNER, 7), Err(BadRecord::NotAuthentic), "bit {bit}");
        }
        // A record that somebody readdresses, checksum and all.
        let mut forged = record;
        forged[12..16].copy_from_slice(&78u32.to_le_bytes());
        let mended = checksum(&forged[..sealed_bytes(61)]);
        forged[20..24].copy_from_slice(&mended.to_le_bytes());
        assert_eq!(open(&forged, 61, Owner { slot: Slot(78), ..OWNER }, 7), Err(BadRecord::NotAuthentic));
    }

    #[test]
    fn the_object_is_not_in_the_file() {
        let record = sealed(1, &[0x5a; 4110]);
        assert!(!record.windows(8).any(|window| window == [0x5a; 8]));
        assert!(!format!("{:?}", Cipher::new(&[0x5a; 32])).contains("90"));
    }
}
