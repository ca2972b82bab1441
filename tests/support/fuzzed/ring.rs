//! A ring's turns over a guest's memory that these bytes fill and change between the turns: descriptors, indices, the
//! in-flight region, memory that is unmapped or cut short, a ring that is stopped and started again with another size.
//! Whatever happened, the ring stops within a bounded number of turns, and the store's numbers are those of a recount.

use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use ballast::device::guest_memory::{Memory, Region};
use ballast::device::inflight::InflightRegion;
use ballast::device::ring::{Ending, GuestMemory, Owner, Ring, Vring, Workbench};
use ballast::device::roster::Roster;
use ballast::device::session::QUEUE_SIZE_MAX;
use ballast::device::signals;
use ballast::device::vm::DeviceVm;
use ballast::ids::Slot;
use ballast::store::codec::Compressor;
use ballast::store::vm::Limits;
use ballast::store::{Store, VmSpec};
use event_manager::{EventManager, SubscriberId, SubscriberOps};
use rustix::fs::{MemfdFlags, memfd_create};
use vhost_user_backend::VringT;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryAtomic};

use super::script::Script;
use super::store_config;

const SLOTS: u32 = 256;
const MEMORY_BYTES: usize = 64 << 10;
/// Where the parts of a ring are unless the script says otherwise.
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x5000;
const STEPS_MAX: usize = 64;
/// Far more turns than the requests of a full ring take.
const TURNS_MAX: usize = 20_000;

pub fn run(bytes: &[u8]) {
    thread_local! {
        static BENCH: RefCell<Bench> = RefCell::new(Bench::new());
    }
    BENCH.with_borrow_mut(|bench| bench.run(&mut Script(bytes)));
}

/// A store with a VM, and a worker's tools without the worker.
struct Bench {
    _dir: tempfile::TempDir,
    store: Store,
    vm: Arc<DeviceVm>,
    manager: EventManager<Ring>,
    roster: Arc<Roster>,
    workbench: Workbench,
}

/// One guest, from its first start to its end.
struct Guest {
    vring: Vring,
    memory: GuestMemory,
    file: File,
    inflight: Option<(Arc<InflightRegion>, File)>,
    size: u16,
    available_index: u16,
    running: Option<SubscriberId>,
}

impl Bench {
    fn new() -> Self {
        signals::install().expect("signals can be handled");
        let dir = tempfile::tempdir_in("/dev/shm").expect("a directory on a tmpfs");
        let config = store_config(dir.path(), Compressor::Lz4, 1 << 20);
        // Less than what its slots may need, so that stores fail as well.
        let limits = Limits { limit_bytes: 64 << 10, ..Limits::NONE };
        let spec = VmSpec { name: "web1".to_owned(), slots: SLOTS, limits };
        let store = Store::open(config, vec![spec], || Ok(None)).expect("the state opens");
        let vm = Arc::new(DeviceVm::new("web1", 1, false, store.ready("web1")));
        let manager = EventManager::new().expect("an epoll");
        let roster = Arc::new(Roster::new(manager.remote_endpoint()));
        Self { _dir: dir, store, vm, manager, roster, workbench: Workbench::default() }
    }

    fn run(&mut self, script: &mut Script<'_>) {
        let mut guest = Guest::new(script);
        self.start(&mut guest);
        for _ in 0..STEPS_MAX {
            if script.is_over() {
                break;
            }
            self.step(&mut guest, script);
        }
        self.stop(&mut guest, Ending::Settle);
        let pages = self.vm.store();
        let mut from = Some(Slot(0));
        while let Some(slot) = from {
            from = pages.invalidate_some(slot, Slot(SLOTS));
        }
        self.store.validate();
    }

    fn step(&mut self, guest: &mut Guest, script: &mut Script<'_>) {
        match script.byte() % 16 {
            0..=3 => self.turn(guest, u32::from(script.byte() % 8) + 1),
            4 => {
                let (at, count) = (script.half_word(), script.byte());
                guest.write(u64::from(at), script.bytes(count.into()));
            }
            5 => guest.describe(script),
            6 | 7 => guest.request(script),
            8 => guest.publish(script.half_word()),
            9 => guest.write(AVAILABLE + 2, &script.half_word().to_le_bytes()),
            10 => guest.unmap(),
            11 => guest.map_again(),
            12 => guest.cut(script.byte()),
            13 => guest.note_in_flight(script),
            14 => {
                if let Some(id) = guest.running {
                    self.manager.subscriber_mut(id).expect("it is there").sleep();
                }
            }
            _ => self.start_again(guest, script),
        }
    }

    fn turn(&mut self, guest: &Guest, pages: u32) {
        if let Some(id) = guest.running {
            let others_wait = pages.is_multiple_of(2);
            let ring = self.manager.subscriber_mut(id).expect("it is there");
            ring.turn(&mut self.workbench, pages, others_wait);
        }
    }

    fn start(&mut self, guest: &mut Guest) {
        let owner = Owner { vm: Arc::clone(&self.vm), session: 1 };
        let inflight = guest.inflight.as_ref().and_then(|(region, _)| region.queue(0));
        guest.vring.set_enabled(true);
        let (vring, memory, roster) = (guest.vring.clone(), guest.memory.clone(), Arc::clone(&self.roster));
        let ring = Ring::new(owner, vring, memory, inflight, Duration::ZERO, roster);
        let id = self.manager.add_subscriber(ring);
        self.manager.subscriber_mut(id).expect("it was added").activate(id);
        guest.running = Some(id);
    }

    fn stop(&mut self, guest: &mut Guest, ending: Ending) {
        let Some(id) = guest.running else { return };
        let (tell, told) = mpsc::channel();
        self.manager.subscriber_mut(id).expect("it is there").stop(tell, ending);
        let stopped = (0..TURNS_MAX).any(|_| {
            let stopped = told.try_recv().is_ok();
            if !stopped {
                self.turn(guest, 8);
            }
            stopped
        });
        assert!(stopped, "a ring doesn't stop");
        self.manager.remove_subscriber(id).expect("it is there");
        self.roster.remove(id);
        guest.vring.set_queue_ready(false);
        self.vm.release(1);
        guest.running = None;
    }

    fn start_again(&mut self, guest: &mut Guest, script: &mut Script<'_>) {
        let how = script.byte();
        self.stop(guest, if how & 1 == 0 { Ending::Settle } else { Ending::LeaveInFlight });
        if how & 2 != 0 {
            guest.resize(1 << (script.byte() % 11));
        }
        if how & 4 != 0 {
            guest.vring.set_queue_next_avail(script.half_word());
        }
        if how & 8 != 0 {
            guest.place(script);
        }
        self.start(guest);
    }
}

impl Guest {
    fn new(script: &mut Script<'_>) -> Self {
        let (size, flags) = (1u16 << (script.byte() % 11), script.byte());
        let file = File::from(memfd_create("fuzzed", MemfdFlags::CLOEXEC).expect("a memfd"));
        file.set_len(MEMORY_BYTES as u64).expect("its length");
        let memory = GuestMemoryAtomic::new(mapped(&file));
        let vring = Vring::new(memory.clone(), QUEUE_SIZE_MAX).expect("a queue");
        vring.set_queue_event_idx(flags & 1 != 0);
        let inflight = (flags & 2 != 0).then(|| {
            let (region, file, _) = InflightRegion::create(1, size, &[7; 16]).expect("a region");
            (Arc::new(region), file)
        });
        let mut guest = Self { vring, memory, file, inflight, size, available_index: 0, running: None };
        guest.resize(size);
        guest.vring.set_queue_info(0, AVAILABLE, USED).expect("they are aligned");
        if flags & 4 != 0 {
            guest.place(script);
        }
        guest
    }

    fn resize(&mut self, size: u16) {
        self.size = size;
        self.vring.set_queue_size(size);
    }

    /// Puts the ring somewhere; a session refuses what isn't aligned.
    fn place(&mut self, script: &mut Script<'_>) {
        let [table, available, used] = std::array::from_fn(|_| u64::from(script.half_word()) * 2);
        let _ = self.vring.set_queue_info(table, available, used);
    }

    /// Writes where there is memory.
    fn write(&self, at: u64, bytes: &[u8]) {
        let _ = self.memory.memory().write_slice(bytes, GuestAddress(at));
    }

    /// Writes a descriptor, of the table or anywhere.
    fn describe(&self, script: &mut Script<'_>) {
        let (at, bytes) = script.descriptor();
        self.write(at, &bytes);
    }

    /// Writes a request that is right but for what the script says, and publishes it.
    fn request(&mut self, script: &mut Script<'_>) {
        let (first, kind, sector) = (u16::from(script.byte()), script.byte(), script.half_word());
        let (length, fill) = (u32::from(script.half_word()), script.byte());
        let mut header = u32::from(kind).to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(u64::from(sector).to_le_bytes());
        self.write(0x7000, &header);
        self.write(0x8000, &[fill; 512]);
        let device_writes = u16::from(kind == 0 || kind == 8) * 2;
        let chain = [(0x7000u64, 16, 1), (0x8000, length, 1 | device_writes), (0x7100, 1, 2)];
        for (index, (address, length, flags)) in (first..).zip(chain) {
            let mut descriptor = address.to_le_bytes().to_vec();
            descriptor.extend(length.to_le_bytes());
            descriptor.extend(u16::to_le_bytes(flags));
            descriptor.extend((index + 1).to_le_bytes());
            self.write(u64::from(index) * 16, &descriptor);
        }
        self.publish(first);
    }

    /// Puts a head on the available ring, where that is unless it was moved.
    fn publish(&mut self, head: u16) {
        let place = u64::from(self.available_index % self.size);
        self.write(AVAILABLE + 4 + 2 * place, &head.to_le_bytes());
        self.available_index = self.available_index.wrapping_add(1);
        self.write(AVAILABLE + 2, &self.available_index.to_le_bytes());
    }

    fn replace_memory(&self, memory: Memory) {
        self.memory.lock().expect("nobody panicked").replace(memory);
    }

    fn unmap(&self) {
        self.replace_memory(Memory::new());
    }

    fn map_again(&self) {
        self.file.set_len(MEMORY_BYTES as u64).expect("its length");
        self.replace_memory(mapped(&self.file));
    }

    /// As a VMM does who wants to see the daemon die by a signal.
    fn cut(&self, pages: u8) {
        self.file.set_len(u64::from(pages % 16) * 4096).expect("its length");
    }

    fn note_in_flight(&self, script: &mut Script<'_>) {
        let (at, count) = (script.half_word(), script.byte() % 32);
        if let Some((_, file)) = &self.inflight {
            // Beyond its end the kernel refuses.
            let _ = file.write_at(script.bytes(count.into()), u64::from(at));
        }
    }
}

fn mapped(file: &File) -> Memory {
    let file = FileOffset::new(file.try_clone().expect("a descriptor"), 0);
    let region = Region::map(file, MEMORY_BYTES, GuestAddress(0), None).expect("it is mapped");
    Memory::from_regions(vec![region]).expect("one region")
}
