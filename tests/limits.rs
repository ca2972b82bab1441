//! How far the pool is filled and emptied: limits under fast writers, reserves, host pressure, idle pages, the day's
//! bytes; and a daemon that ends while pages leave.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use ballast::ids::Slot;
use ballast::page::{Page, ZERO_PAGE};
use ballast::reclaim::policy::Policy;
use ballast::reclaim::pressure::Level;
use ballast::reclaim::shrinker::{Options, Shrinker, Step};
use ballast::store::Store;
use ballast::store::codec::{Compressor, Scratch};
use ballast::store::lru::Age;
use ballast::store::vm::{Limits, StoreError, VmStore};
use ballast::writeback::WritebackState;
use support::file::{load_waiting, neutral_shrinker, old, open_with_file, reserve, settle, store_waiting};
use support::world::World;
use support::{Random, open_store, page_of};

const MIB: u64 = 1 << 20;
const FILE_BYTES: u64 = 64 * MIB;
const PATIENCE: Duration = Duration::from_secs(60);

fn open(dir: &tempfile::TempDir, vms: &[(&str, Limits)], pool_bytes: u64) -> Arc<Store> {
    let vms: Vec<_> = vms.iter().map(|(name, limits)| (*name, 20_000, *limits)).collect();
    Arc::new(open_with_file(dir.path(), &vms, pool_bytes, FILE_BYTES))
}

/// Stores pages of about a kilobyte from `first` on until there is no room; returns the slot that got none.
fn fill(vm: &VmStore, first: u32, scratch: &mut Scratch) -> u32 {
    for slot in first..vm.slots() {
        match vm.store(Slot(slot), &page_of(2, u64::from(slot)), Age::now(), scratch) {
            Ok(()) => {}
            Err(StoreError::PoolFull) => return slot,
            Err(err) => panic!("{err}"),
        }
    }
    panic!("the pool has no end");
}

fn write(vm: &VmStore, slots: std::ops::Range<u32>, done: &AtomicU32) {
    let mut scratch = Scratch::default();
    for slot in slots {
        let deadline = Instant::now() + PATIENCE;
        while let Err(err) = vm.store(Slot(slot), &page_of(2, u64::from(slot)), Age::now(), &mut scratch) {
            assert!(vm.may_wait(&err) && Instant::now() < deadline, "{err}");
            std::thread::sleep(Duration::from_millis(1));
        }
        done.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn fast_writers_never_exceed_a_limit_and_a_lower_one_is_reached_under_way() {
    const PAGES: u32 = 5000;
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { limit_bytes: 2 * MIB, ..Limits::NONE };
    let store = open(&dir, &[("a", limits)], 1 << 30);
    let vm = store.ready("a").unwrap();
    let shrinker = neutral_shrinker(&store).start().unwrap();
    let done = AtomicU32::new(0);
    let mut most_bytes = [0; 2];
    std::thread::scope(|scope| {
        for half in 0..2 {
            let (vm, done) = (&vm, &done);
            scope.spawn(move || write(vm, half * PAGES / 2..(half + 1) * PAGES / 2, done));
        }
        let (mut lowered, mut reached) = (false, false);
        while done.load(Ordering::Relaxed) < PAGES {
            if !lowered && done.load(Ordering::Relaxed) > PAGES / 2 {
                vm.set_limits(Limits { limit_bytes: MIB, ..limits });
                lowered = true;
            }
            let held = vm.accounting().held.pool_bytes;
            reached |= lowered && held <= MIB;
            let most = &mut most_bytes[usize::from(reached)];
            *most = held.max(*most);
        }
        assert!(reached, "while they write");
    });
    println!("at most {most_bytes:?} bytes");
    assert!(most_bytes[0] <= 2 * MIB && most_bytes[0] > 3 * MIB / 2 && most_bytes[1] <= MIB);
    drop(shrinker);
    store.validate();
    let (mut page, mut scratch) = (ZERO_PAGE, Scratch::default());
    for slot in 0..PAGES {
        load_waiting(&vm, slot, &mut page, &mut scratch).unwrap();
        assert!(page == page_of(2, u64::from(slot)), "{slot}");
    }
}

#[test]
fn two_fast_writers_each_stay_at_their_own_limit() {
    const PAGES: u32 = 6000;
    let dir = tempfile::tempdir().unwrap();
    let limits = [2 * MIB, 3 * MIB];
    let [a, b] = limits.map(|limit_bytes| Limits { limit_bytes, ..Limits::NONE });
    let store = open(&dir, &[("a", a), ("b", b), ("other", Limits::NONE)], 1 << 30);
    let (mut scratch, other) = (Scratch::default(), store.ready("other").unwrap());
    for slot in 0..500 {
        other.store(Slot(slot), &page_of(2, 1), old(100), &mut scratch).unwrap();
    }
    let vms = ["a", "b"].map(|name| store.ready(name).unwrap());
    let shrinker = neutral_shrinker(&store).start().unwrap();
    let done = [AtomicU32::new(0), AtomicU32::new(0)];
    let (mut most, mut least) = ([0; 2], [u64::MAX; 2]);
    std::thread::scope(|scope| {
        for (vm, done) in vms.iter().zip(&done) {
            scope.spawn(move || write(vm, 0..PAGES, done));
        }
        while done.iter().any(|done| done.load(Ordering::Relaxed) < PAGES) {
            for (n, vm) in vms.iter().enumerate() {
                let held = vm.accounting().held.pool_bytes;
                most[n] = held.max(most[n]);
                if most[n] > limits[n] / 100 * 95 {
                    least[n] = held.min(least[n]);
                }
            }
        }
    });
    println!("at most {most:?} and then at least {least:?} bytes");
    for n in 0..2 {
        assert!(most[n] <= limits[n] && most[n] > limits[n] / 100 * 95);
        // Where it stops by its threshold, and no more than a batch below that.
        assert!(least[n] >= limits[n] / 100 * 90 - MIB / 2);
        assert!(vms[n].accounting().held.file_pages > 2000);
    }
    assert_eq!(other.accounting().held.file_pages, 0, "the oldest, and nobody else's business");
    drop(shrinker);
    store.validate();
}

#[test]
fn pressure_on_a_sparse_arena_takes_what_lies_between_objects_first() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let store = open(&dir, &[("a", Limits::NONE)], 1 << 30);
    let (vm, mut scratch) = (store.ready("a").unwrap(), Scratch::default());
    for slot in 0..12_000 {
        vm.store(Slot(slot), &page_of(2, slot.into()), old(10), &mut scratch).unwrap();
    }
    (0..12_000).filter(|slot| slot % 3 > 0).for_each(|slot| vm.invalidate(Slot(slot)));
    let used = store.arena().used_bytes();
    let mut shrinker = neutral_shrinker(&store);
    shrinker.request_pressure(Level::Severe);
    settle(&mut shrinker);
    let left = used - store.arena().used_bytes();
    assert!(left > used / 2, "{left} of {used} bytes left");
    assert_eq!(vm.accounting().held.file_pages, 0, "no page had to");
    // Dense now: the next time pages leave.
    shrinker.request_pressure(Level::Severe);
    settle(&mut shrinker);
    assert!(vm.accounting().held.file_pages > 100);
    store.validate();
}

#[test]
fn what_others_may_still_claim_is_left_to_them() {
    let dir = tempfile::tempdir().unwrap();
    let vms = [("a", reserve(2 * MIB)), ("b", reserve(MIB)), ("greedy", Limits::NONE)];
    let store = open(&dir, &vms, 8 * MIB);
    let vm = |name: &str| store.ready(name).unwrap();
    let mut scratch = Scratch::default();
    assert_eq!(store.shared().unclaimed_bytes(), 3 * MIB);
    // Nothing leaves: the shrinker is not there.
    let span_bytes_max = 64 << 10;
    // A reserve counts objects; the spans that hold them are up to a twentieth larger, and one is never filled.
    let spans = |bytes: u64| bytes / 20 * 19 - span_bytes_max;
    let refused = fill(&vm("greedy"), 0, &mut scratch);
    let used = store.arena().used_bytes();
    assert!(used <= 5 * MIB && used > 5 * MIB - span_bytes_max, "{used}");
    fill(&vm("a"), 0, &mut scratch);
    assert!(vm("a").accounting().held.pool_bytes > spans(2 * MIB));
    assert!(store.arena().used_bytes() <= 7 * MIB, "the other one's is untouched");
    fill(&vm("b"), 0, &mut scratch);
    assert!(vm("b").accounting().held.pool_bytes > spans(MIB));
    assert!(store.arena().used_bytes() <= 8 * MIB);
    // What is given up may be claimed again, by its owner only.
    (0..vm("a").slots()).for_each(|slot| vm("a").invalidate(Slot(slot)));
    assert!(store.shared().unclaimed_bytes() >= 2 * MIB);
    assert!(fill(&vm("greedy"), refused, &mut scratch) < refused + 64);
    fill(&vm("a"), 0, &mut scratch);
    assert!(vm("a").accounting().held.pool_bytes > spans(2 * MIB));
    vm("a").set_limits(Limits::NONE);
    vm("b").set_limits(Limits::NONE);
    assert_eq!(store.shared().unclaimed_bytes(), 0);
    store.validate();
}

#[test]
fn pressure_takes_the_announced_share_and_no_reserve() {
    for (level, percent) in [(Level::Moderate, 3), (Level::Severe, 10)] {
        let dir = tempfile::tempdir().unwrap();
        let store = open(&dir, &[("reserved", reserve(4 * MIB)), ("other", Limits::NONE)], 1 << 30);
        let mut shrinker = neutral_shrinker(&store);
        let mut scratch = Scratch::default();
        let (reserved, other) = (store.ready("reserved").unwrap(), store.ready("other").unwrap());
        for slot in 0..2000 {
            reserved.store(Slot(slot), &page_of(2, 1), old(20), &mut scratch).unwrap();
        }
        for slot in 0..8000 {
            other.store(Slot(slot), &page_of(2, 1), old(10), &mut scratch).unwrap();
        }
        let used = store.arena().used_bytes();
        shrinker.request_pressure(level);
        settle(&mut shrinker);
        let left = used - store.arena().used_bytes();
        let share = used / 100 * percent;
        // No more than a batch above it.
        assert!(left >= share && left < share + 600_000, "{left} of {used} bytes left");
        assert_eq!(reserved.accounting().held.file_pages, 0, "older, but within its reserve");
        // Where nobody can give anything up, later pages don't have to.
        other.set_limits(reserve(1 << 30));
        let in_file = other.accounting().held.file_pages;
        shrinker.request_pressure(level);
        settle(&mut shrinker);
        other.set_limits(Limits::NONE);
        settle(&mut shrinker);
        assert_eq!(other.accounting().held.file_pages, in_file);
        store.validate();
    }
}

#[test]
fn pages_older_than_idle_leave_and_younger_ones_stay() {
    let dir = tempfile::tempdir().unwrap();
    let vms = [
        ("a", Limits::NONE),
        ("reserved", reserve(4 * MIB)),
        ("kept", Limits { writeback: false, ..Limits::NONE }),
    ];
    let store = open(&dir, &vms, 1 << 30);
    let idle = Some(Duration::from_secs(20));
    let mut shrinker = Shrinker::new(
        Arc::clone(&store),
        Options { policy: Policy::NEUTRAL, idle, ..Options::default() },
        || {},
    );
    let mut scratch = Scratch::default();
    for vm in store.in_use() {
        for slot in 0..1500 {
            let age = if slot % 3 == 0 { Age::now() } else { old(30) };
            vm.store(Slot(slot), &page_of(2, u64::from(slot)), age, &mut scratch).unwrap();
        }
    }
    for _ in 0..20 {
        let _ = shrinker.turn();
    }
    let in_file = |name: &str| store.ready(name).unwrap().accounting().held.file_pages;
    assert_eq!((in_file("a"), in_file("reserved"), in_file("kept")), (1000, 0, 0));
    assert!(shrinker.stats().get().runs_idle >= 3);
    store.validate();
}

#[test]
fn no_page_leaves_for_its_age_while_a_guest_waits_for_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, &[("a", Limits::NONE), ("b", Limits::NONE)], 1 << 30);
    let (a, b) = (store.ready("a").unwrap(), store.ready("b").unwrap());
    let mut scratch = Scratch::default();
    for slot in 0..1500 {
        a.store(Slot(slot), &page_of(2, u64::from(slot)), old(60), &mut scratch).unwrap();
    }
    let idle = |after| Options { policy: Policy::NEUTRAL, idle: Some(after), ..Options::default() };
    let mut shrinker = Shrinker::new(Arc::clone(&store), idle(Duration::from_secs(40)), || {});
    while a.accounting().held.file_pages < 1500 {
        let _ = shrinker.turn();
    }
    let runs = shrinker.stats().get().runs_idle;
    for slot in 0..1000 {
        b.store(Slot(slot), &page_of(2, u64::from(slot)), old(60), &mut scratch).unwrap();
    }
    // A guest that reads what has left is not to wait behind what leaves without need.
    let mut page = ZERO_PAGE;
    for slot in 0..1000 {
        load_waiting(&a, slot, &mut page, &mut scratch).unwrap();
    }
    for _ in 0..5 {
        let _ = shrinker.turn();
    }
    assert_eq!((shrinker.stats().get().runs_idle, b.accounting().held.file_pages), (runs, 0));
    let deadline = Instant::now() + PATIENCE;
    while b.accounting().held.file_pages < 1000 {
        assert!(Instant::now() < deadline, "the disk is idle again");
        std::thread::sleep(Duration::from_millis(20));
        let _ = shrinker.turn();
    }
}

#[test]
fn when_the_days_bytes_are_used_up_loads_go_on_and_stores_are_refused_at_once() {
    let mut world = World::new(MIB, 24 * MIB);
    while world.file_pages() < 300 {
        world.use_pages(200);
    }
    let today = world.file().status().written_bytes_today;
    world.file().set_daily_bytes_max(Some(today + 100_000));
    while world.refused == 0 {
        world.use_pages(50);
    }
    let status = world.file().status();
    assert_eq!(status.state, WritebackState::Budget);
    assert!(status.written_bytes_today <= today + 100_000);
    assert!(!world.vm(0).may_wait(&StoreError::PoolFull));
    settle(world.shrinker());
    world.use_pages(500);
    world.check();
    world.store().validate();
    // A larger allowance counts from the next try on.
    world.file().set_daily_bytes_max(None);
    let deadline = Instant::now() + PATIENCE;
    while world.file().status().state != WritebackState::On {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(20));
        world.use_pages(20);
        settle(world.shrinker());
    }
    world.use_pages(500);
    world.check();
    world.store().validate();
}

#[test]
fn a_daemon_that_ends_while_pages_leave_loses_nothing() {
    let mut world = World::new(MIB, 24 * MIB);
    world.use_pages(2000);
    for round in 0..4 {
        world.fill_to_the_mark();
        let pages = world.coldest(10_000);
        world.during_a_held_write(|world| {
            for (vm, slot) in pages.into_iter().step_by(3) {
                if slot % 2 == 0 {
                    world.invalidate(vm, slot);
                    continue;
                }
                // A smaller page has room, but where its size class would need one more span: then it would wait.
                let put = world.try_put(vm, slot, 1);
                assert!(matches!(put, Ok(()) | Err(StoreError::PoolFull)), "{put:?}");
            }
            // The files as they are now: what a daemon that ends here leaves behind.
            let mut next = world.crashed();
            next.store().validate();
            next.check();
            next.use_pages(300);
            next.check();
            next.store().validate();
        });
        world.check();
        let mut next = world.crashed();
        next.check();
        next.store().validate();
        world.use_pages(100 * round);
    }
    world.store().validate();
}

#[test]
fn a_vm_with_a_reserve_is_cleared_beside_a_pool_that_others_fill() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, &[("reserved", reserve(4 * MIB)), ("other", Limits::NONE)], 8 * MIB);
    let mut scratch = Scratch::default();
    // The daemon's other rooms hold on to it for a while.
    let before = store.ready("reserved").unwrap();
    fill(&before, 0, &mut scratch);
    fill(&store.ready("other").unwrap(), 0, &mut scratch);
    store.clear("reserved").unwrap();
    let after = store.ready("reserved").unwrap();
    assert_ne!(before.id(), after.id());
    assert_eq!(store.shared().unclaimed_bytes(), 4 * MIB, "claimed once, not twice");
    // A new VM's first page is stored whatever the others hold and may claim.
    let full = store.ready("other").unwrap();
    fill(&full, 0, &mut scratch);
    fill(&after, 0, &mut scratch);
    store.clear("reserved").unwrap();
    let again = store.ready("reserved").unwrap();
    again.store_first(Slot(0), &page_of(2, 1), old(1), &mut scratch).unwrap();
    let mut page = ZERO_PAGE;
    load_waiting(&again, 0, &mut page, &mut scratch).unwrap();
    assert!(page == page_of(2, 1));
    store.validate();
}

/// What zstd makes smaller and lz4 can't.
fn digits(seed: u32) -> Page {
    let mut random = Random(u64::from(seed));
    std::array::from_fn(|_| b'0' + u8::try_from(random.below(10)).unwrap())
}

#[test]
fn recompression_is_done_in_a_pool_that_others_keep_full() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let store = open(&dir, &[("idle", reserve(3 * MIB / 2)), ("busy", Limits::NONE)], 3 * MIB);
    let (idle, busy) = (store.ready("idle").unwrap(), store.ready("busy").unwrap());
    let (mut scratch, mut shrinker) = (Scratch::default(), neutral_shrinker(&store));
    for slot in 0..300 {
        idle.store(Slot(slot), &digits(slot), old(10), &mut scratch).unwrap();
    }
    let raw_bytes = idle.accounting().held.pool_bytes;
    store.shared().pools.set_current(Compressor::Zstd(1)).unwrap();
    shrinker.request_recompression();
    let deadline = Instant::now() + PATIENCE;
    let mut stores = 0;
    while idle.accounting().held.objects_by_pool.iter().filter(|count| **count > 0).count() > 1
        || stores < 9000
    {
        assert!(Instant::now() < deadline, "{:?}", shrinker.stats().get());
        let page = page_of(2, stores.into());
        store_waiting(&busy, &mut shrinker, stores % 15_000, &page, Age::now(), &mut scratch);
        stores += 1;
    }
    let (held, in_file) = (idle.accounting().held, busy.accounting().held.file_pages);
    assert!(held.pool_bytes < raw_bytes / 3 * 2 && held.file_pages == 0 && in_file > 3000, "{held:?}");
    store.validate();
    let mut page = ZERO_PAGE;
    for slot in 0..300 {
        load_waiting(&idle, slot, &mut page, &mut scratch).unwrap();
        assert!(page == digits(slot), "{slot}");
    }
}

#[test]
fn recompression_that_finds_no_room_pauses_and_goes_on_when_there_is_some() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let store = Arc::new(open_store(dir.path(), &["a"], Compressor::Zstd(3), 2 * MIB, u64::MAX));
    let (vm, mut scratch) = (store.ready("a").unwrap(), Scratch::default());
    let full = |slot: &u32| vm.store(Slot(*slot), &digits(*slot), old(10), &mut scratch).is_err();
    let end = (0..vm.slots()).find(full).unwrap();
    store.shared().pools.set_current(Compressor::Lz4).unwrap();
    let mut shrinker = neutral_shrinker(&store);
    shrinker.request_recompression();
    let mut rest = |until: &dyn Fn(&Shrinker) -> bool| {
        let start = Instant::now();
        while shrinker.turn() != Step::Rest || !until(&shrinker) {
            assert!(start.elapsed() < PATIENCE, "{:?}", shrinker.stats().get());
            std::thread::sleep(Duration::from_millis(5));
        }
        shrinker.stats().get()
    };
    let stuck = rest(&|_| true);
    assert!(stuck.recompression_waits && stuck.recompressed_pages < u64::from(end) / 8, "{stuck:?}");
    (0..end * 3 / 4).for_each(|slot| vm.invalidate(Slot(slot)));
    let done = rest(&|shrinker| !shrinker.stats().get().recompression_waits);
    let objects = vm.accounting().held.objects_by_pool;
    assert_eq!(objects.iter().filter(|count| **count > 0).count(), 1, "{objects:?} {done:?}");
    store.validate();
    for slot in end * 3 / 4..end {
        let mut page = ZERO_PAGE;
        load_waiting(&vm, slot, &mut page, &mut scratch).unwrap();
        assert!(page == digits(slot), "{slot}");
    }
}
