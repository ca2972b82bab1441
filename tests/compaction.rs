//! Memory follows what is stored: however pages come and go, after the shrinker's housekeeping the arena is within
//! 12 % of the payload that is left, and everything still reads back.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::path::Path;
use std::sync::Arc;

use ballast::ids::Slot;
use ballast::page::{PAGE_SIZE, Page, ZERO_PAGE};
use ballast::store::codec::{Compressor, Scratch};
use ballast::store::lru::Age;
use ballast::store::vm::{Limits, VmStore};
use ballast::store::{Store, VmSpec};
use support::file::{load_waiting, neutral_shrinker, settle};
use support::store_config;

/// 2 GiB of pages.
const SLOTS: u32 = 1 << 19;

fn open(dir: &Path) -> Arc<Store> {
    let specs = ["a", "b"].map(|name| VmSpec { name: name.into(), slots: SLOTS, limits: Limits::NONE });
    let config = store_config(dir, Compressor::Lz4, 4 << 30);
    Arc::new(Store::open(config, specs.into(), || Ok(None)).unwrap())
}

/// A page of which between 60 bytes and three kilobytes don't compress; a function of slot and version.
fn page_of(slot: u32, version: u32) -> Page {
    let mut page = ZERO_PAGE;
    let mut noise = (u64::from(slot) << 32 | u64::from(version)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let length = 64 + (noise >> 20) as usize % 2900 / 8 * 8;
    for chunk in page[..length].as_chunks_mut::<8>().0 {
        noise ^= noise << 13;
        noise ^= noise >> 7;
        noise ^= noise << 17;
        *chunk = noise.to_le_bytes();
    }
    page
}

/// The arena's bytes for each hundred of payload.
fn percent_of_payload(store: &Store) -> u64 {
    let payload: u64 = store.in_use().iter().map(|vm| vm.accounting().held.payload_bytes).sum();
    (store.arena().used_bytes() * 100).div_ceil(payload)
}

fn check(vm: &VmStore, slots: impl Iterator<Item = (u32, u32)>) {
    let mut scratch = Scratch::default();
    let mut page = [0xee; PAGE_SIZE];
    for (slot, version) in slots {
        load_waiting(vm, slot, &mut page, &mut scratch).unwrap();
        assert!(page == page_of(slot, version), "{slot}");
    }
}

#[test]
fn after_a_random_three_quarters_are_dropped_their_memory_is_given_back() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let store = open(dir.path());
    let (a, mut scratch) = (store.ready("a").unwrap(), Scratch::default());
    for slot in 0..SLOTS {
        a.store(Slot(slot), &page_of(slot, 0), Age::now(), &mut scratch).unwrap();
    }
    let stays = |slot: u32| slot.wrapping_mul(0x9e37_79b9).rotate_left(9).is_multiple_of(4);
    (0..SLOTS).filter(|slot| !stays(*slot)).for_each(|slot| a.invalidate(Slot(slot)));
    let before = percent_of_payload(&store);
    assert!(before > 200, "random holes don't empty spans by themselves: {before} %");
    let mut shrinker = neutral_shrinker(&store);
    settle(&mut shrinker);
    let after = percent_of_payload(&store);
    println!("{before} % of the payload before, {after} % after, {:?}", shrinker.stats().get());
    assert!(after <= 112, "{after} %");
    store.validate();
    check(&a, (0..SLOTS).filter(|slot| stays(*slot)).map(|slot| (slot, 0)));
    drop((a, shrinker));
    drop(store);
    let store = open(dir.path());
    assert_eq!(percent_of_payload(&store), after, "after a restart");
    check(
        &store.ready("a").unwrap(),
        (0..SLOTS).filter(|slot| stays(*slot)).step_by(7).map(|slot| (slot, 0)),
    );
}

#[test]
fn random_overwriting_does_not_wear_the_arena_out() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let store = open(dir.path());
    let vms = [store.ready("a").unwrap(), store.ready("b").unwrap()];
    let mut scratch = Scratch::default();
    let mut shrinker = neutral_shrinker(&store);
    let slots = 60_000u32;
    let mut versions = vec![0u32; slots as usize * 2];
    let mut noise = 1u32;
    let mut worst = 0;
    for version in 0..10u32 {
        // Each round rewrites three quarters, with pages of other sizes, and drops a part of them.
        for _ in 0..slots * 3 / 2 {
            noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let at = (noise >> 4) % (slots * 2);
            let (vm, slot) = (&vms[at as usize % 2], at / 2);
            if noise.is_multiple_of(11) {
                vm.invalidate(Slot(slot));
                versions[at as usize] = 0;
            } else {
                vm.store(Slot(slot), &page_of(slot, version + 1), Age::now(), &mut scratch).unwrap();
                versions[at as usize] = version + 1;
            }
        }
        settle(&mut shrinker);
        worst = worst.max(percent_of_payload(&store));
    }
    println!("at worst {worst} % of the payload, {:?}", shrinker.stats().get());
    assert!(worst <= 112, "{worst} %");
    store.validate();
    for (n, vm) in vms.iter().enumerate() {
        let of_vm = versions.iter().enumerate().filter(|(at, version)| at % 2 == n && **version > 0);
        check(vm, of_vm.map(|(at, version)| (u32::try_from(at / 2).unwrap(), *version)));
    }
}
