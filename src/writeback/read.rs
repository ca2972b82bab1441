//! Reading: places that lie close together come with one transfer. Nothing here waits: the caller submits, and the
//! I/O thread calls back with the records as they are in the file; they are verified where the pages are needed.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;

use super::Writeback;
use super::io::{BackingFile, Buffer, Op, transfer};
use super::pin::Pin;
use super::place::{BLOCK_BYTES, Place, SEGMENT_BYTES_U64};
use super::record::RecordBytes;
use super::status::{Counters, bump};

/// Records with a gap of more bytes between them are read apart.
const GAP_BYTES_MAX: u64 = 16 << 10;
/// The most bytes of one transfer.
const TRANSFER_BYTES_MAX: u64 = 256 << 10;
const BLOCK_BYTES_U64: u64 = BLOCK_BYTES as u64;

/// Called with a result for each pin of the batch, in order.
pub type ReadDone = Box<dyn FnOnce(Vec<Result<RecordBytes, ReadError>>) + Send>;

/// The file did not give a record. Several records of one transfer share the cause.
#[derive(Clone, Debug, thiserror::Error)]
#[error("a read from the writeback file failed")]
pub struct ReadError {
    /// What the system said.
    #[source]
    source: Arc<io::Error>,
}

impl ReadError {
    pub(super) fn new(source: io::Error) -> Self {
        Self { source: Arc::new(source) }
    }
}

/// A batch on its way.
struct Gather {
    results: Vec<Option<Result<RecordBytes, ReadError>>>,
    /// Transfers that have not ended.
    left: usize,
    /// Held until the last transfer has ended.
    pins: Vec<Pin>,
    done: Option<ReadDone>,
}

impl fmt::Debug for Gather {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} records, {} transfers left", self.results.len(), self.left)
    }
}

/// One transfer: a range of the file in whole blocks, and which of the batch's records are in it.
#[derive(Debug, PartialEq, Eq)]
struct Group {
    range: Range<u64>,
    members: Vec<usize>,
}

impl Writeback {
    /// Reads records and calls `done` when all of them are there or have failed. `done` runs on the I/O thread (for
    /// an empty batch on the caller's) and must neither block nor take a lock under which this is called.
    ///
    /// Holds no lock but that of a queue, for a moment. How much is read at a time is the callers' to bound: a batch
    /// costs at most 256 KiB of memory per transfer, and at most a transfer per record.
    pub fn read(&self, batch: Vec<Pin>, done: ReadDone) {
        if batch.is_empty() {
            return done(Vec::new());
        }
        let places: Vec<Place> = batch.iter().map(Pin::place).collect();
        let groups = group(&places);
        let gather = Arc::new(Mutex::new(Gather {
            results: places.iter().map(|_| None).collect(),
            left: groups.len(),
            pins: batch,
            done: Some(done),
        }));
        for Group { range, members } in groups {
            let members = members.iter().map(|index| (*index, places[*index])).collect();
            let (gather, counters) = (Arc::clone(&gather), Arc::clone(&self.counters));
            Transfer { gather, counters, range, members, again: true }.start(&self.file);
        }
    }
}

/// A transfer on its way.
struct Transfer {
    gather: Arc<Mutex<Gather>>,
    counters: Arc<Counters>,
    range: Range<u64>,
    members: Vec<(usize, Place)>,
    /// Should it fail, each record is read once more, alone: a bad block may be in somebody else's, or in none.
    again: bool,
}

impl Transfer {
    fn start(self, file: &Arc<dyn BackingFile>) {
        let start = self.range.start;
        let buffer = Buffer::zeroed(usize::try_from(self.range.end - start).expect("a transfer is short"));
        let same = Arc::clone(file);
        transfer(file, Op::Read, start, buffer, move |result, buffer| match result {
            Err(_) if self.again => self.start_again(&same),
            result => {
                match &result {
                    Ok(()) => bump(&self.counters.read_records, self.members.len() as u64),
                    Err(_) => bump(&self.counters.read_errors, 1),
                }
                arrive(&self.gather, start, &self.members, result, buffer);
            }
        });
    }

    fn start_again(self, file: &Arc<dyn BackingFile>) {
        bump(&self.counters.read_errors, 1);
        self.gather.lock().left += self.members.len() - 1;
        for (index, place) in self.members {
            let (gather, counters) = (Arc::clone(&self.gather), Arc::clone(&self.counters));
            let (range, members) = (blocks_of(place), vec![(index, place)]);
            Transfer { gather, counters, range, members, again: false }.start(file);
        }
    }
}

/// The blocks that a record lies in.
fn blocks_of(place: Place) -> Range<u64> {
    let start = place.offset / BLOCK_BYTES_U64 * BLOCK_BYTES_U64;
    start..(place.offset + place.record_bytes() as u64).next_multiple_of(BLOCK_BYTES_U64)
}

/// Notes the end of one transfer, and tells the caller if it was the last.
fn arrive(
    gather: &Mutex<Gather>,
    start: u64,
    members: &[(usize, Place)],
    result: io::Result<()>,
    buffer: Buffer,
) {
    let outcome = result.map(|()| Arc::new(buffer)).map_err(ReadError::new);
    let mut gather = gather.lock();
    for (index, place) in members {
        let at = usize::try_from(place.offset - start).expect("a transfer is short");
        let record =
            outcome.as_ref().map(|buffer| RecordBytes::new(Arc::clone(buffer), at, place.object_bytes));
        gather.results[*index] = Some(record.map_err(Clone::clone));
    }
    gather.left -= 1;
    if gather.left > 0 {
        return;
    }
    let results = std::mem::take(&mut gather.results);
    let pins = std::mem::take(&mut gather.pins);
    let done = gather.done.take();
    drop(gather);
    drop(pins);
    if let Some(done) = done {
        done(results.into_iter().map(|result| result.expect("every record is in a transfer")).collect());
    }
}

fn group(places: &[Place]) -> Vec<Group> {
    let mut order: Vec<usize> = (0..places.len()).collect();
    order.sort_unstable_by_key(|index| places[*index].offset);
    let mut groups: Vec<Group> = Vec::new();
    for index in order {
        let place = places[index];
        let Range { start, end } = blocks_of(place);
        let near = |group: &&mut Group| {
            group.range.start / SEGMENT_BYTES_U64 == place.offset / SEGMENT_BYTES_U64
                && start.saturating_sub(group.range.end) <= GAP_BYTES_MAX
                && end - group.range.start <= TRANSFER_BYTES_MAX
        };
        match groups.last_mut().filter(near) {
            Some(group) => {
                group.range.end = group.range.end.max(end);
                group.members.push(index);
            }
            None => groups.push(Group { range: start..end, members: vec![index] }),
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::super::place::{SEGMENT_BYTES, SegmentIndex};
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn neighbours_come_with_one_transfer() {
        let at = |segment, start| Place::new(SegmentIndex(segment), start, 1000);
        let last = SEGMENT_BYTES - 1040;
        let places =
            [at(2, 0), at(1, 8192), at(1, 4080), at(1, 8192 + 4096 + (20 << 10)), at(1, last / 16 * 16)];
        let base = SEGMENT_BYTES_U64;
        assert_eq!(
            group(&places),
            [
                Group { range: base..base + 12288, members: vec![2, 1] },
                Group { range: base + (32 << 10)..base + (36 << 10), members: vec![3] },
                Group { range: 2 * base - 4096..2 * base, members: vec![4] },
                Group { range: 2 * base..2 * base + 4096, members: vec![0] },
            ]
        );
    }

    proptest! {
        #[test]
        fn every_record_is_in_one_transfer_of_bounded_length(
            places in prop::collection::vec((1u32..4, 0usize..65000, 17usize..=4110), 1..100),
        ) {
            let places: Vec<Place> = places
                .into_iter()
                .map(|(segment, at, object_bytes)| Place::new(SegmentIndex(segment), at * 16, object_bytes))
                .filter(|place| place.segment().is_some())
                .collect();
            let mut seen = vec![0; places.len()];
            for Group { range, members } in group(&places) {
                prop_assert!(range.end - range.start <= TRANSFER_BYTES_MAX);
                prop_assert!(range.start % BLOCK_BYTES_U64 == 0 && range.end % BLOCK_BYTES_U64 == 0);
                for index in members {
                    seen[index] += 1;
                    prop_assert!(places[index].offset >= range.start);
                    prop_assert!(places[index].offset + places[index].record_bytes() as u64 <= range.end);
                }
            }
            prop_assert!(seen.iter().all(|count| *count == 1));
        }
    }
}
