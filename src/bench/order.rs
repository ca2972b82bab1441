//! In which order the blocks of a run are visited, and by which lane: block n is lane n's modulo the number of lanes, so
//! that lanes know nothing of each other and all get the same number, give or take one.

use super::source::Shuffle;

/// An order; each block comes once.
pub(crate) struct Order {
    lanes: Vec<Numbers>,
    requests: u64,
}

/// What is left of one lane's blocks, counted among its own.
enum Numbers {
    Ascending(std::ops::Range<u64>),
    /// Shuffled, and how many of them.
    Shuffled(Shuffle, u64),
}

impl Order {
    /// All `blocks`, each lane's ascending.
    pub(crate) fn ascending(blocks: u64, lanes: usize) -> Self {
        Self::new(blocks, lanes, |count| Numbers::Ascending(0..count))
    }

    /// All `blocks`, each lane's in an order that looks random; another one for each seed.
    pub(crate) fn shuffled(blocks: u64, lanes: usize, seed: u64) -> Self {
        Self::new(blocks, lanes, |count| Numbers::Shuffled(Shuffle::new(count, seed), count))
    }

    fn new(blocks: u64, lanes: usize, numbers: impl Fn(u64) -> Numbers) -> Self {
        let lanes = (0..lanes).map(|lane| numbers(share(blocks, lane, lanes))).collect();
        Self { lanes, requests: blocks }
    }

    /// No more than `requests` of them, as many of each lane.
    pub(crate) fn first(mut self, requests: u64) -> Self {
        self.requests = self.requests.min(requests);
        let count = self.lanes.len();
        for (lane, numbers) in self.lanes.iter_mut().enumerate() {
            let most = share(self.requests, lane, count);
            match numbers {
                Numbers::Ascending(range) => range.end = range.end.min(range.start + most),
                Numbers::Shuffled(_, left) => *left = most.min(*left),
            }
        }
        self
    }

    /// Those of the first of `vms` VMs alone, whose are every so many of the lanes.
    pub(crate) fn of_first_vm(mut self, vms: u64) -> Self {
        let others = self.lanes.iter_mut().zip(0_u64..).filter(|(_, lane)| !lane.is_multiple_of(vms));
        others.for_each(|(numbers, _)| *numbers = Numbers::Ascending(0..0));
        self.requests = self.requests.div_ceil(vms);
        self
    }

    /// How many there are.
    pub(crate) fn requests(&self) -> u64 {
        self.requests
    }

    /// The lane's next block.
    #[inline]
    pub(crate) fn next(&mut self, lane: usize) -> Option<u64> {
        let number = match &mut self.lanes[lane] {
            Numbers::Ascending(range) => range.next(),
            Numbers::Shuffled(shuffle, left) => {
                *left = left.checked_sub(1)?;
                shuffle.next()
            }
        };
        Some(number? * self.lanes.len() as u64 + lane as u64)
    }
}

/// How many of `count` fall to a lane when they go round.
fn share(count: u64, lane: usize, lanes: usize) -> u64 {
    count.saturating_sub(lane as u64).div_ceil(lanes as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(mut order: Order) -> Vec<Vec<u64>> {
        (0..order.lanes.len()).map(|lane| std::iter::from_fn(|| order.next(lane)).collect()).collect()
    }

    #[test]
    fn lanes_share_the_blocks() {
        assert_eq!(all(Order::ascending(7, 3)), [vec![0, 3, 6], vec![1, 4], vec![2, 5]]);
        assert_eq!(all(Order::ascending(1, 2)), [vec![0], vec![]]);
        for lanes in [1, 4, 7] {
            let visited = all(Order::shuffled(1000, lanes, 2));
            assert!(visited.iter().all(|lane| !lane.is_sorted()));
            let mut visited = visited.concat();
            visited.sort_unstable();
            assert!(visited.into_iter().eq(0..1000), "{lanes} lanes");
        }
    }

    #[test]
    fn the_first_are_as_many_of_each_lane() {
        let order = Order::shuffled(1000, 4, 2).first(10);
        assert_eq!(order.requests(), 10);
        assert_eq!(all(order).iter().map(Vec::len).collect::<Vec<_>>(), [3, 3, 2, 2]);
        assert_eq!(Order::ascending(3, 2).first(10).requests(), 3);
        assert_eq!(all(Order::ascending(9, 2).first(4)), [vec![0, 2], vec![1, 3]]);
    }

    #[test]
    fn the_first_vm_has_every_so_manyth_lane() {
        let order = Order::ascending(8, 4).of_first_vm(2);
        assert_eq!(order.requests(), 4);
        assert_eq!(all(order), [vec![0, 4], vec![], vec![2, 6], vec![]]);
    }
}
