//! The store with a writeback file against a map from slot to page: stores, loads, invalidates, cleared VMs, steps of
//! the shrinker, every fault of the file and restarts in any order. Every number is recounted after each step.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::time::Duration;

use ballast::writeback::io::faulty::Fault;
use proptest::prelude::*;
use rustix::io::Errno;
use support::file::settle;
use support::world::{NAMES, SLOTS, World};

/// Both so small that they are full most of the time.
const POOL_BYTES: u64 = 1 << 20;
const FILE_BYTES: u64 = 5 << 20;

#[derive(Clone, Debug)]
enum Step {
    Store {
        vm: usize,
        first: u32,
        count: u32,
        kind: u8,
    },
    Load {
        vm: usize,
        first: u32,
        count: u32,
    },
    Invalidate {
        vm: usize,
        first: u32,
        count: u32,
    },
    Use(u32),
    Shrink,
    /// All pages of a VM get cold, and those that are the same are kept once.
    Cool(usize),
    Clear(usize),
    Restart,
    Crash,
    FailWrite(u64, Fault),
    FailRead(u64, Fault),
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        1 => Just(Fault::Error(Errno::IO)),
        2 => Just(Fault::Error(Errno::NOSPC)),
        3 => (0usize..200_000).prop_map(Fault::Short),
        1 => (0usize..40).prop_map(|blocks| Fault::Torn(blocks, Errno::IO)),
        2 => (0usize..40).prop_map(|blocks| Fault::Torn(blocks, Errno::NOSPC)),
        2 => (0u64..2000).prop_map(|us| Fault::Delay(Duration::from_micros(us))),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = || (0..NAMES.len(), 0..SLOTS, 1..200u32);
    let step = prop_oneof![
        8 => (range(), 0..5u8)
            .prop_map(|((vm, first, count), kind)| Step::Store { vm, first, count, kind }),
        4 => range().prop_map(|(vm, first, count)| Step::Load { vm, first, count }),
        3 => range().prop_map(|(vm, first, count)| Step::Invalidate { vm, first, count }),
        6 => (1..400u32).prop_map(Step::Use),
        4 => Just(Step::Shrink),
        4 => (0..NAMES.len()).prop_map(Step::Cool),
        1 => (0..NAMES.len()).prop_map(Step::Clear),
        1 => Just(Step::Restart),
        1 => Just(Step::Crash),
        2 => (0u64..3, fault()).prop_map(|(later, fault)| Step::FailWrite(later, fault)),
        2 => (0u64..9, fault()).prop_map(|(later, fault)| Step::FailRead(later, fault)),
    ];
    prop::collection::vec(step, 1..40)
}

fn apply(world: &mut World, step: Step) {
    let slots = |first: u32, count: u32| first..(first + count).min(SLOTS);
    match step {
        Step::Store { vm, first, count, kind } => {
            slots(first, count).for_each(|slot| world.put(vm, slot, kind));
        }
        Step::Load { vm, first, count } => slots(first, count).for_each(|slot| world.check_page(vm, slot)),
        Step::Invalidate { vm, first, count } => {
            slots(first, count).for_each(|slot| world.invalidate(vm, slot));
        }
        Step::Use(uses) => world.use_pages(uses),
        Step::Shrink => settle(world.shrinker()),
        Step::Cool(vm) => world.cool(vm),
        Step::Clear(vm) => world.clear(vm),
        Step::Restart => world.restart(),
        Step::Crash => *world = world.crashed(),
        Step::FailWrite(later, fault) => world.faulty().fail_write(later, fault),
        Step::FailRead(later, fault) => {
            world.failing_reads += 1;
            world.faulty().fail_read(later, fault);
        }
    }
    world.store().validate();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]
    #[test]
    fn pages_are_what_was_stored_whatever_the_file_does(steps in steps()) {
        let mut world = World::new(POOL_BYTES, FILE_BYTES);
        for step in steps {
            apply(&mut world, step);
        }
        world.check();
        world.restart();
        world.check();
        // The file is well again: pages can leave.
        world.use_pages(300);
        prop_assert!(world.is_on());
        world.check();
        world.store().validate();
    }
}
