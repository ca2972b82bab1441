//! Pages of one VM never reach another. Every 64-byte line of every page says whose it is; three VMs reuse slots, places,
//! spans, pools and segments of each other while pages leave, come back, are compressed anew and moved, while VMs are
//! cleared and others come, and the state is opened again and again; each has dictionaries made of its own pages, and pages
//! that are equal, which are kept once. What a VM reads is its own last version or zeros.
//! Nothing in the writeback file says whose it is, and the key of a VM that was cleared is nowhere.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::collections::HashMap;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ballast::ids::Slot;
use ballast::page::{PAGE_SIZE, Page, ZERO_PAGE};
use ballast::reclaim::shrinker::{Shrinker, Step};
use ballast::store::codec::{Compressor, Scratch, train};
use ballast::store::lru::Age;
use ballast::store::vm::{Limits, Recompressed, VmStore};
use ballast::store::{Store, VmState};
use support::Random;
use support::file::{file_options, load_waiting, neutral_shrinker, open_with_file, store_waiting};

const SLOTS: u32 = 900;
const POOL_BYTES: u64 = 1 << 20;
const FILE_BYTES: u64 = 8 << 20;
const LINE_BYTES: usize = 64;
/// What every line begins with. Eight bytes that no codec makes and no key is likely to.
const MARK: [u8; 8] = *b"\xb1LINE\x00\xff\x7e";

/// What a line says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Marked {
    /// The guest: no two have the same, though they may have the same name, one after the other.
    guest: u32,
    slot: u32,
    version: u32,
}

/// What a guest writes into a slot. A tenth of its pages say the same thing, whatever slot they are in, so that they may be
/// kept once.
fn marked(guest: u32, slot: u32, version: u32) -> Marked {
    if slot.is_multiple_of(10) {
        Marked { guest, slot: u32::MAX, version: slot % 3 }
    } else {
        Marked { guest, slot, version }
    }
}

/// A page of 64 such lines. By its version it shrinks well, a little, or not at all.
fn page_of(marked: Marked) -> Page {
    let mut page = ZERO_PAGE;
    let mut noise =
        u64::from(marked.version) << 32 | u64::from(marked.slot) << 8 | u64::from(marked.guest) | 1;
    let noisy_lines = [0, 20, 64][marked.version as usize % 3];
    for (at, line) in page.chunks_exact_mut(LINE_BYTES).enumerate() {
        line[..8].copy_from_slice(&MARK);
        line[8..12].copy_from_slice(&marked.guest.to_le_bytes());
        line[12..16].copy_from_slice(&marked.slot.to_le_bytes());
        line[16..20].copy_from_slice(&marked.version.to_le_bytes());
        for chunk in line[20..].chunks_exact_mut(4).filter(|_| at < noisy_lines) {
            noise = noise.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            chunk.copy_from_slice(&noise.to_be_bytes()[..4]);
        }
    }
    page
}

/// What the lines of a page say that is not what it should be.
fn lines_of(page: &Page) -> Vec<Marked> {
    let word = |line: &[u8], at: usize| u32::from_le_bytes(line[at..at + 4].try_into().unwrap());
    let mut found: Vec<Marked> = Vec::new();
    for line in page.chunks_exact(LINE_BYTES).filter(|line| line[..8] == MARK) {
        let marked = Marked { guest: word(line, 8), slot: word(line, 12), version: word(line, 16) };
        if !found.contains(&marked) {
            found.push(marked);
        }
    }
    found
}

/// A VM with a name, and what it stored last in each slot.
struct Guest {
    name: String,
    number: u32,
    stored: HashMap<u32, u32>,
}

struct World {
    dir: tempfile::TempDir,
    open: Option<(Arc<Store>, Shrinker)>,
    guests: Vec<Guest>,
    scratch: Scratch,
    random: Random,
    version: u32,
    /// Guests so far.
    numbers: u32,
    /// Pages that came to be kept as others that are the same.
    shared: u32,
    /// What shrinkers did that are gone: pages evicted, objects compacted, pages recompressed, segments cleaned.
    done: [u64; 4],
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut world = Self {
            dir,
            open: None,
            guests: Vec::new(),
            scratch: Scratch::default(),
            random: Random(11),
            version: 0,
            numbers: 0,
            shared: 0,
            done: [0; 4],
        };
        for name in ["db", "web1", "web2"] {
            let guest = world.guest(name);
            world.guests.push(guest);
        }
        world.reopen();
        world
    }

    fn guest(&mut self, name: &str) -> Guest {
        self.numbers += 1;
        Guest { name: name.to_owned(), number: self.numbers, stored: HashMap::new() }
    }

    /// Opens the state as it is, for the VMs that there are now.
    fn reopen(&mut self) {
        self.note();
        self.open = None;
        let limits = Limits { limit_bytes: POOL_BYTES / 2, ..Limits::NONE };
        let vms: Vec<_> = self.guests.iter().map(|guest| (guest.name.as_str(), SLOTS, limits)).collect();
        let store = Arc::new(open_with_file(self.dir.path(), &vms, POOL_BYTES, FILE_BYTES));
        store.shared().pools.set_cold(Some(Compressor::Zstd(3))).unwrap();
        let shrinker = neutral_shrinker(&store);
        self.open = Some((store, shrinker));
    }

    fn note(&mut self) {
        if let Some((_, shrinker)) = &self.open {
            let now = shrinker.stats().get();
            let done =
                [now.evicted_pages, now.compacted_objects, now.recompressed_pages, now.cleaned_segments];
            self.done.iter_mut().zip(done).for_each(|(sum, more)| *sum += more);
        }
    }

    fn store(&self) -> &Arc<Store> {
        &self.open.as_ref().unwrap().0
    }

    fn shrinker(&mut self) -> &mut Shrinker {
        &mut self.open.as_mut().unwrap().1
    }

    fn vm(&self, guest: usize) -> Arc<VmStore> {
        self.store().ready(&self.guests[guest].name).unwrap()
    }

    fn put(&mut self, guest: usize, slot: u32) {
        self.version += 1;
        let page = page_of(marked(self.guests[guest].number, slot, self.version));
        let vm = self.vm(guest);
        let (_, shrinker) = self.open.as_mut().unwrap();
        store_waiting(&vm, shrinker, slot, &page, Age::now(), &mut self.scratch);
        self.guests[guest].stored.insert(slot, self.version);
    }

    fn check(&mut self, guest: usize, slot: u32) {
        let mut found = [0xee; PAGE_SIZE];
        load_waiting(&self.vm(guest), slot, &mut found, &mut self.scratch).unwrap();
        let Guest { name, number, stored } = &self.guests[guest];
        let version = stored.get(&slot).copied();
        let right = version.map_or(ZERO_PAGE, |version| page_of(marked(*number, slot, version)));
        assert!(found == right, "{name} ({number}), slot {slot}, {version:?}: found {:?}", lines_of(&found));
    }

    fn check_everything(&mut self) {
        for guest in 0..self.guests.len() {
            (0..SLOTS).for_each(|slot| self.check(guest, slot));
        }
        self.store().validate();
    }

    /// Some stores, loads and discards, and a step of the shrinker now and then.
    fn work(&mut self, uses: u32) {
        for _ in 0..uses {
            let guest = self.random.below(3) as usize;
            let slot = self.random.below(SLOTS);
            match self.random.below(200) {
                0..=149 => self.put(guest, slot),
                150..=189 => self.check(guest, slot),
                190..=192 => {
                    // A whole stretch, so that spans and segments empty.
                    for slot in slot..(slot + 40).min(SLOTS) {
                        self.vm(guest).invalidate(Slot(slot));
                        self.guests[guest].stored.remove(&slot);
                    }
                }
                193 => self.cool(guest),
                _ => drop::<Step>(self.shrinker().turn()),
            }
        }
    }

    /// Makes the pages cold of which some are equal, so that those are kept once.
    fn cool(&mut self, guest: usize) {
        let (vm, cold) = (self.vm(guest), self.store().shared().pools.cold().unwrap());
        for slot in (0..SLOTS).step_by(10) {
            if vm.recompress(Slot(slot), cold, &mut self.scratch) == Recompressed::Shared {
                self.shared += 1;
            }
        }
    }

    fn change_compressor(&mut self, compressor: Compressor) {
        self.store().end_drained_pools();
        self.store().shared().pools.set_current(compressor).unwrap();
        self.shrinker().request_recompression();
    }

    /// Gives each VM a dictionary, made of pages of its own: from then on every line of a page that it helps to keep may
    /// come out of it.
    fn learn(&self) {
        for (guest, Guest { number, .. }) in self.guests.iter().enumerate() {
            let page = |slot| page_of(Marked { guest: *number, slot, version: slot });
            let sample: Vec<u8> = (0..300).flat_map(page).collect();
            self.vm(guest).dictionaries().add(train(&sample).unwrap()).unwrap();
        }
    }

    /// Lets pages of earlier pools be compressed anew, which they are when they are idle.
    fn recompress(&mut self) {
        let before = self.shrinker().stats().get().recompressed_pages;
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.shrinker().stats().get().recompressed_pages < before + 50 {
            assert!(Instant::now() < deadline, "idle pages are compressed anew");
            let _ = self.shrinker().turn();
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Clears a VM, and starts another one under this name.
    fn replace(&mut self, guest: usize, name: &str) {
        let key = *self.vm(guest).table().key();
        assert!(self.holds(&key), "the search finds the key of a VM that is there");
        let line = [&MARK[..], &self.guests[guest].number.to_le_bytes()].concat();
        let learned = self.vm(guest).dictionaries().count() > 0;
        assert_eq!(self.tells(&line), learned, "the search finds what a dictionary is made of");
        let old = self.guests[guest].name.clone();
        if old == name {
            self.store().clear(&old).unwrap();
            self.guests[guest] = self.guest(name);
        } else {
            // The configuration names the new one, and the old one is cleared when it is no longer in it.
            self.guests[guest] = self.guest(name);
            self.reopen();
            self.store().clear(&old).unwrap();
        }
        assert!(!self.holds(&key), "the key of a VM that is gone is in the state directory");
        assert!(!self.tells(&line), "what a dictionary of a VM that is gone was made of is there");
    }

    /// Whether a file beside the page tables has these bytes in it.
    fn tells(&self, bytes: &[u8]) -> bool {
        let files = std::fs::read_dir(self.dir.path().join("state/vms")).unwrap();
        files.map(|file| file.unwrap().path()).any(|path| has(&path, bytes))
    }

    /// Whether a file of the state has these bytes in it.
    fn holds(&self, bytes: &[u8]) -> bool {
        let state = self.dir.path().join("state");
        let dirs = [state.clone(), state.join("vms")];
        let files = dirs.iter().flat_map(|dir| std::fs::read_dir(dir).unwrap());
        let mut files = files.map(|file| file.unwrap().path()).filter(|path| path.is_file());
        files.any(|path| has(&path, bytes))
    }
}

/// Whether a file has these bytes in it. Passes over holes.
fn has(path: &Path, bytes: &[u8]) -> bool {
    let file = File::open(path).unwrap();
    let end = file.metadata().unwrap().len();
    let (mut at, mut buffer) = (0, vec![0; 1 << 20]);
    while at < end {
        match rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
            Ok(data) => at = data,
            Err(err) => {
                assert_eq!(err, rustix::io::Errno::NXIO);
                return false;
            }
        }
        let length = match file.read_at(&mut buffer, at) {
            Err(err) if err.kind() == ErrorKind::Interrupted => continue,
            length => length.unwrap(),
        };
        if buffer[..length].windows(bytes.len()).any(|window| window == bytes) {
            return true;
        }
        if length < buffer.len() {
            return false;
        }
        // What lies across the end of one piece is in the next.
        at += (length - bytes.len()) as u64;
    }
    false
}

#[test]
fn what_a_vm_reads_is_its_own() {
    let mut world = World::new();
    let compressors =
        [Compressor::Zstd(1), Compressor::Lz4, Compressor::ZstdWithDictionary(3), Compressor::Lz4];
    let file = file_options(world.dir.path(), FILE_BYTES).path;
    for round in 0..8usize {
        world.work(1500);
        if round % 4 == 2 {
            world.learn();
        }
        world.change_compressor(compressors[round % 4]);
        if round % 4 == 2 {
            world.recompress();
        }
        world.work(1500);
        world.check_everything();
        assert!(has(&world.dir.path().join("state/arena"), &MARK), "the search finds what is not encrypted");
        assert!(!has(&file, &MARK), "round {round}: a page is in the file as it is");
        match round {
            1 | 5 => world.reopen(),
            2 => world.replace(1, "web1"),
            3 => world.replace(2, "web3"),
            6 => world.replace(0, "web2"),
            _ => {}
        }
        world.check_everything();
    }
    world.note();
    let [evicted, compacted, recompressed, cleaned] = world.done;
    assert!(
        evicted > 5000 && compacted > 100 && recompressed > 100 && cleaned > 2,
        "too little happened: {:?}",
        world.done
    );
    assert!(world.shared > 500, "{} pages were kept as another", world.shared);
    world.store().for_each(|name, vm| assert!(matches!(vm, VmState::Ready(_)), "{name}"));
}
