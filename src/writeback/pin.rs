//! What keeps a segment from being written anew while somebody reads in it: values whose end is the end of the
//! reading. The rules are those of `segments`.

use std::sync::Arc;

use super::place::{Place, SegmentIndex};
use super::segments::Segments;

/// A record that stays readable until this is dropped.
#[derive(Debug)]
#[must_use = "the record may be overwritten once the pin is dropped"]
pub struct Pin {
    place: Place,
    _segment: SegmentPin,
}

/// A segment that is not written anew until this is dropped.
#[derive(Debug)]
#[must_use = "the segment may be overwritten once the pin is dropped"]
pub struct SegmentPin {
    segments: Arc<Segments>,
    segment: SegmentIndex,
}

impl Pin {
    /// A record of a pinned segment.
    pub(super) fn new(place: Place, segment: SegmentPin) -> Self {
        Self { place, _segment: segment }
    }

    /// The record that is pinned.
    #[must_use]
    pub fn place(&self) -> Place {
        self.place
    }
}

impl SegmentPin {
    /// Takes over a reader that `segments` has counted.
    pub(super) fn new(segments: Arc<Segments>, segment: SegmentIndex) -> Self {
        Self { segments, segment }
    }
}

impl Drop for SegmentPin {
    fn drop(&mut self) {
        self.segments.unpin(self.segment);
    }
}
