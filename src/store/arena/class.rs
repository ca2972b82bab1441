//! Size classes: which object sizes share a span, and how long the spans of a class are. The idea is zsmalloc's:
//! many classes a few bytes apart waste little inside an object, and a span length chosen per class wastes little
//! behind the last one.

use crate::page::PAGE_SIZE;
use crate::store::entry::OBJECT_ALIGN;
use crate::store::object::OBJECT_BYTES_MAX;

/// The longest span, in pages.
pub const SPAN_PAGES_MAX: usize = 16;

/// A span is as short as it can be while no more than one part in this many is left over behind its last object.
/// Short spans matter: each class has one that is partly filled.
const TAIL_PARTS: usize = 33;

/// [`OBJECT_ALIGN`] in the type of sizes.
const GRAIN: usize = 16;
const _: () = assert!(GRAIN as u64 == OBJECT_ALIGN);
const SIZES: usize = OBJECT_BYTES_MAX.div_ceil(GRAIN);

/// The number of a size class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClassId(pub u16);

/// The layout of a class's spans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of one object's place.
    pub object_bytes: usize,
    /// Places in a span, at most 128: they fit the bits of a `u128`.
    pub objects: u32,
    /// Pages of a span.
    pub span_pages: usize,
}

impl Layout {
    /// Bytes of a span.
    pub fn span_bytes(&self) -> u64 {
        (self.span_pages * PAGE_SIZE) as u64
    }

    /// The region that spans of this length live in.
    pub fn region(&self) -> usize {
        self.span_pages - 1
    }
}

/// All classes, and the class of every size.
#[derive(Debug)]
pub struct Classes {
    layouts: Vec<Layout>,
    /// By size in grains, minus one.
    by_size: Vec<ClassId>,
}

impl Classes {
    /// Computes the table. It is a pure function of constants: the same in every run of every build, since the
    /// places of stored objects depend on it.
    pub fn new() -> Self {
        let mut layouts: Vec<Layout> = Vec::new();
        let mut by_size = vec![ClassId(0); SIZES];
        // From the largest down: sizes that would get the same number of places from the same span length share the
        // class of the largest of them, which costs nothing.
        for size in (0..SIZES).rev() {
            let layout = best_layout((size + 1) * GRAIN);
            let shared = layouts
                .last()
                .is_some_and(|last| (last.objects, last.span_pages) == (layout.objects, layout.span_pages));
            if !shared {
                layouts.push(layout);
            }
            by_size[size] =
                ClassId(u16::try_from(layouts.len() - 1).expect("there are fewer classes than sizes"));
        }
        Self { layouts, by_size }
    }

    /// The class of objects of this many bytes.
    ///
    /// # Panics
    /// When `object_bytes` is zero or above [`OBJECT_BYTES_MAX`].
    pub fn of(&self, object_bytes: usize) -> ClassId {
        self.by_size[(object_bytes - 1) / GRAIN]
    }

    /// The layout of a class.
    pub fn layout(&self, class: ClassId) -> Layout {
        self.layouts[usize::from(class.0)]
    }

    /// All classes with their layouts.
    pub fn iter(&self) -> impl Iterator<Item = (ClassId, Layout)> {
        (0..).map(ClassId).zip(self.layouts.iter().copied())
    }
}

fn best_layout(object_bytes: usize) -> Layout {
    let layout = |span_pages: usize| {
        let objects = (span_pages * PAGE_SIZE / object_bytes).min(128);
        (span_pages, objects, span_pages * PAGE_SIZE - objects * object_bytes)
    };
    let candidates = || (1..=SPAN_PAGES_MAX).map(layout).filter(|(_, objects, _)| *objects > 0);
    let short_enough = candidates().find(|(pages, _, tail)| tail * TAIL_PARTS <= pages * PAGE_SIZE);
    // No length is within the bound for some of the largest sizes: then the least share of waste, shortest first.
    let (span_pages, objects, _) = short_enough
        .or_else(|| candidates().min_by_key(|(pages, _, tail)| (tail * 1_000_000 / pages, *pages)))
        .expect("an object fits the longest span");
    let objects = u32::try_from(objects).expect("at most 128");
    Layout { object_bytes, objects, span_pages }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_fits_its_class_and_classes_fit_their_spans() {
        let classes = Classes::new();
        for object_bytes in 1..=OBJECT_BYTES_MAX {
            let layout = classes.layout(classes.of(object_bytes));
            assert!(layout.object_bytes >= object_bytes && layout.object_bytes.is_multiple_of(GRAIN));
            assert!(layout.objects as usize * layout.object_bytes <= layout.span_pages * PAGE_SIZE);
            assert!((1..=128).contains(&layout.objects));
        }
    }

    #[test]
    fn little_is_wasted_at_sizes_that_heaps_compress_to() {
        let classes = Classes::new();
        let mut wasted = 0;
        let mut asked = 0;
        for object_bytes in 200..3000 {
            let layout = classes.layout(classes.of(object_bytes));
            wasted += layout.span_pages * PAGE_SIZE / layout.objects as usize - object_bytes;
            asked += object_bytes;
        }
        assert!(wasted * 100 <= asked * 3, "{wasted} of {asked} bytes wasted");
    }
}
