//! One flipped bit in what says whose the pages are, before a start: a page table's header, the state's file, the writeback
//! state, the writeback file's header. Each stands there twice, so it costs nothing, and is mended.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use ballast::ids::Slot;
use ballast::page::{PAGE_SIZE, Page, ZERO_PAGE};
use ballast::store::Store;
use ballast::store::codec::Scratch;
use ballast::store::lru::Age;
use ballast::store::vm::{Limits, VmStore};
use support::file::{file_options, load_waiting, open_with_file, write_back};
use support::page_of;

const POOL_BYTES: u64 = 128 << 20;
const FILE_BYTES: u64 = 64 << 20;
const VMS: [(&str, u32, Limits); 1] = [("web1", 5000, Limits::NONE)];
const TABLE: &str = "state/vms/web1.table";
const PAGES: u32 = 12;
/// Slots below are in the file.
const IN_FILE: u32 = 4;

/// The store, with pages in memory and in the file.
struct World {
    dir: tempfile::TempDir,
    store: Option<Arc<Store>>,
    scratch: Scratch,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut world = Self { dir, store: None, scratch: Scratch::default() };
        world.open();
        let vm = world.vm("web1");
        for slot in 0..PAGES {
            vm.store(Slot(slot), &page_of(2, slot.into()), Age::now(), &mut world.scratch).unwrap();
        }
        world.to_the_file();
        world.check();
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

    /// What is loaded more than once comes back into the pool.
    fn to_the_file(&self) {
        write_back(self.store(), &self.vm("web1"), 0..IN_FILE);
    }

    /// Every page is right, those in the file as well.
    fn check(&mut self) {
        assert_eq!(self.vm("web1").accounting().held.file_pages, u64::from(IN_FILE));
        for slot in 0..PAGES {
            let mut page = ZERO_PAGE;
            load_waiting(&self.vm("web1"), slot, &mut page, &mut self.scratch).unwrap();
            assert!(page == page_of(2, slot.into()), "slot {slot}");
        }
        self.to_the_file();
    }

    fn file(&self, path: &str) -> File {
        OpenOptions::new().read(true).write(true).open(self.dir.path().join(path)).unwrap()
    }
}

/// Changes one bit of a file, counted from its start.
fn flip(file: &File, bit: u64) {
    let mut byte = [0];
    file.read_exact_at(&mut byte, bit / 8).unwrap();
    file.write_all_at(&[byte[0] ^ 1 << (bit % 8)], bit / 8).unwrap();
}

#[test]
fn a_flipped_bit_of_the_tables_header_costs_nothing() {
    let mut world = World::new();
    let table = world.file(TABLE);
    {
        let vm = world.vm("web1");
        vm.table().set_initialised();
        vm.table().note_connected(1000);
        vm.table().crashes().add(10);
    }
    let mut good = [0; PAGE_SIZE];
    table.read_exact_at(&mut good, 0).unwrap();
    // All that means something, and a few bytes more.
    let copy = 0..192 * 8;
    for bit in copy.clone().chain(copy.map(|bit| bit + 2048 * 8)) {
        world.store = None;
        table.write_all_at(&good, 0).unwrap();
        flip(&table, bit);
        world.open();
        let vm = world.vm("web1");
        assert!(vm.table().initialised(), "bit {bit}");
        assert_eq!(
            (vm.table().crashes().count(), vm.table().crashes().is_quarantined()),
            (1, false),
            "bit {bit}"
        );
        // When it is not known, the time since then begins anew.
        assert!([0, 1000].contains(&vm.table().last_connected()), "bit {bit}");
        let mut found = [0; PAGE_SIZE];
        table.read_exact_at(&mut found, 0).unwrap();
        let identity =
            |page: &Page| [0..92, 128..164, 2048..2140, 2176..2212].map(|part| page[part].to_vec());
        assert!(identity(&found) == identity(&good), "bit {bit}: mended");
        if bit % 61 == 0 {
            world.check();
        }
    }
    world.store().validate();
}

#[test]
fn a_flipped_bit_of_what_the_state_or_the_writeback_file_is_called_costs_nothing() {
    let mut world = World::new();
    let id = world.store().state_id();
    for (path, bytes) in [("state/state", 128), ("state/writeback", 384)] {
        let path = world.dir.path().join(path);
        world.store = None;
        let good = fs::read(&path).unwrap();
        assert_eq!(good.len(), bytes);
        for bit in 0..bytes * 8 {
            world.store = None;
            let mut damaged = good.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, damaged).unwrap();
            world.open();
            assert_eq!(world.store().state_id(), id, "bit {bit}");
            assert!(world.store().shared().file.is_some(), "bit {bit}");
            if bit % 61 == 0 {
                world.check();
            }
            world.store = None;
            assert!(bit % 61 == 0 || fs::read(&path).unwrap() == good, "bit {bit}: mended");
            fs::write(&path, &good).unwrap();
        }
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(file_options(world.dir.path(), FILE_BYTES).path)
        .unwrap();
    let header = |file: &File| {
        let mut blocks = [0; 2 * PAGE_SIZE];
        file.read_exact_at(&mut blocks, 0).unwrap();
        blocks
    };
    let good = header(&file);
    for bit in (0..64 * 8).chain(PAGE_SIZE as u64 * 8..(PAGE_SIZE as u64 + 64) * 8) {
        world.store = None;
        flip(&file, bit);
        world.open();
        assert!(header(&file) == good, "bit {bit}: mended");
        if bit % 61 == 0 {
            world.check();
        }
    }
    world.store().validate();
}
