//! How long requests take, by what they ask for and where it was: from the moment at which a worker takes a request's
//! head off the available ring to the one at which its answer goes onto the used ring. So it covers parsing, the turns
//! of others in between, the codec, the file, and waiting for room; it does not cover how long the guest's kick took to
//! wake the worker, nor the signal at the end of the turn. A request that a predecessor left in flight counts from when
//! it was taken again.
//!
//! Each ring has numbers of its own that only its worker changes: plain stores, no locked instruction, no cache line that
//! two cores write. Whoever asks adds them up; a ring that ends leaves its numbers to the VM. They take 9.9 KiB a ring, and as
//! much for those of a VM's that ended.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::store::vm::Source;

/// What the first bucket counts at most, in nanoseconds.
pub const FIRST_BUCKET_NS: u64 = 1 << FIRST_BUCKET_BITS;
const FIRST_BUCKET_BITS: u32 = 8;
/// How often the buckets' ends double: up to 17 s. The last bucket counts what took longer.
pub const DOUBLINGS: usize = 26;
/// Buckets of the same width from an end to its double, so that a quantile is known to an eighth.
const PARTS: usize = 1 << PARTS_BITS;
const PARTS_BITS: u32 = 3;
const PART_MASK: u64 = PARTS as u64 - 1;
/// All of them: the first, those of each doubling, and the last.
const BUCKETS: usize = 1 + DOUBLINGS * PARTS + 1;

/// What a request asked for, and where that was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// Pages were stored; the slowest place that one went to counts, or where a page was of which a part was changed.
    Store(Source),
    /// Pages were loaded; of those of one request, the slowest source counts.
    Load(Source),
}

/// Kinds of [`Path`].
const PATHS: usize = 6;

impl Path {
    fn index(self) -> usize {
        match self {
            Self::Store(Source::SameFilled) => 0,
            Self::Store(Source::Pool) => 1,
            Self::Store(Source::File) => 2,
            Self::Load(Source::SameFilled) => 3,
            Self::Load(Source::Pool) => 4,
            Self::Load(Source::File) => 5,
        }
    }
}

/// The bucket that counts what took so long. As in HdrHistogram, the highest bits that are set choose it.
fn bucket_of(took_ns: u64) -> usize {
    // A bucket's end is still in it.
    let Some(last_bit) = took_ns.saturating_sub(1).checked_ilog2() else { return 0 };
    let Some(doubling) = last_bit.checked_sub(FIRST_BUCKET_BITS) else { return 0 };
    let part = took_ns.wrapping_sub(1).wrapping_shr(last_bit.wrapping_sub(PARTS_BITS)) & PART_MASK;
    let bucket = u64::from(doubling).saturating_mul(PARTS as u64).saturating_add(part).saturating_add(1);
    usize::try_from(bucket).unwrap_or(usize::MAX).min(BUCKETS.saturating_sub(1))
}

/// What a bucket counts at most, in nanoseconds.
fn end_ns(bucket: usize) -> u64 {
    let Some(behind_first) = bucket.checked_sub(1) else { return FIRST_BUCKET_NS };
    // An end has this many eighths of the power of two that it lies beyond.
    let eighths = (behind_first % PARTS).saturating_add(PARTS).saturating_add(1) as u64;
    let power = u32::try_from(behind_first / PARTS).unwrap_or(u32::MAX);
    eighths.saturating_mul((FIRST_BUCKET_NS >> PARTS_BITS).saturating_mul(2_u64.saturating_pow(power)))
}

/// A histogram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Latency {
    counts: [u64; BUCKETS],
    /// The sum of all times, in nanoseconds.
    pub sum_ns: u64,
}

impl Default for Latency {
    fn default() -> Self {
        Self { counts: [0; BUCKETS], sum_ns: 0 }
    }
}

impl Latency {
    /// The buckets that were hit, the shortest times first: what each counts at most, in nanoseconds, and how often.
    /// The last one's end is only the next in the row: it counts all that took longer.
    pub fn buckets(&self) -> impl Iterator<Item = (u64, u64)> {
        let all = self.counts.iter().enumerate().map(|(bucket, count)| (end_ns(bucket), *count));
        all.filter(|(_, count)| *count > 0)
    }

    fn add(&mut self, cells: &Cells) {
        for (count, more) in self.counts.iter_mut().zip(&cells.counts) {
            *count = count.saturating_add(more.load(Ordering::Relaxed));
        }
        self.sum_ns = self.sum_ns.saturating_add(cells.sum_ns.load(Ordering::Relaxed));
    }
}

#[derive(Debug)]
struct Cells {
    counts: [AtomicU64; BUCKETS],
    sum_ns: AtomicU64,
}

impl Default for Cells {
    fn default() -> Self {
        Self { counts: [const { AtomicU64::new(0) }; BUCKETS], sum_ns: AtomicU64::new(0) }
    }
}

impl Cells {
    /// Only ever called by one thread at a time, so that a load and a store are enough.
    fn count(&self, took: Duration) {
        let took_ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        if let Some(count) = self.counts.get(bucket_of(took_ns)) {
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
    fn a_bucket_is_an_eighth_of_a_power_of_two_and_ends_with_what_it_counts() {
        let latencies = Arc::new(Latencies::default());
        let mut ring = latencies.begin_ring();
        for took in [0, 256, 257, 288, 289, 512, 513, 1 << 34, (1 << 34) + 1, 1 << 60] {
            ring.count(Path::Store(Source::Pool), ns(took));
        }
        let latency = latencies.get(Path::Store(Source::Pool));
        let expected = [(256, 2), (288, 2), (320, 1), (512, 1), (576, 1), (1 << 34, 1), (9 << 31, 2)];
        assert_eq!(latency.buckets().collect::<Vec<_>>(), expected);
        let sum_ns = 256 + 257 + 288 + 289 + 512 + 513 + (1 << 34) + (1 << 34) + 1 + (1 << 60);
        assert_eq!(latency.sum_ns, sum_ns);
    }

    #[test]
    fn every_end_is_the_last_of_its_bucket_and_powers_of_two_are_ends() {
        for bucket in 0..BUCKETS - 1 {
            assert_eq!(bucket_of(end_ns(bucket)), bucket);
            assert_eq!(bucket_of(end_ns(bucket) + 1), bucket + 1);
        }
        assert_eq!(end_ns(BUCKETS - 2), FIRST_BUCKET_NS << DOUBLINGS);
        assert!((0..=DOUBLINGS).all(|n| (0..BUCKETS).any(|bucket| end_ns(bucket) == FIRST_BUCKET_NS << n)));
    }

    #[test]
    fn what_a_ring_counted_outlives_it() {
        let latencies = Arc::new(Latencies::default());
        let (mut first, mut second) = (latencies.begin_ring(), latencies.begin_ring());
        first.count(Path::Load(Source::File), ns(1000));
        second.count(Path::Load(Source::File), ns(3000));
        second.count(Path::Load(Source::Pool), ns(1));
        second.count(Path::Store(Source::File), ns(7));
        let seen = || {
            let paths = [Source::SameFilled, Source::Pool, Source::File].map(Path::Load);
            paths
                .map(|path| latencies.get(path))
                .map(|x| (x.buckets().map(|(_, count)| count).sum(), x.sum_ns))
        };
        assert_eq!(seen(), [(0, 0), (1, 1), (2, 4000)]);
        drop(first);
        assert_eq!(seen(), [(0, 0), (1, 1), (2, 4000)]);
        drop(second);
        assert_eq!(seen(), [(0, 0), (1, 1), (2, 4000)]);
        assert!(latencies.0.lock().running.is_empty());
    }
}
