//! What outlives the daemon, in one small file of the state directory: which writeback file the page tables' places
//! are in, the write counters that were given out, and what was written today. Each is a record of 64 bytes with its
//! own checksum, replaced by a single write inside one page, so a kill leaves the old one or the new one. All of that
//! stands there twice, because bits flip: first one copy is written, then the other, and nothing goes by a record before
//! both are. Of two sound copies that differ the first counts, so the change was made or never acted upon.
//!
//! ```text
//!   0 which file: magic "BALLWBS\0"   8 version u32    12 segments u32   16 file id [u8; 16], zeros for none
//!  64 counters:   first counter that no record has u64
//! 128 wear:       day u32, zeros u32  8 bytes written that day u64       16 bytes written ever u64
//! 192 the same again
//! ```
//! A record's last four bytes are the crc32c of those before; all else is zeros.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::file::header::FileId;
use super::place::{FILE_BYTES_MAX, SEGMENT_BYTES};
use crate::crash_point;
use crate::private;

const MAGIC: &[u8; 8] = b"BALLWBS\0";
const VERSION: u32 = 1;
const RECORD_BYTES: usize = 64;
const RECORDS: usize = 3;
const COPY_BYTES: usize = RECORDS * RECORD_BYTES;
/// Where each copy starts.
const COPIES_AT: [usize; 2] = [0, COPY_BYTES];
const CHECKED_BYTES: usize = RECORD_BYTES - 4;
const COUNTERS_AT: u64 = 64;
const WEAR_AT: u64 = 128;

/// Counters are reserved so many at a time: a small write per block, and a start skips at most as many.
const COUNTER_BLOCK: u64 = 1 << 16;

/// The open state.
#[derive(Debug)]
pub struct State {
    file: File,
    path: PathBuf,
    /// The writeback file that the page tables' places are in.
    known: Option<Known>,
    /// The next counter to use.
    next_counter: u64,
    /// Counters below are reserved: they will not be used after a restart.
    reserved_counter: u64,
    wear: Wear,
}

/// A writeback file, as the state knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// Which one.
    pub id: FileId,
    /// How many segments it has been given, the header's included.
    pub segments: u32,
}

/// What the flash has been made to bear.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wear {
    /// Days since 1970.
    pub day: u32,
    /// Bytes written on that day.
    pub day_bytes: u64,
    /// Bytes written since the state was made.
    pub total_bytes: u64,
}

/// Why the state can't be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It was written by another version.
    #[error("{} is of version {found}, and this build reads version {VERSION}: run the build that wrote it", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// The version found.
        found: u32,
    },
    /// It is not what was written. Going on could repeat a write counter, which would give pages away.
    #[error("{} is damaged: clear the VMs and remove the state directory", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// It can't be created, read or written.
    #[error("can't {action} {}{}", path.display(), private::advice(source))]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    move |source| StateError::Io { action, path: path.to_owned(), source }
}

impl State {
    /// Opens the state at `path`, creating one that knows no writeback file when there is none. The state directory's
    /// lock is held by the caller.
    ///
    /// # Errors
    /// When it is damaged, of another version, or the file system refuses.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        if !path.exists() {
            create(path)?;
        }
        let file = private::open(path).map_err(io_error("open", path))?;
        let bytes = fs::read(path).map_err(io_error("read", path))?;
        let damaged = || StateError::Damaged { path: path.to_owned() };
        let records = sound(&bytes).ok_or_else(damaged)?;
        let word =
            |record: usize, at: usize| u32::from_le_bytes(std::array::from_fn(|i| records[record][at + i]));
        let long =
            |record: usize, at: usize| u64::from_le_bytes(std::array::from_fn(|i| records[record][at + i]));
        if word(0, 8) != VERSION {
            return Err(StateError::Version { path: path.to_owned(), found: word(0, 8) });
        }
        mend(&file, path, &bytes, &records)?;
        let id: [u8; 16] = std::array::from_fn(|i| records[0][16 + i]);
        let known = (id != [0; 16]).then(|| Known { id: FileId(id), segments: word(0, 12) });
        // Memory is taken for each of them, and a file that long made.
        if known.is_some_and(|known| !(2..=segments_max()).contains(&known.segments)) {
            return Err(damaged());
        }
        let counter = long(1, 0);
        let wear = Wear { day: word(2, 0), day_bytes: long(2, 8), total_bytes: long(2, 16) };
        let path = path.to_owned();
        Ok(Self { file, path, known, next_counter: counter, reserved_counter: counter, wear })
    }

    /// The writeback file that the page tables' places are in.
    #[must_use]
    pub fn known(&self) -> Option<Known> {
        self.known
    }

    /// What was written so far.
    #[must_use]
    pub fn wear(&self) -> Wear {
        self.wear
    }

    /// Changes which file is known. Counters go on: the VMs' keys are still the same.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn set_known(&mut self, known: Option<Known>) -> Result<(), StateError> {
        self.write(0, known_record(known))?;
        self.known = known;
        Ok(())
    }

    /// Gives out counters that no record has had, and that none will have after a restart.
    ///
    /// # Errors
    /// When they can't be reserved.
    pub fn take_counters(&mut self, count: u64) -> Result<Range<u64>, StateError> {
        let used_up =
            || io_error("take more write counters from", &self.path)(io::ErrorKind::QuotaExceeded.into());
        let end = self.next_counter.checked_add(count).ok_or_else(used_up)?;
        if end > self.reserved_counter {
            let reserved = end.checked_add(COUNTER_BLOCK).ok_or_else(used_up)?;
            self.write(COUNTERS_AT, record(&[(0, &reserved.to_le_bytes())]))?;
            self.reserved_counter = reserved;
        }
        Ok(std::mem::replace(&mut self.next_counter, end)..end)
    }

    /// Bytes that may still be written on `day`; a new day, by whatever the clock says, begins at nothing.
    #[must_use]
    pub fn written_on(&self, day: u32) -> u64 {
        if self.wear.day == day { self.wear.day_bytes } else { 0 }
    }

    /// Counts bytes that are about to be written on `day`.
    ///
    /// # Errors
    /// When it can't be written down.
    pub fn count_written(&mut self, day: u32, bytes: u64) -> Result<(), StateError> {
        let wear = Wear {
            day,
            day_bytes: self.written_on(day) + bytes,
            total_bytes: self.wear.total_bytes.saturating_add(bytes),
        };
        self.write(
            WEAR_AT,
            record(&[
                (0, &wear.day.to_le_bytes()),
                (8, &wear.day_bytes.to_le_bytes()),
                (16, &wear.total_bytes.to_le_bytes()),
            ]),
        )?;
        self.wear = wear;
        Ok(())
    }

    fn write(&self, at: u64, record: [u8; RECORD_BYTES]) -> Result<(), StateError> {
        COPIES_AT.iter().try_for_each(|copy| {
            crash_point::after(self.file.write_all_at(&record, *copy as u64 + at))
                .map_err(io_error("write", &self.path))
        })
    }
}

type Records = [[u8; RECORD_BYTES]; RECORDS];

/// Each record from the first copy that is sound.
fn sound(bytes: &[u8]) -> Option<Records> {
    let mut records = [[0; RECORD_BYTES]; RECORDS];
    for (index, record) in records.iter_mut().enumerate() {
        let copies = COPIES_AT
            .iter()
            .filter_map(|copy| bytes.get(copy + index * RECORD_BYTES..)?.first_chunk::<RECORD_BYTES>());
        *record = *copies.into_iter().find(|copy| is_sound(index, copy))?;
    }
    Some(records)
}

fn is_sound(index: usize, record: &[u8; RECORD_BYTES]) -> bool {
    let checksum = crc32c::crc32c(&record[..CHECKED_BYTES]).to_le_bytes();
    checksum == record[CHECKED_BYTES..] && (index > 0 || record.starts_with(MAGIC))
}

/// Makes both copies what is gone by, before anything is.
fn mend(file: &File, path: &Path, found: &[u8], records: &Records) -> Result<(), StateError> {
    let right = [records.as_flattened(), records.as_flattened()].concat();
    if found == right {
        return Ok(());
    }
    let mut copies = found.as_chunks::<RECORD_BYTES>().0.iter().enumerate();
    // A kill between the two writes leaves sound ones, and a build that knew of one copy wrote no other.
    if !copies.all(|(index, copy)| is_sound(index % RECORDS, copy)) {
        tracing::error!(path = %path.display(), "one copy of the writeback state is damaged; it is mended from the other");
    }
    crash_point::after(file.write_all_at(&right, 0)).map_err(io_error("write", path))
}

/// Segments of a file that is as long as a place can tell.
fn segments_max() -> u32 {
    u32::try_from(FILE_BYTES_MAX / SEGMENT_BYTES as u64).unwrap_or(u32::MAX)
}

/// A new state. Its counters begin somewhere: should a state directory lose just this file, the records that were
/// written under it and those that follow still have different ones.
fn create(path: &Path) -> Result<(), StateError> {
    let mut random = [0; 8];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
        .map_err(|err| io_error("find random numbers for", path)(err.into()))?;
    let counter = u64::from_le_bytes(random) >> 1;
    let records =
        [known_record(None), record(&[(0, &counter.to_le_bytes())]), record(&[(0, &0u32.to_le_bytes())])];
    let new = path.with_extension("new");
    private::write(&new, &[records.as_flattened(), records.as_flattened()].concat())
        .map_err(io_error("write", &new))?;
    crash_point::after(fs::rename(&new, path)).map_err(io_error("replace", path))
}

fn known_record(known: Option<Known>) -> [u8; RECORD_BYTES] {
    let (id, segments) = known.map_or(([0; 16], 0), |known| (known.id.0, known.segments));
    record(&[(0, MAGIC), (8, &VERSION.to_le_bytes()), (12, &segments.to_le_bytes()), (16, &id)])
}

fn record(fields: &[(usize, &[u8])]) -> [u8; RECORD_BYTES] {
    let mut record = [0; RECORD_BYTES];
    for (at, field) in fields {
        record[*at..*at + field.len()].copy_from_slice(field);
    }
    let checksum = crc32c::crc32c(&record[..CHECKED_BYTES]);
    record[CHECKED_BYTES..].copy_from_slice(&checksum.to_le_bytes());
    record
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(dir: &tempfile::TempDir) -> PathBuf {
        dir.path().join("writeback")
    }

    #[test]
    fn no_counter_is_given_out_twice_over_restarts() {
        let dir = tempfile::tempdir().unwrap();
        let mut last = 0;
        for count in [1, 5, COUNTER_BLOCK, 3 * COUNTER_BLOCK, 0, 7] {
            let mut state = State::open(&path(&dir)).unwrap();
            for _ in 0..3 {
                let counters = state.take_counters(count).unwrap();
                assert_eq!(counters.end - counters.start, count);
                assert!(counters.start >= last);
                last = counters.end;
            }
        }
    }

    #[test]
    fn two_states_begin_at_different_counters() {
        let first = || State::open(&path(&tempfile::tempdir().unwrap())).unwrap().take_counters(1).unwrap();
        assert_ne!(first(), first());
    }

    #[test]
    fn what_was_written_is_known_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let mut state = State::open(&path(&dir)).unwrap();
        assert_eq!((state.known(), state.wear()), (None, Wear::default()));
        let known = Some(Known { id: FileId([3; 16]), segments: 77 });
        state.set_known(known).unwrap();
        state.count_written(20_000, 5).unwrap();
        state.count_written(20_001, 7).unwrap();
        state.count_written(20_001, 1).unwrap();
        let state = State::open(&path(&dir)).unwrap();
        assert_eq!(state.known(), known);
        assert_eq!((state.written_on(20_001), state.written_on(20_002)), (8, 0));
        assert_eq!(state.wear().total_bytes, 13);
    }

    #[test]
    fn one_damaged_copy_is_mended_and_two_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut state = State::open(&path(&dir)).unwrap();
        let known = Some(Known { id: FileId([3; 16]), segments: 77 });
        state.set_known(known).unwrap();
        state.count_written(20_000, 5).unwrap();
        let end = state.take_counters(7).unwrap().end;
        let good = fs::read(path(&dir)).unwrap();
        for bit in 0..good.len() * 8 {
            let mut damaged = good.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            fs::write(path(&dir), &damaged).unwrap();
            let mut state = State::open(&path(&dir)).unwrap();
            assert_eq!((state.known(), state.written_on(20_000)), (known, 5), "bit {bit}");
            assert_eq!(fs::read(path(&dir)).unwrap(), good, "bit {bit}");
            assert!(state.take_counters(1).unwrap().start >= end);
            damaged[(bit / 8 + COPY_BYTES) % good.len()] ^= 1;
            fs::write(path(&dir), damaged).unwrap();
            assert!(matches!(State::open(&path(&dir)), Err(StateError::Damaged { .. })), "bit {bit}");
        }
    }

    #[test]
    fn a_state_of_one_copy_gets_another_and_other_versions_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        drop(State::open(&path(&dir)).unwrap());
        let good = fs::read(path(&dir)).unwrap();
        fs::write(path(&dir), &good[..COPY_BYTES]).unwrap();
        drop(State::open(&path(&dir)).unwrap());
        assert_eq!(fs::read(path(&dir)).unwrap(), good);
        let mut newer = good[..COPY_BYTES].to_vec();
        newer[8] = 2;
        let checksum = crc32c::crc32c(&newer[..60]);
        newer[60..64].copy_from_slice(&checksum.to_le_bytes());
        fs::write(path(&dir), newer).unwrap();
        assert!(matches!(State::open(&path(&dir)), Err(StateError::Version { found: 2, .. })));
    }

    /// As a kill between the two writes leaves it.
    #[test]
    fn of_two_sound_copies_the_first_counts_whichever_is_the_newer() {
        let dir = tempfile::tempdir().unwrap();
        let mut state = State::open(&path(&dir)).unwrap();
        let old = fs::read(path(&dir)).unwrap();
        state.count_written(20_000, 5).unwrap();
        let new = fs::read(path(&dir)).unwrap();
        for (first, second, written) in [(&new, &old, 5), (&old, &new, 0)] {
            fs::write(path(&dir), [&first[..COPY_BYTES], &second[..COPY_BYTES]].concat()).unwrap();
            assert_eq!(State::open(&path(&dir)).unwrap().written_on(20_000), written);
            assert_eq!(&fs::read(path(&dir)).unwrap(), first);
        }
    }

    #[test]
    fn as_many_segments_as_no_file_can_have_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for (segments, is_right) in [(0, false), (1, false), (2, true), (segments_max(), true)] {
            let mut state = State::open(&path(&dir)).unwrap();
            state.set_known(Some(Known { id: FileId([3; 16]), segments })).unwrap();
            assert_eq!(State::open(&path(&dir)).is_ok(), is_right, "{segments}");
            fs::remove_file(path(&dir)).unwrap();
        }
        let mut state = State::open(&path(&dir)).unwrap();
        state.set_known(Some(Known { id: FileId([3; 16]), segments: segments_max() + 1 })).unwrap();
        assert!(matches!(State::open(&path(&dir)), Err(StateError::Damaged { .. })));
    }
}
