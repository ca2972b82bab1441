//! The store against the simplest truth there is, a map from slot to page: every step of a random history is done to
//! both, every number is recounted after each step, and restarts (the files as they are, nothing flushed or closed
//! in order) must change nothing.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use ballast::ids::Slot;
use ballast::page::{PAGE_SIZE, Page, ZERO_PAGE};
use ballast::store::accounting::Held;
use ballast::store::arena::compact;
use ballast::store::codec::{Compressor, Scratch, train};
use ballast::store::dictionaries::AddDictionaryError;
use ballast::store::fates::CopyFactor;
use ballast::store::lru::{Age, coldest};
use ballast::store::object::HEADER_BYTES;
use ballast::store::vm::{Limits, LoadError, Loaded, StoreError, Updated, VmStore};
use ballast::store::{Store, VmState};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use support::{SLOTS, open_store, page_of, records};

const NAMES: [&str; 3] = ["db", "web1", "web2"];

fn open(dir: &Path, compressor: Compressor) -> Store {
    open_store(dir, &NAMES, compressor, 1 << 30, 1 << 30)
}

/// Loads from a store that has no writeback file.
fn load(vm: &VmStore, slot: u32, page: &mut Page, scratch: &mut Scratch) -> Result<(), LoadError> {
    match vm.load(Slot(slot), None, page, Age::now(), scratch)? {
        Loaded::Page(_) => Ok(()),
        Loaded::InFile(_) => panic!("there is no file"),
    }
}

#[derive(Clone, Debug)]
enum Step {
    Store {
        vm: usize,
        slot: u32,
        kind: u8,
        seed: u64,
    },
    Update {
        vm: usize,
        slot: u32,
        at: usize,
        byte: u8,
    },
    Load {
        vm: usize,
        slot: u32,
    },
    Invalidate {
        vm: usize,
        from: u32,
        slots: u32,
    },
    Clear {
        vm: usize,
    },
    /// The VM gets a dictionary.
    Dictionary {
        vm: usize,
        seed: u64,
    },
    /// The page goes to the pool of another compressor.
    Recompress {
        vm: usize,
        slot: u32,
        compressor: Compressor,
    },
    /// All pages of the VM go to the pool of another compressor, where those that are the same are kept once.
    Cool {
        vm: usize,
        compressor: Compressor,
    },
    /// Sparse spans are emptied.
    Compact,
    /// Pages that are the same are kept once from now on, or no more.
    Deduplicate(bool),
    Restart {
        compressor: Compressor,
    },
}

/// Few slots, so that they are overwritten; around the border of two chunks and at both ends of the disk.
fn slots() -> impl Strategy<Value = u32> {
    prop_oneof![0..20u32, 4080..4120u32, SLOTS - 10..SLOTS]
}

fn compressors() -> impl Strategy<Value = Compressor> {
    prop_oneof![
        Just(Compressor::Lz4),
        Just(Compressor::Zstd(1)),
        Just(Compressor::Zstd(-3)),
        Just(Compressor::ZstdWithDictionary(2))
    ]
}

/// A dictionary for [`records`]. Training takes a while, and nobody changes them.
fn dictionary(seed: u64) -> Vec<u8> {
    static ALL: [OnceLock<Vec<u8>>; 3] = [const { OnceLock::new() }; 3];
    let make = || train(&(0..100).flat_map(|n| records(seed * 1000 + n)).collect::<Vec<u8>>()).unwrap();
    ALL[usize::try_from(seed).unwrap()].get_or_init(make).clone()
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let vm = 0..NAMES.len();
    let step = prop_oneof![
        6 => (vm.clone(), slots(), any::<u8>(), 0..1000u64)
            .prop_map(|(vm, slot, kind, seed)| Step::Store { vm, slot, kind, seed }),
        // The same pages again and again.
        10 => (vm.clone(), slots(), 1..4u8, 0..3u64)
            .prop_map(|(vm, slot, kind, seed)| Step::Store { vm, slot, kind, seed }),
        3 => (vm.clone(), slots(), 0..PAGE_SIZE, any::<u8>())
            .prop_map(|(vm, slot, at, byte)| Step::Update { vm, slot, at, byte }),
        4 => (vm.clone(), slots()).prop_map(|(vm, slot)| Step::Load { vm, slot }),
        3 => (vm.clone(), slots(), 1..6000u32)
            .prop_map(|(vm, from, slots)| Step::Invalidate { vm, from, slots }),
        1 => vm.clone().prop_map(|vm| Step::Clear { vm }),
        1 => (vm.clone(), 0..3u64).prop_map(|(vm, seed)| Step::Dictionary { vm, seed }),
        4 => (vm.clone(), slots(), compressors())
            .prop_map(|(vm, slot, compressor)| Step::Recompress { vm, slot, compressor }),
        3 => (vm, compressors()).prop_map(|(vm, compressor)| Step::Cool { vm, compressor }),
        2 => Just(Step::Compact),
        1 => prop::bool::weighted(0.8).prop_map(Step::Deduplicate),
        2 => compressors().prop_map(|compressor| Step::Restart { compressor }),
    ];
    prop::collection::vec(step, 1..120)
}

struct Model {
    store: Store,
    truth: HashMap<(usize, u32), Page>,
    scratch: Scratch,
    /// Whether any object was kept for several pages.
    shared: bool,
}

impl Model {
    fn step(&mut self, step: Step, dir: &Path) {
        let vm_store = |store: &Store, vm: usize| store.ready(NAMES[vm]).expect("in service");
        match step {
            Step::Store { vm, slot, kind, seed } => {
                let page = if kind % 6 == 5 { records(seed) } else { page_of(kind, seed) };
                vm_store(&self.store, vm).store(Slot(slot), &page, Age::now(), &mut self.scratch).unwrap();
                self.truth.insert((vm, slot), page);
            }
            Step::Update { vm, slot, at, byte } => {
                let mut page = ZERO_PAGE;
                let change = |page: &mut Page| page[at] = byte;
                let now = Age::now();
                let updated = vm_store(&self.store, vm)
                    .update(Slot(slot), None, &mut page, now, &mut self.scratch, change)
                    .unwrap();
                assert!(matches!(updated, Updated::Done), "there is no file");
                self.truth.entry((vm, slot)).or_insert(ZERO_PAGE)[at] = byte;
            }
            Step::Load { vm, slot } => self.check(vm, slot),
            Step::Invalidate { vm, from, slots } => {
                let end = (from + slots).min(SLOTS);
                let vm_store = vm_store(&self.store, vm);
                let mut next = Some(Slot(from));
                while let Some(slot) = next {
                    next = vm_store.invalidate_some(slot, Slot(end));
                }
                self.truth.retain(|(of, slot), _| *of != vm || !(from..end).contains(slot));
            }
            Step::Clear { vm } => {
                let before = vm_store(&self.store, vm).id();
                self.store.clear(NAMES[vm]).unwrap();
                assert_ne!(vm_store(&self.store, vm).id(), before, "numbers are never reused");
                self.truth.retain(|(of, _), _| *of != vm);
            }
            Step::Dictionary { vm, seed } => {
                match vm_store(&self.store, vm).dictionaries().add(dictionary(seed)) {
                    Ok(_) | Err(AddDictionaryError::TooMany) => {}
                    Err(err) => panic!("{err}"),
                }
            }
            Step::Recompress { vm, slot, compressor } => self.cool(vm, slot..slot + 1, compressor),
            Step::Cool { vm, compressor } => self.cool(vm, 0..SLOTS, compressor),
            Step::Compact => {
                let vms = self.store.in_use();
                compact(self.store.arena(), usize::MAX, |planned| {
                    let vm = vms.iter().find(|vm| vm.id() == planned.owner.vm);
                    vm.is_some_and(|vm| vm.relocate(planned, &mut self.scratch))
                });
            }
            Step::Deduplicate(on) => self.store.shared().set_deduplicates(on),
            Step::Restart { compressor } => {
                // Let go of the lock first; nothing else happens at the end of a store.
                let elsewhere = tempfile::tempdir().unwrap();
                self.store = open(elsewhere.path(), compressor);
                self.store = open(dir, compressor);
            }
        }
        self.store.validate();
        let shared = |vm: &Arc<VmStore>| vm.accounting().held.deduplicated_bytes > 0;
        self.shared |= self.store.in_use().iter().any(shared);
    }

    fn cool(&mut self, vm: usize, slots: Range<u32>, compressor: Compressor) {
        self.store.end_drained_pools();
        let pools = &self.store.shared().pools;
        pools.set_cold(Some(compressor)).unwrap();
        let (vm, cold) = (self.store.ready(NAMES[vm]).unwrap(), pools.cold().unwrap());
        for slot in slots.map(Slot) {
            let _ = vm.recompress(slot, cold, &mut self.scratch);
        }
    }

    fn check(&mut self, vm: usize, slot: u32) {
        let mut page = [0xee; PAGE_SIZE];
        load(&self.store.ready(NAMES[vm]).unwrap(), slot, &mut page, &mut self.scratch).unwrap();
        let expected = self.truth.get(&(vm, slot)).unwrap_or(&ZERO_PAGE);
        assert!(&page == expected, "{} slot {slot}", NAMES[vm]);
    }
}

/// Plays a history. Whether pages were kept once in it that are the same.
fn play(steps: Vec<Step>) -> bool {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), Compressor::Lz4);
    let mut model = Model { store, truth: HashMap::new(), scratch: Scratch::default(), shared: false };
    for step in steps {
        model.step(step, dir.path());
    }
    for (vm, name) in NAMES.iter().enumerate() {
        for slot in (0..20).chain(4080..4120).chain(SLOTS - 10..SLOTS) {
            model.check(vm, slot);
        }
        let stored = model.truth.keys().filter(|(of, _)| *of == vm).count() as u64;
        assert_eq!(model.store.ready(name).unwrap().accounting().held.stored_pages, stored);
    }
    model.shared
}

#[test]
fn the_store_is_a_map_from_slot_to_page() {
    let shared = AtomicU32::new(0);
    let mut runner = TestRunner::new(ProptestConfig {
        cases: 96,
        source_file: Some(file!()),
        ..ProptestConfig::default()
    });
    let played = runner.run(&steps(), |steps| {
        shared.fetch_add(u32::from(play(steps)), Ordering::Relaxed);
        Ok(())
    });
    played.unwrap_or_else(|err| panic!("{err}"));
    let shared = shared.into_inner();
    assert!(shared > 24, "only {shared} of 96 histories had pages that were kept once");
}

#[test]
fn a_full_vm_or_pool_refuses_and_keeps_what_it_has() {
    for (pool, limit) in [(2 << 20, 1 << 30), (1 << 30, 1 << 20)] {
        let dir = tempfile::tempdir().unwrap();
        let store = open_store(dir.path(), &["web1"], Compressor::Lz4, pool, limit);
        let vm = store.ready("web1").unwrap();
        let mut scratch = Scratch::default();
        let mut stored = 0;
        let refused = loop {
            match vm.store(Slot(stored), &page_of(3, u64::from(stored)), Age::now(), &mut scratch) {
                Ok(()) => stored += 1,
                Err(err) => break err,
            }
        };
        assert!(stored > 200, "{stored}");
        assert_eq!(matches!(refused, StoreError::Limit), limit == 1 << 20, "{refused}");
        assert!(vm.accounting().held.pool_bytes <= limit && store.arena().used_bytes() <= pool);
        let events = vm.accounting().events;
        assert_eq!(events.limit_hit + events.pool_limit_hit, 1);
        store.validate();
        let mut page = ZERO_PAGE;
        for slot in 0..stored {
            load(&vm, slot, &mut page, &mut scratch).unwrap();
            assert!(page == page_of(3, u64::from(slot)));
        }
        // Same-filled pages need no room, and dropped pages make some.
        vm.store(Slot(stored), &[7; PAGE_SIZE], Age::now(), &mut scratch).unwrap();
        assert!(vm.invalidate_some(Slot(0), Slot(100)).is_none());
        vm.store(Slot(5), &page_of(3, 5), Age::now(), &mut scratch).unwrap();
        store.validate();
    }
}

#[test]
fn the_coldest_pages_are_those_used_longest_ago() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), Compressor::Lz4);
    let vm = store.ready("web1").unwrap();
    let mut scratch = Scratch::default();
    // Stored in an order that is not that of the slots, then some loaded and some stored again.
    let order: Vec<u32> = (0..5000).map(|n| n * 7919 % 5000).collect();
    let at = |seconds: u64| Age::stored(Duration::from_secs(seconds));
    for (second, slot) in (0..).zip(&order) {
        vm.store(Slot(*slot), &page_of(2, u64::from(*slot)), at(second), &mut scratch).unwrap();
    }
    let mut page = ZERO_PAGE;
    for (slot, second) in [(order[4000], 5000), (order[10], 9000)] {
        let loaded = vm.load(Slot(slot), None, &mut page, at(second), &mut scratch).unwrap();
        assert!(matches!(loaded, Loaded::Page(_)));
    }
    vm.store(Slot(order[0]), &page_of(2, 1), at(9000), &mut scratch).unwrap();
    vm.invalidate(Slot(order[1]));
    // The order of use, but what was loaded counts as twice as old: one of them is as cold as if it had been stored
    // in second 0, the other as in second 8000.
    let expected: Vec<u32> =
        [order[4000]].into_iter().chain(order[2..10].iter().copied()).chain([order[11]]).collect();
    let found = |store: &Store| -> Vec<u32> {
        let vm = store.ready("web1").unwrap();
        let found = coldest(vm.table(), 10, at(10_000), CopyFactor::DOUBLE, |_| true);
        found.into_iter().map(|(_, slot)| slot.0).collect()
    };
    assert_eq!(found(&store), expected);
    drop((vm, store));
    assert_eq!(found(&open(dir.path(), Compressor::Lz4)), expected, "after a restart");
}

#[test]
fn a_damaged_table_takes_its_vm_out_of_service_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let mut scratch = Scratch::default();
    let store = open(dir.path(), Compressor::Lz4);
    for name in NAMES {
        for slot in 0..100 {
            let page = page_of(3, u64::from(slot));
            store.ready(name).unwrap().store(Slot(slot), &page, Age::now(), &mut scratch).unwrap();
        }
    }
    drop(store);
    let path = dir.path().join("vms/web1.table");
    let mut bytes = std::fs::read(&path).unwrap();
    // More than a few flipped bits.
    let damage = |bytes: &mut Vec<u8>| (50..67).for_each(|slot| bytes[4096 + 8 * slot] ^= 0x10);
    damage(&mut bytes);
    std::fs::write(&path, &bytes).unwrap();

    let store = open(dir.path(), Compressor::Lz4);
    let mut reasons = Vec::new();
    store.for_each(|name, vm| {
        if let VmState::Damaged(damaged) = vm {
            reasons.push((name.to_owned(), damaged.reason.clone()));
        }
    });
    assert_eq!(reasons.len(), 1);
    assert!(reasons[0].0 == "web1" && reasons[0].1.contains("slot 66"), "{reasons:?}");
    assert!(reasons[0].1.contains("vm clear web1"), "{reasons:?}");
    assert!(store.ready("web1").is_none());
    drop(store);

    // Mended by hand, the VM has its pages again.
    damage(&mut bytes);
    std::fs::write(&path, &bytes).unwrap();
    let store = open(dir.path(), Compressor::Lz4);
    let mut page = ZERO_PAGE;
    load(&store.ready("web1").unwrap(), 50, &mut page, &mut scratch).unwrap();
    assert!(page == page_of(3, 50));
    drop(store);

    // What the others store does not land on what the damaged table still names.
    damage(&mut bytes);
    std::fs::write(&path, &bytes).unwrap();
    let store = open(dir.path(), Compressor::Lz4);
    for slot in 100..400 {
        let page = page_of(3, u64::from(slot));
        store.ready("db").unwrap().store(Slot(slot), &page, Age::now(), &mut scratch).unwrap();
    }
    store.validate();
    assert_eq!(std::fs::read(&path).unwrap(), bytes, "the damaged table is left alone");
    load(&store.ready("web2").unwrap(), 50, &mut page, &mut scratch).unwrap();
    assert!(page == page_of(3, 50));

    // Cleared, the VM starts afresh.
    store.clear("web1").unwrap();
    load(&store.ready("web1").unwrap(), 49, &mut page, &mut scratch).unwrap();
    assert!(page == ZERO_PAGE);
    store.validate();
}

#[test]
fn changed_bytes_in_the_arena_are_never_served() {
    let dir = tempfile::tempdir().unwrap();
    let mut scratch = Scratch::default();
    let store = open(dir.path(), Compressor::Lz4);
    let vm = store.ready("web1").unwrap();
    vm.store(Slot(1), &page_of(3, 1), Age::now(), &mut scratch).unwrap();
    vm.store(Slot(2), &page_of(3, 2), Age::now(), &mut scratch).unwrap();
    let arena = std::fs::OpenOptions::new().read(true).write(true).open(dir.path().join("arena")).unwrap();
    let at = rustix::fs::seek(&arena, rustix::fs::SeekFrom::Data(0)).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&arena, b"!", at + 1000).unwrap();
    let mut page = [0x55; PAGE_SIZE];
    assert!(load(&vm, 1, &mut page, &mut scratch).is_err());
    assert!(page == [0x55; PAGE_SIZE], "nothing of a damaged page gets out");
    load(&vm, 2, &mut page, &mut scratch).unwrap();
    assert!(page == page_of(3, 2));
    assert_eq!(vm.accounting().events.decompress_fail, 1);
}

#[test]
fn a_million_pages_cost_little_and_come_back() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let config = || ballast::store::StoreConfig {
        state_dir: dir.path().to_owned(),
        pool_max_bytes: 4 << 30,
        accept_percent: 90,
        compressor: Compressor::Lz4,
        host_bytes: 8 << 30,
    };
    let slots = 1 << 20;
    let specs = || vec![ballast::store::VmSpec { name: "big".into(), slots, limits: Limits::NONE }];
    let store = Store::open(config(), specs(), || Ok(None)).unwrap();
    let vm = store.ready("big").unwrap();
    let mut scratch = Scratch::default();
    // Sizes that lie anywhere between 100 bytes and three kilobytes.
    let mut page = page_of(4, 1);
    for slot in 0..slots {
        page[(slot as usize * 37 % 2900) + 60..].fill(1);
        page[..8].copy_from_slice(&u64::from(slot).to_le_bytes());
        if let Err(err) = vm.store(Slot(slot), &page, Age::now(), &mut scratch) {
            panic!("{err} at {slot} {:?} {}", vm.accounting(), store.arena().used_bytes());
        }
        if slot % 64 == 63 {
            page = page_of(4, u64::from(slot));
        }
    }
    let held = vm.accounting().held;
    let headers = (held.stored_pages - held.same_filled_pages) * HEADER_BYTES as u64;
    let arena_bytes = store.arena().used_bytes();
    assert!(arena_bytes - headers <= held.payload_bytes * 106 / 100, "{arena_bytes} for {held:?}");
    let metadata_bytes = vm.table().metadata_bytes() + store.arena().metadata_bytes() + headers;
    assert!(metadata_bytes <= 32 * held.stored_pages + 4096, "{metadata_bytes} bytes of metadata");
    drop((vm, store));
    let before = std::time::Instant::now();
    let store = Store::open(config(), specs(), || Ok(None)).unwrap();
    println!("recovered {slots} pages in {:?}", before.elapsed());
    // Which pool made an object is only known while its daemon lives.
    let without_pools = |held: Held| Held { objects_by_pool: Default::default(), ..held };
    let recovered = store.ready("big").unwrap().accounting().held;
    assert_eq!(without_pools(recovered), without_pools(held));
}
