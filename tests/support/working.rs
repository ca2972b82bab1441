//! A daemon that has done something of everything: stores and loads of every kind of page, a pool that was full, a VM at
//! its limit, pages in the file and back. For tests of what it says about that.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::time::Duration;

use ballast::frontend::{Device, Memory, Op, Options, Queue, SECTORS_PER_PAGE, Status};

use super::daemon::Daemon;
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
    pub queue: Queue,
}

impl Guest {
    pub fn attach(daemon: &Daemon, name: &str) -> Self {
        let memory = Memory::with_bytes(16 << 20).expect("memory for a guest");
        let mut device = Device::connect(daemon.socket(name), memory, Options::default()).expect("a daemon");
        let queue = device.start().expect("the rings start").remove(0);
        Self { _device: device, queue }
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
    let file = dir.join("writeback");
    let config = format!(
        "metrics = \"{address}\"\n[pool]\nmax = \"2MiB\"\npressure = false\n\
         [writeback]\npath = {file:?}\nsize = \"64MiB\"\ndaily_limit = \"1GiB\"\n\
         [[vm]]\nname = \"{BUSY}\"\nsize = \"16MiB\"\n\
         [[vm]]\nname = \"{LIMITED}\"\nsize = \"16MiB\"\nlimit = \"1MiB\"\n"
    );
    let daemon = Daemon::start(dir, &config);
    let mut guests = [BUSY, LIMITED].map(|name| Guest::attach(&daemon, name));
    guests.iter_mut().for_each(Guest::work);
    (daemon, guests.into())
}
