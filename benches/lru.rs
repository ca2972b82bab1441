//! What an LRU of ages costs beside one of links: a use of a page, and finding the pages that are to leave, for VMs of
//! 1, 4 and 64 GiB of swap. `cargo bench --bench lru`; ARCHITECTURE.md has the figures.

#![allow(missing_docs, reason = "criterion's macros make public items")]
#![allow(clippy::unwrap_used, reason = "a bench says what went wrong by failing")]

use std::hint::black_box;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ballast::ids::{Slot, VmId};
use ballast::store::entry::{Entry, Location};
use ballast::store::fates::CopyFactor;
use ballast::store::lru::{Age, coldest};
use ballast::store::table::Table;
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const SIZES: [u32; 3] = [256 << 10, 1 << 20, 16 << 20];

/// An LRU list whose links are indices: eight bytes a page, and four more for the age that a global order needs.
struct List {
    /// The last one is the list's own: its next is the hottest page, its previous the coldest.
    links: Vec<(u32, u32)>,
}

impl List {
    /// The pages in this order, the coldest first.
    fn new(order: &[u32]) -> Self {
        let own = u32::try_from(order.len()).unwrap();
        let mut list = Self { links: vec![(own, own); order.len() + 1] };
        order.iter().for_each(|page| list.link(*page));
        list
    }

    fn link(&mut self, page: u32) {
        let own = self.links.len() - 1;
        let (_, hottest) = self.links[own];
        let own_page = u32::try_from(own).unwrap();
        self.links[page as usize] = (own_page, hottest);
        self.links[hottest as usize].0 = page;
        self.links[own].1 = page;
    }

    fn unlink(&mut self, page: u32) {
        let (previous, next) = self.links[page as usize];
        self.links[previous as usize].1 = next;
        self.links[next as usize].0 = previous;
    }

    fn touch(&mut self, page: u32) {
        self.unlink(page);
        self.link(page);
    }

    fn pop(&mut self) -> u32 {
        let (coldest, _) = *self.links.last().unwrap();
        self.unlink(coldest);
        coldest
    }
}

/// All slots in an order without a pattern.
fn shuffled(slots: u32) -> Vec<u32> {
    let mut order: Vec<u32> = (0..slots).collect();
    let mut noise = 1u64;
    for last in (1..order.len()).rev() {
        noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let other = usize::try_from(noise >> 33).unwrap() % (last + 1);
        order.swap(last, other);
    }
    order
}

/// A VM whose slots all hold objects, stored in this order.
fn table(directory: &std::path::Path, order: &[u32]) -> Table {
    let slots = u32::try_from(order.len()).unwrap();
    let table = Table::create(&directory.join("a.table"), VmId(1), "a", slots).unwrap();
    for (moment, slot) in order.iter().map(|slot| Slot(*slot)).enumerate() {
        table.back(slot).unwrap();
        let record = table.record(slot).unwrap();
        let location = Location { offset: u64::from(slot.0) * 1024, payload_bytes: 1000 };
        record.entry.store(Entry::Arena(location).pack(slot), Ordering::Relaxed);
        // A hundred pages share an age, as when guests swap out at three thousand a second.
        let age = Age::stored(Duration::from_millis(moment as u64 * 32 / 100));
        record.age.store(age.to_bits(), Ordering::Relaxed);
    }
    table
}

fn uses(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("use");
    for slots in SIZES {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let order = shuffled(slots);
        let table = table(directory.path(), &order);
        let now = Age::stored(Duration::from_secs(1 << 20)).to_bits();
        let mut next = order.iter().cycle();
        group.bench_function(BenchmarkId::new("age", slots), |bencher| {
            bencher.iter(|| {
                let record = table.record(Slot(*next.next().unwrap())).unwrap();
                record.age.store(black_box(now), Ordering::Relaxed);
            });
        });
        let mut list = List::new(&order);
        // Another order than the list's own, so that neighbours in the list are strangers in memory.
        let stride = 7919;
        let mut at = 0;
        group.bench_function(BenchmarkId::new("links", slots), |bencher| {
            bencher.iter(|| {
                at = (at + stride) % order.len();
                list.touch(black_box(order[at]));
            });
        });
    }
}

/// As many as the shrinker takes at once from a VM of this size.
fn victims(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("victims");
    group.sample_size(20);
    for slots in SIZES {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let order = shuffled(slots);
        let batch = order.len().div_ceil(256).max(8192);
        let table = table(directory.path(), &order);
        let now = Age::stored(Duration::from_secs(1 << 20));
        group.throughput(Throughput::Elements(batch as u64));
        group.bench_function(BenchmarkId::new("age", slots), |bencher| {
            bencher.iter(|| black_box(coldest(&table, batch, now, CopyFactor::DOUBLE, |_| true)));
        });
        let mut list = List::new(&order);
        group.bench_function(BenchmarkId::new("links", slots), |bencher| {
            bencher.iter_batched(
                || (),
                |()| {
                    for _ in 0..batch {
                        let page = black_box(list.pop());
                        list.link(page);
                    }
                },
                BatchSize::PerIteration,
            );
        });
    }
}

criterion_group!(benches, uses, victims);
criterion_main!(benches);
