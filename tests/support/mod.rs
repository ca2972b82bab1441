//! What the tests share: pages that are a function of two numbers, and a host in this process with the real store,
//! the real workers and the real sockets.
#![allow(dead_code, reason = "not every test uses everything")]

pub mod balloon;
pub mod daemon;
pub mod debian;
pub mod fake_vmm;
pub mod file;
pub mod guests;
pub mod http;
pub mod load;
pub mod mount;
pub mod steps;
pub mod told;
pub mod usage;
pub mod vm;
pub mod working;
pub mod world;

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use ballast::device::Device;
use ballast::device::vm::DeviceVm;
use ballast::page::{PAGE_SIZE, Page, ZERO_PAGE};
use ballast::store::codec::Compressor;
use ballast::store::state::StateDir;
use ballast::store::vm::{Limits, VmStore};
use ballast::store::{Store, StoreConfig, VmSpec};
use ballast::writeback::io::faulty::Faulty;
use ballast::writeback::{self, OpenError, Options, Writeback};

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

/// A page of records that have their names in common with all such pages: what a dictionary is good for.
pub fn records(seed: u64) -> Page {
    const NAMES: [&str; 8] =
        ["offset", "length", "owner", "generation", "checksum", "next", "previous", "kind"];
    const OF: [&str; 6] = ["process", "connection", "inode", "transaction", "descriptor", "interpreter"];
    let mut text = Vec::with_capacity(PAGE_SIZE + 64);
    let mut random = Random(seed);
    while text.len() < PAGE_SIZE {
        let (name, of, with) = (random.below(8), random.below(6), random.below(6));
        let (name, of, with) = (NAMES[name as usize], OF[of as usize], OF[with as usize]);
        let number = random.below(1000);
        text.extend(
            format!("the {name} of the {of} that shares it with another {with} is {number}; ").bytes(),
        );
    }
    text.truncate(PAGE_SIZE);
    text.try_into().expect("a page")
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

/// How a host is to be.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// The pool's maximum, in bytes.
    pub pool_bytes: u64,
    /// Each VM's limit, in bytes.
    pub limit_bytes: u64,
    /// Whether there is a writeback file.
    pub file: bool,
    /// How long stores wait for room.
    pub store_deadline: Duration,
    /// How long workers look at their rings before they sleep.
    pub poll: Duration,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            pool_bytes: 1 << 30,
            limit_bytes: 1 << 30,
            file: false,
            store_deadline: Duration::from_secs(5),
            poll: Duration::from_micros(50),
        }
    }
}

/// A daemon's worth of rooms in this process. The threads of its sockets end with the process, like a daemon's.
pub struct Host {
    pub dir: tempfile::TempDir,
    pub store: Arc<Store>,
    pub device: Arc<Device>,
    pub vms: Vec<Arc<DeviceVm>>,
    /// What is between the store and the writeback file.
    pub faulty: Option<Arc<Faulty>>,
    setup: Setup,
    runtime_dir: PathBuf,
}

impl Host {
    /// Starts one with these VMs, four queues each and two workers.
    pub fn start(names: &[&str]) -> Self {
        Self::with(names, Setup::default())
    }

    /// The same, otherwise set up.
    pub fn with(names: &[&str], setup: Setup) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a directory on a tmpfs");
        let runtime_dir = dir.path().to_owned();
        Self::run(dir, names, setup, runtime_dir)
    }

    fn run(dir: tempfile::TempDir, names: &[&str], setup: Setup, runtime_dir: PathBuf) -> Self {
        let limits = Limits { limit_bytes: setup.limit_bytes, ..Limits::NONE };
        let spec = |name: &&str| VmSpec { name: (*name).to_owned(), slots: SLOTS, limits };
        let config = store_config(&dir.path().join("state"), Compressor::Lz4, setup.pool_bytes);
        let mut faulty = None;
        let file = || setup.file.then(|| open_file(dir.path(), &mut faulty)).transpose();
        let store = Store::open(config, names.iter().map(spec).collect(), file).expect("the state opens");
        let store = Arc::new(store);
        let device = Device::start(2, setup.poll, setup.store_deadline, store.state_id());
        let device = Arc::new(device.expect("workers start"));
        let mut vms = Vec::new();
        for name in names {
            let vm = Arc::new(DeviceVm::new(name, 4, true, store.ready(name)));
            let socket = runtime_dir.join(format!("{name}.sock"));
            let _ = std::fs::remove_file(&socket);
            let listener = UnixListener::bind(socket).expect("a socket");
            device.listen(listener, Arc::clone(&vm)).expect("a thread");
            vms.push(vm);
        }
        Self { dir, store, device, vms, faulty, setup, runtime_dir }
    }

    /// A host that goes on from what this one has in its files at this moment, as a daemon does after its predecessor
    /// was killed, on the same sockets. This one must have nothing to do that changes them.
    pub fn successor(&self) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a directory on a tmpfs");
        let copied = Command::new("cp")
            .args(["-r", "--sparse=always"])
            .args(["state", "writeback"].map(|name| self.dir.path().join(name)))
            .arg(dir.path())
            .status()
            .expect("cp is there");
        assert!(copied.success());
        let names: Vec<&str> = self.vms.iter().map(|vm| vm.name()).collect();
        Self::run(dir, &names, self.setup, self.runtime_dir.clone())
    }

    /// The socket of a VM.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.runtime_dir.join(format!("{name}.sock"))
    }

    /// The file's faults.
    pub fn faulty(&self) -> &Faulty {
        self.faulty.as_ref().expect("there is a file")
    }

    /// The pages of a VM.
    pub fn pages(&self, name: &str) -> Arc<VmStore> {
        self.store.ready(name).expect("the VM is in service")
    }

    /// Moves pages of a VM to the writeback file, as the shrinker would. Returns how many were in the pool and have
    /// moved.
    pub fn write_back(&self, name: &str, slots: impl IntoIterator<Item = u32>) -> usize {
        file::write_back(&self.store, &self.pages(name), slots)
    }
}

fn open_file(dir: &Path, faulty: &mut Option<Arc<Faulty>>) -> Result<Writeback, OpenError> {
    let options = Options {
        path: dir.join("writeback"),
        size_bytes: 256 << 20,
        state_path: StateDir::writeback_path(&dir.join("state")),
        daily_bytes_max: None,
        lock_wait: Duration::from_secs(10),
    };
    Writeback::open_with(&options, |target| {
        let file = Arc::new(Faulty::new(writeback::io::start(target)?));
        *faulty = Some(Arc::clone(&file));
        Ok(file)
    })
}
