//! What each segment of the file is doing: how many of its bytes live, who reads it, whether it may be written
//! anew. Nothing of it is on disk: at start the page tables say what lives.
//!
//! A segment is free, open (the one being written) or closed. A closed one that has neither live bytes nor readers
//! becomes free by whoever took the last of either away. It is not written again before that, so a record can be
//! read as long as it is pinned. Nobody reads a segment without live bytes: a pin is taken while an entry names the
//! record, under the lock that also covers the entry, and freed after the entry is gone.
//!
//! Locks: one for the lists of free segments, held for a few instructions. Counting is one atomic word a segment.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::pin::{Pin, SegmentPin};
use super::place::{Place, SEGMENT_BYTES_U64, SegmentIndex};

/// A word: live bytes in bits 0–31, readers in 32–61, open in 62, closed in 63. Zero is a free segment.
const LIVE_MASK: u64 = (1 << 32) - 1;
const READER: u64 = 1 << 32;
const OPEN: u64 = 1 << 62;
const CLOSED: u64 = 1 << 63;

/// All segments of the file. Shared by reference; every method takes `&self`.
#[derive(Debug)]
pub struct Segments {
    words: Vec<AtomicU64>,
    /// Segments from here on are beyond the configured size: they are read as long as they live, and written only with
    /// what cleaning can put nowhere else for the moment.
    limit: u32,
    lists: Mutex<Lists>,
}

/// The free segments. The last of a list is used first.
#[derive(Debug, Default)]
struct Lists {
    /// Known to take no room in the file system.
    clean: Vec<SegmentIndex>,
    /// To be given back to it. May be written without that.
    dead: Vec<SegmentIndex>,
    /// The same two beyond the limit, until the file ends there.
    beyond_clean: Vec<SegmentIndex>,
    beyond: Vec<SegmentIndex>,
    /// The file ends at the limit. Whoever freed the last of what was beyond it may only then come to put it on a list.
    is_beyond_gone: bool,
}

/// Why a recovered entry can't be right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdoptError {
    /// No record of that length can lie there.
    #[error("no record with an object of {} bytes can lie at offset {:#x} of the writeback file", place.object_bytes, place.offset)]
    Misplaced {
        /// The place that the entry named.
        place: Place,
    },
    /// More records than a segment can hold.
    #[error("the entries name more records than fit the segment around offset {:#x} of the writeback file", place.offset)]
    Overfull {
        /// The place of the record that was too much.
        place: Place,
    },
}

/// How full the file is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SegmentCount {
    /// Segments that records may be written to.
    pub total: u64,
    /// Segments of these that hold nothing.
    pub free: u64,
    /// Bytes of the records that entries name, in all segments.
    pub live_bytes: u64,
}

impl Segments {
    /// `count` segments, header segment included, none adopted or free yet; those from `limit` on are not written.
    #[must_use]
    pub fn new(count: u32, limit: u32) -> Self {
        let words = (0..count).map(|_| AtomicU64::new(0)).collect();
        Self { words, limit, lists: Mutex::default() }
    }

    fn word(&self, segment: SegmentIndex) -> &AtomicU64 {
        &self.words[segment.index()]
    }

    fn indices(&self) -> impl DoubleEndedIterator<Item = SegmentIndex> + use<> {
        let count = u32::try_from(self.words.len()).expect("the number of segments was a u32");
        (1..count).map(SegmentIndex)
    }

    fn segment_of(&self, place: Place) -> Option<SegmentIndex> {
        place.segment().filter(|segment| segment.index() < self.words.len())
    }

    /// At start: takes note of a record that an entry names.
    ///
    /// # Errors
    /// When the place is impossible, which means a damaged table or another file.
    pub fn adopt(&self, place: Place) -> Result<(), AdoptError> {
        let segment = self.segment_of(place).ok_or(AdoptError::Misplaced { place })?;
        let bytes = place.record_bytes() as u64;
        self.word(segment)
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
                ((word & LIVE_MASK) + bytes <= SEGMENT_BYTES_U64).then(|| (word + bytes) | CLOSED)
            })
            .map(|_| ())
            .map_err(|_| AdoptError::Overfull { place })
    }

    /// At start, after the last [`Segments::adopt`]: what no entry names is free; `clean` when the file was just made.
    pub fn finish_adoption(&self, clean: bool) {
        let mut lists = self.lists.lock();
        let free = self.indices().rev().filter(|index| self.word(*index).load(Ordering::Acquire) == 0);
        let (beyond, within): (Vec<_>, Vec<_>) = free.partition(|index| index.0 >= self.limit);
        *lists = if clean {
            Lists { clean: within, ..Lists::default() }
        } else {
            Lists { dead: within, beyond, ..Lists::default() }
        };
    }

    /// Opens a free segment for writing, if `spared` others are left.
    pub fn take(&self, spared: usize) -> Option<SegmentIndex> {
        let mut lists = self.lists.lock();
        if lists.clean.len() + lists.dead.len() <= spared {
            return None;
        }
        let segment = lists.clean.pop().or_else(|| lists.dead.pop())?;
        Some(self.open(segment))
    }

    /// The same beyond the limit.
    pub fn take_beyond(&self) -> Option<SegmentIndex> {
        let mut lists = self.lists.lock();
        let segment = lists.beyond_clean.pop().or_else(|| lists.beyond.pop())?;
        Some(self.open(segment))
    }

    fn open(&self, segment: SegmentIndex) -> SegmentIndex {
        let before = self.word(segment).swap(OPEN, Ordering::AcqRel);
        assert_eq!(before, 0, "a free segment has neither records nor readers");
        segment
    }

    /// Ends the writing of an open segment. From here on it becomes free when its last record does.
    pub fn close(&self, segment: SegmentIndex) {
        let before = self.word(segment).fetch_add(CLOSED - OPEN, Ordering::AcqRel);
        assert!(before & OPEN != 0, "only an open segment is closed");
        self.retire_if_idle(segment);
    }

    /// Counts records that were written to an open segment.
    pub fn add_live(&self, segment: SegmentIndex, bytes: usize) {
        let before = self.word(segment).fetch_add(bytes as u64, Ordering::AcqRel);
        assert!(before & OPEN != 0, "only an open segment is written");
    }

    /// Gives up a record that no entry names any more. One atomic operation, and a short lock for the last of its
    /// segment.
    ///
    /// # Panics
    /// When the segment has fewer live bytes than the record: freed twice, or never written.
    pub fn free(&self, place: Place) {
        let segment = self.segment_of(place).expect("a record is freed where it was written");
        let bytes = place.record_bytes() as u64;
        let before = self.word(segment).fetch_sub(bytes, Ordering::AcqRel);
        assert!(before & LIVE_MASK >= bytes, "a record is freed once");
        if before & LIVE_MASK == bytes {
            self.retire_if_idle(segment);
        }
    }

    /// Keeps the segment of `place` from being written anew. The caller holds the lock of the entry that names the
    /// place, so that its [`Segments::free`] comes later. `None` when nothing lives there: a damaged entry.
    pub fn pin(self: &Arc<Self>, place: Place) -> Option<Pin> {
        Some(Pin::new(place, self.pin_segment(self.segment_of(place)?)?))
    }

    /// Keeps a segment from being written anew. `None` when nothing lives there.
    pub fn pin_segment(self: &Arc<Self>, segment: SegmentIndex) -> Option<SegmentPin> {
        self.word(segment)
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
                (word & LIVE_MASK > 0).then_some(word + READER)
            })
            .ok()?;
        Some(SegmentPin::new(Arc::clone(self), segment))
    }

    /// Ends a [`SegmentPin`].
    pub(super) fn unpin(&self, segment: SegmentIndex) {
        self.word(segment).fetch_sub(READER, Ordering::AcqRel);
        self.retire_if_idle(segment);
    }

    /// Only one of those who see the segment idle succeeds; once it has no live bytes nobody can pin it again.
    fn retire_if_idle(&self, segment: SegmentIndex) {
        if self.word(segment).compare_exchange(CLOSED, 0, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            self.retire(segment);
        }
    }

    fn retire(&self, segment: SegmentIndex) {
        let mut lists = self.lists.lock();
        if segment.0 < self.limit {
            lists.dead.push(segment);
        } else if !lists.is_beyond_gone {
            lists.beyond.push(segment);
        }
    }

    /// Takes up to `segments_max` dead segments out of the lists, in file order, to be given back to the file
    /// system; [`Segments::put_back`] follows. Nobody can open them meanwhile.
    pub fn take_dead(&self, segments_max: usize) -> Vec<SegmentIndex> {
        let mut lists = self.lists.lock();
        let beyond = lists.beyond.len().saturating_sub(segments_max);
        let mut taken = lists.beyond.split_off(beyond);
        let dead = lists.dead.len().saturating_sub(segments_max - taken.len());
        taken.extend(lists.dead.split_off(dead));
        taken.sort_unstable();
        taken
    }

    /// Returns what [`Segments::take_dead`] took and takes no room any more.
    pub fn put_back(&self, segments: &[SegmentIndex]) {
        let (within, beyond) = self.split(segments);
        let mut lists = self.lists.lock();
        lists.clean.extend(within.iter().rev());
        lists.beyond_clean.extend(beyond.iter().rev());
    }

    /// Returns what [`Segments::take_dead`] took and is as it was.
    pub fn put_back_dead(&self, segments: &[SegmentIndex]) {
        let (within, beyond) = self.split(segments);
        let mut lists = self.lists.lock();
        lists.dead.extend(within);
        lists.beyond.extend(beyond);
    }

    /// Those within the limit, and those beyond it.
    fn split(&self, segments: &[SegmentIndex]) -> (Vec<SegmentIndex>, Vec<SegmentIndex>) {
        segments.iter().copied().partition(|segment| segment.0 < self.limit)
    }

    /// How full the file is. Walks all segments.
    #[must_use]
    pub fn count(&self) -> SegmentCount {
        let live_bytes = self.words.iter().map(|word| word.load(Ordering::Relaxed) & LIVE_MASK).sum();
        let total = u64::from(self.limit).saturating_sub(1);
        SegmentCount { total, free: self.free_count(), live_bytes }
    }

    /// Segments that may be written and hold nothing.
    #[must_use]
    pub fn free_count(&self) -> u64 {
        let lists = self.lists.lock();
        (lists.clean.len() + lists.dead.len()) as u64
    }

    /// The same beyond the limit.
    #[must_use]
    pub fn free_beyond_count(&self) -> u64 {
        let lists = self.lists.lock();
        (lists.beyond_clean.len() + lists.beyond.len()) as u64
    }

    /// Segments from this one on are beyond the configured size.
    #[must_use]
    pub fn limit(&self) -> u32 {
        self.limit
    }

    /// Live bytes of a closed segment; `None` when it is open or free.
    #[must_use]
    pub fn closed_live_bytes(&self, segment: SegmentIndex) -> Option<u64> {
        let word = self.words.get(segment.index())?.load(Ordering::Acquire);
        (word & CLOSED != 0).then_some(word & LIVE_MASK)
    }

    /// Every closed segment that may be written again, with its live bytes.
    pub fn closed_within(&self) -> impl Iterator<Item = (SegmentIndex, u64)> {
        let within = self.indices().take_while(|index| index.0 < self.limit);
        within.filter_map(|index| Some((index, self.closed_live_bytes(index)?)))
    }

    /// Every other closed segment, the last one first, with its live bytes.
    pub fn closed_beyond(&self) -> impl Iterator<Item = (SegmentIndex, u64)> {
        let beyond = self.indices().rev().take_while(|index| index.0 >= self.limit);
        beyond.filter_map(|index| Some((index, self.closed_live_bytes(index)?)))
    }

    /// Gives up the segments beyond the limit, if nothing lives there and nobody reads: none is opened any more. False
    /// when some are in use. For the writing thread, which opens them.
    #[must_use]
    pub fn give_up_beyond(&self) -> bool {
        let mut beyond = self.words.iter().skip(SegmentIndex(self.limit).index());
        if !beyond.all(|word| word.load(Ordering::Acquire) == 0) {
            return false;
        }
        let mut lists = self.lists.lock();
        (lists.beyond_clean, lists.beyond, lists.is_beyond_gone) = (Vec::new(), Vec::new(), true);
        true
    }

    /// Recounts from the places that entries name and compares; unless `all` are given, others may live as well. Nothing
    /// may be written or freed meanwhile.
    ///
    /// # Panics
    /// When a segment's live bytes are not those of its records, or a free segment is not on exactly one list.
    pub fn validate(&self, places: impl IntoIterator<Item = Place>, all: bool) {
        let mut live: HashMap<SegmentIndex, u64> = HashMap::new();
        for place in places {
            let segment = self.segment_of(place).expect("an entry names a possible place");
            *live.entry(segment).or_default() += place.record_bytes() as u64;
        }
        let lists = self.lists.lock();
        let mut listed: HashMap<SegmentIndex, u32> = HashMap::new();
        let beyond = lists.beyond_clean.iter().chain(&lists.beyond);
        for index in lists.clean.iter().chain(&lists.dead).chain(beyond) {
            *listed.entry(*index).or_default() += 1;
        }
        for index in self.indices() {
            let word = self.word(index).load(Ordering::Acquire);
            let recounted = live.get(&index).copied().unwrap_or_default();
            let unnamed_bytes = (word & LIVE_MASK).checked_sub(recounted).expect("what is named lives");
            assert!(!all || unnamed_bytes == 0, "live bytes of {index:?}");
            assert_ne!(
                word & (LIVE_MASK | READER | OPEN | CLOSED),
                CLOSED,
                "{index:?} is idle, yet not free"
            );
            // What is beyond the limit is on none once the file ends there.
            let on_lists = listed.get(&index).copied().unwrap_or_default();
            let expected = u32::from(word == 0);
            assert!(
                on_lists == expected || (index.0 >= self.limit && on_lists == 0),
                "{index:?} is on {on_lists} lists"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::place::SEGMENT_BYTES;
    use super::*;

    fn fresh(count: u32) -> Arc<Segments> {
        let segments = Arc::new(Segments::new(count, count));
        segments.finish_adoption(true);
        segments
    }

    fn write(segments: &Segments, segment: SegmentIndex, at: usize) -> Place {
        let place = Place::new(segment, at, 1000);
        segments.add_live(segment, place.record_bytes());
        place
    }

    #[test]
    fn a_segment_is_not_free_while_it_is_written_read_or_live() {
        let segments = fresh(2);
        let segment = segments.take(0).unwrap();
        let place = write(&segments, segment, 0);
        let pin = segments.pin(place).unwrap();
        segments.free(place);
        assert!(segments.take(0).is_none(), "open and read");
        segments.close(segment);
        assert!(segments.take(0).is_none(), "still read");
        drop(pin);
        segments.validate([], true);
        assert_eq!(segments.take(0), Some(segment));
        assert!(segments.pin(place).is_none(), "nothing lives there");
    }

    #[test]
    fn what_no_entry_names_is_free_after_a_start() {
        let segments = Segments::new(5, 4);
        let places = [Place::new(SegmentIndex(2), 4096, 17), Place::new(SegmentIndex(4), 0, 4110)];
        for place in places {
            segments.adopt(place).unwrap();
        }
        segments.finish_adoption(false);
        segments.validate(places, true);
        assert_eq!(segments.count(), SegmentCount { total: 3, free: 2, live_bytes: 64 + 4160 });
        // Beyond the limit a record can be freed, and its segment is given back, but never written.
        segments.free(places[1]);
        let dead = segments.take_dead(9);
        assert_eq!(dead, [SegmentIndex(1), SegmentIndex(3), SegmentIndex(4)]);
        segments.put_back(&dead);
        assert_eq!((segments.take(0), segments.take(0)), (Some(SegmentIndex(1)), Some(SegmentIndex(3))));
        assert_eq!(segments.take(0), None);
    }

    #[test]
    fn a_segment_that_is_retired_after_the_file_was_cut_is_never_written() {
        let segments = Segments::new(5, 4);
        // Whoever freed its last record has not come to put it on a list.
        segments.finish_adoption(true);
        assert!(segments.give_up_beyond());
        segments.retire(SegmentIndex(4));
        assert_eq!((segments.take_beyond(), segments.free_beyond_count()), (None, 0));
    }

    #[test]
    fn impossible_entries_are_refused() {
        let segments = Segments::new(3, 3);
        let place = Place::new(SegmentIndex(3), 0, 100);
        assert_eq!(segments.adopt(place), Err(AdoptError::Misplaced { place }));
        let place = Place { offset: 4096, object_bytes: 100 };
        assert_eq!(segments.adopt(place), Err(AdoptError::Misplaced { place }));
        let place = Place::new(SegmentIndex(1), 0, 4110);
        for _ in 0..SEGMENT_BYTES / place.record_bytes() {
            segments.adopt(place).unwrap();
        }
        assert_eq!(segments.adopt(place), Err(AdoptError::Overfull { place }));
    }

    #[test]
    #[should_panic(expected = "freed once")]
    fn freeing_twice_is_a_broken_invariant() {
        let segments = fresh(2);
        let segment = segments.take(0).unwrap();
        let place = write(&segments, segment, 0);
        segments.free(place);
        segments.free(place);
    }
}
