//! The record of one span: which of its places are taken, and what it is used for. Everything else about a span, the
//! list that it belongs on included, follows from its record and the layout of its class.

use super::class::{ClassId, Layout};

/// Spans with room are listed by how full they are, in this many steps.
pub const FULLNESS_LISTS: usize = 8;
/// The list behind those: spans with an object that could not be moved. They are filled first.
pub const FIXED_LIST: usize = FULLNESS_LISTS;

/// A span by its position in the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpanIndex(pub u32);

impl SpanIndex {
    /// The span at this position of the records.
    ///
    /// # Panics
    /// Above 2^32, which a region doesn't have.
    pub fn at(position: usize) -> Self {
        Self(u32::try_from(position).expect("there are fewer spans than 2^32"))
    }
}

/// A bit for every taken place of a span. Two words instead of a `u128`, whose alignment would make a span's record a
/// third larger.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Places([u64; 2]);

impl Places {
    fn bits(self) -> u128 {
        u128::from(self.0[0]) | u128::from(self.0[1]) << 64
    }

    pub fn count(self) -> u32 {
        self.bits().count_ones()
    }

    pub fn is_empty(self) -> bool {
        self == Self::default()
    }

    pub fn is_taken(self, place: u32) -> bool {
        self.bits() >> place & 1 == 1
    }

    pub fn first_free(self) -> u32 {
        self.bits().trailing_ones()
    }

    pub fn first_taken(self) -> Option<u32> {
        (!self.is_empty()).then(|| self.bits().trailing_zeros())
    }

    pub fn toggle(&mut self, place: u32) {
        self.0[place as usize / 64] ^= 1 << (place % 64);
    }

    /// The places that are taken in both.
    pub fn and(self, other: Self) -> Self {
        Self([self.0[0] & other.0[0], self.0[1] & other.0[1]])
    }
}

/// What a span is used for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Usage {
    /// Nothing: it is not backed, or on its way from or to that.
    #[default]
    Unused,
    /// Objects of this class.
    Movable(ClassId),
    /// Objects of this class, one of which could not be moved. Until it is full or one of its objects is freed, trying
    /// again would only keep others from being tried.
    Fixed(ClassId),
    /// Its objects are being moved away: it is on no list and stays backed until that has ended.
    Evacuating(ClassId),
}

impl Usage {
    /// The class whose objects the span holds.
    pub fn class(self) -> Option<ClassId> {
        match self {
            Self::Unused => None,
            Self::Movable(class) | Self::Fixed(class) | Self::Evacuating(class) => Some(class),
        }
    }
}

/// One span.
#[derive(Clone, Copy, Debug, Default)]
pub struct Span {
    pub taken: Places,
    pub usage: Usage,
    /// Where the span stands in its list; meaningless while it is on none.
    pub position: u32,
}

const _: () = assert!(size_of::<Span>() == 24, "there is one for every few stored pages");

/// Where a span with room belongs, and how much room that is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listing {
    pub class: ClassId,
    /// Below [`FULLNESS_LISTS`] by how full the span is, or [`FIXED_LIST`].
    pub list: usize,
    pub free_places: u32,
}

impl Span {
    /// Takes the first free place.
    pub fn take(&mut self, layout: &Layout) -> u32 {
        let place = self.taken.first_free();
        self.taken.toggle(place);
        if let Usage::Fixed(class) = self.usage
            && self.taken.count() == layout.objects
        {
            self.usage = Usage::Movable(class);
        }
        place
    }

    /// Gives a taken place back.
    pub fn release(&mut self, place: u32) {
        self.taken.toggle(place);
        if let Usage::Fixed(class) = self.usage {
            self.usage = Usage::Movable(class);
        }
    }

    /// The list that the span belongs on: none while it is full, empty or being evacuated.
    pub fn listing(&self, layout: &Layout) -> Option<Listing> {
        let taken = self.taken.count();
        if taken == 0 || taken == layout.objects {
            return None;
        }
        let (class, list) = match self.usage {
            Usage::Movable(class) => (class, taken as usize * FULLNESS_LISTS / layout.objects as usize),
            Usage::Fixed(class) => (class, FIXED_LIST),
            Usage::Unused | Usage::Evacuating(_) => return None,
        };
        Some(Listing { class, list, free_places: layout.objects - taken })
    }
}
