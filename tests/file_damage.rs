//! What is stored and damaged, under a store with several VMs: whoever moves a page finds out, gives the page up, and
//! frees its place. A read that fails proves no damage. And a daemon that ends while its file is emptied loses nothing.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::Ordering;

use ballast::ids::Slot;
use ballast::reclaim::pressure::Level;
use ballast::store::codec::{Compressor, Scratch};
use ballast::store::entry::{Entry, Location};
use ballast::store::vm::{LoadError, VmStore};
use ballast::writeback::{Place, SEGMENT_BYTES};
use support::file::{place_of, settle};
use support::world::{NAMES, SLOTS, World};

const POOL_BYTES: u64 = 1 << 20;
/// Of a record in the file.
const HEADER_BYTES: u64 = 24;

fn flip(path: &Path, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

/// Somewhere in the object of a record, which may be a short one.
fn in_object(place: Place) -> u64 {
    HEADER_BYTES + place.object_bytes as u64 / 2
}

fn location_of(vm: &VmStore, slot: u32) -> Option<Location> {
    let entry = vm.table().record(Slot(slot))?.entry.load(Ordering::Relaxed);
    match Entry::unpack(entry, Slot(slot)) {
        Ok(Entry::Arena(location)) => Some(location),
        _ => None,
    }
}

/// Lost pages that VMs have, and pages that were given up.
fn lost(world: &World) -> (u64, u64) {
    let numbers = (0..NAMES.len()).map(|vm| world.vm(vm).accounting());
    numbers.fold((0, 0), |(lost, given_up), numbers| {
        (lost + numbers.held.lost_pages, given_up + numbers.events.given_up_pages)
    })
}

/// The page can't be read until it is written; all others are right.
fn check_lost(world: &mut World, vm: usize, slot: u32) {
    assert_eq!(lost(world), (1, 1));
    assert!(matches!(world.load(vm, slot), Err(LoadError::Lost)));
    world.truth.remove(&(vm, slot));
    world.store().validate();
    world.check();
    world.restart();
    assert_eq!(lost(world), (1, 0));
    assert!(matches!(world.load(vm, slot), Err(LoadError::Lost)));
    world.put(vm, slot, 1);
    world.check_page(vm, slot);
    assert_eq!(lost(world), (0, 0));
    world.store().validate();
}

/// A world some of whose pages are in a segment beyond the size of its file, one of them at the place returned.
fn oversized() -> (World, usize, u32, Place) {
    let mut world = World::new(POOL_BYTES, 24 << 20);
    let place = |world: &World, (vm, slot): (usize, u32)| place_of(&world.vm(vm), slot).unwrap();
    let (found, last) = loop {
        world.use_pages(500);
        let of = |found: &(usize, u32)| place(&world, *found).offset;
        let last = world.in_file().max_by_key(of).map(|found| (found, of(&found) / SEGMENT_BYTES as u64));
        if let Some((found, last @ 5..)) = last {
            break (found, last);
        }
    };
    // One of four is left, and room for them.
    for (n, (vm, slot)) in world.in_file().enumerate().collect::<Vec<_>>() {
        if n % 4 > 0 && (vm, slot) != found {
            world.invalidate(vm, slot);
        }
    }
    world.file_bytes = last * SEGMENT_BYTES as u64;
    world.restart();
    let place = place(&world, found);
    assert!(world.file().is_oversized());
    (world, found.0, found.1, place)
}

#[test]
fn a_damaged_record_is_given_up_when_its_segment_is_emptied() {
    // In the header, in the object, in the tag.
    for part in
        [|_| 9, in_object, |place| HEADER_BYTES + place.object_bytes as u64 + 15] as [fn(Place) -> u64; 3]
    {
        let (mut world, vm, slot, place) = oversized();
        flip(&world.dir.path().join("writeback-file"), place.offset + part(place));
        settle(world.shrinker());
        assert!(!world.file().is_oversized(), "nothing is in the way");
        check_lost(&mut world, vm, slot);
    }
}

#[test]
fn a_record_that_can_not_be_read_is_not_given_up() {
    let (mut world, vm, slot, place) = oversized();
    world.faulty().damage(place.offset..place.offset + 1);
    settle(world.shrinker());
    assert!(world.file().is_oversized() && lost(&world) == (0, 0));
    assert_eq!(place_of(&world.vm(vm), slot), Some(place));
    assert!(matches!(world.load(vm, slot), Err(LoadError::Read(_))));
    world.faulty().heal();
    world.check();
    world.restart();
    settle(world.shrinker());
    assert!(!world.file().is_oversized() && lost(&world) == (0, 0));
    world.check();
    world.store().validate();
}

#[test]
fn a_read_that_fails_the_second_time_proves_nothing() {
    let (mut world, vm, slot, place) = oversized();
    let path = world.dir.path().join("writeback-file");
    flip(&path, place.offset + in_object(place));
    // Until it is all that is left in its segment: then it has been read once, and found damaged.
    let segment = place.segment().unwrap();
    while world.file().live_bytes(segment) > place.record_bytes() as u64 {
        let _ = world.shrinker().turn();
    }
    world.faulty().damage(place.offset..place.offset + 1);
    settle(world.shrinker());
    assert_eq!(lost(&world), (0, 0));
    assert_eq!(place_of(&world.vm(vm), slot), Some(place));
    assert!(world.file().status().read_errors >= 1);
    world.faulty().heal();
    flip(&path, place.offset + in_object(place));
    world.check();
    world.store().validate();
}

#[test]
fn a_damaged_object_is_given_up_by_whoever_moves_it() {
    type Mover = fn(&mut World, usize, u32);
    let shrinker: Mover = |world, vm, slot| {
        while location_of(&world.vm(vm), slot).is_some() {
            world.shrinker().request_pressure(Level::Severe);
            settle(world.shrinker());
        }
    };
    let recompression: Mover = |world, vm, slot| {
        world.store().shared().pools.set_current(Compressor::Zstd(1)).unwrap();
        let current = world.store().shared().pools.current();
        let _ = world.vm(vm).recompress(Slot(slot), current, &mut Scratch::default());
    };
    for moves in [shrinker, recompression] {
        let mut world = World::new(POOL_BYTES, 24 << 20);
        for slot in 0..SLOTS / 4 {
            (0..NAMES.len()).for_each(|vm| world.put(vm, slot, 2));
        }
        let (vm, slot) = (1, 77);
        let at = location_of(&world.vm(vm), slot).unwrap().offset;
        flip(&world.dir.path().join("state/arena"), at + 50);
        moves(&mut world, vm, slot);
        check_lost(&mut world, vm, slot);
    }
}

#[test]
fn compaction_gives_up_what_it_finds_damaged() {
    let mut world = World::new(POOL_BYTES, 24 << 20);
    for slot in 0..SLOTS / 4 {
        (0..NAMES.len()).for_each(|vm| world.put(vm, slot, 2));
    }
    for slot in (0..SLOTS / 4).filter(|slot| slot % 4 > 0) {
        (0..NAMES.len()).for_each(|vm| world.invalidate(vm, slot));
    }
    // Which spans are emptied is not for us to say: some of these are in one.
    let damaged: Vec<u32> = (0..SLOTS / 4).step_by(12).collect();
    for slot in &damaged {
        let at = location_of(&world.vm(1), *slot).unwrap().offset;
        flip(&world.dir.path().join("state/arena"), at + 50);
    }
    settle(world.shrinker());
    let (lost, given_up) = lost(&world);
    assert!(lost > 0 && lost == given_up, "{lost}");
    for slot in damaged {
        assert!(matches!(world.load(1, slot), Err(LoadError::Lost | LoadError::Object(_))), "{slot}");
        world.invalidate(1, slot);
    }
    world.store().validate();
    world.check();
}

#[test]
fn a_daemon_that_ends_while_its_file_is_made_smaller_loses_nothing() {
    let (mut world, ..) = oversized();
    let length = |world: &World| std::fs::metadata(world.dir.path().join("writeback-file")).unwrap().len();
    let mut turns = 0;
    while length(&world) > world.file_bytes {
        let _ = world.shrinker().turn();
        turns += 1;
        assert!(turns < 100, "it comes to an end");
        // With the smaller size again, and with the one that it had.
        for file_bytes in [world.file_bytes, 24 << 20] {
            let mut next = world.crashed();
            next.file_bytes = file_bytes;
            next.restart();
            next.store().validate();
            next.check();
            next.use_pages(100);
            next.check();
        }
    }
    world.check();
    world.store().validate();
}
