//! A state directory and a writeback file, whole but for what these bytes change in them: page tables, the state's and
//! the writeback's own file, arena, records. With the changed file's checksum mended where it has one, because no fuzzer
//! finds those. The store opens or says why not; what it then serves is right or an error, and no place is another's.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ballast::ids::Slot;
use ballast::page::{Page, ZERO_PAGE};
use ballast::store::codec::{Compressor, Scratch, train};
use ballast::store::entry::{ARENA_BYTES_MAX, Entry, Location};
use ballast::store::lru::Age;
use ballast::store::vm::{Limits, VmStore};
use ballast::store::{Store, VmSpec};
use ballast::writeback::{Place, Writeback};
use rustix::fs::SeekFrom;

use super::file::{file_options, load_waiting, open_with_file, write_back};
use super::script::Script;
use super::store_config;

const SLOTS: u32 = 64;
const POOL_BYTES: u64 = 1 << 20;
const FILE_BYTES: u64 = 4 << 20;
const STEPS_MAX: usize = 32;
const SEGMENTS_MAX: u32 = 1000;
/// Slots of the first VM whose pages were compressed with its dictionary.
const LEARNED: Range<u32> = 24..32;
/// Slots of the same VM whose pages are equal by fours, and kept once.
const EQUAL: Range<u32> = 32..40;
/// The VM whose table is changed comes first, so that its entries are believed before the other one's.
const VMS: [(&str, u32, Limits); 2] = [("web1", SLOTS, Limits::NONE), ("web2", SLOTS, Limits::NONE)];
/// The files that are changed; the last one is of the VM that must not suffer.
const FILES: [&str; 7] = [
    "state/state",
    "state/vms/web1.table",
    "state/arena",
    "state/writeback",
    "writeback-file",
    "state/vms/web1.dictionary-1",
    "state/vms/web2.table",
];
const CHANGED: usize = FILES.len() - 1;

pub fn run(bytes: &[u8]) {
    thread_local! {
        static TEMPLATE: Template = Template::new();
    }
    TEMPLATE.with(|template| template.run(&mut Script(bytes)));
}

/// The files as a store left them.
struct Template {
    dir: tempfile::TempDir,
    files: Vec<Sparse>,
}

/// A file: its length, and what is not a hole.
struct Sparse {
    bytes: u64,
    parts: Vec<(u64, Vec<u8>)>,
}

/// A page that is a function of its slot: all kinds of entries, and empty slots.
fn page_of(slot: u32) -> Page {
    let mut page = ZERO_PAGE;
    let random_bytes = match slot % 6 {
        0 => return page,
        1 => {
            page.as_chunks_mut::<8>().0.fill(u64::from(slot).to_le_bytes());
            return page;
        }
        2 | 3 => 64,
        4 => 1500,
        _ => 4096,
    };
    let mut noise = u64::from(slot) << 7 | 1;
    for chunk in page[..random_bytes].as_chunks_mut::<8>().0 {
        noise ^= noise << 13;
        noise ^= noise >> 7;
        noise ^= noise << 17;
        *chunk = noise.to_le_bytes();
    }
    page
}

/// A page that has most of its text in common with all such pages: what a dictionary is good for.
fn alike(seed: u32) -> Page {
    let record = |n: u32| {
        let number = (seed * 131 + n).wrapping_mul(0x9e37_79b9);
        format!("record {n} belongs to process {}, and its checksum is {number:08x}; ", number >> 20)
    };
    let text: Vec<u8> = (0..200).flat_map(|n| record(n).into_bytes()).take(4096).collect();
    text.try_into().expect("a page")
}

impl Template {
    fn new() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a directory on a tmpfs");
        let store = open_with_file(dir.path(), &VMS, POOL_BYTES, FILE_BYTES);
        let mut scratch = Scratch::default();
        for (name, ..) in VMS {
            let vm = store.ready(name).expect("it is new");
            for slot in 0..24 {
                vm.store(Slot(slot), &page_of(slot), Age::now(), &mut scratch).expect("there is room");
            }
            write_back(&store, &vm, [3, 5, 9]);
        }
        let vm = store.ready("web1").expect("it is new");
        let sample: Vec<u8> = (0..100).flat_map(alike).collect();
        let dictionary = train(&sample).expect("they have much in common");
        vm.dictionaries().add(dictionary).expect("there is room");
        let with_dictionary = Compressor::ZstdWithDictionary(1);
        store.shared().pools.set_current(with_dictionary).expect("there are few pools");
        for slot in LEARNED {
            vm.store(Slot(slot), &alike(slot), Age::now(), &mut scratch).expect("there is room");
        }
        write_back(&store, &vm, [LEARNED.start]);
        store.shared().set_deduplicates(true);
        store.shared().pools.set_cold(Some(Compressor::Zstd(1))).expect("there are few pools");
        let cold = store.shared().pools.cold().expect("it was set");
        for slot in EQUAL {
            vm.store(Slot(slot), &alike(EQUAL.start + slot % 2), Age::now(), &mut scratch)
                .expect("there is room");
        }
        for slot in EQUAL {
            vm.recompress(Slot(slot), cold, &mut scratch);
        }
        let held = vm.accounting().held;
        assert_eq!((held.shared_pages, held.shared_objects), (8, 2), "equal pages are kept once");
        drop((store, vm));
        let files = FILES.map(|name| Sparse::read(&dir.path().join(name))).into();
        Self { dir, files }
    }

    fn path(&self, file: usize) -> PathBuf {
        self.dir.path().join(FILES[file])
    }

    fn run(&self, script: &mut Script<'_>) {
        for (index, file) in self.files.iter().enumerate() {
            file.write(&self.path(index));
        }
        for _ in 0..STEPS_MAX {
            if script.is_over() {
                break;
            }
            self.change(script);
        }
        let specs = VMS.map(|(name, slots, limits)| VmSpec { name: name.to_owned(), slots, limits });
        let config = store_config(&self.dir.path().join("state"), Compressor::Lz4, POOL_BYTES);
        let options = file_options(self.dir.path(), FILE_BYTES);
        match Store::open(config, specs.into(), || Writeback::open(&options).map(Some)) {
            Ok(store) => use_it(&store),
            Err(err) => assert!(!err.to_string().is_empty()),
        }
    }

    fn change(&self, script: &mut Script<'_>) {
        let (kind, which) = (script.byte(), usize::from(script.byte()) % CHANGED);
        let file = File::options().write(true).read(true).open(self.path(which)).expect("it is there");
        match kind % 8 {
            0 => {
                let length = u64::from(script.word()) % (self.files[which].bytes + 4096);
                file.set_len(length).expect("its length");
            }
            1..=3 => self.change_entry(script),
            _ => {
                let (at, count) = (script.half_word(), script.byte());
                // Where there is something.
                let parts = &self.files[which].parts;
                let (start, _) = &parts[usize::from(kind / 8) % parts.len()];
                file.write_all_at(script.bytes(count.into()), start + u64::from(at)).expect("it is written");
                if kind & 1 == 0 {
                    mend(&file, which);
                }
            }
        }
    }

    /// Puts a sound entry into the first VM's table, whose place may be anybody's.
    fn change_entry(&self, script: &mut Script<'_>) {
        let (slot, kind) = (Slot(u32::from(script.byte()) % SLOTS), script.byte());
        let (place, length) = (script.long(), script.half_word());
        let entry = match kind % 4 {
            0 => {
                let offset = place % (1 << 20) / 16 * 16 + (place >> 60) * (ARENA_BYTES_MAX / 16);
                let payload_bytes = usize::from(length) % 4096 + 1;
                let location = Location { offset, payload_bytes };
                if kind & 4 == 0 { Entry::Arena(location) } else { Entry::Shared(location) }
            }
            1 => {
                let (offset, object_bytes) =
                    (place % (2 * FILE_BYTES) / 16 * 16, usize::from(length) % 4110 + 1);
                Entry::File(Place { offset, object_bytes })
            }
            2 => Entry::Lost,
            _ => Entry::SameFilled(place & 0xffff_ffff),
        };
        let table = File::options().write(true).open(self.path(1)).expect("it is there");
        // In a file that was made shorter this is beyond the end, where nothing is looked for.
        let at = 4096 + u64::from(slot.0) * 8;
        table.write_all_at(&entry.pack(slot).to_le_bytes(), at).expect("it is written");
    }
}

/// Makes the checksums of the file those of what is in it.
fn mend(file: &File, which: usize) {
    if which == 3 {
        // A file may have sixteen million segments, which take their time to be counted again.
        for at in [12, 192 + 12] {
            let mut segments = [0; 4];
            let _ = file.read_exact_at(&mut segments, at);
            let segments = u32::from_le_bytes(segments);
            if (SEGMENTS_MAX..1 << 24).contains(&segments) {
                file.write_all_at(&(segments % SEGMENTS_MAX).to_le_bytes(), at).expect("it is written");
            }
        }
    }
    // Where a checksum is, and from where on what it is of.
    let half = file.metadata().map_or(0, |file| file.len() / 2);
    let checksums: &[(u64, u64)] = match which {
        0 => &[(0, 60), (64, 124)],
        1 => &[(0, 88), (128, 160), (2048, 2048 + 88), (2048 + 128, 2048 + 160)],
        3 => &[(0, 60), (64, 124), (128, 188), (192, 252), (256, 316), (320, 380)],
        4 => &[(0, 60), (4096, 4156)],
        5 => &[(0, half.saturating_sub(4)), (half, (2 * half).saturating_sub(4).max(half))],
        _ => &[],
    };
    for (start, end) in checksums {
        let mut bytes = vec![0; usize::try_from(end - start).expect("short")];
        if file.read_exact_at(&mut bytes, *start).is_ok() {
            file.write_all_at(&crc32c::crc32c(&bytes).to_le_bytes(), *end).expect("it is written");
        }
    }
}

/// Everything that is served is right or an error, before and after the first VM has written all of its slots.
fn use_it(store: &Store) {
    let mut scratch = Scratch::default();
    check(store, &mut scratch);
    store.validate();
    if let Some(vm) = store.ready("web1") {
        for slot in 0..vm.slots() {
            // There may be no room: the first VM's entries can take up any number of places.
            let _ = vm.store(Slot(slot), &page_of(slot + 3), Age::now(), &mut scratch);
        }
    }
    check(store, &mut scratch);
    store.validate();
    let _ = store.clear("web1");
    check(store, &mut scratch);
    store.validate();
}

fn check(store: &Store, scratch: &mut Scratch) {
    let load = |vm: &Arc<VmStore>, slot, scratch: &mut Scratch| {
        let mut page = [0xee; 4096];
        match load_waiting(vm, slot, &mut page, scratch) {
            Ok(()) => Some(page),
            Err(err) => {
                // A recount is of sound objects.
                if err.is_damage() {
                    vm.invalidate(Slot(slot));
                }
                None
            }
        }
    };
    if let Some(vm) = store.ready("web1") {
        for slot in 0..vm.slots() {
            let page = load(&vm, slot, scratch);
            // An entry or an object may be made up, but nothing that is changed in a dictionary makes another page.
            if let Some(page) = page.filter(|_| LEARNED.contains(&slot)) {
                let words = page.as_chunks::<8>().0;
                let repeats = words.iter().all(|word| *word == words[0]);
                let written = [alike(slot), page_of(slot + 3)];
                assert!(repeats || written.contains(&page), "slot {slot}: a page that nobody has written");
            }
        }
    }
    if let Some(vm) = store.ready("web2") {
        for slot in 0..SLOTS {
            let right = if slot < 24 { page_of(slot) } else { ZERO_PAGE };
            // What was damaged is empty when it is looked at again.
            if let Some(page) = load(&vm, slot, scratch) {
                assert!(page == right || page == ZERO_PAGE, "slot {slot} of the VM that nobody changed");
            }
        }
    }
}

impl Sparse {
    fn read(path: &Path) -> Self {
        let file = File::open(path).expect("it was made");
        let bytes = file.metadata().expect("its length").len();
        let (mut parts, mut at) = (Vec::new(), 0);
        while let Ok(start) = rustix::fs::seek(&file, SeekFrom::Data(at)) {
            at = rustix::fs::seek(&file, SeekFrom::Hole(start)).expect("there is one at the end");
            let mut part = vec![0; usize::try_from(at - start).expect("it fits memory")];
            file.read_exact_at(&mut part, start).expect("it can be read");
            parts.push((start, part));
        }
        Self { bytes, parts }
    }

    fn write(&self, path: &Path) {
        let _ = fs::remove_file(path);
        let file = File::create(path).expect("it can be made");
        file.set_len(self.bytes).expect("its length");
        for (start, part) in &self.parts {
            file.write_all_at(part, *start).expect("it is written");
        }
    }
}
