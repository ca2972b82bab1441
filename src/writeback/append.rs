//! Writing: a batch is encrypted into one buffer per segment that it touches, and written with one write each. It
//! counts only when all of it is in the file; the caller publishes the places after that.
//!
//! One thread at a time writes, cleans and gives segments back: the shrinker. It waits for the disk here; nobody
//! else does.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use super::Writeback;
use super::find::RecordRef;
use super::give::Giving;
use super::io::{Buffer, Op, transfer_blocking};
use super::place::{Place, SEGMENT_BYTES, SegmentIndex};
use super::plan::{Cursor, Plan, Run, plan};
use super::record::{self, Cipher};
use super::state::{State, StateError};
use super::status::{Refusal, bump};
use crate::ids::Owner;

/// Free segments that new records leave to cleaning: what lives in a half-dead segment has to fit somewhere, or a
/// file that was written full could never be cleaned.
const SPARED_SEGMENTS: usize = 1;
/// A file with no more segments than this spares none.
const SPARELESS_SEGMENTS_MAX: u32 = 4;

/// How many that is in a file of `segments`.
pub(super) fn spared_segments(segments: u32) -> usize {
    if segments > SPARELESS_SEGMENTS_MAX { SPARED_SEGMENTS } else { 0 }
}

/// What only the writing thread needs.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) state: State,
    current: Option<Cursor>,
    /// Between batches; a write takes it along.
    buffer: Option<Buffer>,
    /// Segments that were read for cleaning, with their live bytes at that time.
    pub(super) tried: HashMap<SegmentIndex, u64>,
    pub(super) giving: Giving,
    /// The file system had no room for the last batch, and nothing was given back to it since.
    pub(super) no_space: bool,
}

/// A page to be written.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing<'a> {
    /// Whose it is.
    pub owner: Owner,
    /// The VM's cipher.
    pub cipher: &'a Cipher,
    /// The sealed object, opaque here.
    pub object: &'a [u8],
}

/// Why a batch was not written. None of its records has a place then.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// No free segment but the one that cleaning needs. It passes when records are freed or cleaned up.
    #[error("the writeback file is full")]
    Full,
    /// The file system had no room. It passes when somebody makes some, or segments are given back.
    #[error("the file system of the writeback file has no room")]
    NoSpace,
    /// As much was written today as may be. It passes at midnight UTC.
    #[error("as much was written to the writeback file today as its daily limit allows")]
    Budget,
    /// Writing has failed, now or earlier. Nothing is written any more until the daemon starts again.
    #[error("writeback is off: {reason}")]
    Failed {
        /// What happened first.
        reason: String,
    },
}

/// What a place in the file is filled with.
enum Item<'a> {
    New(&'a Outgoing<'a>),
    Moved(&'a RecordRef),
}

impl Item<'_> {
    fn object_bytes(&self) -> usize {
        match self {
            Self::New(outgoing) => outgoing.object.len(),
            Self::Moved(record) => record.place.object_bytes,
        }
    }

    fn fill(&self, target: &mut [u8], counters: &mut Range<u64>) {
        match self {
            Self::New(Outgoing { owner, cipher, object }) => {
                let counter = counters.next().expect("a counter was taken for every new record");
                record::seal(target, counter, *owner, cipher, object);
            }
            Self::Moved(record) => target.copy_from_slice(record.bytes()),
        }
    }
}

/// What went wrong while a batch was written.
enum Trouble {
    State(StateError),
    File(io::Error),
}

impl Writer {
    pub(super) fn new(state: State) -> Self {
        Self {
            state,
            current: None,
            buffer: None,
            tried: HashMap::new(),
            giving: Giving::default(),
            no_space: false,
        }
    }

    /// Bytes that are left in the open segment.
    pub(super) fn room_bytes(&self) -> u64 {
        self.current.map_or(0, |cursor| (SEGMENT_BYTES - cursor.at) as u64)
    }
}

impl Writeback {
    /// Writes a batch and returns a place for each record, in order. The records live until [`Writeback::free`].
    ///
    /// Blocks until they are in the file; for one thread at a time. A batch of up to half a segment is best: each
    /// ends at a block boundary.
    ///
    /// # Errors
    /// When there is no room, the day's bytes are used up, or the file or the state fails. Nothing lives then.
    ///
    /// # Panics
    /// When an object has an impossible length.
    pub fn append(&self, records: &[Outgoing<'_>]) -> Result<Vec<Place>, WriteError> {
        self.append_on(today(), records)
    }

    pub(super) fn append_on(&self, day: u32, records: &[Outgoing<'_>]) -> Result<Vec<Place>, WriteError> {
        let spared = spared_segments(self.segments.limit());
        self.write_batch(day, &records.iter().map(Item::New).collect::<Vec<_>>(), spared)
    }

    /// Writes records that [`Writeback::read_segment`] found to new places, as they are. Otherwise like
    /// [`Writeback::append`]; the old places live on until they are freed.
    ///
    /// # Errors
    /// As for [`Writeback::append`].
    pub fn append_raw(&self, records: &[RecordRef]) -> Result<Vec<Place>, WriteError> {
        let result = self.write_batch(today(), &records.iter().map(Item::Moved).collect::<Vec<_>>(), 0);
        if result.is_err() {
            // Their segments were not cleaned for want of room; they may be tried again.
            let segments = records.iter().filter_map(|record| record.place.segment());
            let mut writer = self.writer.lock();
            for segment in segments {
                writer.tried.remove(&segment);
            }
        }
        result
    }

    fn write_batch(&self, day: u32, items: &[Item<'_>], spared: usize) -> Result<Vec<Place>, WriteError> {
        let mut writer = self.writer.lock();
        if let Some(reason) = self.off.get() {
            return Err(WriteError::Failed { reason: reason.clone() });
        }
        self.give_back_dead(&mut writer);
        // Of a file that was configured smaller all that is within may be in use; what is moved beyond for a moment comes
        // back when something within was freed by that.
        let beyond_too = matches!(items.first(), Some(Item::Moved(_)));
        let open = || {
            let within = self.segments.take(spared);
            within.or_else(|| if beyond_too { self.segments.take_beyond() } else { None })
        };
        let plan = match plan(writer.current, items.iter().map(Item::object_bytes), open) {
            Ok(plan) => plan,
            Err(opened) => {
                self.abandon(&opened);
                return Err(self.refuse(Refusal::Full));
            }
        };
        if writer.state.written_on(day).saturating_add(plan.padded_bytes()) > self.daily_bytes_max() {
            self.abandon(&plan.opened);
            return Err(self.refuse(Refusal::Budget));
        }
        if let Err(trouble) = self.carry_out(&mut writer, day, &plan, items) {
            self.abandon(&plan.opened);
            let err = self.fail(trouble);
            writer.no_space = err == WriteError::NoSpace;
            return Err(err);
        }
        writer.no_space = false;
        for run in &plan.runs {
            self.segments.add_live(run.segment, run.record_bytes);
        }
        for segment in &plan.filled {
            self.segments.close(*segment);
        }
        writer.current = plan.end.filter(|cursor| cursor.segment.0 < self.segments.limit());
        if let Some(beyond) = plan.end.filter(|_| writer.current.is_none()) {
            self.segments.close(beyond.segment);
        }
        self.count_records(items);
        Ok(plan.places)
    }

    fn count_records(&self, items: &[Item<'_>]) {
        let moved = items.iter().filter(|item| matches!(item, Item::Moved(_))).count() as u64;
        bump(&self.counters.moved_records, moved);
        bump(&self.counters.written_records, items.len() as u64 - moved);
        self.report.lock().refusal = None;
    }

    /// Closes segments that were opened in vain. Nothing lives in them, so this frees them; what a failed write left
    /// there is given back later.
    fn abandon(&self, opened: &[SegmentIndex]) {
        for segment in opened {
            self.segments.close(*segment);
        }
    }

    fn refuse(&self, refusal: Refusal) -> WriteError {
        self.report.lock().refusal = Some(refusal);
        match refusal {
            Refusal::Full => WriteError::Full,
            Refusal::NoSpace => WriteError::NoSpace,
            Refusal::Budget => WriteError::Budget,
        }
    }

    fn fail(&self, trouble: Trouble) -> WriteError {
        let reason = match trouble {
            Trouble::File(err)
                if matches!(err.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) =>
            {
                // Not the file's fault, and it passes: segments that die are given back to the file system.
                bump(&self.counters.no_space_errors, 1);
                return self.refuse(Refusal::NoSpace);
            }
            Trouble::File(err) => {
                bump(&self.counters.write_errors, 1);
                format!("a write to the file failed: {err}")
            }
            Trouble::State(err) => {
                bump(&self.counters.state_errors, 1);
                match std::error::Error::source(&err) {
                    Some(source) => format!("{err}: {source}"),
                    None => err.to_string(),
                }
            }
        };
        let reason = self.off.get_or_init(|| reason).clone();
        tracing::error!(
            reason,
            "writeback is switched off until the next start; what was written is still read"
        );
        WriteError::Failed { reason }
    }

    /// Reserves, counts, encrypts and writes. Counters that a failed batch used are not used again.
    fn carry_out(
        &self,
        writer: &mut Writer,
        day: u32,
        plan: &Plan,
        items: &[Item<'_>],
    ) -> Result<(), Trouble> {
        let new = items.iter().filter(|item| matches!(item, Item::New(_))).count() as u64;
        let mut counters = writer.state.take_counters(new).map_err(Trouble::State)?;
        writer.state.count_written(day, plan.padded_bytes()).map_err(Trouble::State)?;
        self.report.lock().wear = writer.state.wear();
        for run in &plan.runs {
            let buffer = writer.buffer.take().unwrap_or_else(|| Buffer::zeroed(SEGMENT_BYTES));
            let buffer = pack(buffer, run, &items[run.records.clone()], &mut counters);
            let offset = run.segment.offset() + run.start as u64;
            self.report.lock().writing_since = Some(Instant::now());
            let (result, buffer) = transfer_blocking(&self.file, Op::Write, offset, buffer);
            self.report.lock().writing_since = None;
            writer.buffer = Some(buffer);
            result.map_err(Trouble::File)?;
        }
        Ok(())
    }
}

fn pack(mut buffer: Buffer, run: &Run, items: &[Item<'_>], counters: &mut Range<u64>) -> Buffer {
    buffer.fit(run.padded_bytes());
    let mut rest = buffer.bytes_mut();
    for item in items {
        let (target, behind) = rest.split_at_mut(super::place::record_bytes(item.object_bytes()));
        item.fill(target, counters);
        rest = behind;
    }
    rest.fill(0);
    buffer
}

/// The day, UTC, since 1970. A clock that is wrong costs or gives a day's bytes, nothing else.
pub(super) fn today() -> u32 {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    u32::try_from(seconds / (24 * 60 * 60)).unwrap_or(u32::MAX)
}
