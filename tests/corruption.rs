//! One flipped bit, anywhere in what is stored: page tables, objects in the arena, records in the writeback file; while
//! the store runs, and before it starts. The page is an error or the right one, never a wrong one; every other page is
//! right, nothing is freed that is another's, and the numbers are those of a recount. What stands there twice is in
//! `damaged_headers`.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ballast::ids::Slot;
use ballast::page::{PAGE_SIZE, Page, ZERO_PAGE};
use ballast::store::codec::{Compressor, Scratch};
use ballast::store::entry::{Entry, Location};
use ballast::store::lru::Age;
use ballast::store::vm::{Limits, LoadError, VmStore};
use ballast::store::{Store, VmState};
use support::file::{
    file_options, load_waiting, neutral_shrinker, open_with_file, place_of, settle, write_back,
};
use support::page_of;
use support::told::{listen, told};

const SLOTS: u32 = 5000;
const POOL_BYTES: u64 = 128 << 20;
const FILE_BYTES: u64 = 64 << 20;
const VMS: [(&str, u32, Limits); 2] = [("web1", SLOTS, Limits::NONE), ("web2", SLOTS, Limits::NONE)];
const TABLE: &str = "state/vms/web1.table";
/// Slots of which each kind of page has some: in two chunks, an empty one last.
const FIRST: u32 = 4090;
const KINDS: u32 = 9;

/// A page of the kind that belongs in this slot.
fn page_for(slot: u32) -> Page {
    let seed = u64::from(slot);
    let filled = |word: u64| {
        let mut page = ZERO_PAGE;
        page.as_chunks_mut::<8>().0.fill(word.to_le_bytes());
        page
    };
    match (slot - FIRST) % KINDS {
        0 => filled(seed),
        1 => filled((seed | 0xdead_0000) * 0x1_0000_0001),
        // Repeats a word that no entry can hold.
        2 => filled(0x0123_4567_89ab_0000 | seed),
        3 | 6 => page_of(1, seed),
        4 => page_of(2, seed),
        5 | 7 => page_of(4, seed),
        _ => ZERO_PAGE,
    }
}

fn is_in_file(slot: u32) -> bool {
    (6..8).contains(&((slot - FIRST) % KINDS))
}

/// The store, and what is in the slots of both VMs.
struct World {
    dir: tempfile::TempDir,
    store: Option<Arc<Store>>,
    truth: BTreeMap<u32, Page>,
    scratch: Scratch,
}

impl World {
    fn new() -> Self {
        listen();
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut world = Self { dir, store: None, truth: BTreeMap::new(), scratch: Scratch::default() };
        world.open();
        for slot in FIRST..FIRST + 2 * KINDS {
            world.put("web2", slot);
            world.put("web1", slot);
            world.truth.insert(slot, page_for(slot));
        }
        world.check_all_but(None);
        world
    }

    fn open(&mut self) {
        self.store = None;
        self.store = Some(Arc::new(open_with_file(self.dir.path(), &VMS, POOL_BYTES, FILE_BYTES)));
    }

    fn store(&self) -> &Arc<Store> {
        self.store.as_ref().unwrap()
    }

    fn vm(&self, name: &str) -> Arc<VmStore> {
        self.store().ready(name).expect("it is in service")
    }

    /// Stores what belongs into a slot, compressed and where it belongs.
    fn put(&mut self, name: &str, slot: u32) {
        let vm = self.vm(name);
        let page = page_for(slot);
        if page == ZERO_PAGE {
            return vm.invalidate(Slot(slot));
        }
        let zstd = (slot - FIRST) % KINDS == 4;
        let compressor = if zstd { Compressor::Zstd(1) } else { Compressor::Lz4 };
        let pools = &self.store().shared().pools;
        self.store().end_drained_pools();
        pools.set_current(compressor).unwrap();
        vm.store(Slot(slot), &page, Age::now(), &mut self.scratch).unwrap();
        if is_in_file(slot) {
            assert_eq!(write_back(self.store(), &vm, [slot]), 1);
        }
    }

    fn load(&mut self, name: &str, slot: u32) -> Result<Page, LoadError> {
        let mut page = [0xee; PAGE_SIZE];
        let result = load_waiting(&self.vm(name), slot, &mut page, &mut self.scratch);
        assert!(result.is_ok() || page == [0xee; PAGE_SIZE], "nothing of a damaged page gets out");
        result.map(|()| page)
    }

    /// Every page of both VMs is right; that of one slot of `web1` may be an error, and is told whether it was.
    fn check_all_but(&mut self, damaged: Option<u32>) -> bool {
        let truth = self.truth.clone();
        let mut failed = false;
        for (slot, right) in truth {
            assert!(self.load("web2", slot).unwrap() == right, "slot {slot} of the other VM");
            match self.load("web1", slot) {
                Ok(page) => assert!(page == right, "slot {slot}"),
                Err(_) if damaged == Some(slot) => failed = true,
                Err(err) => panic!("slot {slot}: {err}"),
            }
        }
        self.back_to_the_file();
        failed
    }

    /// What is loaded more than once comes back into the pool.
    fn back_to_the_file(&self) {
        for (name, _, _) in VMS {
            write_back(
                self.store(),
                &self.vm(name),
                self.truth.keys().copied().filter(|slot| is_in_file(*slot)),
            );
        }
    }

    fn file(&self, path: &str) -> File {
        OpenOptions::new().read(true).write(true).open(self.dir.path().join(path)).unwrap()
    }

    fn entry(&self, slot: u32) -> Entry {
        let vm = self.vm("web1");
        let raw = vm.table().record(Slot(slot)).unwrap().entry.load(Ordering::Relaxed);
        Entry::unpack(raw, Slot(slot)).unwrap()
    }

    fn location(&self, slot: u32) -> Location {
        match self.entry(slot) {
            Entry::Arena(location) => location,
            other => panic!("{other:?}"),
        }
    }
}

/// Changes one bit of a file, counted from its start.
fn flip(file: &File, bit: u64) {
    let mut byte = [0];
    file.read_exact_at(&mut byte, bit / 8).unwrap();
    file.write_all_at(&[byte[0] ^ 1 << (bit % 8)], bit / 8).unwrap();
}

/// Where the entry of a slot, or its age, starts in the table, in bits.
fn entry_at(slot: u32) -> u64 {
    let (chunk, within) = (u64::from(slot) / 4096, u64::from(slot) % 4096);
    (4096 + chunk * 49152 + within * 8) * 8
}

fn age_at(slot: u32) -> u64 {
    let (chunk, within) = (u64::from(slot) / 4096, u64::from(slot) % 4096);
    (4096 + chunk * 49152 + 32768 + within * 4) * 8
}

/// One slot of each kind, the empty one included.
fn one_of_each() -> std::ops::Range<u32> {
    FIRST..FIRST + KINDS
}

#[test]
fn there_are_pages_of_every_kind() {
    let world = World::new();
    let entries: Vec<Entry> = one_of_each().map(|slot| world.entry(slot)).collect();
    let lengths: Vec<usize> = [2, 3, 4, 5].map(|n| world.location(FIRST + n).payload_bytes).to_vec();
    assert!(matches!(entries[0], Entry::SameFilled(word) if word < 1 << 32), "{entries:?}");
    assert!(matches!(entries[1], Entry::SameFilled(word) if word > 1 << 32), "{entries:?}");
    assert!(lengths[0] == 8 && lengths[1] < 200 && lengths[2] < 1500 && lengths[3] == 4096, "{lengths:?}");
    assert!(matches!(entries[6..8], [Entry::File(_), Entry::File(_)]), "{entries:?}");
    assert_eq!(entries[8], Entry::Empty);
    world.store().validate();
}

#[test]
fn every_bit_of_an_entry_is_watched_while_the_store_runs() {
    let mut world = World::new();
    let table = world.file(TABLE);
    for slot in one_of_each() {
        for bit in 0..64 {
            let failures = world.vm("web1").accounting().events.decompress_fail;
            flip(&table, entry_at(slot) + bit);
            assert!(matches!(world.load("web1", slot), Err(LoadError::Entry(_))), "slot {slot}, bit {bit}");
            assert_eq!(world.vm("web1").accounting().events.decompress_fail, failures + 1);
            assert!(world.check_all_but(Some(slot)));
            flip(&table, entry_at(slot) + bit);
            assert!(!world.check_all_but(Some(slot)), "slot {slot}, bit {bit}: mended");
        }
        world.store().validate();
    }
}

#[test]
fn a_damaged_entry_can_be_overwritten_and_discarded() {
    let mut world = World::new();
    let table = world.file(TABLE);
    for slot in one_of_each() {
        for bit in 0..64 {
            flip(&table, entry_at(slot) + bit);
            if bit % 2 == 0 {
                world.vm("web1").invalidate(Slot(slot));
                assert!(world.load("web1", slot).unwrap() == ZERO_PAGE, "slot {slot}, bit {bit}");
            }
            world.put("web1", slot);
            world.store().validate();
            assert!(!world.check_all_but(None), "slot {slot}, bit {bit}");
        }
    }
    // Several at once, of which one is overwritten: the others stay errors, and count as lost.
    for slot in one_of_each() {
        flip(&table, entry_at(slot) + u64::from(slot % 64));
    }
    world.put("web1", FIRST);
    world.store().validate();
    assert_eq!(world.vm("web1").accounting().held.lost_pages, u64::from(KINDS) - 1);
    for slot in one_of_each().skip(1) {
        assert!(matches!(world.load("web1", slot), Err(LoadError::Lost)), "slot {slot}");
        world.put("web1", slot);
    }
    world.check_all_but(None);
    world.store().validate();
    // Said once, of which VM, and not of the other.
    let said = told(|| world.store().shared().tell_written_off());
    assert_eq!(said.matches("entries of the VM's page table were damaged").count(), 1, "{said}");
    assert!(said.contains("vm=\"web1\""), "{said}");
    assert_eq!(told(|| world.store().shared().tell_written_off()), "");
    // What damaged entries named is had back at the next start.
    let used_bytes = world.store().arena().used_bytes();
    world.open();
    assert!(world.store().arena().used_bytes() < used_bytes);
    world.check_all_but(None);
    world.store().validate();
}

#[test]
fn nothing_that_moves_pages_is_misled_by_a_damaged_entry() {
    let mut world = World::new();
    let table = world.file(TABLE);
    for bit in 0..64 {
        // Holes between objects, so that there is something to move together.
        for slot in 0..400 {
            world.vm("web2").store(Slot(slot), &page_of(2, 9), Age::now(), &mut world.scratch).unwrap();
        }
        for slot in one_of_each() {
            flip(&table, entry_at(slot) + bit);
        }
        for slot in (0..400).filter(|slot| slot % 16 != 0) {
            world.vm("web2").invalidate(Slot(slot));
        }
        let mut shrinker = neutral_shrinker(world.store());
        shrinker.request_recompression();
        shrinker.request_pressure(ballast::reclaim::pressure::Level::Severe);
        settle(&mut shrinker);
        for slot in one_of_each() {
            assert!(matches!(world.load("web1", slot), Err(LoadError::Entry(_))), "slot {slot}, bit {bit}");
            flip(&table, entry_at(slot) + bit);
        }
        world.check_all_but(None);
        world.store().validate();
    }
}

#[test]
fn a_flipped_bit_of_an_age_changes_no_page_and_no_number() {
    let mut world = World::new();
    let table = world.file(TABLE);
    for slot in one_of_each() {
        for bit in 0..32 {
            flip(&table, age_at(slot) + bit);
            world.store().validate();
            if bit % 2 == 0 {
                world.check_all_but(None);
                flip(&table, age_at(slot) + bit);
            }
            world.put("web1", slot);
            world.store().validate();
        }
    }
    flip(&table, age_at(FIRST + 4) + 31);
    world.open();
    world.store().validate();
    world.check_all_but(None);
}

#[test]
fn a_flipped_bit_of_an_entry_before_the_start_costs_that_page_at_most() {
    let mut world = World::new();
    let table = world.file(TABLE);
    for slot in one_of_each() {
        for bit in 0..64 {
            world.store = None;
            flip(&table, entry_at(slot) + bit);
            world.open();
            world.store().validate();
            let lost = world.vm("web1").accounting().held.lost_pages;
            assert_eq!(lost, 1, "slot {slot}, bit {bit}");
            assert!(world.check_all_but(Some(slot)), "slot {slot}, bit {bit}");
            assert!(matches!(world.load("web1", slot), Err(LoadError::Lost)));
            // Its object's place is free, and given to others without harm.
            world.put("web1", slot);
            assert!(!world.check_all_but(None));
        }
    }
    world.store().validate();
}

#[test]
fn a_table_with_many_damaged_entries_is_left_alone() {
    let mut world = World::new();
    for slot in 0..20 {
        world.vm("web1").store(Slot(slot), &page_of(2, 3), Age::now(), &mut world.scratch).unwrap();
    }
    let table = world.file(TABLE);
    for damaged in [16, 17] {
        world.store = None;
        for slot in 0..damaged {
            flip(&table, entry_at(slot) + 40);
        }
        world.open();
        world.store().validate();
        let mut reasons = Vec::new();
        world.store().for_each(|_, vm| {
            if let VmState::Damaged(damaged) = vm {
                reasons.push(damaged.reason.clone());
            }
        });
        if damaged == 16 {
            assert!(reasons.is_empty(), "{reasons:?}");
            assert_eq!(world.vm("web1").accounting().held.lost_pages, 16);
            world.check_all_but(None);
        } else {
            assert!(reasons.len() == 1 && reasons[0].contains("ballast vm clear web1"), "{reasons:?}");
        }
    }
    // Mended, it is as good as it was.
    world.store = None;
    for slot in 0..17 {
        flip(&table, entry_at(slot) + 40);
    }
    world.open();
    world.check_all_but(None);
    world.store().validate();
}

#[test]
fn every_bit_of_an_object_is_watched() {
    let mut world = World::new();
    let arena = world.file("state/arena");
    for slot in one_of_each().skip(2).take(4) {
        let Location { offset, payload_bytes } = world.location(slot);
        let bits = (14 + payload_bytes as u64) * 8;
        // All of the header, and of a long payload a part that is different in each byte.
        for bit in (0..bits).filter(|bit| bits < 4000 || *bit < 14 * 8 || bit % 5 == 0) {
            flip(&arena, offset * 8 + bit);
            assert!(matches!(world.load("web1", slot), Err(LoadError::Object(_))), "slot {slot}, bit {bit}");
            flip(&arena, offset * 8 + bit);
        }
        world.check_all_but(None);
        // Damaged, it does not go to the file: it is given up, and then overwritten.
        flip(&arena, offset * 8 + bits / 2);
        assert_eq!(write_back(world.store(), &world.vm("web1"), [slot]), 0);
        for _ in 0..3 {
            assert!(matches!(world.load("web1", slot), Err(LoadError::Lost)), "slot {slot}");
        }
        assert!(world.check_all_but(Some(slot)));
        world.put("web1", slot);
        world.check_all_but(None);
        world.store().validate();
    }
}

#[test]
fn objects_whose_owner_is_damaged_are_moved_to_nobody() {
    let mut world = World::new();
    let arena = world.file("state/arena");
    for bit in 4 * 8..12 * 8 {
        for slot in 0..300 {
            world.vm("web2").store(Slot(slot), &page_of(1, 9), Age::now(), &mut world.scratch).unwrap();
        }
        let Location { offset, .. } = world.location(FIRST + 3);
        flip(&arena, offset * 8 + bit);
        for slot in (0..300).filter(|slot| slot % 16 != 0) {
            world.vm("web2").invalidate(Slot(slot));
        }
        settle(&mut neutral_shrinker(world.store()));
        assert!(world.check_all_but(Some(FIRST + 3)), "bit {bit}");
        world.put("web1", FIRST + 3);
        world.store().validate();
    }
    world.check_all_but(None);
}

#[test]
fn every_bit_of_a_record_is_watched() {
    let mut world = World::new();
    let file = OpenOptions::new().read(true).write(true).open(file_path(world.dir.path())).unwrap();
    for slot in [FIRST + 6, FIRST + 7] {
        let place = || place_of(&world.vm("web1"), slot).unwrap();
        let (sealed, all) = ((24 + place().object_bytes as u64 + 16) * 8, place().record_bytes() as u64 * 8);
        let dense =
            |bit: &u64| sealed < 2000 || *bit < 24 * 8 || *bit + 16 * 8 >= sealed || bit.is_multiple_of(37);
        for bit in (0..all).filter(dense) {
            let place = place_of(&world.vm("web1"), slot).unwrap();
            flip(&file, place.offset * 8 + bit);
            match world.load("web1", slot) {
                Err(LoadError::Record(_)) => assert!(bit < sealed, "bit {bit} of {sealed}"),
                Err(err) => panic!("{err}"),
                // Behind the tag there is nothing but padding.
                Ok(page) => assert!(bit >= sealed && page == page_for(slot), "bit {bit} of {sealed}"),
            }
            flip(&file, place.offset * 8 + bit);
            world.back_to_the_file();
        }
        world.check_all_but(None);
        world.put("web1", slot);
        world.store().validate();
    }
}

fn file_path(dir: &Path) -> std::path::PathBuf {
    file_options(dir, FILE_BYTES).path
}
