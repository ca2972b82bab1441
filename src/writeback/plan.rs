//! Where the records of one batch go: behind one another in the current segment, and on in fresh ones. Pure but for
//! the segments it asks for; writes nothing.

use std::ops::Range;

use super::place::{BLOCK_BYTES, Place, SEGMENT_BYTES, SegmentIndex, record_bytes};

/// Where the next batch starts: a block boundary of an open segment that has room behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// The open segment.
    pub segment: SegmentIndex,
    /// Bytes from its start.
    pub at: usize,
}

/// Records of a batch that lie in one segment, and are written at once.
#[derive(Debug, PartialEq, Eq)]
pub struct Run {
    /// The segment.
    pub segment: SegmentIndex,
    /// Bytes from its start to the first record; a block boundary.
    pub start: usize,
    /// Which records of the batch.
    pub records: Range<usize>,
    /// Bytes of the records.
    pub record_bytes: usize,
}

impl Run {
    /// Bytes to write: whole blocks.
    pub fn padded_bytes(&self) -> usize {
        self.record_bytes.next_multiple_of(BLOCK_BYTES)
    }
}

/// Where everything goes.
#[derive(Debug, Default)]
pub struct Plan {
    /// The writes, in the order of the records.
    pub runs: Vec<Run>,
    /// A place for every record.
    pub places: Vec<Place>,
    /// Segments that were opened for this batch.
    pub opened: Vec<SegmentIndex>,
    /// Open segments that are full after it.
    pub filled: Vec<SegmentIndex>,
    /// Where the next batch starts.
    pub end: Option<Cursor>,
}

/// Plans a batch that starts at `current`. `open` opens a free segment.
///
/// # Errors
/// Without enough free segments; the error is those opened in vain.
pub fn plan(
    current: Option<Cursor>,
    objects_bytes: impl IntoIterator<Item = usize>,
    mut open: impl FnMut() -> Option<SegmentIndex>,
) -> Result<Plan, Vec<SegmentIndex>> {
    let mut plan = Plan { end: current, ..Plan::default() };
    for (index, object_bytes) in objects_bytes.into_iter().enumerate() {
        let bytes = record_bytes(object_bytes);
        let here = match plan.end {
            Some(cursor) if cursor.at + bytes <= SEGMENT_BYTES => cursor,
            full => {
                plan.filled.extend(full.map(|cursor| cursor.segment));
                let Some(segment) = open() else { return Err(plan.opened) };
                plan.opened.push(segment);
                Cursor { segment, at: 0 }
            }
        };
        plan.places.push(Place::new(here.segment, here.at, object_bytes));
        match plan.runs.last_mut().filter(|run| run.segment == here.segment) {
            Some(run) => {
                run.records.end = index + 1;
                run.record_bytes += bytes;
            }
            None => plan.runs.push(Run {
                segment: here.segment,
                start: here.at,
                records: index..index + 1,
                record_bytes: bytes,
            }),
        }
        plan.end = Some(Cursor { at: here.at + bytes, ..here });
    }
    plan.round_up();
    Ok(plan)
}

impl Plan {
    /// The next batch starts at a block boundary, so that no write touches a block that holds live records.
    fn round_up(&mut self) {
        let Some(cursor) = &mut self.end else { return };
        cursor.at = cursor.at.next_multiple_of(BLOCK_BYTES);
        if cursor.at == SEGMENT_BYTES {
            self.filled.push(cursor.segment);
            self.end = None;
        }
    }

    /// Bytes to write, in whole blocks.
    pub fn padded_bytes(&self) -> u64 {
        self.runs.iter().map(|run| run.padded_bytes() as u64).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn records_never_overlap_and_batches_start_at_blocks(
            batches in prop::collection::vec(prop::collection::vec(17usize..=4110, 0..200), 1..12),
        ) {
            let mut segments = (1..).map(SegmentIndex);
            let (mut current, mut reached) = (None, 0);
            for batch in batches {
                let plan = plan(current, batch.iter().copied(), || segments.next()).unwrap();
                let objects: Vec<usize> = plan.places.iter().map(|place| place.object_bytes).collect();
                prop_assert_eq!(objects, batch);
                for place in &plan.places {
                    prop_assert!(place.segment().is_some() && place.offset >= reached);
                    reached = place.offset + place.record_bytes() as u64;
                }
                let mut records = 0;
                for run in &plan.runs {
                    prop_assert!(run.start.is_multiple_of(BLOCK_BYTES) && !run.records.is_empty());
                    prop_assert!(run.start + run.padded_bytes() <= SEGMENT_BYTES);
                    let first = plan.places[run.records.start];
                    prop_assert_eq!((first.segment(), first.start()), (Some(run.segment), run.start));
                    prop_assert_eq!(run.records.start, records);
                    records = run.records.end;
                }
                prop_assert_eq!(records, plan.places.len());
                current = plan.end;
                if let Some(cursor) = current {
                    prop_assert!(cursor.at < SEGMENT_BYTES && cursor.at.is_multiple_of(BLOCK_BYTES));
                    reached = reached.max(cursor.segment.offset() + cursor.at as u64);
                }
            }
        }
    }

    #[test]
    fn a_batch_that_finds_no_room_returns_what_it_opened() {
        let mut free = vec![SegmentIndex(4)];
        let refused = plan(None, vec![4110; 300], || free.pop());
        assert_eq!(refused.unwrap_err(), [SegmentIndex(4)]);
    }
}
