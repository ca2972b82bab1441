//! A region: the part of the arena whose spans have one length. Knows which place is where, and hands places out
//! and takes them back. Touches no memory of the arena and makes no system call: all of it happens under the
//! region's lock, so it has to be short.

use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::class::{ClassId, Classes, Layout};
use super::span::{Places, Span, SpanIndex, Usage};
use super::spans::Spans;
use super::{AdoptError, ArenaCount};

#[derive(Debug)]
pub struct Region {
    /// Offset of the first span in the arena, in bytes.
    base: u64,
    span_bytes: u64,
    spans_max: u32,
    /// By class number; `None` for the classes of other regions.
    layouts: Vec<Option<Layout>>,
    /// The classes of this region.
    classes: Vec<ClassId>,
    spans: Mutex<Spans>,
    /// Bytes of the taken places. Changes under the lock, is read without it.
    charged_bytes: AtomicU64,
}

/// What [`Region::take`] found.
pub enum Taken {
    /// The offset of a place in a span that had room.
    Object(u64),
    /// No span has room: back this one and [`Region::open`] it. `None` when the region is used up.
    NeedsSpan(Option<SpanIndex>),
}

/// What [`Region::release`] and [`Region::end_evacuation`] left behind.
pub enum Released {
    /// The span stays: it has other objects, or is being evacuated.
    SpanStays,
    /// The span is empty and on no list: punch it, then [`Region::put_back`].
    LastOfSpan(SpanIndex),
}

/// A span that is being evacuated.
#[derive(Debug)]
pub struct Source {
    pub class: ClassId,
    pub span: SpanIndex,
    /// Places of the objects that nobody tried to move yet.
    pub untried: Places,
}

impl Region {
    /// The region at `index`, whose spans are `index + 1` pages long.
    pub fn new(index: usize, region_bytes: u64, classes: &Classes) -> Self {
        let layouts: Vec<_> =
            classes.iter().map(|(_, layout)| (layout.region() == index).then_some(layout)).collect();
        let span_bytes = ((index + 1) * crate::page::PAGE_SIZE) as u64;
        Self {
            base: index as u64 * region_bytes,
            span_bytes,
            spans_max: u32::try_from(region_bytes / span_bytes).unwrap_or(u32::MAX),
            spans: Mutex::new(Spans::new(&layouts)),
            layouts,
            classes: classes
                .iter()
                .filter(|(_, layout)| layout.region() == index)
                .map(|(id, _)| id)
                .collect(),
            charged_bytes: AtomicU64::new(0),
        }
    }

    /// Where a span starts in the arena, in bytes.
    pub fn span_offset(&self, span: SpanIndex) -> u64 {
        self.base + u64::from(span.0) * self.span_bytes
    }

    /// Bytes of the region's spans, each.
    pub fn span_bytes(&self) -> u64 {
        self.span_bytes
    }

    /// The layout of a class of this region.
    pub fn layout(&self, class: ClassId) -> Layout {
        self.layouts[usize::from(class.0)].expect("the class is one of this region")
    }

    fn place_offset(&self, layout: &Layout, span: SpanIndex, place: u32) -> u64 {
        self.span_offset(span) + u64::from(place) * layout.object_bytes as u64
    }

    fn charge(&self, layout: &Layout) {
        self.charged_bytes.fetch_add(layout.object_bytes as u64, Ordering::Relaxed);
    }

    fn take_place(&self, spans: &mut Spans, layout: &Layout, index: SpanIndex) -> u64 {
        let place = spans.update(index, layout, |span| span.take(layout));
        self.charge(layout);
        self.place_offset(layout, index, place)
    }

    /// Takes a place for an object of `class`, or a span to open for one.
    pub fn take(&self, class: ClassId) -> Taken {
        let layout = self.layout(class);
        let mut spans = self.spans.lock();
        match spans.fullest(class) {
            Some(index) => Taken::Object(self.take_place(&mut spans, &layout, index)),
            None => Taken::NeedsSpan(spans.fresh(self.spans_max)),
        }
    }

    /// Puts a backed span into use for `class` and takes its first place.
    pub fn open(&self, index: SpanIndex, class: ClassId) -> u64 {
        let layout = self.layout(class);
        let mut spans = self.spans.lock();
        spans.update(index, &layout, |span| {
            *span = Span { usage: Usage::Movable(class), ..Span::default() };
        });
        self.take_place(&mut spans, &layout, index)
    }

    /// Makes a span that is not backed available again.
    pub fn put_back(&self, index: SpanIndex) {
        self.spans.lock().put_back(index);
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
        let mut spans = self.spans.lock();
        let empties = spans.update(index, &layout, |span| {
            assert!(
                span.usage.class() == Some(class) && span.taken.is_taken(place),
                "an object is freed once"
            );
            span.release(place);
            // Whoever evacuates a span may be reading in it, and gives it back in the end.
            let empties = span.taken.is_empty() && !matches!(span.usage, Usage::Evacuating(_));
            if empties {
                span.usage = Usage::Unused;
            }
            empties
        });
        self.charged_bytes.fetch_sub(layout.object_bytes as u64, Ordering::Relaxed);
        if empties { Released::LastOfSpan(index) } else { Released::SpanStays }
    }

    /// The span that costs least to empty, and the bytes to copy for every thousand that it would give back.
    fn cheapest(&self, spans: &Spans) -> Option<(u64, ClassId, SpanIndex)> {
        let candidates = self.classes.iter().filter_map(|&class| {
            let layout = self.layout(class);
            let index = spans.sparsest(class, &layout)?;
            let copied_bytes = u64::from(spans.get(index).taken.count()) * layout.object_bytes as u64;
            Some((copied_bytes * 1000 / self.span_bytes, class, index))
        });
        candidates.min_by_key(|(cost, ..)| *cost)
    }

    /// The bytes to copy for every thousand bytes that the next evacuation gives back; `None` when no span can be
    /// emptied.
    pub fn evacuation_cost(&self) -> Option<u64> {
        self.cheapest(&self.spans.lock()).map(|(cost, ..)| cost)
    }

    /// Bytes of the spans that could be emptied if every object could be moved.
    pub fn gain_bytes(&self) -> u64 {
        let spans = self.spans.lock();
        let gained = |class: &ClassId| spans.surplus_spans(*class, &self.layout(*class)) * self.span_bytes;
        self.classes.iter().map(gained).sum()
    }

    /// Takes the span that costs least to empty off its list: nobody is given a place in it from now on.
    pub fn begin_evacuation(&self) -> Option<Source> {
        let mut spans = self.spans.lock();
        let (_, class, index) = self.cheapest(&spans)?;
        let untried = spans.update(index, &self.layout(class), |span| {
            span.usage = Usage::Evacuating(class);
            span.taken
        });
        Some(Source { class, span: index, untried })
    }

    /// The offsets of the next object to move and of a place that was taken for it in another span. `None` when no
    /// object is left to try, or no other span has room.
    pub fn next_move(&self, source: &mut Source) -> Option<(u64, u64)> {
        let layout = self.layout(source.class);
        let mut spans = self.spans.lock();
        source.untried = source.untried.and(spans.get(source.span).taken);
        let place = source.untried.first_taken()?;
        let target = spans.fullest(source.class)?;
        source.untried.toggle(place);
        let to = self.take_place(&mut spans, &layout, target);
        Some((self.place_offset(&layout, source.span, place), to))
    }

    /// Ends the evacuation of a span: with objects left it is listed again.
    pub fn end_evacuation(&self, source: &Source) -> Released {
        let mut spans = self.spans.lock();
        let empty = spans.update(source.span, &self.layout(source.class), |span| {
            let empty = span.taken.is_empty();
            span.usage = if empty {
                Usage::Unused
            } else if source.untried.is_empty() {
                Usage::Fixed(source.class)
            } else {
                Usage::Movable(source.class)
            };
            empty
        });
        if empty { Released::LastOfSpan(source.span) } else { Released::SpanStays }
    }

    /// Marks the place at `offset` as taken. True when this put its span into use.
    pub fn adopt(&self, class: ClassId, offset: u64, misplaced: AdoptError) -> Result<bool, AdoptError> {
        let layout = self.layout(class);
        let (index, place) = self.place_of(layout, offset).ok_or(misplaced)?;
        let mut spans = self.spans.lock();
        let span = spans.adopted(index);
        let opened = span.usage == Usage::Unused;
        if !opened && span.usage != Usage::Movable(class) {
            return Err(misplaced);
        }
        if span.taken.is_taken(place) {
            return Err(AdoptError::Taken { offset });
        }
        span.usage = Usage::Movable(class);
        span.taken.toggle(place);
        self.charge(&layout);
        Ok(opened)
    }

    /// Builds the lists from what was adopted; returns the ranges (offset, bytes) that hold nothing.
    pub fn finish_adoption(&self, region_bytes: u64) -> Vec<(u64, u64)> {
        let mut unused = Vec::new();
        let mut from = 0;
        self.spans.lock().finish_adoption(&self.layouts, |index| {
            let start = u64::from(index.0) * self.span_bytes;
            if from < start {
                unused.push((self.base + from, start - from));
            }
            from = start + self.span_bytes;
        });
        unused.push((self.base + from, region_bytes - from));
        unused
    }

    /// Bytes of the places that are taken.
    pub fn charged_bytes(&self) -> u64 {
        self.charged_bytes.load(Ordering::Relaxed)
    }

    /// Bytes of the records of spans and of the lists they are on.
    pub fn metadata_bytes(&self) -> u64 {
        self.spans.lock().metadata_bytes()
    }

    /// Checks every list and number against every span and adds the region's objects to `count`.
    pub fn validate(&self, classes: &Classes, count: &mut ArenaCount) {
        let spans = self.spans.lock();
        let charged_before = count.charged_bytes;
        spans.validate(classes, self.span_bytes, count);
        assert_eq!(
            self.charged_bytes(),
            count.charged_bytes - charged_before,
            "charged bytes are those of the taken places"
        );
    }
}
