//! The writeback file under a guest that overwrites its pages again and again: segments are cleaned in time, so that a
//! file somewhat larger than what lives in it is enough, for ever; and under an operator who makes it smaller.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use ballast::ids::Slot;
use ballast::page::ZERO_PAGE;
use ballast::reclaim::policy::Policy;
use ballast::reclaim::shrinker::{Options, Shrinker};
use ballast::store::Store;
use ballast::store::codec::Scratch;
use ballast::store::lru::Age;
use ballast::store::vm::{Limits, VmStore};
use ballast::writeback::WritebackState;
use support::file::{
    load_waiting, neutral_shrinker, open_with_faulty_file, open_with_file, place_of, settle, store_waiting,
};
use support::{Random, page_of};

const FILE_BYTES: u64 = 16 << 20;
const POOL_BYTES: u64 = 1 << 20;

/// Every page of `vm` is `page_of(kind, truth)`.
fn check(vm: &VmStore, kind: u8, truth: &[u32]) {
    let (mut page, mut scratch) = (ZERO_PAGE, Scratch::default());
    for (slot, stamp) in (0..).zip(truth) {
        load_waiting(vm, slot, &mut page, &mut scratch).unwrap();
        assert!(page == page_of(kind, u64::from(*stamp)), "{slot}");
    }
}

/// Stores pages that fill a share of the file over one another until it was written several times, and it is never full.
fn overwrite_many_times(kind: u8, record_bytes: u64, live_percent: u64, times_its_size: u64) {
    let dir = tempfile::tempdir().unwrap();
    let pages = u32::try_from((FILE_BYTES - (1 << 20)) * live_percent / 100 / record_bytes).unwrap();
    let vms = [("a", pages, Limits::NONE)];
    let store = Arc::new(open_with_file(dir.path(), &vms, POOL_BYTES, FILE_BYTES));
    let mut shrinker = neutral_shrinker(&store);
    let (vm, file) = (store.ready("a").unwrap(), store.shared().file.as_ref().unwrap());
    let mut truth = vec![0; pages as usize];
    let (mut random, mut scratch) = (Random(3), Scratch::default());
    let mut stores = 0;
    while file.status().written_bytes_total < times_its_size * FILE_BYTES {
        let slot = if stores < pages { stores } else { random.below(pages) };
        let page = page_of(kind, u64::from(stores));
        while let Err(err) = vm.store(Slot(slot), &page, Age::now(), &mut scratch) {
            assert!(vm.may_wait(&err), "{err}: {:?}", file.status());
            let _ = shrinker.turn();
            assert_eq!(file.status().state, WritebackState::On, "{:?}", file.status());
        }
        truth[slot as usize] = stores;
        stores += 1;
    }
    store.validate();
    let (status, stats) = (file.status(), shrinker.stats().get());
    println!("{status:?}");
    assert!(stats.cleaned_segments > 20, "{stats:?}");
    check(&vm, kind, &truth);
}

#[test]
fn a_small_file_is_overwritten_many_times_without_ever_being_full() {
    overwrite_many_times(2, 1088, 60, 3);
}

#[test]
fn so_is_one_of_raw_pages_that_nearly_fill_it() {
    overwrite_many_times(4, 4160, 92, 6);
}

/// A store most of whose pages are in a file of 16 MiB, all over it.
fn spread(dir: &std::path::Path) -> Vec<u32> {
    let vms = [("a", 12_000, Limits::NONE)];
    let store = Arc::new(open_with_file(dir, &vms, POOL_BYTES, FILE_BYTES));
    let mut shrinker = neutral_shrinker(&store);
    let (vm, mut scratch) = (store.ready("a").unwrap(), Scratch::default());
    for slot in 0..12_000 {
        store_waiting(&vm, &mut shrinker, slot, &page_of(2, u64::from(slot)), Age::now(), &mut scratch);
    }
    // One of three is left, in every segment.
    for slot in (0..12_000).filter(|slot| slot % 3 > 0) {
        vm.invalidate(Slot(slot));
    }
    (0..12_000).filter(|slot| slot % 3 == 0).collect()
}

fn check_spread(vm: &VmStore, slots: &[u32]) {
    let (mut page, mut scratch) = (ZERO_PAGE, Scratch::default());
    for slot in slots {
        load_waiting(vm, *slot, &mut page, &mut scratch).unwrap();
        assert!(page == page_of(2, u64::from(*slot)), "{slot}");
    }
}

fn in_file_beyond(store: &Store, bytes: u64) -> usize {
    let vm = store.ready("a").unwrap();
    (0..12_000).filter(|slot| place_of(&vm, *slot).is_some_and(|place| place.offset >= bytes)).count()
}

#[test]
fn a_file_that_was_configured_smaller_is_emptied_there_within_the_days_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let slots = spread(dir.path());
    let smaller = FILE_BYTES / 2;
    let vms = [("a", 12_000, Limits::NONE)];
    let store = Arc::new(open_with_file(dir.path(), &vms, POOL_BYTES, smaller));
    let mut shrinker = neutral_shrinker(&store);
    let file = store.shared().file.as_ref().unwrap();
    let length = || fs::metadata(dir.path().join("writeback-file")).unwrap().len();
    let before = in_file_beyond(&store, smaller);
    assert!(before > 1000, "{before}");

    let day = file.status().written_bytes_today + (2 << 20);
    file.set_daily_bytes_max(Some(day));
    settle(&mut shrinker);
    let after = in_file_beyond(&store, smaller);
    assert!(after < before && after > 0, "{before}, {after}");
    assert!(file.status().written_bytes_today <= day && length() == FILE_BYTES);
    store.validate();

    file.set_daily_bytes_max(None);
    settle(&mut shrinker);
    assert_eq!((in_file_beyond(&store, smaller), length()), (0, smaller));
    store.validate();
    check_spread(&store.ready("a").unwrap(), &slots);
    drop((shrinker, store));
    let store = open_with_file(dir.path(), &vms, POOL_BYTES, smaller);
    store.validate();
    check_spread(&store.ready("a").unwrap(), &slots);
}

#[test]
fn nothing_is_read_for_cleaning_that_may_not_be_written_today() {
    let dir = tempfile::tempdir().unwrap();
    let slots = spread(dir.path());
    let vms = [("a", 12_000, Limits::NONE)];
    let (store, faulty) = open_with_faulty_file(dir.path(), &vms, POOL_BYTES, FILE_BYTES);
    let store = Arc::new(store);
    let options = Options { policy: Policy::NEUTRAL, idle: Some(Duration::ZERO), ..Options::default() };
    let mut shrinker = Shrinker::new(Arc::clone(&store), options, || {});
    let file = store.shared().file.as_ref().unwrap();
    file.set_daily_bytes_max(Some(file.status().written_bytes_today));
    for _ in 0..50 {
        let _ = shrinker.turn();
    }
    assert_eq!(faulty.submitted(), (0, 0));
    assert_eq!(file.status().state, WritebackState::Budget, "old pages would leave");
    file.set_daily_bytes_max(None);
    settle(&mut shrinker);
    assert!(faulty.submitted().0 > 0 && shrinker.stats().get().cleaned_segments > 0);
    check_spread(&store.ready("a").unwrap(), &slots);
}

#[test]
fn segments_that_die_are_given_back_though_no_page_leaves() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    let slots = spread(dir.path());
    let vms = [("a", 12_000, Limits::NONE)];
    let store = Arc::new(open_with_file(dir.path(), &vms, POOL_BYTES, FILE_BYTES));
    let mut shrinker = neutral_shrinker(&store);
    let blocks = || fs::metadata(dir.path().join("writeback-file")).unwrap().blocks();
    settle(&mut shrinker);
    let (before, vm) = (blocks(), store.ready("a").unwrap());
    slots.iter().for_each(|slot| vm.invalidate(Slot(*slot)));
    settle(&mut shrinker);
    assert!(store.shared().file.as_ref().unwrap().status().discard_errors == 0 && before > 8192);
    assert!(blocks() <= 2048 + 8, "the header, and what was written last: {}", blocks());
}
