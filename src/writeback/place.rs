//! Where a record lies in the writeback file: the arithmetic of segments, blocks and records. Knows no I/O.

use crate::page::PAGE_SIZE;

/// Bytes of a segment, the unit in which the file is written, cleaned and given back.
pub const SEGMENT_BYTES: usize = 1 << 20;
/// [`SEGMENT_BYTES`] in the type that file offsets use.
pub const SEGMENT_BYTES_U64: u64 = SEGMENT_BYTES as u64;
/// Bytes of a block: every transfer starts and ends at a multiple of it, which is what direct I/O asks for.
pub const BLOCK_BYTES: usize = 4096;
/// Records start at multiples of this many bytes, so that an entry can name them in fewer bits.
pub const RECORD_ALIGN: usize = 16;
/// Bytes of the header in front of a record's object.
pub const RECORD_HEADER_BYTES: usize = 24;
/// Bytes of the authentication tag behind it.
pub const TAG_BYTES: usize = 16;
/// The shortest object that a record may hold.
pub const OBJECT_BYTES_MIN: usize = 15;
/// The longest: a raw page and 14 bytes in front of it.
pub const OBJECT_BYTES_MAX: usize = PAGE_SIZE + 14;
/// An entry has 40 bits for the offset, in units of [`RECORD_ALIGN`]; no file is longer than they reach.
pub const FILE_BYTES_MAX: u64 = (RECORD_ALIGN as u64) << 40;

/// A segment by its position in the file. Segment 0 holds the file's header and no records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentIndex(pub u32);

impl SegmentIndex {
    /// Where the segment starts in the file, in bytes.
    #[must_use]
    pub fn offset(self) -> u64 {
        u64::from(self.0) * SEGMENT_BYTES_U64
    }

    /// The segment as an index into a table.
    #[must_use]
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Names one record: what an entry of a page table holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// Offset of the record's header in the file, in bytes; a multiple of [`RECORD_ALIGN`].
    pub offset: u64,
    /// Bytes of the object inside ([`OBJECT_BYTES_MIN`] to [`OBJECT_BYTES_MAX`]).
    pub object_bytes: usize,
}

impl Place {
    /// The place of a record at `at` bytes into a segment.
    #[must_use]
    pub(super) fn new(segment: SegmentIndex, at: usize, object_bytes: usize) -> Self {
        Self { offset: segment.offset() + at as u64, object_bytes }
    }

    /// The segment that holds the record, or `None` when no record can lie there: outside every segment, across
    /// the end of one, unaligned, or of an impossible length.
    #[must_use]
    pub fn segment(self) -> Option<SegmentIndex> {
        let index = u32::try_from(self.offset / SEGMENT_BYTES_U64).ok().filter(|index| *index > 0)?;
        let possible = (OBJECT_BYTES_MIN..=OBJECT_BYTES_MAX).contains(&self.object_bytes)
            && self.offset.is_multiple_of(RECORD_ALIGN as u64)
            && self.start() + self.record_bytes() <= SEGMENT_BYTES;
        possible.then_some(SegmentIndex(index))
    }

    /// Bytes from the start of the segment to the record.
    #[must_use]
    pub fn start(self) -> usize {
        usize::try_from(self.offset % SEGMENT_BYTES_U64).expect("a segment fits the address space")
    }

    /// Bytes that the record takes from its segment.
    #[must_use]
    pub fn record_bytes(self) -> usize {
        record_bytes(self.object_bytes)
    }
}

/// Bytes that a record with an object of `object_bytes` takes: header, ciphertext and tag, rounded up.
#[must_use]
pub fn record_bytes(object_bytes: usize) -> usize {
    sealed_bytes(object_bytes).next_multiple_of(RECORD_ALIGN)
}

/// The same without the rounding: what is written and verified.
#[must_use]
pub(super) fn sealed_bytes(object_bytes: usize) -> usize {
    RECORD_HEADER_BYTES + object_bytes + TAG_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_lies_in_one_segment_or_nowhere() {
        let place = |offset, object_bytes| Place { offset, object_bytes };
        let last = SEGMENT_BYTES_U64 * 2 - record_bytes(17) as u64;
        assert_eq!(place(SEGMENT_BYTES_U64, 17).segment(), Some(SegmentIndex(1)));
        assert_eq!(place(last, 17).segment(), Some(SegmentIndex(1)));
        for (offset, object_bytes) in [
            (4096, 17),
            (SEGMENT_BYTES_U64 + 8, 17),
            (SEGMENT_BYTES_U64, OBJECT_BYTES_MIN - 1),
            (SEGMENT_BYTES_U64, OBJECT_BYTES_MAX + 1),
            (last + 16, 17),
            (u64::MAX - 15, 17),
        ] {
            assert_eq!(place(offset, object_bytes).segment(), None, "{offset} {object_bytes}");
        }
    }
}
