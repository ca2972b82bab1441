//! A daemon that has done something of everything: stores and loads of every kind of page, a pool that was full, a VM at
//! its limit, pages in the file and back, a guest that was squeezed. For tests of what it says about that.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::time::{Duration, Instant};

use ballast::frontend::{Device, Memory, Op, Options, Queue, SECTORS_PER_PAGE, Status};

use serde_json::json;

use super::daemon::Daemon;
use super::fake_vmm::FakeVmm;
use super::page_of;

/// Its VM without a reserve, which does most of the work.
pub const BUSY: &str = "web1";
/// Its VM with a limit.
pub const LIMITED: &str = "web2";
/// Pages that each of them stores, from the second slot on.
const PAGES: u64 = 1500;
const PATIENCE: Duration = Duration::from_secs(60);

/// A TCP port of this host that nobody has at this moment.
pub fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address")
}

/// A VM's guest.
pub struct Guest {
    _device: Device,
    /// What its balloon is reached by, if it has one.
    _vmm: Option<FakeVmm>,
    pub queue: Queue,
}

impl Guest {
    pub fn attach(daemon: &Daemon, name: &str) -> Self {
        let memory = Memory::with_bytes(16 << 20).expect("memory for a guest");
        let mut device = Device::connect(daemon.socket(name), memory, Options::default()).expect("a daemon");
        let queue = device.start().expect("the rings start").remove(0);
        Self { _device: device, _vmm: None, queue }
    }

    /// Stores pages of all kinds, and reads all of them and some that were never stored.
    pub fn work(&mut self) {
        // More at once than leaves meanwhile.
        let depth = u64::from(self.queue.depth().min(32));
        for slots in (1..=PAGES).collect::<Vec<_>>().chunks(usize::try_from(depth).expect("small")) {
            for (tag, slot) in (0..).zip(slots) {
                let page = page_of(u8::try_from(slot % 5).expect("small"), *slot);
                self.queue.write_data(tag, 0, &page).expect("a buffer");
                let op = Op::Write { sector: slot * SECTORS_PER_PAGE, bytes: 4096 };
                self.queue.stage(tag, op).expect("a place");
            }
            self.queue.publish().expect("a ring");
            for _ in slots {
                let done = self.queue.wait(PATIENCE).expect("an answer");
                assert_eq!(done.status, Status::Ok, "there is room, sooner or later");
            }
        }
        for slot in 1..=PAGES + 100 {
            self.queue.read_page(slot).expect("every page is there");
        }
    }
}

/// Starts a daemon in `dir` whose metrics are at `address`, and has its VMs work.
pub fn start(dir: &Path, address: SocketAddr) -> (Daemon, Vec<Guest>) {
    let (file, socket) = (dir.join("writeback"), dir.join("busy.qmp"));
    let vmm = FakeVmm::qmp(&socket);
    vmm.vm().stats = json!({ "stat-available-memory": 100 << 20 });
    let config = format!(
        "metrics = \"{address}\"\n[pool]\nmax = \"2MiB\"\npressure = false\n\
         [writeback]\npath = {file:?}\nsize = \"64MiB\"\ndaily_limit = \"1GiB\"\n\
         [balloon]\ninterval = \"1s\"\n\
         [[vm]]\nname = \"{BUSY}\"\nsize = \"16MiB\"\n\
         squeeze = {{ vmm = \"qemu\", socket = {socket:?}, mode = \"fixed\", to = \"256MiB\" }}\n\
         [[vm]]\nname = \"{LIMITED}\"\nsize = \"16MiB\"\nlimit = \"1MiB\"\n"
    );
    let daemon = Daemon::start(dir, &config);
    let mut guests = [BUSY, LIMITED].map(|name| Guest::attach(&daemon, name));
    guests.iter_mut().for_each(Guest::work);
    guests[0]._vmm = Some(vmm);
    let deadline = Instant::now() + PATIENCE;
    while daemon.vm(BUSY)["balloon"]["actual_bytes"] != json!(256 << 20) {
        assert!(Instant::now() < deadline, "it is squeezed: {}", daemon.vm(BUSY));
        std::thread::sleep(Duration::from_millis(50));
    }
    (daemon, guests.into())
}
