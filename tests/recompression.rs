//! Pages that nobody uses become smaller in the background, with dictionaries of their own VMs, and come back to the fast
//! codec when they are used; whatever happens in between, each is what was stored.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ballast::ids::Slot;
use ballast::page::{Page, ZERO_PAGE};
use ballast::reclaim::ColdOptions;
use ballast::reclaim::shrinker::{Options, Shrinker};
use ballast::store::Store;
use ballast::store::codec::{Compressor, Scratch, train};
use ballast::store::lru::Age;
use ballast::store::vm::{Limits, LoadError, Loaded, Recompressed, VmStore};
use support::file::open_with_file;
use support::{SLOTS, open_store, page_of, records};

const PAGES: u32 = 3000;
const COLD: Compressor = Compressor::ZstdWithDictionary(9);

fn open(dir: &Path) -> Arc<Store> {
    let store = open_store(dir, &["web1", "web2"], Compressor::Lz4, 1 << 30, 1 << 30);
    store.shared().pools.set_cold(Some(COLD)).unwrap();
    Arc::new(store)
}

fn shrinker(store: &Arc<Store>, after: Duration) -> Shrinker {
    shrinker_with(store, ColdOptions { after, cpu_percent: 100, ..ColdOptions::default() })
}

fn shrinker_with(store: &Arc<Store>, cold: ColdOptions) -> Shrinker {
    Shrinker::new(Arc::clone(store), Options { cold, ..Options::default() }, || {})
}

/// Takes steps until `done`, which has to come.
fn turn_until(shrinker: &mut Shrinker, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(120), "it never comes to that");
        shrinker.turn();
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn page(vm: &str, slot: u32) -> Page {
    match slot % 5 {
        4 => page_of(2, u64::from(slot)),
        _ => records(u64::from(slot) + u64::from(vm.ends_with('2')) * 5000),
    }
}

fn store_all(store: &Store, names: &[&str], at: Age) {
    let mut scratch = Scratch::default();
    for name in names {
        let vm = store.ready(name).unwrap();
        for slot in 0..PAGES {
            vm.store(Slot(slot), &page(name, slot), at, &mut scratch).unwrap();
        }
    }
}

fn check_all(store: &Store, names: &[&str]) {
    let (mut scratch, mut found) = (Scratch::default(), ZERO_PAGE);
    for name in names {
        let vm = store.ready(name).unwrap();
        for slot in 0..PAGES {
            vm.check(Slot(slot), &mut found, &mut scratch).unwrap();
            assert!(found == page(name, slot), "{name}, {slot}");
        }
    }
    store.validate();
}

fn cold_objects(store: &Store, vm: &VmStore) -> u64 {
    vm.accounting().held.objects_by_pool[store.shared().pools.cold().unwrap().id.index()]
}

fn dictionary_files(dir: &Path) -> usize {
    let files = fs::read_dir(dir.join("vms")).unwrap();
    files.filter(|file| file.as_ref().unwrap().file_name().to_str().unwrap().contains(".dictionary-")).count()
}

#[test]
fn cold_pages_become_smaller_with_a_dictionary_of_their_vm_and_outlive_the_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let names = ["web1", "web2"];
    // Long ago; and some a moment ago, which stay as they are.
    store_all(&store, &names, Age::from_bits(0));
    let vm = store.ready("web1").unwrap();
    let mut scratch = Scratch::default();
    for slot in 0..100 {
        vm.store(Slot(slot), &page("web1", slot), Age::now(), &mut scratch).unwrap();
    }
    let before: u64 = names.map(|name| store.ready(name).unwrap().accounting().held.pool_bytes).iter().sum();
    let mut shrinker = shrinker(&store, Duration::from_secs(60));
    let all = u64::from(PAGES);
    let other = store.ready("web2").unwrap();
    turn_until(&mut shrinker, || {
        cold_objects(&store, &vm) == all - 100 && cold_objects(&store, &other) == all
    });
    let after: u64 = names.map(|name| store.ready(name).unwrap().accounting().held.pool_bytes).iter().sum();
    assert!(after * 10 < before * 8, "{after} of {before}");
    for vm in [&vm, &other] {
        assert_eq!(vm.dictionaries().count(), 1);
    }
    assert_ne!(
        vm.dictionaries().current().unwrap().bytes(),
        other.dictionaries().current().unwrap().bytes(),
        "each learned from its own pages"
    );
    check_all(&store, &names);
    let moved = shrinker.stats().get().recompressed_pages;
    assert!(moved > all, "{moved}");
    drop((vm, other, shrinker, store));

    // What a new daemon finds it leaves as it is, and reads.
    let store = open(dir.path());
    check_all(&store, &names);
    let mut shrinker = self::shrinker(&store, Duration::from_secs(60));
    let vm = store.ready("web2").unwrap();
    turn_until(&mut shrinker, || cold_objects(&store, &vm) == all);
    let anew = shrinker.stats().get().recompressed_pages;
    assert!(anew < moved / 10, "{anew} of {moved} were compressed again for nothing");
    check_all(&store, &names);

    // With the VM's pages its dictionaries are gone.
    assert_eq!(dictionary_files(dir.path()), 2);
    store.clear("web1").unwrap();
    assert_eq!(dictionary_files(dir.path()), 1);
    assert_eq!(store.ready("web1").unwrap().dictionaries().count(), 0);
    check_all(&store, &["web2"]);
}

#[test]
fn what_is_loaded_comes_back_to_the_fast_codec_and_gets_cold_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let long_ago = Age::from_bits(0);
    store_all(&store, &["web1"], long_ago);
    let vm = store.ready("web1").unwrap();
    let mut shrinker = shrinker(&store, Duration::from_secs(60));
    turn_until(&mut shrinker, || cold_objects(&store, &vm) == u64::from(PAGES));
    let (mut scratch, mut found) = (Scratch::default(), ZERO_PAGE);
    for slot in 0..50 {
        let loaded = vm.load(Slot(slot), None, &mut found, Age::now(), &mut scratch).unwrap();
        assert!(matches!(loaded, Loaded::Page(_)) && found == page("web1", slot));
    }
    // Passes are some seconds apart, of which a test need not wait for each.
    drop(shrinker);
    let mut shrinker = self::shrinker(&store, Duration::from_secs(60));
    turn_until(&mut shrinker, || cold_objects(&store, &vm) == u64::from(PAGES) - 50);
    check_all(&store, &["web1"]);
    drop(shrinker);
    let mut shrinker = self::shrinker(&store, Duration::from_secs(1));
    turn_until(&mut shrinker, || cold_objects(&store, &vm) == u64::from(PAGES));
    check_all(&store, &["web1"]);
}

#[test]
fn pages_of_earlier_pools_follow_although_a_few_cold_ones_wait_for_a_dictionary() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    // Too few of them are cold to learn from; all others are only idle.
    let ago = Duration::from_secs(10);
    let moment = Age::from_bits(0).until(Age::now()).saturating_sub(ago);
    store_all(&store, &["web1"], Age::stored(moment));
    let (vm, mut scratch) = (store.ready("web1").unwrap(), Scratch::default());
    for slot in 0..100 {
        vm.store(Slot(slot), &page("web1", slot), Age::from_bits(0), &mut scratch).unwrap();
    }
    let earlier = store.shared().pools.current().id;
    store.shared().pools.set_current(Compressor::Zstd(1)).unwrap();
    let mut shrinker = shrinker(&store, ago * 6);
    shrinker.request_recompression();
    turn_until(&mut shrinker, || vm.accounting().held.objects_by_pool[earlier.index()] == 0);
    assert_eq!(vm.dictionaries().count(), 0);
    check_all(&store, &["web1"]);
}

#[test]
fn a_page_is_readable_after_any_number_of_dictionaries_and_not_without_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let vm = store.ready("web1").unwrap();
    let mut scratch = Scratch::default();
    let cold = store.shared().pools.cold().unwrap();
    let at_once = |from: u64| train(&(from..from + 100).flat_map(records).collect::<Vec<u8>>()).unwrap();
    for round in 0..15u32 {
        vm.dictionaries().add(at_once(u64::from(round) * 1000)).unwrap();
        for slot in (round..300).step_by(15) {
            vm.store(Slot(slot), &page("web1", slot), Age::now(), &mut scratch).unwrap();
            let _ = vm.recompress(Slot(slot), cold, &mut scratch);
        }
        store.validate();
    }
    drop((vm, store));
    let store = open(dir.path());
    let vm = store.ready("web1").unwrap();
    let mut found = ZERO_PAGE;
    for slot in 0..300 {
        vm.check(Slot(slot), &mut found, &mut scratch).unwrap();
        assert!(found == page("web1", slot), "{slot}");
    }
    drop((vm, store));

    // A dictionary that is damaged in both its copies costs the pages that were made with it, and is said.
    let path = dir.path().join("vms/web1.dictionary-3");
    let good = fs::read(&path).unwrap();
    fs::write(&path, &good[..good.len() / 2 - 9]).unwrap();
    let store = open(dir.path());
    let vm = store.ready("web1").unwrap();
    let mut lost = 0;
    for slot in 0..300 {
        match vm.load(Slot(slot), None, &mut found, Age::now(), &mut scratch) {
            Ok(_) => assert!(found == page("web1", slot), "{slot}"),
            Err(LoadError::Dictionary(number)) => {
                assert_eq!((number.get(), slot % 15), (3, 2));
                lost += 1;
            }
            Err(err) => panic!("{slot}: {err}"),
        }
    }
    assert!(lost > 10, "{lost}");
    drop((vm, store));

    // Once it is back, so are they.
    fs::write(&path, good).unwrap();
    let store = open(dir.path());
    let vm = store.ready("web1").unwrap();
    for slot in 0..300 {
        vm.check(Slot(slot), &mut found, &mut scratch).unwrap();
        assert!(found == page("web1", slot), "{slot}");
    }
}

#[test]
fn a_dictionary_of_a_vm_that_is_gone_is_removed_at_the_next_start() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()));
    let stray = dir.path().join("vms/gone.dictionary-1");
    fs::write(&stray, b"of a VM that was removed just before its daemon was killed").unwrap();
    let store = open(dir.path());
    assert!(!stray.exists());
    assert!(store.ready("web1").unwrap().slots() == SLOTS);
}

#[test]
fn no_more_is_compressed_anew_at_a_time_than_its_share_of_a_core_allows() {
    let moved_at_once = |cpu_percent: u32| {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let store = open_store(dir.path(), &["web1"], Compressor::Lz4, 1 << 30, 1 << 30);
        store.shared().pools.set_cold(Some(Compressor::Zstd(19))).unwrap();
        let store = Arc::new(store);
        store_all(&store, &["web1"], Age::now());
        let cold = ColdOptions { after: Duration::ZERO, cpu_percent, ..ColdOptions::default() };
        let mut shrinker = shrinker_with(&store, cold);
        let moved = || shrinker_stats(&store);
        while moved() == 0 {
            shrinker.turn();
        }
        moved()
    };
    // A tenth of a second, and a thousandth: machines vary by less than what is between these.
    let (all, little) = (moved_at_once(100), moved_at_once(1));
    assert!(little * 4 < all, "{little} objects with a hundredth of a core, {all} with all of it");
}

fn shrinker_stats(store: &Store) -> u64 {
    store.ready("web1").unwrap().accounting().events.recompressed_pages
}

/// A guest writes a page again and again while it is compressed anew: that there is no room would end the pass for its VM.
#[test]
fn a_page_that_changes_meanwhile_is_not_taken_for_one_without_room() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let store = open(dir.path());
    let (vm, cold) = (store.ready("web1").unwrap(), store.shared().pools.cold().unwrap());
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut scratch = Scratch::default();
            for seed in (0..).take_while(|_| !is_over.load(Ordering::Relaxed)) {
                vm.store(Slot(1), &records(seed), Age::from_bits(0), &mut scratch).unwrap();
            }
        });
        let (mut scratch, start, mut changed) = (Scratch::default(), Instant::now(), 0);
        while changed < 10 && start.elapsed() < Duration::from_secs(60) {
            match vm.recompress(Slot(1), cold, &mut scratch) {
                Recompressed::Changed => changed += 1,
                Recompressed::NoRoom => break,
                Recompressed::Kept | Recompressed::Moved(_) | Recompressed::Shared => {}
            }
        }
        is_over.store(true, Ordering::Relaxed);
        assert_eq!(changed, 10);
    });
    store.validate();
}

/// With `+dictionary` in `compressor` it is the pages that are stored which tell whether their dictionary still suits them.
#[test]
fn a_guest_that_stores_other_pages_than_it_used_to_gets_another_dictionary() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let compressor = Compressor::ZstdWithDictionary(1);
    let store = Arc::new(open_store(dir.path(), &["web1"], compressor, 1 << 30, 1 << 30));
    let vm = store.ready("web1").unwrap();
    // How often it is looked.
    let after = Duration::from_millis(500);
    let mut shrinker =
        shrinker_with(&store, ColdOptions { after, cpu_percent: 100, retrain_after: Duration::ZERO });
    let (mut scratch, mut kept) = (Scratch::default(), vec![ZERO_PAGE; PAGES as usize]);
    let mut next = 0_u32;
    let mut guest = |of: fn(u64) -> Page, until: &dyn Fn() -> bool| {
        turn_until(&mut shrinker, || {
            for seed in next..next + 500 {
                let slot = seed % PAGES;
                let page = &mut kept[slot as usize];
                *page = of(u64::from(seed));
                vm.store(Slot(slot), page, Age::now(), &mut scratch).unwrap();
            }
            next += 500;
            until()
        });
    };
    let dictionaries = || vm.dictionaries().count();
    guest(records, &|| dictionaries() == 1);
    let start = Instant::now();
    guest(records, &|| start.elapsed() > Duration::from_secs(3));
    assert_eq!(dictionaries(), 1, "they are what they were");
    guest(|seed| records(seed).map(|byte| byte.to_ascii_uppercase()), &|| dictionaries() == 2);
    let mut found = ZERO_PAGE;
    for (slot, page) in (0..).map(Slot).zip(&kept) {
        vm.check(slot, &mut found, &mut scratch).unwrap();
        assert!(found == *page, "{slot:?}");
    }
}

/// The same where pages get their dictionary when they are cold: those that were compressed anew tell.
#[test]
fn cold_pages_that_are_others_than_they_used_to_be_get_another_dictionary() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let store = Arc::new(open_store(dir.path(), &["web1"], Compressor::Lz4, 1 << 30, 1 << 30));
    store.shared().pools.set_cold(Some(Compressor::ZstdWithDictionary(1))).unwrap();
    let (vm, after) = (store.ready("web1").unwrap(), Duration::from_secs(1));
    let mut shrinker =
        shrinker_with(&store, ColdOptions { after, cpu_percent: 100, retrain_after: Duration::ZERO });
    let mut scratch = Scratch::default();
    let mut seed = 0_u64;
    let mut rounds = |of: fn(u64) -> Page, until: &dyn Fn() -> bool| {
        let mut kept = Vec::new();
        for _ in 0..20 {
            kept = (0..PAGES).map(|slot| of(seed + u64::from(slot))).collect();
            seed += u64::from(PAGES);
            for (slot, page) in (0..).map(Slot).zip(&kept) {
                vm.store(slot, page, Age::now(), &mut scratch).unwrap();
            }
            turn_until(&mut shrinker, || cold_objects(&store, &vm) == u64::from(PAGES));
            if until() {
                break;
            }
        }
        let mut found = ZERO_PAGE;
        for (slot, page) in (0..).map(Slot).zip(&kept) {
            vm.check(slot, &mut found, &mut scratch).unwrap();
            assert!(found == *page, "{slot:?}");
        }
    };
    let dictionaries = || vm.dictionaries().count();
    let looks = Cell::new(0);
    rounds(records, &|| looks.replace(looks.get() + 1) == 5);
    assert_eq!(dictionaries(), 1, "they are what they were");
    rounds(|seed| records(seed).map(|byte| byte.to_ascii_uppercase()), &|| dictionaries() == 2);
    assert_eq!(dictionaries(), 2);
}

/// A host that is short of memory needs its processors for what makes room.
#[test]
fn nothing_is_compressed_anew_while_pages_have_to_leave() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let store = Arc::new(open_with_file(dir.path(), &[("web1", SLOTS, Limits::NONE)], 1 << 30, 1 << 30));
    store.shared().pools.set_cold(Some(Compressor::Zstd(1))).unwrap();
    let (vm, mut scratch) = (store.ready("web1").unwrap(), Scratch::default());
    for slot in 0..SLOTS {
        vm.store(Slot(slot), &page_of(2, u64::from(slot)), Age::from_bits(0), &mut scratch).unwrap();
    }
    let held_bytes = vm.accounting().held.pool_bytes;
    vm.set_limits(Limits { limit_bytes: held_bytes / 16, ..Limits::NONE });
    let mut shrinker = shrinker(&store, Duration::from_secs(60));
    let mut steps = 0;
    while vm.accounting().held.pool_bytes > held_bytes / 8 {
        shrinker.turn();
        steps += 1;
        assert_eq!(shrinker_stats(&store), 0, "after {steps} steps");
    }
    assert!(steps > 16, "{steps}: after so many all else has a turn");
    turn_until(&mut shrinker, || shrinker_stats(&store) > 0);
}
