//! The steps that a page's way consists of, each as something that can be done any number of times: for `benches/steps`,
//! which measures how long they take, and `tests/cost`, which counts the instructions.

use std::fs::File;
use std::hint::black_box;
use std::sync::Arc;

use ballast::device::blk::request::parse;
use ballast::device::chain::DescriptorTable;
use ballast::device::guest_memory::{Memory, Region};
use ballast::device::view::View;
use ballast::ids::{Owner, Slot, VmId};
use ballast::page::{PAGE_SIZE, Page, ZERO_PAGE};
use ballast::store::Store;
use ballast::store::arena::Arena;
use ballast::store::codec::{Compressor, Dictionary, DictionaryNumber, Encoder, Scratch, train};
use ballast::store::entry::{Entry, Location};
use ballast::store::fates::CopyFactor;
use ballast::store::lru::{Age, coldest};
use ballast::store::object::{self, HEADER_BYTES};
use ballast::store::same_filled;
use ballast::store::state::STATE_VERSION;
use ballast::store::vm::VmStore;
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, FileOffset, GuestAddress};

use super::{SLOTS, open_store, records};

/// Pages that the steps go round.
const PAGES: usize = 64;

/// A step, and what it is done with.
pub type Step = Box<dyn FnMut()>;

/// How a step is made ready.
type Make = fn() -> Step;

/// All steps, by their names.
pub const STEPS: [(&str, Make); 16] = [
    ("same-filled check of a page that is not", same_filled_check),
    ("same-filled check of a page of zeros", same_filled_zeros),
    ("checksum and header of an object of 1 KiB", checksum),
    ("lz4, compress", || compress(Compressor::Lz4, false)),
    ("lz4, decompress", || decompress(Compressor::Lz4, false)),
    ("zstd 1, compress", || compress(Compressor::Zstd(1), false)),
    ("zstd 1, decompress", || decompress(Compressor::Zstd(1), false)),
    ("zstd 9 with a dictionary, compress", || compress(Compressor::ZstdWithDictionary(9), true)),
    ("zstd 9 with a dictionary, decompress", || decompress(Compressor::ZstdWithDictionary(9), true)),
    ("entry, pack and unpack", entry),
    ("place in the arena, taken and given back", allocation),
    ("coldest 1024 of 4096 pages, found", lru),
    ("request of a page, parsed", request),
    ("page stored", stored),
    ("page loaded", loaded),
    ("page of zeros stored", zeros_stored),
];

fn pages() -> Vec<Page> {
    (0..PAGES as u64).map(records).collect()
}

/// Calls `step` with each page in turn.
fn round(pages: Vec<Page>, mut step: impl FnMut(&Page) + 'static) -> Step {
    let mut next = 0;
    Box::new(move || {
        step(black_box(&pages[next % pages.len()]));
        next += 1;
    })
}

fn same_filled_check() -> Step {
    // One word differs, in the middle: of most pages it is known sooner.
    let mut page = ZERO_PAGE;
    page[PAGE_SIZE / 2] = 1;
    round(vec![page], |page| {
        black_box(same_filled::word_of(page));
    })
}

fn same_filled_zeros() -> Step {
    round(vec![ZERO_PAGE], |page| {
        black_box(same_filled::word_of(page));
    })
}

fn checksum() -> Step {
    let mut bytes = vec![7; HEADER_BYTES + 1024];
    let owner = Owner { vm: VmId(1), slot: Slot(1) };
    Box::new(move || {
        object::seal(&mut bytes, owner, ballast::store::codec::CodecId::Lz4);
        black_box(&bytes);
    })
}

fn dictionary() -> Dictionary {
    let sample: Vec<u8> = (1000..1200).flat_map(records).collect();
    let number = DictionaryNumber::new(1).expect("a number");
    Dictionary::new("web1", number, train(&sample).expect("they have much in common")).expect("a dictionary")
}

fn compress(compressor: Compressor, with_dictionary: bool) -> Step {
    let level = compressor.dictionary_level().unwrap_or(1);
    let encoder: Option<Encoder> = with_dictionary.then(|| dictionary().encoder(level).expect("memory"));
    let mut scratch = Scratch::default();
    round(pages(), move |page| {
        black_box(scratch.compress(compressor, encoder.as_ref(), page));
    })
}

fn decompress(compressor: Compressor, with_dictionary: bool) -> Step {
    let dictionary = with_dictionary.then(dictionary);
    let level = compressor.dictionary_level().unwrap_or(1);
    let encoder = dictionary.as_ref().map(|dictionary| dictionary.encoder(level).expect("memory"));
    let mut scratch = Scratch::default();
    let objects: Vec<_> = pages()
        .iter()
        .map(|page| {
            let (coding, object) = scratch.compress(compressor, encoder.as_ref(), page);
            (coding.codec, object.to_vec())
        })
        .collect();
    let (mut next, mut page) = (0, ZERO_PAGE);
    Box::new(move || {
        let (codec, object) = &objects[next % objects.len()];
        scratch.object(object.len()).copy_from_slice(object);
        scratch
            .decompress(*codec, dictionary.as_ref(), object.len(), &mut page)
            .expect("what was compressed");
        black_box(&page);
        next += 1;
    })
}

fn entry() -> Step {
    let mut slot = 0;
    Box::new(move || {
        let entry = Entry::Arena(Location { offset: 0x1234_5670, payload_bytes: 1000 });
        let raw = black_box(entry).pack(Slot(slot));
        let _ = black_box(Entry::unpack(black_box(raw), Slot(slot)));
        slot = (slot + 1) % SLOTS;
    })
}

fn allocation() -> Step {
    let file = File::from(memfd_create("arena", MemfdFlags::CLOEXEC).expect("a memfd"));
    let arena = Arena::new(file, 1 << 30, 1 << 30).expect("an arena");
    // Another one keeps the span from being given back each time.
    let _kept = arena.allocate(1000, 1 << 30).expect("room");
    Box::new(move || {
        let place = arena.allocate(black_box(1000), 1 << 30).expect("room");
        arena.free(place.offset, 1000);
    })
}

/// A store with a VM, in a directory that lives as long as it does.
fn vm() -> (tempfile::TempDir, Store, Arc<VmStore>) {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory");
    // Valgrind's processes have too few addresses for the arena of a new state, so this one has a small one.
    let mut state = Vec::from(*b"BALLAST\0");
    state.extend([STATE_VERSION, 1].into_iter().flat_map(u32::to_le_bytes));
    state.extend([7; 16]);
    state.extend((1_u64 << 30).to_le_bytes());
    state.resize(60, 0);
    state.extend(crc32c::crc32c(&state).to_le_bytes());
    state.extend_from_within(..);
    std::fs::write(dir.path().join("state"), state).expect("room");
    let store = open_store(dir.path(), &["web1"], Compressor::Lz4, 1 << 30, 1 << 30);
    let vm = store.ready("web1").expect("it is new");
    (dir, store, vm)
}

fn lru() -> Step {
    let (dir, store, vm) = vm();
    let mut scratch = Scratch::default();
    for slot in 0..4096 {
        vm.store(Slot(slot), &records(1), Age::from_bits(1), &mut scratch).expect("room");
    }
    let now = Age::from_bits(1);
    Box::new(move || {
        let _kept = (&dir, &store);
        black_box(coldest(vm.table(), 1024, now, CopyFactor::DOUBLE, |_| true));
    })
}

fn request() -> Step {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).expect("a memfd"));
    file.set_len(1 << 20).expect("its length");
    let region = Region::map(FileOffset::new(file, 0), 1 << 20, GuestAddress(0), None).expect("it is mapped");
    let memory = Memory::from_regions(vec![region]).expect("one region");
    let descriptor = |index: u64, address: u64, length: u32, flags: u16, next: u16| {
        let at = 16 * index;
        memory.write_obj(address, GuestAddress(at)).expect("there");
        memory.write_obj(length, GuestAddress(at + 8)).expect("there");
        memory.write_obj(flags, GuestAddress(at + 12)).expect("there");
        memory.write_obj(next, GuestAddress(at + 14)).expect("there");
    };
    // A store: header, page, status.
    descriptor(0, 0x1000, 16, 1, 1);
    descriptor(1, 0x2000, 4096, 1, 2);
    descriptor(2, 0x4000, 1, 2, 0);
    memory.write_obj(1_u32, GuestAddress(0x1000)).expect("there");
    memory.write_obj(64_u64, GuestAddress(0x1008)).expect("there");
    let table = DescriptorTable { address: GuestAddress(0), size: 128 };
    Box::new(move || {
        let request = parse(&View::new(&memory), table, black_box(0), 1 << 30);
        assert!(black_box(request).is_ok());
    })
}

fn stored() -> Step {
    let (dir, store, vm) = vm();
    let mut scratch = Scratch::default();
    let mut slot = 0;
    round(pages(), move |page| {
        let _kept = (&dir, &store);
        vm.store(Slot(slot), page, Age::from_bits(1), &mut scratch).expect("room");
        slot = (slot + 1) % 1024;
    })
}

fn loaded() -> Step {
    let (dir, store, vm) = vm();
    let mut scratch = Scratch::default();
    for (slot, page) in (0..).zip(pages()) {
        vm.store(Slot(slot), &page, Age::from_bits(1), &mut scratch).expect("room");
    }
    let (mut slot, mut page) = (0, ZERO_PAGE);
    Box::new(move || {
        let _kept = (&dir, &store);
        drop(vm.load(Slot(slot), None, &mut page, Age::from_bits(1), &mut scratch).expect("it is there"));
        black_box(&page);
        slot = (slot + 1) % 64;
    })
}

fn zeros_stored() -> Step {
    let (dir, store, vm) = vm();
    let mut scratch = Scratch::default();
    let mut slot = 0;
    Box::new(move || {
        let _kept = (&dir, &store);
        vm.store(Slot(slot), black_box(&ZERO_PAGE), Age::from_bits(1), &mut scratch).expect("it takes none");
        slot = (slot + 1) % 1024;
    })
}
