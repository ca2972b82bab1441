//! What the room has to say about itself: counters that only grow, and a snapshot for status and metrics. Asking
//! never waits for the disk.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::Writeback;
use super::append::today;
use super::io::IoKind;
use super::place::SEGMENT_BYTES_U64;
use super::segments::SegmentCount;
use super::state::Wear;

/// What has happened since the daemon started.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub written_records: AtomicU64,
    pub moved_records: AtomicU64,
    pub read_records: AtomicU64,
    pub write_errors: AtomicU64,
    pub no_space_errors: AtomicU64,
    pub state_errors: AtomicU64,
    pub read_errors: AtomicU64,
    pub discard_errors: AtomicU64,
}

/// Adds to a counter.
pub(super) fn bump(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// What the writing thread says about itself, readable while it waits for the disk.
#[derive(Debug, Default)]
pub(super) struct Report {
    pub wear: Wear,
    /// Why the last batch was refused; `None` when it was written.
    pub refusal: Option<Refusal>,
    /// When the write that is being waited for began.
    pub writing_since: Option<Instant>,
}

/// A write that takes longer is worth telling: stores that wait for room fail after as long by default.
pub const SLOW_AFTER: Duration = Duration::from_secs(2);

/// Why a batch is refused for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    Full,
    NoSpace,
    Budget,
}

/// Whether pages are being written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WritebackState {
    /// They are.
    On,
    /// A write that began so many seconds ago has not ended.
    Slow {
        /// How many, at least [`SLOW_AFTER`].
        for_seconds: u64,
    },
    /// The last batch found no room in the file.
    Full,
    /// The last batch found no room in the file system.
    NoSpace,
    /// The last batch would have exceeded the day's bytes.
    Budget,
    /// Writing failed; there will be none until the next start.
    Off {
        /// What happened.
        reason: String,
    },
}

/// The room at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Whether pages are being written.
    pub state: WritebackState,
    /// How the file is read and written.
    pub io: IoKind,
    /// Whether that goes around the page cache.
    pub direct: bool,
    /// Bytes of the file that are used, the header's segment included.
    pub size_bytes: u64,
    /// How full it is.
    pub segments: SegmentCount,
    /// Bytes written since the state directory was made, padding included.
    pub written_bytes_total: u64,
    /// Bytes of these written today (UTC).
    pub written_bytes_today: u64,
    /// The most bytes to be written on one day.
    pub daily_bytes_max: Option<u64>,
    /// Records written since the daemon started.
    pub written_records: u64,
    /// Records moved by cleaning.
    pub moved_records: u64,
    /// Records read.
    pub read_records: u64,
    /// Failed writes.
    pub write_errors: u64,
    /// Writes for which the file system had no room.
    pub no_space_errors: u64,
    /// Failed writes of the state in the state directory.
    pub state_errors: u64,
    /// Failed transfers from the file; each may have been for several records.
    pub read_errors: u64,
    /// Failed attempts to give segments back.
    pub discard_errors: u64,
}

impl Writeback {
    /// Whether writing has not failed.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.off.get().is_none()
    }

    /// A snapshot. Walks the segments' words; takes only locks that are never held across I/O.
    #[must_use]
    pub fn status(&self) -> Status {
        let (wear, refusal, writing_since) = {
            let report = self.report.lock();
            (report.wear, report.refusal, report.writing_since)
        };
        let slow = writing_since.map(|since| since.elapsed()).filter(|passed| *passed >= SLOW_AFTER);
        let state = match (self.off.get(), slow, refusal) {
            (Some(reason), ..) => WritebackState::Off { reason: reason.clone() },
            (None, Some(passed), _) => WritebackState::Slow { for_seconds: passed.as_secs() },
            (None, None, Some(Refusal::Full)) => WritebackState::Full,
            (None, None, Some(Refusal::NoSpace)) => WritebackState::NoSpace,
            (None, None, Some(Refusal::Budget)) => WritebackState::Budget,
            (None, None, None) => WritebackState::On,
        };
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.counters;
        Status {
            state,
            io: self.file.kind(),
            direct: self.direct,
            size_bytes: u64::from(self.segments.limit()) * SEGMENT_BYTES_U64,
            segments: self.segments.count(),
            written_bytes_total: wear.total_bytes,
            written_bytes_today: if wear.day == today() { wear.day_bytes } else { 0 },
            daily_bytes_max: Some(self.daily_bytes_max()).filter(|max| *max < u64::MAX),
            written_records: count(&counters.written_records),
            moved_records: count(&counters.moved_records),
            read_records: count(&counters.read_records),
            write_errors: count(&counters.write_errors),
            no_space_errors: count(&counters.no_space_errors),
            state_errors: count(&counters.state_errors),
            read_errors: count(&counters.read_errors),
            discard_errors: count(&counters.discard_errors),
        }
    }
}
