//! What becomes of pages that their guest has loaded. It has a copy of such a page, and tells nobody when it changes that or
//! frees it: ours is a zombie then, stored for no one, until its slot is written again or discarded. How many there are can't be
//! known, but how those before them ended can: some were loaded again, which is a copy that was alive, and others were
//! overwritten or dropped without. So the share of the latter among the last few thousand says of a loaded page how likely it
//! is dead, for this guest and what it does now. From that come an estimate for whoever asks, and the order in which pages
//! leave: a page that is needed with half the probability counts as twice as old ([`Fates::factor`]).

/// As many of either are taken for granted: before anything is seen a loaded page counts as twice as old.
const FIRST: u32 = 64;
/// When there are as many, all that was seen counts half, so that a guest that does something else is believed soon.
const SEEN_MAX: u32 = 8192;
/// Fates that have to be seen before there is an estimate.
const SEEN_MIN: u32 = 64;
/// A loaded page never counts as older than so many times its age: what a guest does may change at once.
const FACTOR_MAX: u32 = 8;

/// What became of the pages of one VM that were loaded, lately.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fates {
    again: u32,
    dropped: u32,
}

impl Default for Fates {
    fn default() -> Self {
        Self { again: FIRST, dropped: FIRST }
    }
}

impl Fates {
    /// A page that had been loaded was loaded again.
    pub fn loaded_again(&mut self) {
        self.again += 1;
        self.forget();
    }

    /// One was overwritten or discarded without.
    pub fn dropped(&mut self) {
        self.dropped += 1;
        self.forget();
    }

    fn forget(&mut self) {
        if self.again + self.dropped >= SEEN_MAX {
            // Neither becomes impossible.
            (self.again, self.dropped) = (self.again.div_ceil(2), self.dropped.div_ceil(2));
        }
    }

    /// By how much a loaded page is older than it is.
    #[must_use]
    pub fn factor(self) -> CopyFactor {
        let sum = u64::from(self.again + self.dropped);
        let factor = sum * u64::from(CopyFactor::ONE) / u64::from(self.again.max(1));
        CopyFactor(u32::try_from(factor).unwrap_or(u32::MAX).min(FACTOR_MAX * CopyFactor::ONE))
    }

    /// How many of so many loaded pages nobody will load again; none before enough was seen.
    #[must_use]
    pub fn zombies(self, loaded_pages: u64) -> u64 {
        let sum = self.again + self.dropped;
        if sum < 2 * FIRST + SEEN_MIN {
            return 0;
        }
        let zombies = u128::from(loaded_pages) * u128::from(self.dropped) / u128::from(sum);
        u64::try_from(zombies).unwrap_or(loaded_pages)
    }
}

/// By how much a page that was loaded counts as older than it is, from once to eight times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyFactor(u32);

impl CopyFactor {
    /// One, as it is kept.
    const ONE: u32 = 256;
    /// Where nothing is known.
    pub const DOUBLE: Self = Self(2 * Self::ONE);

    /// So many times, rounded down.
    #[must_use]
    pub fn times(self, ticks: u32) -> u32 {
        u32::try_from(u64::from(ticks) * u64::from(self.0) / u64::from(Self::ONE)).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_believed_by_what_it_does() {
        let mut fates = Fates::default();
        assert_eq!((fates.factor(), fates.zombies(1000)), (CopyFactor::DOUBLE, 0));
        (0..SEEN_MIN).for_each(|_| fates.dropped());
        assert_eq!((fates.factor().times(100), fates.zombies(1000)), (300, 666));
        (0..100_000).for_each(|_| fates.dropped());
        assert_eq!((fates.factor().times(100), fates.zombies(1000)), (800, 999));
        // Half a window later it does something else.
        (0..SEEN_MAX).for_each(|_| fates.loaded_again());
        assert!((100..140).contains(&fates.factor().times(100)), "{fates:?}");
        (0..100_000).for_each(|_| fates.loaded_again());
        assert_eq!((fates.factor().times(100), fates.zombies(1000)), (100, 0));
        assert_eq!(CopyFactor(8 * CopyFactor::ONE).times(u32::MAX), u32::MAX);
    }
}
