//! How long requests take, by what they ask for and where it was: from the moment at which a worker takes a request's
//! head off the available ring to the one at which its answer goes onto the used ring. So it covers parsing, the turns
//! of others in between, the codec, the file, and waiting for room; it does not cover how long the guest's kick took to
//! wake the worker, nor the signal at the end of the turn. A request that a predecessor left in flight counts from when
//! it was taken again.
//!
//! Each ring has numbers of its own that only its worker changes: plain stores, no locked instruction, no cache line that
//! two cores write. Whoever asks adds them up; a ring that ends leaves its numbers to the VM.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::store::histogram::power_of_two;
use crate::store::vm::Source;

/// What the first bucket counts at most, in nanoseconds; each of the others counts up to twice the one before.
pub const FIRST_BUCKET_NS: u64 = 256;
/// Buckets: the last but one ends at 17 s, and the last one counts what took longer.
pub const BUCKETS: usize = 28;

/// What a request asked for, and where that was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// Pages were stored.
    Store,
    /// Pages were loaded; of those of one request, the slowest source counts.
    Load(Source),
}

/// Kinds of [`Path`].
const PATHS: usize = 4;

impl Path {
    fn index(self) -> usize {
        match self {
            Self::Store => 0,
            Self::Load(Source::SameFilled) => 1,
            Self::Load(Source::Pool) => 2,
            Self::Load(Source::File) => 3,
        }
    }
}

/// A histogram: bucket n counts what took at most 2^n times [`FIRST_BUCKET_NS`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Latency {
    /// How often each bucket was hit.
    pub counts: [u64; BUCKETS],
    /// The sum of all times, in nanoseconds.
    pub sum_ns: u64,
}

impl Latency {
    fn add(&mut self, cells: &Cells) {
        for (count, more) in self.counts.iter_mut().zip(&cells.counts) {
            *count = count.saturating_add(more.load(Ordering::Relaxed));
        }
        self.sum_ns = self.sum_ns.saturating_add(cells.sum_ns.load(Ordering::Relaxed));
    }
}

#[derive(Debug, Default)]
struct Cells {
    counts: [AtomicU64; BUCKETS],
    sum_ns: AtomicU64,
}

impl Cells {
    /// Only ever called by one thread at a time, so that a load and a store are enough.
    fn count(&self, took: Duration) {
        let took_ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let bucket = power_of_two(took_ns.div_ceil(FIRST_BUCKET_NS)).min(BUCKETS.saturating_sub(1));
        if let Some(count) = self.counts.get(bucket) {
            count.store(count.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        }
        let sum_ns = self.sum_ns.load(Ordering::Relaxed).saturating_add(took_ns);
        self.sum_ns.store(sum_ns, Ordering::Relaxed);
    }
}

type RingCells = [Cells; PATHS];

/// The latencies of a VM.
#[derive(Debug, Default)]
pub struct Latencies(Mutex<Rings>);

#[derive(Debug, Default)]
struct Rings {
    running: Vec<Arc<RingCells>>,
    ended: [Latency; PATHS],
}

impl Rings {
    fn sums(&self) -> [Latency; PATHS] {
        let mut sums = self.ended;
        for ring in &self.running {
            sums.iter_mut().zip(ring.iter()).for_each(|(sum, cells)| sum.add(cells));
        }
        sums
    }
}

impl Latencies {
    /// Those of this path, all rings together.
    #[must_use]
    pub fn get(&self, path: Path) -> Latency {
        self.0.lock().sums().get(path.index()).copied().unwrap_or_default()
    }

    /// A part for a ring that starts.
    #[must_use]
    pub fn begin_ring(self: &Arc<Self>) -> RingLatencies {
        let cells = Arc::new(RingCells::default());
        self.0.lock().running.push(Arc::clone(&cells));
        RingLatencies { cells, vm: Arc::clone(self) }
    }
}

/// A ring's part of its VM's latencies. Dropping it leaves them to the VM.
#[derive(Debug)]
pub struct RingLatencies {
    cells: Arc<RingCells>,
    vm: Arc<Latencies>,
}

impl RingLatencies {
    /// Counts a request that took so long.
    pub fn count(&mut self, path: Path, took: Duration) {
        if let Some(cells) = self.cells.get(path.index()) {
            cells.count(took);
        }
    }
}

impl Drop for RingLatencies {
    fn drop(&mut self) {
        let mut rings = self.vm.0.lock();
        rings.running.retain(|cells| !Arc::ptr_eq(cells, &self.cells));
        rings.ended.iter_mut().zip(self.cells.iter()).for_each(|(sum, cells)| sum.add(cells));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ns(nanoseconds: u64) -> Duration {
        Duration::from_nanos(nanoseconds)
    }

    #[test]
    fn a_bucket_counts_twice_as_much_as_the_one_before() {
        let latencies = Arc::new(Latencies::default());
        let mut ring = latencies.begin_ring();
        for took in [0, 256, 257, 512, 513, 1 << 34, (1 << 34) + 1, 1 << 60] {
            ring.count(Path::Store, ns(took));
        }
        let latency = latencies.get(Path::Store);
        let mut expected = [0; BUCKETS];
        for (bucket, count) in [(0, 2), (1, 2), (2, 1), (26, 1), (27, 2)] {
            expected[bucket] = count;
        }
        assert_eq!(latency.counts, expected);
        assert_eq!(latency.sum_ns, 256 + 257 + 512 + 513 + (1 << 34) + (1 << 34) + 1 + (1 << 60));
    }

    #[test]
    fn what_a_ring_counted_outlives_it() {
        let latencies = Arc::new(Latencies::default());
        let (mut first, mut second) = (latencies.begin_ring(), latencies.begin_ring());
        first.count(Path::Load(Source::File), ns(1000));
        second.count(Path::Load(Source::File), ns(3000));
        second.count(Path::Load(Source::Pool), ns(1));
        let seen = || {
            let paths = [Source::SameFilled, Source::Pool, Source::File].map(Path::Load);
            paths.map(|path| latencies.get(path)).map(|latency| (latency.counts.iter().sum(), latency.sum_ns))
        };
        assert_eq!(seen(), [(0, 0), (1, 1), (2, 4000)]);
        drop(first);
        assert_eq!(seen(), [(0, 0), (1, 1), (2, 4000)]);
        drop(second);
        assert_eq!(seen(), [(0, 0), (1, 1), (2, 4000)]);
        assert!(latencies.0.lock().running.is_empty());
    }
}
