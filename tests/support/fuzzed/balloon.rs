//! The queues of a balloon over a guest's memory that these bytes fill and change between the turns: lists of pages, ranges
//! that are free, statistics, indices, rings in pages that are given up, memory that is unmapped or cut short; and what a
//! driver writes to the configuration space. Whatever happened, what counts as given up is what was given up and not taken
//! back, and no page that is not there is among it.

use std::fs::File;
use std::sync::Arc;

use ballast::device::balloon::Numbers;
use ballast::device::balloon::config_space::{Fields, PAGE_POISON, REPORTING, Role, STATS_VQ, has, role};
use ballast::device::balloon::given::Given;
use ballast::device::balloon::ring::Ring;
use ballast::device::balloon::turn::{TURN_COST, Turn};
use ballast::device::guest_memory::{Memory, Region};
use ballast::device::ring::{GuestMemory, Vring};
use ballast::device::session::QUEUE_SIZE_MAX;
use ballast::device::signals;
use ballast::device::vm::DeviceVm;
use rustix::fs::{MemfdFlags, memfd_create};
use vhost_user_backend::VringT;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryAtomic};

use super::script::Script;

const PAGES: u32 = 64;
const MEMORY_BYTES: usize = PAGES as usize * 4096;
const RINGS: u16 = 4;
/// Each ring has a page of its own, with its parts in these places, unless the script says otherwise.
const AVAILABLE: u64 = 0x600;
const USED: u64 = 0x800;
const LIST: u64 = 0x8000;
const STEPS_MAX: usize = 64;

pub fn run(bytes: &[u8]) {
    signals::install().expect("signals can be handled");
    let mut script = Script(bytes);
    let mut guest = Guest::new(&mut script);
    for _ in 0..STEPS_MAX {
        if script.is_over() {
            break;
        }
        guest.step(&mut script);
    }
}

/// A driver, and what a session knows of it.
struct Guest {
    vm: Arc<DeviceVm>,
    memory: GuestMemory,
    file: File,
    features: u64,
    size: u16,
    rings: Vec<Ring>,
    available: Vec<u16>,
    given: Given,
    /// What was given up and not taken back, as it was counted.
    balance: u64,
    is_new_driver: bool,
    wish: bool,
    fields: Fields,
}

impl Guest {
    fn new(script: &mut Script<'_>) -> Self {
        let (flags, size) = (script.byte(), 1u16 << (script.byte() % 7));
        let bits = [(2, PAGE_POISON), (4, STATS_VQ), (8, REPORTING)];
        let features =
            bits.iter().filter(|(flag, _)| flags & flag != 0).fold(0, |all, (_, bit)| all | 1 << bit);
        let file = File::from(memfd_create("fuzzed", MemfdFlags::CLOEXEC).expect("a memfd"));
        file.set_len(MEMORY_BYTES as u64).expect("its length");
        let memory = GuestMemoryAtomic::new(mapped(&file));
        let mut guest = Self {
            vm: Arc::new(DeviceVm::new("web1", 1, false, None)),
            memory,
            file,
            features,
            size,
            rings: Vec::new(),
            available: vec![0; RINGS.into()],
            given: Given::default(),
            balance: 0,
            is_new_driver: false,
            wish: false,
            fields: Fields::default(),
        };
        for index in 0..RINGS {
            let vring = Vring::new(guest.memory.clone(), QUEUE_SIZE_MAX).expect("a queue");
            vring.set_queue_event_idx(flags & 1 != 0);
            vring.set_queue_size(size);
            let page = u64::from(index) * 4096;
            vring.set_queue_info(page, page + AVAILABLE, page + USED).expect("they are aligned");
            guest.rings.push(Ring::new(vring, role(index, features)));
        }
        guest
    }

    fn step(&mut self, script: &mut Script<'_>) {
        let what = script.byte() % 16;
        match what {
            0..=3 => {
                let (ring, turns) = (script.byte() % 4, script.byte() % 8);
                (0..=turns).for_each(|_| self.turn(ring.into()));
            }
            4 => {
                let (at, count) = (script.word(), script.byte());
                self.write(at.into(), script.bytes(count.into()));
            }
            5 => self.describe(script),
            6 => {
                let (ring, index) = (u64::from(script.byte() % 4), script.half_word());
                self.write(ring * 4096 + AVAILABLE + 2, &index.to_le_bytes());
            }
            7 => self.list(script),
            8 => self.range(script),
            9 => self.replace_memory(Memory::new()),
            10 => {
                self.file.set_len(MEMORY_BYTES as u64).expect("its length");
                self.replace_memory(mapped(&self.file));
            }
            11 => self.file.set_len(u64::from(script.byte() % 64) * 4096).expect("its length"),
            12 => self.wish = true,
            13 => self.configure(script),
            _ => self.start_again(script, what == 15),
        }
    }

    fn turn(&mut self, index: usize) {
        let memory = self.memory.memory();
        let mut turn = Turn {
            memory: &memory,
            vm: &self.vm,
            given: &mut self.given,
            poisoned: has(self.features, PAGE_POISON) && self.fields.poison_val != 0,
            wish: self.wish,
            stats: None,
            is_new_driver: self.is_new_driver,
            begins: false,
            numbers: Numbers::default(),
            cost_left: TURN_COST,
            batch: Vec::new(),
        };
        let _ = self.rings[index].turn(&mut turn);
        let Turn { wish, is_new_driver, begins, numbers, .. } = turn;
        (self.wish, self.is_new_driver) = (wish, is_new_driver);
        let before = if begins { 0 } else { self.balance };
        self.balance = before + numbers.inflated_pages - numbers.deflated_pages;
        assert_eq!(self.given.pages(), self.balance, "what was given up");
        assert!(self.balance <= PAGES.into(), "there are no more pages");
        let _ = self.rings[index].listen();
    }

    /// Stops a ring as a message would, and starts it again, maybe elsewhere.
    fn start_again(&mut self, script: &mut Script<'_>, moves: bool) {
        let index = script.byte() % 4;
        let role = role(index.into(), self.features);
        let vring = self.rings[usize::from(index)].vring().clone();
        let fresh = Ring::new(vring.clone(), Role::None);
        std::mem::replace(&mut self.rings[usize::from(index)], fresh).stop();
        if moves {
            // A session refuses what isn't aligned.
            let [table, available, used] = std::array::from_fn(|_| u64::from(script.half_word()) * 2);
            let _ = vring.set_queue_info(table, available, used);
        }
        self.rings[usize::from(index)] = Ring::new(vring, role);
    }

    /// Names pages: so many from one on, each so far from the last.
    fn list(&mut self, script: &mut Script<'_>) {
        let (ring, first, count, stride) = (script.byte() % 4, script.word(), script.byte(), script.byte());
        let pages = (0..u32::from(count)).map(|n| first.wrapping_add(n * u32::from(stride)));
        let bytes: Vec<u8> = pages.flat_map(u32::to_le_bytes).collect();
        self.write(LIST, &bytes);
        self.publish(ring, LIST, u32::from(count) * 4, 0);
    }

    /// Reports some pages as free, or anything.
    fn range(&mut self, script: &mut Script<'_>) {
        let (ring, page, pages) = (script.byte() % 4, script.half_word(), script.half_word());
        self.publish(ring, u64::from(page) * 4096, u32::from(pages) << 12, 2);
    }

    /// Writes a descriptor of any table, or of none.
    fn describe(&self, script: &mut Script<'_>) {
        let (at, bytes) = script.descriptor();
        self.write(at, &bytes);
    }

    /// Makes a chain of one descriptor, and puts it on the available ring, where that is unless it was moved.
    fn publish(&mut self, ring: u8, address: u64, bytes: u32, flags: u16) {
        let page = u64::from(ring) * 4096;
        let index = &mut self.available[usize::from(ring)];
        let head = *index % self.size;
        *index = index.wrapping_add(1);
        let index = *index;
        let mut descriptor = address.to_le_bytes().to_vec();
        descriptor.extend(bytes.to_le_bytes());
        descriptor.extend(flags.to_le_bytes());
        descriptor.extend([0; 2]);
        self.write(page + u64::from(head) * 16, &descriptor);
        self.write(page + AVAILABLE + 4 + 2 * u64::from(head), &head.to_le_bytes());
        self.write(page + AVAILABLE + 2, &index.to_le_bytes());
    }

    /// Writes to the configuration space; what is not the driver's own stays as it was.
    fn configure(&mut self, script: &mut Script<'_>) {
        let (offset, count) = (script.word(), script.byte());
        let before = self.fields;
        self.fields = before.written(offset, script.bytes(count.into()));
        assert_eq!(self.fields.num_pages, before.num_pages);
        assert!(self.fields.read(offset, count.into()).len() <= count.into());
    }

    /// Writes where there is memory.
    fn write(&self, at: u64, bytes: &[u8]) {
        let _ = self.memory.memory().write_slice(bytes, GuestAddress(at));
    }

    fn replace_memory(&self, memory: Memory) {
        self.memory.lock().expect("nobody panicked").replace(memory);
    }
}

fn mapped(file: &File) -> Memory {
    let file = FileOffset::new(file.try_clone().expect("a descriptor"), 0);
    let region = Region::map(file, MEMORY_BYTES, GuestAddress(0), None).expect("it is mapped");
    Memory::from_regions(vec![region]).expect("one region")
}
