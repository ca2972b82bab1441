//! The tag of a slot: what has to be known of it beside its entry, in ordinary memory, and changes under the VM's lock.
//!
//! ```text
//!  31   28 27       26        0
//! ┌───────┬────────┬───────────┐
//! │ pool  │ loaded │ generation│
//! └───────┴────────┴───────────┘
//! ```
//! The age in the page table says as well whether a page was loaded, for the next daemon; what was counted is what the
//! tag says, so that numbers stay right whatever becomes of an age, which no check covers.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::store::pool::PoolId;

const POOL_SHIFT: u32 = 28;
const LOADED: u32 = 1 << 27;
const GENERATION_MASK: u32 = LOADED - 1;

/// Tells whether an entry is still the one that was read. A hundred million stores to one slot would have to happen
/// between a look and a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generation(u32);

impl Generation {
    /// That of a slot whose chunk was never used.
    pub(super) const FIRST: Self = Self(0);
}

/// See the top of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::store) struct Tag(u32);

impl Tag {
    /// The tag that is kept in `word`.
    pub fn of(word: &AtomicU32) -> Self {
        Self(word.load(Ordering::Relaxed))
    }

    /// Keeps it in `word`; under the VM's lock, or before the VM has one.
    pub fn keep_in(self, word: &AtomicU32) {
        word.store(self.0, Ordering::Relaxed);
    }

    /// The pool that made the slot's object.
    pub fn pool(self) -> PoolId {
        PoolId::from_bits(self.0 >> POOL_SHIFT)
    }

    /// Whether an object in the arena counts as one that its guest has a copy of.
    pub fn is_loaded(self) -> bool {
        self.0 & LOADED != 0
    }

    /// What changes with every published entry.
    pub fn generation(self) -> Generation {
        Generation(self.0 & GENERATION_MASK)
    }

    /// The same slot once its guest has a copy.
    pub fn loaded(self) -> Self {
        Self(self.0 | LOADED)
    }

    /// The same slot with its object counted under another pool.
    pub fn made_by(self, pool: PoolId) -> Self {
        Self(pool.bits() << POOL_SHIFT | self.0 & (LOADED | GENERATION_MASK))
    }

    /// The tag of the next entry.
    pub fn next(self, pool: PoolId, loaded: bool) -> Self {
        let generation = self.0.wrapping_add(1) & GENERATION_MASK;
        let next = Self(pool.bits() << POOL_SHIFT | generation);
        if loaded { next.loaded() } else { next }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_parts_keep_apart() {
        let last = Tag(GENERATION_MASK);
        let pool = PoolId::from_bits(15);
        let next = last.next(pool, true);
        assert_eq!((next.generation(), next.pool(), next.is_loaded()), (Generation(0), pool, true));
        let moved = next.made_by(PoolId::from_bits(3));
        assert_eq!(
            (moved.generation(), moved.pool(), moved.is_loaded()),
            (Generation(0), PoolId::from_bits(3), true)
        );
        assert!(!moved.next(pool, false).is_loaded() && last.loaded().generation() == last.generation());
    }
}
