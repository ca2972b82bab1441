//! Finding records in a segment by their headers alone, for cleaning. Knows no keys and no page tables: what is found
//! may be long dead.

use std::sync::Arc;

use super::io::Buffer;
use super::pin::SegmentPin;
use super::place::{Place, RECORD_ALIGN};
use super::record::{self, Cipher};
use crate::ids::Owner;

/// A record found in a segment: intact, but encrypted, and perhaps long dead. Only the page table knows.
#[derive(Debug)]
pub struct RecordRef {
    /// Whose page it is.
    pub owner: Owner,
    /// Where it was found.
    pub place: Place,
    segment: Arc<SegmentCopy>,
}

/// A segment that was read whole. While it is here the segment is not written anew, so whoever finds an entry that
/// names a record's place has that very record.
#[derive(Debug)]
pub(super) struct SegmentCopy {
    pub buffer: Buffer,
    /// Where the segment starts in the file, in bytes.
    pub offset: u64,
    pub _pin: SegmentPin,
}

impl RecordRef {
    /// The record as it stands in the file, padding included.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        let start = self.place.start();
        &self.segment.buffer.bytes()[start..start + self.place.record_bytes()]
    }

    /// Whether it was written with this key, for the owner that it names.
    #[must_use]
    pub fn is_authentic(&self, cipher: &Cipher) -> bool {
        record::open(self.bytes(), self.place.object_bytes, self.owner, cipher).is_ok()
    }
}

/// The intact records of a segment.
///
/// Wherever there is none the search goes on at the next 16 bytes: through the padding of a batch, a torn write, a
/// damaged record, and what an earlier life of the segment left. What is found is intact by its checksum; that
/// something else passes for a record there takes less than one chance in 2^50 a place, and it would be nobody's.
pub(super) fn find_all(segment: SegmentCopy) -> Vec<RecordRef> {
    let segment = Arc::new(segment);
    let found = find(segment.buffer.bytes(), segment.offset);
    found.map(|(owner, place)| RecordRef { owner, place, segment: Arc::clone(&segment) }).collect()
}

/// The owners and places of the intact records in `bytes`, which start at `offset` in the file.
pub(super) fn find(bytes: &[u8], offset: u64) -> impl Iterator<Item = (Owner, Place)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < bytes.len() {
            if let Some((owner, object_bytes)) = record::intact_at_start(&bytes[at..]) {
                let place = Place { offset: offset + at as u64, object_bytes };
                at += place.record_bytes();
                return Some((owner, place));
            }
            at += RECORD_ALIGN;
        }
        None
    })
}

#[cfg(test)]
mod tests {
    use super::super::place::record_bytes;
    use super::*;
    use crate::ids::{Slot, VmId};
    use proptest::prelude::*;

    const OWNER: Owner = Owner { vm: VmId(3), slot: Slot(77) };

    fn sealed(counter: u64, object: &[u8]) -> Vec<u8> {
        let mut record = vec![0xee; record_bytes(object.len())];
        record::seal(&mut record, counter, OWNER, &Cipher::new(&[7; 32]), object);
        record
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn records_are_found_between_garbage(
            batches in prop::collection::vec(
                (prop::collection::vec((17usize..=4110, 0u8..4), 0..5), prop::collection::vec(any::<u8>(), 0..200)),
                1..8,
            ),
        ) {
            let mut segment = Vec::new();
            let mut truth = Vec::new();
            for (records, garbage) in batches {
                for (object_bytes, damaged) in records {
                    let (start, place) = (segment.len(), (1 << 20) + segment.len() as u64);
                    segment.extend_from_slice(&sealed(place, &vec![1; object_bytes]));
                    if damaged == 0 {
                        segment[start + object_bytes] ^= 1;
                    } else {
                        truth.push((OWNER, Place { offset: place, object_bytes }));
                    }
                }
                segment.extend_from_slice(&garbage);
                segment.resize(segment.len().next_multiple_of(4096), 0);
            }
            let found: Vec<_> = find(&segment, 1 << 20).collect();
            prop_assert_eq!(found, truth);
        }

        #[test]
        fn hostile_bytes_are_parsed_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..9000)) {
            prop_assert!(find(&bytes, 1 << 20).count() < 9000);
        }
    }
}
