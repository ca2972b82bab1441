//! Cleaning: a segment in which little lives is read whole, its live records are written elsewhere as they are, and
//! it becomes free. Which records live is for the page tables to say; here there are only headers.

use super::Writeback;
use super::find::{RecordRef, SegmentCopy, find_all};
use super::io::{Buffer, Op, transfer_blocking};
use super::place::{SEGMENT_BYTES, SEGMENT_BYTES_U64, SegmentIndex};
use super::read::ReadError;

use super::status::bump;

/// With so few free segments the next batch may find no room.
const FREE_SCARCE: u64 = 2;

impl Writeback {
    /// The closed segment with the fewest live bytes, when less than half of it lives and less than
    /// `free_percent_min` of the segments are free: before that, cleaning only wears the flash. Of a file with hardly a
    /// free segment, less than seven eighths have to live. `None` when there is nothing to gain.
    ///
    /// A segment that was read before and lost no record since is passed over: it holds something that can't be moved,
    /// which only its owner can free.
    #[must_use]
    pub fn half_dead(&self, free_percent_min: u64) -> Option<SegmentIndex> {
        let mut writer = self.writer.lock();
        let total = u64::from(self.segments.limit()).saturating_sub(1);
        let free = self.segments.free_count();
        if free * 100 >= total * free_percent_min {
            return None;
        }
        let live_max = if free <= FREE_SCARCE { SEGMENT_BYTES_U64 / 8 * 7 } else { SEGMENT_BYTES_U64 / 2 };
        writer.tried.retain(|segment, live| self.segments.closed_live_bytes(*segment) == Some(*live));
        self.segments
            .closed()
            .filter(|(segment, live)| (1..live_max).contains(live) && !writer.tried.contains_key(segment))
            .min_by_key(|(_, live)| *live)
            .map(|(segment, _)| segment)
    }

    /// Reads a closed segment whole and returns every intact record in it, dead ones and those of earlier lives
    /// included. Blocks; for the writing thread.
    ///
    /// For each record whose place the owner's entry names: [`Writeback::append_raw`] it, publish the new place if
    /// the entry is still the same, free the old one (or else the new). The segment is not written anew before the
    /// records are dropped.
    ///
    /// # Errors
    /// When the file doesn't give it.
    pub fn read_segment(&self, segment: SegmentIndex) -> Result<Vec<RecordRef>, ReadError> {
        let mut writer = self.writer.lock();
        let Some(live) = self.segments.closed_live_bytes(segment) else { return Ok(Vec::new()) };
        let Some(pin) = self.segments.pin_segment(segment) else { return Ok(Vec::new()) };
        writer.tried.insert(segment, live);
        let offset = segment.offset();
        match transfer_blocking(&self.file, Op::Read, offset, Buffer::zeroed(SEGMENT_BYTES)) {
            (Ok(()), buffer) => Ok(find_all(SegmentCopy { buffer, offset, _pin: pin })),
            (Err(err), _) => {
                bump(&self.counters.read_errors, 1);
                Err(ReadError::new(err))
            }
        }
    }
}
