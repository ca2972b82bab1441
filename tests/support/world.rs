//! A store with three VMs, a file that fails as told, a shrinker, and what every page should be.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ballast::ids::Slot;
use ballast::page::{PAGE_SIZE, Page, ZERO_PAGE};
use ballast::reclaim::pressure::Level;
use ballast::reclaim::shrinker::Shrinker;
use ballast::store::Store;
use ballast::store::codec::{Compressor, Scratch};
use ballast::store::lru::{Age, coldest};
use ballast::store::vm::{Limits, LoadError, StoreError, VmStore};
use ballast::writeback::Writeback;
use ballast::writeback::io::faulty::{Fault, Faulty};

use super::file::{load_waiting, neutral_shrinker, open_with_faulty_file, place_of};
use super::{Random, page_of};

/// Slots on each VM's device.
pub const SLOTS: u32 = 800;
/// The VMs.
pub const NAMES: [&str; 3] = ["db", "web1", "web2"];

/// What is open of a [`World`].
struct Open {
    store: Arc<Store>,
    faulty: Arc<Faulty>,
    shrinker: Shrinker,
}

/// See the top of the file.
pub struct World {
    pub dir: tempfile::TempDir,
    pool_bytes: u64,
    /// For the next restart.
    pub file_bytes: u64,
    open: Option<Open>,
    /// Kind and seed of every page that is stored.
    pub truth: HashMap<(usize, u32), (u8, u64)>,
    pub scratch: Scratch,
    pub random: Random,
    stamp: u64,
    /// Stores that found no room and nothing to wait for.
    pub refused: u64,
    /// Reads that are planned to fail.
    pub failing_reads: u32,
}

impl World {
    pub fn new(pool_bytes: u64, file_bytes: u64) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let mut world = Self::closed(dir, pool_bytes, file_bytes);
        world.restart();
        world
    }

    fn closed(dir: tempfile::TempDir, pool_bytes: u64, file_bytes: u64) -> Self {
        Self {
            dir,
            pool_bytes,
            file_bytes,
            open: None,
            truth: HashMap::new(),
            scratch: Scratch::default(),
            random: Random(7),
            stamp: 0,
            refused: 0,
            failing_reads: 0,
        }
    }

    /// Drops everything and opens it again with a file that is well.
    pub fn restart(&mut self) {
        self.open = None;
        self.failing_reads = 0;
        let vms = NAMES.map(|name| (name, SLOTS, Limits::NONE));
        let (store, faulty) = open_with_faulty_file(self.dir.path(), &vms, self.pool_bytes, self.file_bytes);
        let store = Arc::new(store);
        let shrinker = neutral_shrinker(&store);
        self.open = Some(Open { store, faulty, shrinker });
    }

    /// What a daemon finds that starts after this one was killed now: the files as they are, copied.
    pub fn crashed(&self) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        // The state files are sparse, and mostly holes.
        let copied = std::process::Command::new("cp")
            .args(["-a", "--sparse=always"])
            .args([self.dir.path().join("."), dir.path().to_owned()])
            .status();
        assert!(copied.expect("cp runs").success());
        let mut next =
            Self { truth: self.truth.clone(), ..Self::closed(dir, self.pool_bytes, self.file_bytes) };
        next.restart();
        next
    }

    fn open(&self) -> &Open {
        self.open.as_ref().expect("it is open")
    }

    pub fn store(&self) -> &Arc<Store> {
        &self.open().store
    }

    pub fn faulty(&self) -> &Arc<Faulty> {
        &self.open().faulty
    }

    pub fn file(&self) -> &Writeback {
        self.open().store.shared().file.as_ref().expect("there is a file")
    }

    pub fn is_on(&self) -> bool {
        self.file().is_on()
    }

    pub fn shrinker(&mut self) -> &mut Shrinker {
        &mut self.open.as_mut().expect("it is open").shrinker
    }

    pub fn vm(&self, vm: usize) -> Arc<VmStore> {
        self.store().ready(NAMES[vm]).expect("it is in service")
    }

    /// What the page should be.
    pub fn right(&self, vm: usize, slot: u32) -> Page {
        self.truth.get(&(vm, slot)).map_or(ZERO_PAGE, |(kind, seed)| page_of(*kind, *seed))
    }

    /// Pages that are in the file, as their VMs count them.
    pub fn file_pages(&self) -> u64 {
        (0..NAMES.len()).map(|vm| self.vm(vm).accounting().held.file_pages).sum()
    }

    /// Pages that are in the file, in the order of VMs and slots.
    pub fn in_file(&self) -> impl Iterator<Item = (usize, u32)> + use<> {
        let vms = [self.vm(0), self.vm(1), self.vm(2)];
        let all = (0..NAMES.len()).flat_map(|vm| (0..SLOTS).map(move |slot| (vm, slot)));
        all.filter(move |(vm, slot)| place_of(&vms[*vm], *slot).is_some())
    }

    /// The coldest pages of the pool, coldest first.
    pub fn coldest(&self, count: usize) -> Vec<(usize, u32)> {
        let (mut found, now) = (Vec::new(), Age::now());
        for vm in 0..NAMES.len() {
            let copies = self.vm(vm).accounting().fates.factor();
            let of_vm = coldest(self.vm(vm).table(), count, now, copies, |_| true);
            let ranked = |(age, slot): (Age, Slot)| (Reverse(age.coldness(now, copies)), vm, slot.0);
            found.extend(of_vm.into_iter().map(ranked));
        }
        found.sort_unstable();
        found.into_iter().take(count).map(|(_, vm, slot)| (vm, slot)).collect()
    }

    /// Stores a new page once.
    pub fn try_put(&mut self, vm: usize, slot: u32, kind: u8) -> Result<(), StoreError> {
        self.stamp += 1;
        // One of three is the same as others.
        let seed = if self.stamp.is_multiple_of(3) { (self.stamp / 3 % 16) << 32 } else { self.stamp };
        let page = page_of(kind, seed);
        self.vm(vm).store(Slot(slot), &page, Age::now(), &mut self.scratch)?;
        self.truth.insert((vm, slot), (kind, seed));
        Ok(())
    }

    /// Stores a new page; makes room when that can be done, and counts when it can't.
    pub fn put(&mut self, vm: usize, slot: u32, kind: u8) {
        for _ in 0..1000 {
            match self.try_put(vm, slot, kind) {
                Ok(()) => return,
                Err(err @ (StoreError::Limit | StoreError::PoolFull)) => {
                    if !self.vm(vm).may_wait(&err) {
                        self.refused += 1;
                        return;
                    }
                    let _ = self.shrinker().turn();
                }
                Err(err) => panic!("{err}"),
            }
        }
        panic!("no room comes about: {:?}", self.file().status());
    }

    pub fn load(&mut self, vm: usize, slot: u32) -> Result<Page, LoadError> {
        let mut page = [0xee; PAGE_SIZE];
        load_waiting(&self.vm(vm), slot, &mut page, &mut self.scratch).map(|()| page)
    }

    /// Loads a page. It may fail as often as reads were planned to, and only by them.
    pub fn check_page(&mut self, vm: usize, slot: u32) {
        let page = loop {
            match self.load(vm, slot) {
                Ok(page) => break page,
                Err(LoadError::Read(_)) if self.failing_reads > 0 => self.failing_reads -= 1,
                Err(err) => panic!("{} slot {slot}: {err}", NAMES[vm]),
            }
        };
        assert!(page == self.right(vm, slot), "{} slot {slot}", NAMES[vm]);
    }

    /// Every page is what it should be.
    pub fn check(&mut self) {
        let mut all: Vec<_> = self.truth.keys().copied().collect();
        all.sort_unstable();
        for (vm, slot) in all {
            self.check_page(vm, slot);
        }
    }

    /// Makes all pages of a VM cold that are in the pool: those that are the same are kept once.
    pub fn cool(&mut self, vm: usize) {
        let shared = Arc::clone(self.store().shared());
        shared.pools.set_cold(Some(Compressor::Zstd(1))).expect("few pools");
        let (vm, cold) = (self.vm(vm), shared.pools.cold().expect("it was set"));
        for slot in (0..SLOTS).map(Slot) {
            let _ = vm.recompress(slot, cold, &mut self.scratch);
        }
    }

    pub fn invalidate(&mut self, vm: usize, slot: u32) {
        self.vm(vm).invalidate(Slot(slot));
        self.truth.remove(&(vm, slot));
    }

    pub fn clear(&mut self, vm: usize) {
        self.store().clear(NAMES[vm]).expect("it can be cleared");
        self.truth.retain(|(of, _), _| *of != vm);
    }

    /// Stores, loads and invalidates some pages.
    pub fn use_pages(&mut self, uses: u32) {
        for _ in 0..uses {
            let vm = self.random.below(3) as usize;
            let slot = self.random.below(SLOTS);
            match self.random.below(10) {
                0..=6 => {
                    let kind = u8::try_from(self.random.below(5)).expect("few");
                    self.put(vm, slot, kind);
                }
                7 | 8 => self.check_page(vm, slot),
                _ => self.invalidate(vm, slot),
            }
        }
    }

    /// Stores until the next step of the shrinker has something to do.
    pub fn fill_to_the_mark(&mut self) {
        let shared = Arc::clone(self.store().shared());
        let start_bytes = self.pool_bytes - (128 << 10);
        for slot in (0..SLOTS).cycle() {
            if shared.arena.used_bytes() > start_bytes {
                return;
            }
            for vm in 0..NAMES.len() {
                self.put(vm, slot, 2);
            }
        }
    }

    /// Does something while the shrinker's next write is on its way, and lets that end.
    pub fn during_a_held_write(&mut self, does: impl FnOnce(&mut Self)) {
        let Open { store, faulty, shrinker } = self.open.take().expect("it is open");
        let writes = faulty.submitted().1;
        faulty.fail_write(0, Fault::Hold);
        let idle = neutral_shrinker(&store);
        self.open = Some(Open { store, faulty: Arc::clone(&faulty), shrinker: idle });
        let mut shrinker = shrinker;
        let written = {
            let faulty = Arc::clone(&faulty);
            move || faulty.submitted().1 > writes
        };
        let turning = std::thread::spawn(move || {
            // A step may also move objects together, after which the pool isn't full any more.
            while !written() {
                shrinker.request_pressure(Level::Severe);
                let _ = shrinker.turn();
            }
            shrinker
        });
        let deadline = Instant::now() + Duration::from_secs(60);
        while faulty.submitted().1 == writes {
            assert!(Instant::now() < deadline, "the shrinker writes");
            std::thread::yield_now();
        }
        does(self);
        assert_eq!(faulty.release(), 1);
        *self.shrinker() = turning.join().expect("the step ends");
    }
}
