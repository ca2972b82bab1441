//! The shrinker on a real store with a real file: who leaves, in which order, how far, and that nothing is lost by it.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ballast::ids::Slot;
use ballast::page::{PAGE_SIZE, Page, ZERO_PAGE};
use ballast::reclaim::pressure::Level;
use ballast::reclaim::shrinker::{Options, Shrinker};
use ballast::store::Store;
use ballast::store::codec::{Compressor, Scratch};
use ballast::store::lru::Age;
use ballast::store::vm::{Limits, StoreError, VmStore};
use support::file::{
    load_at, load_waiting, neutral_shrinker, open_with_file, place_of, settle, store_waiting,
};
use support::page_of;

const FILE_BYTES: u64 = 256 << 20;

fn at(ms: u64) -> Age {
    Age::stored(Duration::from_millis(ms))
}

fn in_file(vm: &VmStore, slot: u32) -> bool {
    place_of(vm, slot).is_some()
}

#[test]
fn a_full_pool_keeps_the_new_pages_and_nothing_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let vms = [("a", 40_000, Limits::NONE), ("b", 40_000, Limits::NONE)];
    let store = Arc::new(open_with_file(dir.path(), &vms, 8 << 20, FILE_BYTES));
    let mut shrinker = neutral_shrinker(&store);
    let mut scratch = Scratch::default();
    let both = [store.ready("a").unwrap(), store.ready("b").unwrap()];
    for n in 0..10_000u32 {
        let vm = &both[n as usize % 2];
        store_waiting(vm, &mut shrinker, n, &page_of(2, u64::from(n)), at(u64::from(n) * 100), &mut scratch);
        assert!(store.arena().used_bytes() <= 8 << 20);
    }
    settle(&mut shrinker);
    store.validate();
    let stats = shrinker.stats().get();
    assert!(stats.evicted_pages > 2000 && stats.runs_pool_full > 5, "{stats:?}");
    // No inversion: what is in the file is older than what is in the pool.
    let newest_out = (0..10_000).filter(|n| in_file(&both[*n as usize % 2], *n)).max().unwrap();
    let oldest_in = (0..10_000).find(|n| !in_file(&both[*n as usize % 2], *n)).unwrap();
    assert_eq!(newest_out + 1, oldest_in, "pages left in the order of their age");
    let check = |store: &Store| {
        let mut page = ZERO_PAGE;
        let mut scratch = Scratch::default();
        for n in 0..10_000u32 {
            let vm = store.ready(["a", "b"][n as usize % 2]).unwrap();
            load_waiting(&vm, n, &mut page, &mut scratch).unwrap();
            assert!(page == page_of(2, u64::from(n)), "{n}");
        }
    };
    check(&store);
    drop((both, shrinker));
    drop(store);
    let store = open_with_file(dir.path(), &vms, 8 << 20, FILE_BYTES);
    store.validate();
    check(&store);
}

#[test]
fn a_load_is_a_use_and_what_was_loaded_counts_as_twice_as_old() {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(open_with_file(dir.path(), &[("a", 40_000, Limits::NONE)], 1 << 30, FILE_BYTES));
    let mut shrinker = neutral_shrinker(&store);
    let mut scratch = Scratch::default();
    let vm = store.ready("a").unwrap();
    let mut page = ZERO_PAGE;
    // Ten thousand moments since the machine was booted, to the latter half of which the shrinker comes.
    let moment = Age::from_bits(0).until(Age::now()) / 10_000;
    let at = |moments: u32| Age::stored(moment * moments);
    for n in 0..5000u32 {
        vm.store(Slot(n), &page_of(2, u64::from(n)), at(n), &mut scratch).unwrap();
    }
    // As old as pages that were stored at 2000, and younger than any that was stored.
    for (slots, moment) in [(500..1000, 6000), (1000..1500, 9000)] {
        for n in slots {
            load_at(&vm, n, &mut page, at(moment), &mut scratch).unwrap();
        }
    }
    assert_eq!(vm.accounting().held.duplicate_pages, 1000);
    while shrinker.stats().get().evicted_pages < 1700 {
        shrinker.request_pressure(Level::Severe);
        settle(&mut shrinker);
    }
    let left = u32::try_from(shrinker.stats().get().evicted_pages).unwrap();
    assert!((0..1000).chain(1500..500 + left).all(|n| in_file(&vm, n)), "{left} have left");
    assert!((1000..1500).chain(500 + left..5000).all(|n| !in_file(&vm, n)), "{left} have left");
    assert_eq!(vm.accounting().held.duplicate_pages, 500);
    store.validate();
}

/// Of two guests that have loaded as many pages as long ago, one used to load such pages again and the other to overwrite them.
#[test]
fn what_was_loaded_leaves_the_sooner_the_more_such_pages_of_its_vm_were_dead() {
    let dir = tempfile::tempdir().unwrap();
    let vms = [("reader", 40_000, Limits::NONE), ("writer", 40_000, Limits::NONE)];
    let store = Arc::new(open_with_file(dir.path(), &vms, 1 << 30, FILE_BYTES));
    let mut shrinker = neutral_shrinker(&store);
    let mut scratch = Scratch::default();
    let vms = ["reader", "writer"].map(|name| store.ready(name).unwrap());
    let mut page = ZERO_PAGE;
    let moment = Age::from_bits(0).until(Age::now()) / 10_000;
    let at = |moments: u32| Age::stored(moment * moments);
    for vm in &vms {
        for n in 0..3000u32 {
            vm.store(Slot(n), &page_of(2, u64::from(n)), at(4000 + n), &mut scratch).unwrap();
        }
        assert_eq!(vm.accounting().fates.zombies(100), 0, "nothing is known yet");
        for n in 0..1000 {
            load_at(vm, n, &mut page, at(7000), &mut scratch).unwrap();
        }
    }
    // They go on with half of what they have loaded; the other half is as old as before.
    for _ in 0..10 {
        for n in 0..500u32 {
            load_at(&vms[0], n, &mut page, at(9500), &mut scratch).unwrap();
            load_at(&vms[1], n, &mut page, at(9500), &mut scratch).unwrap();
            vms[1].store(Slot(n), &page_of(2, u64::from(n)), at(9500), &mut scratch).unwrap();
        }
    }
    let zombies = vms.each_ref().map(|vm| {
        let numbers = vm.accounting();
        (numbers.held.duplicate_pages, numbers.fates.zombies(numbers.held.duplicate_pages))
    });
    assert!(matches!(zombies, [(1000, 0..50), (500, 400..=500)]), "{zombies:?}");
    while shrinker.stats().get().evicted_pages < 1500 {
        shrinker.request_pressure(Level::Severe);
        settle(&mut shrinker);
    }
    let loaded_left = vms.each_ref().map(|vm| (500..1000).filter(|n| in_file(vm, *n)).count());
    let stored_left = vms.each_ref().map(|vm| (1000..3000).filter(|n| in_file(vm, *n)).count());
    assert_eq!(loaded_left, [0, 500], "stored that have left: {stored_left:?}");
    store.validate();
}

#[test]
fn a_vm_at_its_limit_shrinks_alone_and_a_lower_limit_shrinks_it_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { limit_bytes: 2 << 20, ..Limits::NONE };
    let vms = [("small", 40_000, limits), ("other", 40_000, Limits::NONE)];
    let store = Arc::new(open_with_file(dir.path(), &vms, 1 << 30, FILE_BYTES));
    let mut shrinker = neutral_shrinker(&store);
    let mut scratch = Scratch::default();
    let (small, other) = (store.ready("small").unwrap(), store.ready("other").unwrap());
    for n in 0..1000u32 {
        other.store(Slot(n), &page_of(2, u64::from(n)), at(1), &mut scratch).unwrap();
    }
    for n in 0..5000u32 {
        store_waiting(
            &small,
            &mut shrinker,
            n,
            &page_of(2, u64::from(n)),
            at(u64::from(n) * 100),
            &mut scratch,
        );
        assert!(small.accounting().held.pool_bytes <= 2 << 20, "a limit is a limit");
    }
    assert!(small.accounting().held.file_pages > 3000);
    assert_eq!(other.accounting().held.file_pages, 0, "nobody else pays for it");
    small.set_limits(Limits { limit_bytes: 1 << 20, ..limits });
    settle(&mut shrinker);
    let held = small.accounting().held;
    assert!(held.pool_bytes <= 1 << 20 && held.pool_bytes > 800 << 10, "{held:?}");
    small.set_limits(Limits { limit_bytes: 512 << 10, writeback: false, ..limits });
    settle(&mut shrinker);
    assert_eq!(small.accounting().held.pool_bytes, held.pool_bytes, "its pages may not leave");
    assert!(!small.may_wait(&StoreError::Limit));
    store.validate();
}

#[test]
fn a_vm_within_its_reserve_loses_nothing_to_a_flood() {
    let dir = tempfile::tempdir().unwrap();
    let reserved = Limits { reserve_bytes: 3 << 20, ..Limits::NONE };
    let vms = [("quiet", 40_000, reserved), ("flood", 40_000, Limits::NONE)];
    let store = Arc::new(open_with_file(dir.path(), &vms, 8 << 20, FILE_BYTES));
    let mut shrinker = neutral_shrinker(&store);
    let mut scratch = Scratch::default();
    let (quiet, flood) = (store.ready("quiet").unwrap(), store.ready("flood").unwrap());
    for n in 0..1000u32 {
        quiet.store(Slot(n), &page_of(2, u64::from(n)), at(1), &mut scratch).unwrap();
    }
    for n in 0..10_000u32 {
        store_waiting(
            &flood,
            &mut shrinker,
            n,
            &page_of(2, u64::from(n)),
            at(u64::from(n) * 100),
            &mut scratch,
        );
    }
    assert_eq!(quiet.accounting().held.file_pages, 0);
    // What it may still claim is there, at once, although the flood would have taken it.
    for n in 1000..2700u32 {
        quiet.store(Slot(n), &page_of(2, u64::from(n)), at(2), &mut scratch).unwrap();
    }
    assert!(quiet.accounting().held.pool_bytes > 5 << 19);
    store.validate();
}

/// A VM limited to a mebibyte with 2000 pages, stored one `every_ms`: all but the youngest are in the file.
fn mostly_in_the_file(dir: &Path, every_ms: u64) -> Arc<Store> {
    let limits = Limits { limit_bytes: 1 << 20, ..Limits::NONE };
    let store = Arc::new(open_with_file(dir, &[("a", 40_000, limits)], 1 << 30, FILE_BYTES));
    let (mut shrinker, mut scratch) = (neutral_shrinker(&store), Scratch::default());
    let vm = store.ready("a").unwrap();
    for n in 0..2000 {
        let now = at(u64::from(n) * every_ms);
        store_waiting(&vm, &mut shrinker, n, &page_of(2, u64::from(n)), now, &mut scratch);
    }
    settle(&mut shrinker);
    store
}

#[test]
fn a_page_read_twice_from_the_file_comes_back_into_the_pool() {
    let dir = tempfile::tempdir().unwrap();
    let (store, mut scratch) = (mostly_in_the_file(dir.path(), 100), Scratch::default());
    let vm = store.ready("a").unwrap();
    let mut page = ZERO_PAGE;
    assert!(in_file(&vm, 7));
    for twice in [false, true] {
        load_waiting(&vm, 7, &mut page, &mut scratch).unwrap();
        assert!(page == page_of(2, 7));
        assert_eq!(in_file(&vm, 7), !twice);
    }
    let events = vm.accounting().events;
    assert_eq!((events.loaded_from_file, events.promoted_pages), (2, 1));
    load_waiting(&vm, 7, &mut page, &mut scratch).unwrap();
    assert!(page == page_of(2, 7));
    store.validate();
}

#[test]
fn a_page_of_the_file_stays_there_when_it_would_only_leave_again() {
    let dir = tempfile::tempdir().unwrap();
    let (store, mut scratch) = (mostly_in_the_file(dir.path(), 1000), Scratch::default());
    let vm = store.ready("a").unwrap();
    // A page a second, and at the end a little more than the shrinker leaves.
    let second = |n: u32| at(u64::from(n) * 1000);
    for n in 2000..2030 {
        vm.store(Slot(n), &page_of(2, u64::from(n)), second(n), &mut scratch).unwrap();
    }
    // What left last was used some 900 seconds before the end: a page is to be loaded again in less than a quarter of
    // that, and of what passes meanwhile.
    let left = (0..2000).rfind(|n| in_file(&vm, *n)).unwrap();
    let soon = (2030 - left) / 4;
    let mut page = ZERO_PAGE;
    for (slot, after, comes_back) in [(7, soon - 10, true), (8, soon * 2, false)] {
        for now in [2030, 2030 + after] {
            load_at(&vm, slot, &mut page, second(now), &mut scratch).unwrap();
            assert!(page == page_of(2, u64::from(slot)));
        }
        assert_eq!(in_file(&vm, slot), !comes_back, "slot {slot}, loaded twice in {after} s");
    }
    // In use now: it is never too late.
    load_at(&vm, 8, &mut page, second(2030 + soon * 2 + 1), &mut scratch).unwrap();
    assert!(!in_file(&vm, 8));
    assert_eq!(vm.accounting().held.duplicate_pages, 2, "the guest has just loaded them");
    store.validate();
}

#[test]
fn the_compressor_changes_under_load_and_old_pools_drain() {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(open_with_file(dir.path(), &[("a", 40_000, Limits::NONE)], 4 << 20, FILE_BYTES));
    let mut shrinker = Shrinker::new(Arc::clone(&store), Options::default(), || {});
    let mut scratch = Scratch::default();
    let vm = store.ready("a").unwrap();
    let mut truth: HashMap<u32, Page> = HashMap::new();
    for change in 0..10u32 {
        let level = i32::try_from(change % 3).unwrap();
        let compressor = if level == 0 { Compressor::Lz4 } else { Compressor::Zstd(level) };
        store.shared().pools.set_current(compressor).unwrap();
        for n in 0..600u32 {
            let slot = (n * 7 + change * 311) % 4000;
            let page = page_of(u8::try_from(n % 4).unwrap(), u64::from(n * 16 + change));
            store_waiting(&vm, &mut shrinker, slot, &page, Age::now(), &mut scratch);
            truth.insert(slot, page);
        }
        settle(&mut shrinker);
        store.validate();
    }
    let objects = vm.accounting().held.objects_by_pool;
    assert!(objects.iter().filter(|count| **count > 0).count() >= 3, "{objects:?}");
    let mut page = [0xee; PAGE_SIZE];
    for (slot, right) in &truth {
        load_waiting(&vm, *slot, &mut page, &mut scratch).unwrap();
        assert!(&page == right, "{slot}");
    }
    // Everything moves over once it is idle, and the old pools end.
    store.shared().pools.set_current(Compressor::Zstd(5)).unwrap();
    let later = Duration::from_millis(1100);
    std::thread::sleep(later);
    let held = vm.accounting().held;
    let current = store.shared().pools.current().id;
    let to_move = held.objects() - held.objects_by_pool[current.index()];
    shrinker.request_recompression();
    shrinker.turn();
    assert_eq!(shrinker.stats().get().recompression_objects, to_move, "so many there were to move");
    for _ in 0..1000 {
        settle(&mut shrinker);
        store.end_drained_pools();
        // The pass that finds nothing more ends it.
        if store.shared().pools.list().len() == 2 && shrinker.stats().get().recompression_objects == 0 {
            break;
        }
        // So much at a time and no more.
        std::thread::sleep(Duration::from_millis(20));
    }
    let objects = vm.accounting().held.objects_by_pool;
    assert_eq!(objects.iter().filter(|count| **count > 0).count(), 1, "{objects:?}");
    let done = shrinker.stats().get();
    assert!(done.recompressed_pages > 100 && done.recompression_objects == 0, "{done:?}");
    store.validate();
    for (slot, right) in &truth {
        load_waiting(&vm, *slot, &mut page, &mut scratch).unwrap();
        assert!(&page == right, "{slot}");
    }
}
