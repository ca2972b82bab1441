//! Pages of a VM that are the same are kept once, from when they get cold on; and whatever happens to one of them happens
//! to no other: it is overwritten, dropped, used, moved, written back, damaged. Nothing is shared between VMs.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ballast::ids::Slot;
use ballast::page::{PAGE_SIZE, Page, ZERO_PAGE};
use ballast::store::accounting::Accounting;
use ballast::store::arena::compact;
use ballast::store::codec::{Compressor, Scratch};
use ballast::store::entry::{Entry, Location};
use ballast::store::lru::Age;
use ballast::store::sharing::SHARERS_MAX;
use ballast::store::vm::{Limits, LoadError, Recompressed, VmStore};
use ballast::store::{Store, VmState};
use support::file::{load_waiting, neutral_shrinker, open_with_file, settle, write_back};
use support::page_of;

const SLOTS: u32 = 4096;
const VMS: [(&str, u32, Limits); 2] = [("web1", SLOTS, Limits::NONE), ("web2", SLOTS, Limits::NONE)];

/// A store, and what is in the slots of its VMs.
struct World {
    dir: tempfile::TempDir,
    store: Option<Arc<Store>>,
    truth: BTreeMap<(&'static str, u32), Page>,
    scratch: Scratch,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut world = Self { dir, store: None, truth: BTreeMap::new(), scratch: Scratch::default() };
        world.open();
        world
    }

    /// One in which the slots of web1 from 0 on have the same page, and are cold.
    fn with_equal(slots: u32) -> Self {
        Self::with_kinds(slots, 1)
    }

    /// The same with so many kinds of pages in turn.
    fn with_kinds(slots: u32, kinds: u32) -> Self {
        let mut world = Self::new();
        for slot in 0..slots {
            world.put("web1", slot, page_of(2, u64::from(7 + slot % kinds)));
        }
        assert_eq!(world.cool("web1"), (slots - kinds) as usize);
        world
    }

    fn open(&mut self) {
        self.store = None;
        let store = open_with_file(self.dir.path(), &VMS, 128 << 20, 64 << 20);
        store.shared().pools.set_cold(Some(Compressor::Zstd(1))).unwrap();
        self.store = Some(Arc::new(store));
    }

    fn store(&self) -> &Arc<Store> {
        self.store.as_ref().unwrap()
    }

    fn vm(&self, name: &str) -> Arc<VmStore> {
        self.store().ready(name).expect("it is in service")
    }

    fn put(&mut self, name: &'static str, slot: u32, page: Page) {
        self.vm(name).store(Slot(slot), &page, Age::now(), &mut self.scratch).unwrap();
        self.truth.insert((name, slot), page);
    }

    fn discard(&mut self, name: &'static str, slot: u32) {
        self.vm(name).invalidate(Slot(slot));
        self.truth.remove(&(name, slot));
    }

    /// Makes all pages cold. How many were found to be the same as another.
    fn cool(&mut self, name: &str) -> usize {
        let (vm, cold) = (self.vm(name), self.store().shared().pools.cold().unwrap());
        let all = (0..SLOTS).map(|slot| vm.recompress(Slot(slot), cold, &mut self.scratch));
        all.filter(|outcome| *outcome == Recompressed::Shared).count()
    }

    /// Every page is what it should be, and so is every number.
    fn check(&mut self) {
        self.store().validate();
        for ((name, slot), right) in self.truth.clone() {
            let mut page = [0xee; PAGE_SIZE];
            load_waiting(&self.vm(name), slot, &mut page, &mut self.scratch).unwrap();
            assert!(page == right, "slot {slot} of {name}");
        }
        self.store().validate();
    }

    fn entry(&self, name: &str, slot: u32) -> Entry {
        let vm = self.vm(name);
        let raw = vm.table().record(Slot(slot)).unwrap().entry.load(Ordering::Relaxed);
        Entry::unpack(raw, Slot(slot)).unwrap()
    }

    fn shared(&self, slot: u32) -> Location {
        match self.entry("web1", slot) {
            Entry::Shared(location) => location,
            other => panic!("slot {slot}: {other:?}"),
        }
    }

    /// Slots that share, objects that they share, and the bytes that this saves.
    fn numbers(&self, name: &str) -> (u64, u64, u64) {
        let held = self.vm(name).accounting().held;
        (held.shared_pages, held.shared_objects, held.deduplicated_bytes)
    }

    fn file(&self, path: &str) -> File {
        OpenOptions::new().read(true).write(true).open(self.dir.path().join(path)).unwrap()
    }

    /// Overwrites the entry of a slot in the file of web1's table, while no store is open.
    fn set_entry(&mut self, slot: u32, entry: Entry) {
        self.store = None;
        let at = 4096 + u64::from(slot) * 8;
        self.file("state/vms/web1.table").write_all_at(&entry.pack(Slot(slot)).to_le_bytes(), at).unwrap();
    }

    /// Flips a bit of an entry of web1.
    fn flip_entry(&self, slot: u32, bit: u32) {
        let vm = self.vm("web1");
        let entry = vm.table().record(Slot(slot)).unwrap().entry;
        entry.store(entry.load(Ordering::Relaxed) ^ 1 << bit, Ordering::Relaxed);
    }

    fn reason(&self) -> String {
        let mut reasons = Vec::new();
        self.store().for_each(|_, vm| {
            if let VmState::Damaged(damaged) = vm {
                reasons.push(damaged.reason.clone());
            }
        });
        assert_eq!(reasons.len(), 1, "{reasons:?}");
        reasons.remove(0)
    }

    fn move_together(&mut self) -> usize {
        let store = Arc::clone(self.store());
        let vms = store.in_use();
        let mut shared = 0;
        let _ = compact(store.arena(), usize::MAX, |planned| {
            let vm = vms.iter().find(|vm| vm.id() == planned.owner.vm);
            let moved = vm.is_some_and(|vm| vm.relocate(planned, &mut self.scratch));
            shared += usize::from(moved && planned.owner.is_shared());
            moved
        });
        shared
    }
}

#[test]
fn equal_pages_take_the_room_of_one_and_the_last_gives_it_back() {
    let mut world = World::new();
    for slot in 0..30 {
        // Three of each kind, and a few that are like no other; those that repeat a word need no object.
        world.put("web1", slot, page_of(u8::try_from(slot / 6).unwrap(), u64::from(slot / 6 * 7)));
    }
    for slot in 30..40 {
        world.put("web1", slot, page_of(3, 1000 + u64::from(slot)));
    }
    // A word that no entry can hold: a very small object.
    for slot in 40..44 {
        let mut page = ZERO_PAGE;
        page.as_chunks_mut::<8>().0.fill(0x0123_4567_89ab_cdef_u64.to_le_bytes());
        world.put("web1", slot, page);
    }
    let before = world.vm("web1").accounting().held;
    assert_eq!(world.cool("web1"), 4 * 5, "very small objects are not worth it");
    let held = world.vm("web1").accounting().held;
    assert_eq!((held.shared_pages, held.shared_objects, held.stored_pages), (24, 4, before.stored_pages));
    assert_eq!((held.arena_pages(), held.objects()), (38, 38 - 20));
    assert!(
        held.pool_bytes + held.deduplicated_bytes <= before.pool_bytes && held.deduplicated_bytes > 30_000
    );
    assert_eq!(world.vm("web1").accounting().events.deduplicated_pages, 20);
    world.check();

    let entry = world.shared(29);
    world.discard("web1", 24);
    world.put("web1", 25, page_of(2, 5));
    world.discard("web1", 26);
    assert_eq!(world.numbers("web1").0, 21);
    world.check();
    world.open();
    assert_eq!(
        (world.shared(29), world.numbers("web1").1),
        (entry, 4),
        "a new daemon knows it from the entries"
    );
    world.check();
    (0..44).for_each(|slot| world.discard("web1", slot));
    assert_eq!(world.vm("web1").accounting().held.pool_bytes, 0);
    assert_eq!((world.numbers("web1"), world.store().arena().used_bytes()), ((0, 0, 0), 0));
    world.check();
}

#[test]
fn vms_share_nothing_however_equal_their_pages_are() {
    let mut world = World::with_equal(10);
    for slot in 0..10 {
        world.put("web2", slot, page_of(2, 7));
    }
    assert_eq!(world.cool("web2"), 9);
    assert_eq!(world.numbers("web1"), world.numbers("web2"));
    assert_ne!(world.entry("web1", 3), world.entry("web2", 3));
    let alone = world.vm("web1").accounting().held.pool_bytes;
    world.store().clear("web2").unwrap();
    world.truth.retain(|(name, _), _| *name == "web1");
    assert_eq!(world.vm("web1").accounting().held.pool_bytes, alone);
    world.check();
    world.store().remove("web1").unwrap();
    assert_eq!(world.store().arena().used_bytes(), 0, "nothing is left of it");
    world.store().validate();
}

#[test]
fn there_is_an_end_to_how_many_share_an_object() {
    let max = u32::try_from(SHARERS_MAX).unwrap();
    let mut world = World::new();
    for slot in 0..2 * max + 3 {
        world.put("web1", slot, page_of(2, 7));
    }
    // The one after each full object has its own, which the next makes a shared one of.
    assert_eq!(world.cool("web1"), 2 * SHARERS_MAX + 3 - 3);
    assert_eq!((world.numbers("web1").0, world.numbers("web1").1), (2 * u64::from(max) + 3, 3));
    world.check();
    world.open();
    world.check();
}

#[test]
fn who_is_used_leaves_the_others_and_may_come_back() {
    let mut world = World::with_equal(5);
    let (vm, current) = (world.vm("web1"), world.store().shared().pools.current());
    assert!(matches!(vm.recompress(Slot(2), current, &mut world.scratch), Recompressed::Moved(_)));
    assert!(matches!(world.entry("web1", 2), Entry::Arena(_)));
    assert_eq!(world.numbers("web1").0, 4);
    world.check();
    assert_eq!(world.cool("web1"), 1);
    assert_eq!(world.shared(2), world.shared(3));
    world.check();
}

#[test]
fn each_goes_to_the_file_as_its_own_and_comes_back() {
    let mut world = World::with_equal(6);
    let moved = write_back(world.store(), &world.vm("web1"), 0..5);
    assert_eq!((moved, world.numbers("web1")), (5, (1, 1, 0)));
    world.open();
    world.check();
    assert_eq!(write_back(world.store(), &world.vm("web1"), 0..6), 1, "the others are there");
    assert_eq!(world.store().arena().used_bytes(), 0);
    // Loaded twice, they come back, each with an object of its own.
    world.check();
    world.check();
    assert_eq!((world.vm("web1").accounting().held.file_pages, world.numbers("web1").0), (0, 0));
    assert_eq!(world.cool("web1"), 0, "what was compressed as a cold page stays as it came");
    world.check();
}

#[test]
fn a_shared_object_moves_for_all_who_share_it() {
    let mut world = World::with_kinds(300, 100);
    // One object is left in each span.
    let before: Vec<_> = (0..100).map(|slot| world.shared(slot)).collect();
    for slot in (0..100).filter(|slot| slot % 8 != 0) {
        (0..3).for_each(|n| world.discard("web1", slot + 100 * n));
    }
    // Nobody is kept from moving by a limit, although an object is there twice meanwhile.
    let limit_bytes = world.vm("web1").accounting().held.pool_bytes;
    world.vm("web1").set_limits(Limits { limit_bytes, ..Limits::NONE });
    let used_bytes = world.store().arena().used_bytes();
    let moved = world.move_together();
    assert!(moved > 3 && world.store().arena().used_bytes() < used_bytes, "{moved}");
    let elsewhere = (0..100).step_by(8).filter(|slot| world.shared(*slot) != before[*slot as usize]).count();
    assert_eq!(elsewhere, moved);
    for slot in (0..100).step_by(8) {
        assert!(
            world.shared(slot) == world.shared(slot + 100) && world.shared(slot) == world.shared(slot + 200)
        );
    }
    world.check();
    world.open();
    world.check();
}

#[test]
fn a_flipped_bit_costs_those_who_share_it_and_is_never_a_wrong_byte() {
    let mut world = World::with_equal(6);
    world.put("web1", 6, page_of(2, 8));
    let Location { offset, payload_bytes } = world.shared(0);
    let arena = world.file("state/arena");
    let flip = |bit: u64| {
        let mut byte = [0];
        arena.read_exact_at(&mut byte, offset + bit / 8).unwrap();
        arena.write_all_at(&[byte[0] ^ 1 << (bit % 8)], offset + bit / 8).unwrap();
    };
    let load = |world: &mut World, slot: u32| {
        let mut page = [0xee; PAGE_SIZE];
        let result = load_waiting(&world.vm("web1"), slot, &mut page, &mut world.scratch);
        assert!(result.is_ok() || page == [0xee; PAGE_SIZE], "nothing of a damaged page gets out");
        result.map(|()| page)
    };
    for bit in (0..(14 + payload_bytes as u64) * 8).filter(|bit| *bit < 14 * 8 || bit % 7 == 0) {
        flip(bit);
        for slot in 0..6 {
            assert!(matches!(load(&mut world, slot), Err(LoadError::Object(_))), "bit {bit}, slot {slot}");
        }
        flip(bit);
    }
    world.check();
    flip(500);
    // One is overwritten, one moved, one dropped; the others stay what they are.
    world.put("web1", 1, page_of(2, 9));
    assert_eq!(write_back(world.store(), &world.vm("web1"), [2]), 0);
    assert!(matches!(load(&mut world, 2), Err(LoadError::Lost)));
    world.discard("web1", 3);
    for slot in [0, 4, 5] {
        assert!(matches!(load(&mut world, slot), Err(LoadError::Object(_))));
    }
    // Nobody joins it.
    world.put("web1", 7, page_of(2, 7));
    assert_eq!(world.cool("web1"), 0);
    assert!(load(&mut world, 7).unwrap() == page_of(2, 7));
    for slot in [0, 2, 4, 5] {
        world.put("web1", slot, page_of(2, 7));
    }
    world.check();
    assert_eq!(world.cool("web1"), 4);
    world.check();
}

#[test]
fn compaction_gives_a_damaged_object_up_for_all_who_share_it() {
    let mut world = World::with_kinds(300, 100);
    let arena = world.file("state/arena");
    for slot in 0..100 {
        match slot % 8 {
            0 => arena.write_all_at(b"!", world.shared(slot).offset + 100).unwrap(),
            _ => (0..3).for_each(|n| world.discard("web1", slot + 100 * n)),
        }
    }
    assert_eq!(world.move_together(), 0);
    let held = world.vm("web1").accounting().held;
    assert!(held.lost_pages > 3 && held.lost_pages.is_multiple_of(3), "{held:?}");
    for slot in 0..300 {
        if slot % 100 % 8 == 0 {
            assert!(
                load_waiting(&world.vm("web1"), slot, &mut ZERO_PAGE.clone(), &mut world.scratch).is_err()
            );
            world.put("web1", slot, page_of(2, 3));
        }
    }
    world.check();
}

#[test]
fn a_damaged_entry_of_one_costs_the_others_nothing() {
    let mut world = World::with_equal(4);
    world.flip_entry(1, 20);
    // Not moved while one of them is not known; overwritten, its numbers are counted anew.
    assert_eq!(world.move_together(), 0);
    world.put("web1", 1, page_of(2, 9));
    assert_eq!(world.numbers("web1").0, 3);
    world.check();
    world.flip_entry(2, 40);
    world.truth.remove(&("web1", 2));
    world.open();
    assert_eq!((world.numbers("web1").0, world.vm("web1").accounting().held.lost_pages), (2, 1));
    world.check();
    [0, 3].into_iter().for_each(|slot| world.discard("web1", slot));
    world.store().validate();
}

#[test]
fn entries_that_contradict_each_other_take_the_vm_out_of_service() {
    for wrong in 0..3 {
        let mut world = World::with_equal(4);
        world.put("web1", 9, page_of(2, 9));
        let (shared, own) = (world.shared(2), world.entry("web1", 9).location().unwrap());
        let (slot, entry, said) = match wrong {
            0 => (
                2,
                Entry::Shared(Location { payload_bytes: shared.payload_bytes - 1, ..shared }),
                "shared object",
            ),
            1 => (2, Entry::Arena(shared), "two entries"),
            _ => (2, Entry::Shared(own), "two entries"),
        };
        let right = world.entry("web1", slot);
        world.set_entry(slot, entry);
        world.open();
        assert!(world.store().ready("web1").is_none());
        let reason = world.reason();
        assert!(reason.contains(said) && reason.contains("ballast vm clear web1"), "{reason}");
        world.store().validate();
        // Its objects stay; mended, it has all of its pages.
        for slot in 0..200 {
            world.put("web2", slot, page_of(2, 1000 + u64::from(slot)));
        }
        world.set_entry(slot, right);
        world.open();
        world.check();
        // And cleared it has nothing.
        world.set_entry(slot, entry);
        world.open();
        world.store().clear("web1").unwrap();
        world.truth.retain(|(name, _), _| *name == "web2");
        world.check();
    }
}

#[test]
fn a_table_without_a_header_keeps_what_its_slots_share() {
    let mut world = World::with_equal(4);
    world.store = None;
    let table = world.file("state/vms/web1.table");
    let mut header = [0; 4096];
    table.read_exact_at(&mut header, 0).unwrap();
    table.write_all_at(&[0; 4096], 0).unwrap();
    world.open();
    assert!(world.store().ready("web1").is_none());
    for slot in 0..200 {
        world.put("web2", slot, page_of(2, 1000 + u64::from(slot)));
    }
    world.store().validate();
    world.store = None;
    table.write_all_at(&header, 0).unwrap();
    world.open();
    world.check();
}

#[test]
fn nothing_is_shared_when_that_is_not_wanted() {
    let mut world = World::with_equal(4);
    world.store().shared().set_deduplicates(false);
    // Those that share an object stay with it: one of its own for each, however much denser, would take more.
    let (vm, before) = (world.vm("web1"), world.numbers("web1"));
    world.store().shared().pools.set_current(Compressor::Zstd(19)).unwrap();
    let denser = world.store().shared().pools.current();
    let kept = [0, 1, 2, 3].map(|slot| vm.recompress(Slot(slot), denser, &mut world.scratch));
    assert_eq!((kept, world.numbers("web1")), ([Recompressed::Kept; 4], before));
    for slot in 4..8 {
        world.put("web1", slot, page_of(2, 7));
    }
    assert_eq!((world.cool("web1"), world.numbers("web1").0), (0, 4));
    world.check();
    world.store().shared().set_deduplicates(true);
    (6..8).for_each(|slot| world.put("web1", slot, page_of(2, 7)));
    assert_eq!(world.cool("web1"), 1, "hints are forgotten: of two new ones one finds the other");
    world.check();
}

#[test]
fn the_shrinker_takes_those_who_share_one_by_one() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let store = Arc::new(open_with_file(dir.path(), &VMS, 1 << 20, 64 << 20));
    store.shared().pools.set_cold(Some(Compressor::Zstd(1))).unwrap();
    let (vm, cold) = (store.ready("web1").unwrap(), store.shared().pools.cold().unwrap());
    let (mut shrinker, mut scratch) = (neutral_shrinker(&store), Scratch::default());
    // Every other is like some before it.
    let page_for =
        |slot: u32| page_of(2, u64::from(if slot.is_multiple_of(2) { slot / 2 % 100 } else { 1000 + slot }));
    for slot in 0..SLOTS {
        let page = page_for(slot);
        support::file::store_waiting(&vm, &mut shrinker, slot, &page, Age::now(), &mut scratch);
        let _ = vm.recompress(Slot(slot), cold, &mut scratch);
        if slot % 500 == 0 {
            store.validate();
        }
    }
    settle(&mut shrinker);
    store.validate();
    let Accounting { held, events, .. } = vm.accounting();
    assert!(events.deduplicated_pages > 300 && held.file_pages > 1000, "{held:?} {events:?}");
    let mut page = ZERO_PAGE;
    for slot in 0..SLOTS {
        load_waiting(&vm, slot, &mut page, &mut scratch).unwrap();
        assert!(page == page_for(slot), "{slot}");
    }
    store.validate();
}
