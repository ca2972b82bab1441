//! The spans of a region, and the lists of those that have room. A record changes through [`Spans::update`] alone,
//! which keeps lists and numbers in step with it, so that no other code has to know when a span is listed.

use super::ArenaCount;
use super::class::{ClassId, Classes, Layout};
use super::span::{FIXED_LIST, FULLNESS_LISTS, Listing, Span, SpanIndex, Usage};

/// What a region's lock protects.
#[derive(Debug, Default)]
pub struct Spans {
    /// Every span up to the highest ever used.
    records: Vec<Span>,
    /// Spans below the highest that are not in use; the last one is used first.
    unused: Vec<SpanIndex>,
    /// By class number; `None` for the classes of other regions.
    with_room: Vec<Option<Box<WithRoom>>>,
}

/// The spans of one class that have both taken and free places.
#[derive(Debug, Default)]
struct WithRoom {
    /// By how full they are, emptiest first; the fixed ones behind.
    lists: [Vec<SpanIndex>; FULLNESS_LISTS + 1],
    /// Free places of all of them.
    free_places: u64,
}

impl Spans {
    /// No spans yet, and the lists for those classes that have a layout here.
    pub fn new(layouts: &[Option<Layout>]) -> Self {
        let with_room = layouts.iter().map(|layout| layout.map(|_| Box::default())).collect();
        Self { with_room, ..Self::default() }
    }

    /// The record of a span.
    pub fn get(&self, index: SpanIndex) -> &Span {
        &self.records[index.0 as usize]
    }

    /// Changes the record of a span of a class with this layout; its position is not for `change` to touch.
    pub fn update<T>(&mut self, index: SpanIndex, layout: &Layout, change: impl FnOnce(&mut Span) -> T) -> T {
        let span = &mut self.records[index.0 as usize];
        let before = span.listing(layout);
        let result = change(span);
        let after = span.listing(layout);
        match (before, after) {
            // Most changes: the span stays where it stands.
            (Some(before), Some(after)) if (before.class, before.list) == (after.class, after.list) => {
                let free_places = &mut self.room_of(after.class).free_places;
                *free_places = *free_places + u64::from(after.free_places) - u64::from(before.free_places);
            }
            _ => {
                if let Some(before) = before {
                    self.unlist(index, before);
                }
                if let Some(after) = after {
                    self.list(index, after);
                }
            }
        }
        result
    }

    fn room_of(&mut self, class: ClassId) -> &mut WithRoom {
        self.with_room[usize::from(class.0)].as_deref_mut().expect("the class is one of this region")
    }

    fn list(&mut self, index: SpanIndex, listing: Listing) {
        let room = self.room_of(listing.class);
        room.free_places += u64::from(listing.free_places);
        let list = &mut room.lists[listing.list];
        let position = SpanIndex::at(list.len()).0;
        list.push(index);
        self.records[index.0 as usize].position = position;
    }

    fn unlist(&mut self, index: SpanIndex, listing: Listing) {
        let position = self.get(index).position;
        let room = self.room_of(listing.class);
        room.free_places -= u64::from(listing.free_places);
        let list = &mut room.lists[listing.list];
        assert_eq!(list.swap_remove(position as usize), index, "a span knows its place in the list");
        if let Some(moved) = list.get(position as usize).copied() {
            self.records[moved.0 as usize].position = position;
        }
    }

    /// The span that the next object of `class` goes to: a fixed one, or else one of the fullest, so that sparse spans
    /// become sparser.
    pub fn fullest(&self, class: ClassId) -> Option<SpanIndex> {
        let room = self.with_room[usize::from(class.0)].as_deref()?;
        room.lists.iter().rev().find_map(|list| list.last()).copied()
    }

    /// How many spans of `class` could be emptied: one for every span's worth of free places, since the free places of
    /// the span that is emptied make up for its taken ones.
    pub fn surplus_spans(&self, class: ClassId, layout: &Layout) -> u64 {
        let room = self.with_room[usize::from(class.0)].as_deref();
        room.map_or(0, |room| room.free_places / u64::from(layout.objects))
    }

    /// One of the emptiest spans of `class`, if the class has room for all of its objects elsewhere.
    pub fn sparsest(&self, class: ClassId, layout: &Layout) -> Option<SpanIndex> {
        if self.surplus_spans(class, layout) == 0 {
            return None;
        }
        let room = self.with_room[usize::from(class.0)].as_deref()?;
        room.lists[..FIXED_LIST].iter().find_map(|list| list.last()).copied()
    }

    /// A span that is in no use, new or used before.
    pub fn fresh(&mut self, spans_max: u32) -> Option<SpanIndex> {
        self.unused.pop().or_else(|| {
            let next = u32::try_from(self.records.len()).ok().filter(|next| *next < spans_max)?;
            self.records.push(Span::default());
            Some(SpanIndex(next))
        })
    }

    /// Makes a span that is in no use available to [`Spans::fresh`].
    pub fn put_back(&mut self, index: SpanIndex) {
        self.unused.push(index);
    }

    /// The record of a span while what was stored is taken stock of, and no list is made yet.
    pub fn adopted(&mut self, index: SpanIndex) -> &mut Span {
        let spans = self.records.len().max(index.0 as usize + 1);
        self.records.resize(spans, Span::default());
        &mut self.records[index.0 as usize]
    }

    /// Makes the lists of what was adopted; calls `in_use` with every span in use, in order.
    pub fn finish_adoption(&mut self, layouts: &[Option<Layout>], mut in_use: impl FnMut(SpanIndex)) {
        for position in 0..self.records.len() {
            let (index, span) = (SpanIndex::at(position), self.records[position]);
            let class = span.usage.class();
            let Some(layout) = class.and_then(|class| layouts[usize::from(class.0)].as_ref()) else {
                self.unused.push(index);
                continue;
            };
            in_use(index);
            if let Some(listing) = span.listing(layout) {
                self.list(index, listing);
            }
        }
    }

    /// Bytes of the records and of the lists that they are on.
    pub fn metadata_bytes(&self) -> u64 {
        let with_room = self.with_room.iter().flatten().flat_map(|room| &room.lists);
        let listed = self.unused.len() + with_room.map(Vec::len).sum::<usize>();
        (self.records.len() * size_of::<Span>() + listed * size_of::<SpanIndex>()) as u64
    }

    /// Checks every list against every record and adds the objects to `count`.
    pub fn validate(&self, classes: &Classes, span_bytes: u64, count: &mut ArenaCount) {
        let mut listed = 0;
        let mut free_places = vec![0; self.with_room.len()];
        for (index, span) in self.records.iter().enumerate() {
            let Some(class) = span.usage.class() else {
                assert!(span.taken.is_empty());
                continue;
            };
            let layout = classes.layout(class);
            let objects = span.taken.count();
            let evacuating = matches!(span.usage, Usage::Evacuating(_));
            assert!(evacuating || objects > 0, "a span in use has an object");
            assert!(objects <= layout.objects, "no object is outside its span");
            if let Some(listing) = span.listing(&layout) {
                let room = self.with_room[usize::from(class.0)].as_deref();
                let at = room.and_then(|room| room.lists[listing.list].get(span.position as usize));
                assert_eq!(at, Some(&SpanIndex::at(index)), "a span with room is listed");
                listed += 1;
                free_places[usize::from(class.0)] += u64::from(listing.free_places);
            }
            count.objects += u64::from(objects);
            count.charged_bytes += u64::from(objects) * layout.object_bytes as u64;
            count.span_bytes += span_bytes;
        }
        for (room, free_places) in self.with_room.iter().zip(free_places) {
            let room = room.as_deref();
            assert_eq!(room.map_or(0, |room| room.free_places), free_places, "free places are counted");
            listed -= room.map_or(0, |room| room.lists.iter().map(Vec::len).sum::<usize>());
        }
        assert_eq!(listed, 0, "only spans with room are listed");
        for index in &self.unused {
            assert_eq!(self.get(*index).usage, Usage::Unused, "a span to be used is not in use");
        }
    }
}
