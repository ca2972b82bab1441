//! A writeback file that fails, under a store with several VMs: never a wrong byte, never a failed read of a page that
//! has a good copy, and after a failed write a pool that serves on and says what is the matter.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use ballast::ids::Slot;
use ballast::page::ZERO_PAGE;
use ballast::store::lru::Age;
use ballast::store::vm::{LoadError, Loaded, StoreError};
use ballast::writeback::WritebackState;
use ballast::writeback::io::faulty::Fault;
use rustix::io::Errno;
use support::file::{fetch, file_options, place_of, settle};
use support::world::{SLOTS, World};

const POOL_BYTES: u64 = 1 << 20;
const FILE_BYTES: u64 = 24 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

/// A world in which pages of every VM are in the pool and in the file.
fn world() -> World {
    let mut world = World::new(POOL_BYTES, FILE_BYTES);
    while world.file_pages() < 500 {
        world.use_pages(500);
    }
    world
}

#[test]
fn after_a_failed_write_nothing_is_lost_and_the_state_says_why() {
    let faults = [(2, Fault::Error(Errno::IO)), (0, Fault::Torn(5, Errno::IO)), (1, Fault::Short(100))];
    for (later, fault) in faults {
        let mut world = world();
        world.faulty().fail_write(later, fault);
        while world.is_on() {
            world.use_pages(200);
        }
        let WritebackState::Off { reason } = world.file().status().state else { panic!("{fault:?}") };
        assert!(reason.starts_with("a write to the file failed"), "{reason}");
        world.store().validate();
        world.check();
        let writes = world.faulty().submitted().1;
        let refused = world.refused;
        world.use_pages(1000);
        assert!(world.refused > refused, "the pool is full and nothing can leave");
        for vm in 0..3 {
            assert!(
                !world.vm(vm).may_wait(&StoreError::PoolFull) && !world.vm(vm).may_wait(&StoreError::Limit)
            );
        }
        settle(world.shrinker());
        assert_eq!(world.faulty().submitted().1, writes, "it is not tried again");
        world.store().validate();
        world.check();
        world.restart();
        let in_file = world.file_pages();
        world.use_pages(1000);
        assert!(world.is_on() && world.file_pages() > in_file, "pages leave again");
        world.store().validate();
        world.check();
    }
}

#[test]
fn a_file_system_without_room_is_tried_again() {
    for fault in [Fault::Error(Errno::NOSPC), Fault::Torn(3, Errno::NOSPC)] {
        let mut world = world();
        world.faulty().fail_write(0, fault);
        while world.file().status().state == WritebackState::On {
            world.use_pages(20);
        }
        assert_eq!(world.file().status().state, WritebackState::NoSpace);
        assert!(!world.vm(0).may_wait(&StoreError::PoolFull));
        world.store().validate();
        world.check();
        let deadline = Instant::now() + PATIENCE;
        while world.file().status().state != WritebackState::On {
            assert!(Instant::now() < deadline, "it is tried again");
            std::thread::sleep(Duration::from_millis(20));
            world.use_pages(20);
            settle(world.shrinker());
        }
        assert!(world.vm(0).may_wait(&StoreError::PoolFull));
        assert_eq!(world.file().status().no_space_errors, 1);
        world.use_pages(1000);
        world.store().validate();
        world.check();
    }
}

#[test]
fn short_and_slow_transfers_are_no_failures() {
    let mut world = world();
    for later in 0..6 {
        world.faulty().fail_write(later * 2, Fault::Short(9000));
        world.faulty().fail_write(later * 2 + 1, Fault::Delay(Duration::from_millis(5)));
        world.faulty().fail_read(later * 2, Fault::Short(4096 * 3 + 5));
        world.faulty().fail_read(later * 2 + 1, Fault::Delay(Duration::from_millis(5)));
    }
    world.use_pages(1000);
    world.check();
    let status = world.file().status();
    assert_eq!((status.state, status.read_errors, status.write_errors), (WritebackState::On, 0, 0));
    world.store().validate();
}

#[test]
fn a_read_that_fails_is_tried_again_and_a_bad_one_fails_that_load_only() {
    for fault in [Fault::Error(Errno::IO), Fault::Torn(1, Errno::IO), Fault::Short(17)] {
        let mut world = world();
        let (vm, slot) = world.in_file().next().unwrap();
        world.faulty().fail_read(0, fault);
        world.check_page(vm, slot);
        world.faulty().fail_read(0, fault);
        world.faulty().fail_read(1, fault);
        assert!(matches!(world.load(vm, slot), Err(LoadError::Read(_))), "{fault:?}");
        assert!(world.is_on());
        world.check_page(vm, slot);
        // Of several at once none is without its page for the sake of another.
        let wanted = world.vm(vm).in_file(Slot(0), Slot(SLOTS), usize::MAX);
        let many = wanted.len();
        world.faulty().fail_read(0, fault);
        let before = world.file().status().read_errors;
        for fetched in fetch(&world.vm(vm), wanted) {
            let (slot, mut page, now) = (fetched.slot(), ZERO_PAGE, Age::now());
            match world.vm(vm).load(slot, Some(fetched), &mut page, now, &mut world.scratch) {
                Ok(_) => assert_eq!(page, world.right(vm, slot.0)),
                Err(err) => panic!("{err}"),
            }
        }
        assert!(many > 1);
        assert_eq!(world.file().status().read_errors, before + 1);
        world.check();
        world.store().validate();
    }
}

#[test]
fn a_page_that_is_used_while_it_is_written_keeps_its_newest_contents() {
    let mut world = world();
    let before = world.shrinker().stats().get().stale_pages;
    world.fill_to_the_mark();
    // All that may be among them.
    let leaving = world.coldest(10_000);
    world.during_a_held_write(|world| {
        world.store().validate();
        for (at, (vm, slot)) in leaving.iter().enumerate() {
            match at % 4 {
                0 => world.invalidate(*vm, *slot),
                1 => assert!(world.try_put(*vm, *slot, 1).is_ok(), "a smaller page has room"),
                2 => world.check_page(*vm, *slot),
                _ => {}
            }
        }
    });
    let stale = world.shrinker().stats().get().stale_pages - before;
    assert!(stale >= 20, "{stale} were written in vain");
    world.store().validate();
    world.check();
}

#[test]
fn a_vm_that_is_cleared_while_its_pages_are_written_leaves_nothing_behind() {
    let mut world = world();
    world.fill_to_the_mark();
    let (cleared, _) = world.coldest(1)[0];
    world.during_a_held_write(|world| {
        world.clear(cleared);
        world.store().validate();
    });
    assert!(world.shrinker().stats().get().stale_pages > 0, "some of its pages were on their way");
    world.store().validate();
    world.check();
    for slot in 0..SLOTS {
        world.check_page(cleared, slot);
    }
    // Nor is there anything left of it for a successor to find.
    (0..3).for_each(|vm| world.clear(vm));
    assert_eq!(world.file().status().segments.live_bytes, 0);
    assert_eq!(world.store().arena().used_bytes(), 0);
    world.store().validate();
    world.restart();
    world.use_pages(1000);
    world.store().validate();
    world.check();
}

#[test]
fn a_page_that_is_changed_while_it_is_read_reads_as_changed() {
    let mut world = world();
    let found: Vec<_> = world.in_file().take(30).collect();
    for (at, (vm, slot)) in found.into_iter().enumerate() {
        let mut page = [0xee; 4096];
        let vm_store = world.vm(vm);
        let now = Age::now();
        let loaded = vm_store.load(Slot(slot), None, &mut page, now, &mut world.scratch).unwrap();
        let Loaded::InFile(wanted) = loaded else { panic!("it is in the file") };
        world.faulty().fail_read(0, Fault::Hold);
        let (tell, told) = std::sync::mpsc::channel();
        vm_store.fetch(vec![wanted], move |fetched| tell.send(fetched).unwrap());
        match at % 3 {
            0 => world.put(vm, slot, 2),
            1 => world.invalidate(vm, slot),
            _ => {}
        }
        world.store().validate();
        assert_eq!(world.faulty().release(), 1);
        let fetched = told.recv_timeout(PATIENCE).unwrap().pop();
        let loaded = vm_store.load(Slot(slot), fetched, &mut page, now, &mut world.scratch).unwrap();
        assert!(matches!(loaded, Loaded::Page(_)));
        assert!(page == world.right(vm, slot), "{at}");
    }
    world.store().validate();
}

#[test]
fn a_damaged_record_is_an_error_and_nothing_else() {
    let mut world = world();
    let damaged: Vec<_> = world.in_file().step_by(41).take(9).collect();
    let path = file_options(world.dir.path(), FILE_BYTES).path;
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    for (at, (vm, slot)) in damaged.iter().enumerate() {
        let place = place_of(&world.vm(*vm), *slot).unwrap();
        // In the header, in what is encrypted, in the tag.
        let within = [at % 16, 24 + at % place.object_bytes, 24 + place.object_bytes][at % 3];
        let mut byte = [0];
        file.read_exact_at(&mut byte, place.offset + within as u64).unwrap();
        file.write_all_at(&[byte[0] ^ 1 << (at % 8)], place.offset + within as u64).unwrap();
        assert!(matches!(world.load(*vm, *slot), Err(LoadError::Record(_))), "byte {within}");
    }
    let all: Vec<_> = world.truth.keys().copied().collect();
    for (vm, slot) in all.into_iter().filter(|page| !damaged.contains(page)) {
        world.check_page(vm, slot);
    }
    assert!(world.is_on());
    for vm in 0..3 {
        let events = world.vm(vm).accounting().events;
        let failed = damaged.iter().filter(|(of, _)| *of == vm).count() as u64;
        assert_eq!((events.file_load_fail, events.decompress_fail), (failed, 0), "whose pages they are");
    }
    world.store().validate();
    // The guest's next write to the slot mends it, before and after a restart.
    world.restart();
    for (vm, slot) in damaged {
        assert!(matches!(world.load(vm, slot), Err(LoadError::Record(_))));
        world.put(vm, slot, 3);
    }
    world.check();
    world.store().validate();
}
