//! A region: the part of the arena whose spans have one length. Keeps which spans are free, which have room, and
//! which places in them are taken. Touches no memory of the arena and makes no system call: all of it happens under
//! the region's lock, so it has to be short.

use parking_lot::Mutex;

use super::class::{ClassId, Classes, Layout};
use super::{AdoptError, ArenaCount};

/// A span by its position in the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpanIndex(u32);

#[derive(Debug)]
pub struct Region {
    /// Offset of the first span in the arena, in bytes.
    base: u64,
    span_bytes: u64,
    spans_max: u32,
    /// By class number; `None` for the classes of other regions.
    layouts: Vec<Option<Layout>>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Every span up to the highest ever used.
    spans: Vec<Span>,
    /// Spans below the highest that are not in use; the last one is used first.
    free: Vec<SpanIndex>,
    /// By class number: the spans that have both taken and free places.
    with_room: Vec<Vec<SpanIndex>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Span {
    taken: Places,
    class: Option<ClassId>,
    /// Where the span stands in its class's list; meaningless when it is full.
    position: u32,
}

/// A bit for every taken place of a span. Two words instead of a `u128`, whose alignment would make a span's record a
/// third larger.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Places([u64; 2]);

impl Places {
    fn bits(self) -> u128 {
        u128::from(self.0[0]) | u128::from(self.0[1]) << 64
    }

    fn count(self) -> u32 {
        self.bits().count_ones()
    }

    fn is_taken(self, place: u32) -> bool {
        self.bits() >> place & 1 == 1
    }

    fn first_free(self) -> u32 {
        self.bits().trailing_ones()
    }

    fn toggle(&mut self, place: u32) {
        self.0[place as usize / 64] ^= 1 << (place % 64);
    }
}

/// What [`Region::take`] found.
pub enum Taken {
    /// The offset of a place in a span that had room.
    Object(u64),
    /// No span has room: back this one and [`Region::open`] it. `None` when the region is used up.
    NeedsSpan(Option<SpanIndex>),
}

/// What [`Region::release`] left behind.
pub enum Released {
    /// The span has other objects.
    OneOfSeveral,
    /// The span is empty and on no list: punch it, then [`Region::put_back`].
    LastOfSpan(SpanIndex),
}

impl State {
    fn span(&mut self, index: SpanIndex) -> &mut Span {
        &mut self.spans[index.0 as usize]
    }

    fn list(&mut self, class: ClassId, index: SpanIndex) {
        let list = &mut self.with_room[usize::from(class.0)];
        list.push(index);
        let position = u32::try_from(list.len() - 1).expect("there are fewer spans than 2^32");
        self.span(index).position = position;
    }

    fn unlist(&mut self, class: ClassId, index: SpanIndex) {
        let position = self.span(index).position as usize;
        let list = &mut self.with_room[usize::from(class.0)];
        assert_eq!(list.swap_remove(position), index, "a span knows its place in the list");
        if let Some(moved) = list.get(position).copied() {
            self.span(moved).position = u32::try_from(position).expect("it was a u32");
        }
    }

    /// A span that is in no use, new or used before.
    fn fresh(&mut self, spans_max: u32) -> Option<SpanIndex> {
        self.free.pop().or_else(|| {
            let next = u32::try_from(self.spans.len()).ok().filter(|next| *next < spans_max)?;
            self.spans.push(Span::default());
            Some(SpanIndex(next))
        })
    }
}

impl Region {
    /// The region at `index`, whose spans are `index + 1` pages long.
    pub fn new(index: usize, region_bytes: u64, classes: &Classes) -> Self {
        let layouts: Vec<_> =
            classes.iter().map(|(_, layout)| (layout.region() == index).then_some(layout)).collect();
        let span_bytes = ((index + 1) * crate::page::PAGE_SIZE) as u64;
        let state = State { with_room: vec![Vec::new(); layouts.len()], ..State::default() };
        Self {
            base: index as u64 * region_bytes,
            span_bytes,
            spans_max: u32::try_from(region_bytes / span_bytes).unwrap_or(u32::MAX),
            layouts,
            state: Mutex::new(state),
        }
    }

    /// Where a span starts in the arena, in bytes.
    pub fn span_offset(&self, span: SpanIndex) -> u64 {
        self.base + u64::from(span.0) * self.span_bytes
    }

    fn layout(&self, class: ClassId) -> Layout {
        self.layouts[usize::from(class.0)].expect("the class is one of this region")
    }

    fn take_place(&self, state: &mut State, class: ClassId, index: SpanIndex) -> u64 {
        let layout = self.layout(class);
        let span = state.span(index);
        let place = span.taken.first_free();
        span.taken.toggle(place);
        if span.taken.count() == layout.objects {
            state.unlist(class, index);
        }
        self.span_offset(index) + u64::from(place) * layout.object_bytes as u64
    }

    /// Takes a place for an object of `class`, or a span to open for one.
    pub fn take(&self, class: ClassId) -> Taken {
        let mut state = self.state.lock();
        match state.with_room[usize::from(class.0)].last().copied() {
            Some(index) => Taken::Object(self.take_place(&mut state, class, index)),
            None => Taken::NeedsSpan(state.fresh(self.spans_max)),
        }
    }

    /// Puts a backed span into use for `class` and takes its first place.
    pub fn open(&self, index: SpanIndex, class: ClassId) -> u64 {
        let mut state = self.state.lock();
        *state.span(index) = Span { class: Some(class), ..Span::default() };
        state.list(class, index);
        self.take_place(&mut state, class, index)
    }

    /// Makes a span that is not backed available again.
    pub fn put_back(&self, index: SpanIndex) {
        self.state.lock().free.push(index);
    }

    fn place_of(&self, layout: Layout, offset: u64) -> Option<(SpanIndex, u32)> {
        let within = offset.checked_sub(self.base)?;
        let index = u32::try_from(within / self.span_bytes).ok().filter(|index| *index < self.spans_max)?;
        let within_span = within % self.span_bytes;
        let object_bytes = layout.object_bytes as u64;
        let place = u32::try_from(within_span / object_bytes).ok()?;
        (within_span.is_multiple_of(object_bytes) && place < layout.objects)
            .then_some((SpanIndex(index), place))
    }

    /// Releases the place at `offset`.
    ///
    /// # Panics
    /// When it was not taken by an object of `class`: freed twice, or never allocated.
    pub fn release(&self, class: ClassId, offset: u64) -> Released {
        let layout = self.layout(class);
        let (index, place) = self.place_of(layout, offset).expect("the offset is a place of this class");
        let mut state = self.state.lock();
        let span = state.span(index);
        assert!(span.class == Some(class) && span.taken.is_taken(place), "an object is freed once");
        let was_full = span.taken.count() == layout.objects;
        span.taken.toggle(place);
        let empty = span.taken == Places::default();
        match (was_full, empty) {
            (true, false) => state.list(class, index),
            (false, true) => state.unlist(class, index),
            _ => {}
        }
        if !empty {
            return Released::OneOfSeveral;
        }
        *state.span(index) = Span::default();
        Released::LastOfSpan(index)
    }

    /// Marks the place at `offset` as taken. True when this put its span into use.
    pub fn adopt(&self, class: ClassId, offset: u64, misplaced: AdoptError) -> Result<bool, AdoptError> {
        let layout = self.layout(class);
        let (index, place) = self.place_of(layout, offset).ok_or(misplaced)?;
        let mut state = self.state.lock();
        if state.spans.len() <= index.0 as usize {
            state.spans.resize(index.0 as usize + 1, Span::default());
        }
        let span = state.span(index);
        let opened = span.class.is_none();
        if *span.class.get_or_insert(class) != class {
            return Err(misplaced);
        }
        if span.taken.is_taken(place) {
            return Err(AdoptError::Taken { offset });
        }
        span.taken.toggle(place);
        Ok(opened)
    }

    /// Builds the lists from what was adopted; returns the ranges (offset, bytes) that hold nothing.
    pub fn finish_adoption(&self, region_bytes: u64) -> Vec<(u64, u64)> {
        let mut state = self.state.lock();
        let mut unused = Vec::new();
        let mut from = 0;
        for at in 0..state.spans.len() {
            let index = SpanIndex(u32::try_from(at).expect("there are fewer spans than 2^32"));
            let Span { class, taken, .. } = state.spans[at];
            let Some(class) = class else {
                state.free.push(index);
                continue;
            };
            let start = u64::from(index.0) * self.span_bytes;
            if from < start {
                unused.push((self.base + from, start - from));
            }
            from = start + self.span_bytes;
            if taken.count() < self.layout(class).objects {
                state.list(class, index);
            }
        }
        unused.push((self.base + from, region_bytes - from));
        unused
    }

    /// Bytes of the records of spans and of the lists they are on.
    pub fn metadata_bytes(&self) -> u64 {
        let state = self.state.lock();
        let listed = state.free.len() + state.with_room.iter().map(Vec::len).sum::<usize>();
        (state.spans.len() * size_of::<Span>() + listed * size_of::<SpanIndex>()) as u64
    }

    /// Checks every list against every span and adds the region's objects to `count`.
    pub fn validate(&self, classes: &Classes, count: &mut ArenaCount) {
        let state = self.state.lock();
        let mut listed = 0;
        for (index, span) in state.spans.iter().enumerate() {
            let Some(class) = span.class else {
                assert_eq!(span.taken, Places::default());
                continue;
            };
            let layout = classes.layout(class);
            let objects = span.taken.count();
            assert!((1..=layout.objects).contains(&objects), "a span in use has an object");
            if objects < layout.objects {
                let at = state.with_room[usize::from(class.0)].get(span.position as usize);
                assert_eq!(at.map(|span| span.0 as usize), Some(index), "a span with room is listed");
                listed += 1;
            }
            count.objects += u64::from(objects);
            count.charged_bytes += u64::from(objects) * layout.object_bytes as u64;
            count.span_bytes += self.span_bytes;
        }
        assert_eq!(
            listed,
            state.with_room.iter().map(Vec::len).sum::<usize>(),
            "only spans with room are listed"
        );
        for free in &state.free {
            assert!(state.spans[free.0 as usize].class.is_none(), "a free span is not in use");
        }
    }
}
