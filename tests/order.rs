//! In which order pages leave: the shrinker against an ideal that sees every use of every page at once, with three
//! pools and many VMs. Beside them the same history with a list per pool, as zswap had before "mm/zswap: optimize for
//! dynamic zswap_pools": what one global order is for.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use ballast::ids::Slot;
use ballast::page::ZERO_PAGE;
use ballast::reclaim::pressure::Level;
use ballast::reclaim::shrinker::Shrinker;
use ballast::store::Store;
use ballast::store::codec::{Compressor, Scratch};
use ballast::store::fates::CopyFactor;
use ballast::store::lru::Age;
use ballast::store::pool::PoolId;
use ballast::store::vm::{Limits, Loaded, VmStore};
use support::file::{neutral_shrinker, open_with_file, place_of};
use support::{Random, page_of};

const VMS: usize = 24;
const SLOTS: u32 = 400;
/// Slots of the first VM, which has more pages than one scan of its ages finds.
const LARGE_SLOTS: u32 = 16_000;
const COMPRESSORS: [Compressor; 3] = [Compressor::Lz4, Compressor::Zstd(1), Compressor::Zstd(3)];
/// Uses of pages while the pool fills.
const USES_FILLING: usize = 15_000;
/// What guests do while one batch of pages leaves.
const USES_PER_TURN: u64 = 30;
/// More turns than it takes.
const TURNS: u64 = 40;
/// No more than this passes between two uses.
const STEP_MS_MAX: u64 = 40;

type Key = (usize, u32);

/// A page in the pool.
#[derive(Clone, Copy)]
struct Kept {
    age: Age,
    pool: PoolId,
    /// Tells it from what the slot held before.
    version: u32,
}

/// What is in the pool, and what has left it in which order.
#[derive(Clone, Default)]
struct Pages {
    kept: HashMap<Key, Kept>,
    left: Vec<Kept>,
}

impl Pages {
    /// One list for everything.
    fn evict(&mut self, count: usize, copies: &[CopyFactor]) {
        let coldest = self.coldest_first(copies).into_iter().take(count).collect();
        self.leave(coldest);
    }

    /// A list per pool, each giving up one page in turn.
    fn evict_per_pool(&mut self, count: usize, copies: &[CopyFactor]) {
        let mut lists: HashMap<PoolId, usize> = HashMap::new();
        let mut order: Vec<_> = self
            .coldest_first(copies)
            .into_iter()
            .map(|key| {
                let pool = self.kept[&key].pool;
                let place = lists.entry(pool).or_default();
                *place += 1;
                (*place, pool, key)
            })
            .collect();
        order.sort_unstable();
        self.leave(order.into_iter().take(count).map(|(_, _, key)| key).collect());
    }

    /// With what copies count in each VM.
    fn coldest_first(&self, copies: &[CopyFactor]) -> Vec<Key> {
        let now = Age::now();
        let coldness = |key: &Key, kept: &Kept| Reverse(kept.age.coldness(now, copies[key.0]));
        let pages = self.kept.iter();
        let mut pages: Vec<_> = pages.map(|(key, kept)| (coldness(key, kept), kept.version, *key)).collect();
        pages.sort_unstable();
        pages.into_iter().map(|(_, _, key)| key).collect()
    }

    fn leave(&mut self, keys: Vec<Key>) {
        let kept = &mut self.kept;
        self.left.extend(keys.into_iter().map(|key| kept.remove(&key).unwrap()));
    }

    /// The place of every page in the order of leaving. Those of one age that left behind one another share theirs;
    /// those of `all` that have not left share the last.
    fn ranks(&self, all: &[u32]) -> HashMap<u32, f64> {
        let mut ranks = HashMap::new();
        let mut rank = 0.0;
        for same in self.left.chunk_by(|one, next| one.age == next.age) {
            let shared = rank + (same.len() - 1) as f64 / 2.0;
            ranks.extend(same.iter().map(|kept| (kept.version, shared)));
            rank += same.len() as f64;
        }
        let stayed: Vec<u32> = all.iter().copied().filter(|version| !ranks.contains_key(version)).collect();
        let shared = rank + stayed.len().saturating_sub(1) as f64 / 2.0;
        ranks.extend(stayed.into_iter().map(|version| (version, shared)));
        ranks
    }
}

/// How well two orders agree.
#[derive(Clone, Copy)]
struct Agreement {
    /// Spearman's rank correlation.
    correlation: f64,
    /// The share of pairs that are the other way round.
    inverted: f64,
}

impl fmt::Display for Agreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.4} ({:.2} % of pairs inverted)", self.correlation, self.inverted * 100.0)
    }
}

fn compare(ideal: &Pages, other: &Pages) -> Agreement {
    let versions: HashSet<u32> = ideal.left.iter().chain(&other.left).map(|kept| kept.version).collect();
    let versions: Vec<u32> = versions.into_iter().collect();
    let (ideal, other) = (ideal.ranks(&versions), other.ranks(&versions));
    let pairs: Vec<(f64, f64)> = versions.iter().map(|version| (ideal[version], other[version])).collect();
    let mean = (pairs.len() - 1) as f64 / 2.0;
    let sum = |of: fn(f64, f64) -> f64| pairs.iter().map(|(a, b)| of(a - mean, b - mean)).sum::<f64>();
    let correlation = sum(|a, b| a * b) / (sum(|a, _| a * a) * sum(|_, b| b * b)).sqrt();
    let differ = |(a, b): &(f64, f64), (c, d): &(f64, f64)| (a < c && b > d) || (a > c && b < d);
    let inverted: usize = pairs
        .iter()
        .enumerate()
        .map(|(index, one)| pairs[index + 1..].iter().filter(|other| differ(one, other)).count())
        .sum();
    let all = pairs.len() * (pairs.len() - 1) / 2;
    Agreement { correlation, inverted: inverted as f64 / all as f64 }
}

struct Host {
    store: Arc<Store>,
    vms: Vec<Arc<VmStore>>,
    real: Pages,
    ideal: Pages,
    per_pool: Pages,
    random: Random,
    scratch: Scratch,
    clock: Duration,
    step_ms_max: u64,
    versions: u32,
}

impl Host {
    fn new(store: Store) -> Self {
        let vms = store.in_use();
        // Every use lies in the past of the shrinker's clock, which begins when the machine does, and the last ones not
        // far from its present: a step takes half of its maximum on average.
        let uptime_ms = u64::try_from(Age::from_bits(0).until(Age::now()).as_millis()).unwrap();
        let uses = 2 * USES_FILLING as u64 + TURNS * USES_PER_TURN;
        let step_ms_max = (uptime_ms / uses).clamp(1, STEP_MS_MAX);
        let began_ms = uptime_ms.saturating_sub(uses * step_ms_max / 2);
        Self {
            store: Arc::new(store),
            vms,
            real: Pages::default(),
            ideal: Pages::default(),
            per_pool: Pages::default(),
            random: Random(24),
            scratch: Scratch::default(),
            clock: Duration::from_millis(began_ms),
            step_ms_max,
            versions: 0,
        }
    }

    fn all(&mut self) -> [&mut Pages; 3] {
        [&mut self.real, &mut self.ideal, &mut self.per_pool]
    }

    fn slots(vm: usize) -> u32 {
        if vm == 0 { LARGE_SLOTS } else { SLOTS }
    }

    fn pass_time(&mut self) {
        let passed = self.random.below(u32::try_from(self.step_ms_max).unwrap() + 1);
        self.clock += Duration::from_millis(u64::from(passed));
    }

    /// One use of one page. Some VMs use more than others.
    fn use_a_page(&mut self) {
        self.pass_time();
        let many = u32::try_from(VMS).unwrap();
        let vm = self.random.below(many).min(self.random.below(many)) as usize;
        let slot = self.random.below(Self::slots(vm));
        match self.random.below(10) {
            0..=6 => self.store(vm, slot),
            7 | 8 => self.load(vm, slot),
            _ => {
                self.vms[vm].invalidate(Slot(slot));
                for pages in self.all() {
                    pages.kept.remove(&(vm, slot));
                }
            }
        }
    }

    fn store(&mut self, vm: usize, slot: u32) {
        let age = Age::stored(self.clock);
        let kind = 1 + u8::try_from(self.random.below(2)).unwrap();
        let page = page_of(kind, u64::from(self.versions));
        self.vms[vm].store(Slot(slot), &page, age, &mut self.scratch).unwrap();
        let pool = self.store.shared().pools.current().id;
        let kept = Kept { age, pool, version: self.versions };
        self.versions += 1;
        for pages in self.all() {
            pages.kept.insert((vm, slot), kept);
        }
    }

    /// Loads a page that is in the pool. What has left is not in question here.
    fn load(&mut self, vm: usize, slot: u32) {
        if !self.real.kept.contains_key(&(vm, slot)) {
            return;
        }
        let mut page = ZERO_PAGE;
        let now = Age::stored(self.clock);
        let loaded = self.vms[vm].load(Slot(slot), None, &mut page, now, &mut self.scratch).unwrap();
        assert!(matches!(loaded, Loaded::Page(_)));
        for pages in self.all() {
            if let Some(kept) = pages.kept.get_mut(&(vm, slot)) {
                kept.age = now.loaded();
            }
        }
    }

    /// Lets one batch leave, and as many pages of the models. Batches are written one behind the other, so the place
    /// in the file tells the order within one.
    fn shrink(&mut self, shrinker: &mut Shrinker) {
        let place = |key: &Key| place_of(&self.vms[key.0], key.1).map(|place| (place.offset, *key));
        let mut left: Vec<_> = Vec::new();
        // Some steps only move objects together.
        for _ in 0..100 {
            shrinker.request_pressure(Level::Severe);
            let _ = shrinker.turn();
            left = self.real.kept.keys().filter_map(place).collect();
            if !left.is_empty() {
                break;
            }
        }
        left.sort_unstable();
        let copies: Vec<_> = self.vms.iter().map(|vm| vm.accounting().fates.factor()).collect();
        self.ideal.evict(left.len(), &copies);
        self.per_pool.evict_per_pool(left.len(), &copies);
        self.real.leave(left.into_iter().map(|(_, key)| key).collect());
    }
}

/// What leaves when the compressor was changed after every so many uses: what is left of the pool, and how near to the
/// ideal order we came, and how near a list per pool.
fn history(uses_per_compressor: usize) -> (Pages, Agreement, Agreement) {
    let dir = tempfile::tempdir().unwrap();
    let names: Vec<String> = (0..VMS).map(|vm| format!("vm{vm:02}")).collect();
    let vms: Vec<_> =
        names.iter().enumerate().map(|(vm, name)| (name.as_str(), Host::slots(vm), Limits::NONE)).collect();
    let mut host = Host::new(open_with_file(dir.path(), &vms, 1 << 30, 256 << 20));
    for uses in 0..USES_FILLING {
        let compressor = COMPRESSORS[uses / uses_per_compressor % COMPRESSORS.len()];
        host.store.shared().pools.set_current(compressor).unwrap();
        host.use_a_page();
        host.pass_time();
        let slot = host.random.below(LARGE_SLOTS);
        host.store(0, slot);
    }
    let of_large = host.real.kept.keys().filter(|(vm, _)| *vm == 0).count();
    assert!(of_large > 9000, "one scan finds all {of_large} pages");
    let filled = host.real.kept.len();
    let mut shrinker = neutral_shrinker(&host.store);
    while host.real.kept.len() > filled / 10 {
        let before = host.real.left.len();
        host.shrink(&mut shrinker);
        assert!(host.real.left.len() > before, "pages leave at every turn");
        (0..USES_PER_TURN).for_each(|_| host.use_a_page());
    }
    host.store.validate();
    let (ours, per_pool) = (compare(&host.ideal, &host.real), compare(&host.ideal, &host.per_pool));
    (host.real, ours, per_pool)
}

#[test]
fn pages_of_three_pools_and_many_vms_leave_in_one_order_of_age() {
    // How much worse a list per pool is depends on how far apart in time the pools were filled: a compressor that is
    // changed seldom is the usual case.
    for (changes, per_pool_max) in [(3, 0.9), (6, 0.97)] {
        let (pages, ours, per_pool) = history(USES_FILLING / changes);
        println!(
            "{changes} times a compressor, {} pages left: ours {ours}, a list per pool {per_pool}",
            pages.left.len()
        );
        assert!(ours.correlation >= 0.99, "{ours}");
        assert!(per_pool.correlation < per_pool_max, "{per_pool}");
        assert!(per_pool.inverted > 10.0 * ours.inverted, "{ours}, {per_pool}");
    }
}
