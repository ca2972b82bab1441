//! What the shrinker leaves a VM: its reserve, whatever sizes its pages have, and more of its pages the more weight it has.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::sync::Arc;

use ballast::ids::Slot;
use ballast::reclaim::pressure::Level;
use ballast::store::Store;
use ballast::store::codec::Scratch;
use ballast::store::vm::Limits;
use support::file::{neutral_shrinker, old, open_with_file, reserve, settle};
use support::page_of;

const MIB: u64 = 1 << 20;
const FILE_BYTES: u64 = 64 << 20;

fn open(dir: &tempfile::TempDir, vms: &[(&str, Limits)], pool_bytes: u64) -> Arc<Store> {
    let vms: Vec<_> = vms.iter().map(|(name, limits)| (*name, 20_000, *limits)).collect();
    Arc::new(open_with_file(dir.path(), &vms, pool_bytes, FILE_BYTES))
}

#[test]
fn a_vm_above_its_reserve_keeps_that_whatever_size_its_coldest_pages_have() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, &[("reserved", reserve(2 * MIB)), ("other", reserve(16 * MIB))], 1 << 30);
    let mut shrinker = neutral_shrinker(&store);
    let mut scratch = Scratch::default();
    let (reserved, other) = (store.ready("reserved").unwrap(), store.ready("other").unwrap());
    for slot in 0..8000 {
        other.store(Slot(slot), &page_of(2, 1), old(10), &mut scratch).unwrap();
    }
    // What leaves first is raw, and much larger than the mean.
    let held = || reserved.accounting().held.pool_bytes;
    for slot in (0..).take_while(|_| held() < MIB) {
        reserved.store(Slot(slot), &page_of(4, slot.into()), old(30), &mut scratch).unwrap();
    }
    for slot in (4000..).take_while(|_| held() < 2 * MIB + 200_000) {
        reserved.store(Slot(slot), &page_of(2, slot.into()), old(5), &mut scratch).unwrap();
    }
    for _ in 0..3 {
        shrinker.request_pressure(Level::Severe);
        settle(&mut shrinker);
        assert!(held() >= 2 * MIB, "{} bytes are left", held());
    }
    assert!(held() < 2 * MIB + 8192, "it gives up what it has above that: {}", held());
    assert_eq!(other.accounting().held.file_pages, 0);
    store.validate();
}

#[test]
fn the_pages_of_a_vm_with_more_weight_count_as_younger() {
    let lost = |weights: [u32; 2]| {
        let dir = tempfile::tempdir().unwrap();
        let [a, b] = weights.map(|weight| Limits { weight, ..Limits::NONE });
        let store = open(&dir, &[("a", a), ("b", b)], 1 << 30);
        let mut scratch = Scratch::default();
        for slot in 0..4000u32 {
            for vm in store.in_use() {
                let age = old(100 - u64::from(slot) / 50);
                vm.store(Slot(slot), &page_of(2, slot.into()), age, &mut scratch).unwrap();
            }
        }
        let mut shrinker = neutral_shrinker(&store);
        shrinker.request_pressure(Level::Severe);
        settle(&mut shrinker);
        ["a", "b"].map(|name| store.ready(name).unwrap().accounting().held.file_pages)
    };
    let [a, b] = lost([100, 100]);
    assert!(a > 200 && b > 200, "{a} and {b} of pages that are equally old");
    let [a, b] = lost([200, 50]);
    assert!(a == 0 && b > 400, "{a} and {b}");
}
