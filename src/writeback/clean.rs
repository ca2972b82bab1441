//! Cleaning: a segment in which little lives is read whole, its live records are written elsewhere as they are, and
//! it becomes free. Which records live is for the page tables to say; here there are only headers. A segment is chosen
//! only when its records may be written: reading one in vain helps nobody.

use super::Writeback;
use super::append::{Writer, spared_segments, today};
use super::find::{RecordRef, SegmentCopy, find_all};
use super::io::{Buffer, Op, transfer_blocking};
use super::place::{BLOCK_BYTES, SEGMENT_BYTES, SEGMENT_BYTES_U64, SegmentIndex};
use super::read::ReadError;
use super::status::bump;

/// With so few free segments the next batch may find no room.
const FREE_SCARCE: u64 = 2;
/// A segment of a full file is worth cleaning when it has as much that is dead: its records are padded anew, which costs
/// less than a fifth of that, so every segment that is cleaned is a gain and cleaning comes to an end.
const GAIN_BYTES_MIN: u64 = SEGMENT_BYTES_U64 / 16;
/// Records that are moved end in two segments at most, each padded to a block.
const PADDING_BYTES_MAX: u64 = 2 * BLOCK_BYTES as u64;

impl Writeback {
    /// The closed segment with the fewest live bytes, when less than half of it lives and less than
    /// `free_percent_min` of the segments are free: before that, cleaning only wears the flash. Of a file with hardly a
    /// free segment, less than seven eighths have to live. `None` when there is nothing to gain, or its records may not
    /// be written today.
    ///
    /// A segment that was read before and lost no record since is passed over: it holds something that can't be moved,
    /// which only its owner can free.
    #[must_use]
    pub fn half_dead(&self, free_percent_min: u64) -> Option<SegmentIndex> {
        let total = u64::from(self.segments.limit()).saturating_sub(1);
        let free = self.segments.free_count();
        if free * 100 >= total * free_percent_min {
            return None;
        }
        let live_max = if free <= FREE_SCARCE { SEGMENT_BYTES_U64 / 8 * 7 } else { SEGMENT_BYTES_U64 / 2 };
        self.emptiest_below(live_max)
    }

    /// The closed segment with the fewest live bytes, for a batch that found no room: however much lives in it, if
    /// anything is to be gained. Otherwise like [`Writeback::half_dead`].
    #[must_use]
    pub fn emptiest(&self) -> Option<SegmentIndex> {
        self.emptiest_below(SEGMENT_BYTES_U64 - GAIN_BYTES_MIN + 1)
    }

    fn emptiest_below(&self, live_max: u64) -> Option<SegmentIndex> {
        let writer = &mut *self.writer.lock();
        self.forget_tried(writer);
        let possible = self
            .segments
            .closed_within()
            .filter(|(segment, live)| (1..live_max).contains(live) && !writer.tried.contains_key(segment));
        let (segment, live) = possible.min_by_key(|(_, live)| *live)?;
        let room = self.segments.free_count() + self.segments.free_beyond_count() > 0;
        self.may_move(writer, live, room).then_some(segment)
    }

    /// The last segment beyond the size that was configured in which something lives and can be moved to where there is
    /// room, leaving what new records leave. A file is shortened from its end.
    #[must_use]
    pub fn beyond_size(&self) -> Option<SegmentIndex> {
        let writer = &mut *self.writer.lock();
        self.forget_tried(writer);
        let live = |(_, live): &(SegmentIndex, u64)| *live > 0;
        let mut possible = self.segments.closed_beyond().filter(live);
        let (segment, live) = possible.find(|(segment, _)| !writer.tried.contains_key(segment))?;
        let room = self.segments.free_count() > spared_segments(self.segments.limit()) as u64;
        self.may_move(writer, live, room).then_some(segment)
    }

    /// Whether something lives beyond the size that was configured.
    #[must_use]
    pub fn is_oversized(&self) -> bool {
        self.segments.closed_beyond().any(|(_, live)| live > 0)
    }

    /// Bytes that live in a segment.
    #[must_use]
    pub fn live_bytes(&self, segment: SegmentIndex) -> u64 {
        self.segments.closed_live_bytes(segment).unwrap_or_default()
    }

    fn forget_tried(&self, writer: &mut Writer) {
        writer.tried.retain(|segment, live| self.segments.closed_live_bytes(*segment) == Some(*live));
    }

    /// Whether so many bytes of records may be written elsewhere now: nothing has failed, and there is room in the day
    /// and in the file: there is `room` in a free segment, or enough in the open one.
    fn may_move(&self, writer: &Writer, live_bytes: u64, room: bool) -> bool {
        if !self.is_on() || writer.no_space {
            return false;
        }
        let bytes = live_bytes + PADDING_BYTES_MAX;
        let in_day = writer.state.written_on(today()).saturating_add(bytes) <= self.daily_bytes_max();
        in_day && (room || writer.room_bytes() >= live_bytes)
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
