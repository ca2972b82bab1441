//! What the tests share: pages that are a function of two numbers, and a host in this process with the real store,
//! the real workers and the real sockets.
#![allow(dead_code, reason = "not every test uses everything")]

pub mod daemon;
pub mod file;
pub mod world;

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ballast::device::Device;
use ballast::device::vm::DeviceVm;
use ballast::page::{PAGE_SIZE, Page, ZERO_PAGE};
use ballast::store::codec::Compressor;
use ballast::store::vm::Limits;
use ballast::store::{Store, StoreConfig, VmSpec};

/// Slots on every test VM's disk.
pub const SLOTS: u32 = 10_000;

/// A page that is a function of two numbers: same-filled, well compressible, hardly or not at all.
pub fn page_of(kind: u8, seed: u64) -> Page {
    let mut page = ZERO_PAGE;
    let mut noise = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        noise ^= noise << 13;
        noise ^= noise >> 7;
        noise ^= noise << 17;
        noise.to_le_bytes()
    };
    let random_bytes = match kind % 5 {
        0 => {
            let word = if seed.is_multiple_of(2) { seed.to_le_bytes() } else { next() };
            page.as_chunks_mut::<8>().0.fill(word);
            return page;
        }
        1 => 64,
        2 => 1000,
        3 => 3000,
        _ => PAGE_SIZE,
    };
    for chunk in page[..random_bytes].as_chunks_mut::<8>().0 {
        *chunk = next();
    }
    page
}

/// Numbers that look random and are the same in every run.
pub struct Random(pub u64);

impl Random {
    /// A number below `end`.
    pub fn below(&mut self, end: u32) -> u32 {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        let high = self.0 >> 32;
        u32::try_from((high * u64::from(end)) >> 32).expect("less than the end")
    }
}

/// Opens a store with these VMs in `dir`.
pub fn open_store(dir: &Path, names: &[&str], compressor: Compressor, pool: u64, limit: u64) -> Store {
    let limits = Limits { limit_bytes: limit, ..Limits::NONE };
    let spec = |name: &&str| VmSpec { name: (*name).to_owned(), slots: SLOTS, limits };
    let specs = names.iter().map(spec).collect();
    Store::open(store_config(dir, compressor, pool), specs, || Ok(None)).expect("the state opens")
}

/// What a test's store is opened with.
pub fn store_config(dir: &Path, compressor: Compressor, pool: u64) -> StoreConfig {
    StoreConfig {
        state_dir: dir.to_owned(),
        pool_max_bytes: pool,
        accept_percent: 90,
        compressor,
        host_bytes: 1 << 30,
    }
}

/// A daemon's worth of rooms in this process. The threads of its sockets end with the process, like a daemon's.
pub struct Host {
    pub dir: tempfile::TempDir,
    pub store: Arc<Store>,
    pub vms: Vec<Arc<DeviceVm>>,
}

impl Host {
    /// Starts one with these VMs, four queues each and two workers.
    pub fn start(names: &[&str]) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a directory on a tmpfs");
        let store = Arc::new(open_store(&dir.path().join("state"), names, Compressor::Lz4, 1 << 30, 1 << 30));
        let device = Device::start(2, Duration::from_micros(50), store.state_id()).expect("workers start");
        let device = Arc::new(device);
        let mut vms = Vec::new();
        for name in names {
            let vm = Arc::new(DeviceVm::new(name, 4, store.ready(name)));
            let listener = UnixListener::bind(dir.path().join(format!("{name}.sock"))).expect("a socket");
            device.listen(listener, Arc::clone(&vm)).expect("a thread");
            vms.push(vm);
        }
        Self { dir, store, vms }
    }

    /// The socket of a VM.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.sock"))
    }
}
