//! Some of many, each with the same chance, without knowing how many there will be (Vitter's algorithm R). The numbers
//! look random and follow from a seed, so that a test may know them.

/// So many of what was offered.
#[derive(Debug)]
pub(super) struct Reservoir<T> {
    kept: Vec<T>,
    kept_max: usize,
    offered: u64,
    random: u64,
}

impl<T> Reservoir<T> {
    /// Keeps `kept_max` at most.
    pub fn new(kept_max: usize, seed: u64) -> Self {
        Self { kept: Vec::new(), kept_max, offered: 0, random: seed | 1 }
    }

    /// Offers one more.
    pub fn offer(&mut self, item: T) {
        self.offered += 1;
        if self.kept.len() < self.kept_max {
            self.kept.push(item);
        } else if self.kept_max > 0 {
            let place = self.below(self.offered);
            if let Some(kept) = usize::try_from(place).ok().and_then(|place| self.kept.get_mut(place)) {
                *kept = item;
            }
        }
    }

    /// What it kept, in no order that says anything.
    pub fn into_kept(self) -> Vec<T> {
        self.kept
    }

    /// A number below `end` (xorshift64*, then the high part of a product; its bias is of no account below 2^40).
    fn below(&mut self, end: u64) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        let number = self.random.wrapping_mul(0x2545_f491_4f6c_dd1d);
        u64::try_from((u128::from(number) * u128::from(end)) >> 64).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_are_all_kept_and_none_is_kept_twice() {
        let mut reservoir = Reservoir::new(10, 7);
        (0..10).for_each(|n| reservoir.offer(n));
        assert_eq!(reservoir.into_kept(), (0..10).collect::<Vec<_>>());
        let mut reservoir = Reservoir::new(10, 7);
        (0..1000).for_each(|n| reservoir.offer(n));
        let mut kept = reservoir.into_kept();
        kept.sort_unstable();
        kept.dedup();
        assert_eq!(kept.len(), 10);
        let mut none = Reservoir::new(0, 7);
        none.offer(1);
        assert!(none.into_kept().is_empty());
    }

    #[test]
    fn each_has_the_same_chance() {
        let mut hits = [0_u32; 100];
        for seed in 0..2000_u64 {
            let mut reservoir = Reservoir::new(10, seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            (0..100_usize).for_each(|n| reservoir.offer(n));
            reservoir.into_kept().into_iter().for_each(|n| hits[n] += 1);
        }
        // 200 are expected of each, and 68 are five times the deviation.
        assert!(hits.iter().all(|hits| (132..=268).contains(hits)), "{hits:?}");
    }
}
