//! The daemon and VMMs that are told how much memory their guests are to have: what somebody else changes is put right, and
//! a guest that is given much of it finds its pages in the pool before it asks for them.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::daemon::Daemon;
use support::fake_vmm::FakeVmm;
use support::page_of;

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);
/// Pages of a kilobyte that the guest has pushed out.
const PAGES: u64 = 3000;

struct Host {
    daemon: Daemon,
    vmm: FakeVmm,
    _dir: tempfile::TempDir,
}

impl Host {
    /// One VM, whose guest is to have 256 MiB of its 512, and has.
    fn start() -> Self {
        let host = Self::with_interval("1s");
        host.until("squeezed", |vm| vm["balloon"]["actual_bytes"] == 256 * MIB);
        host
    }

    /// The same, a tick after the other so long; nobody has waited for the first.
    fn with_interval(interval: &str) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let [socket, file] = ["web1.qmp", "writeback"].map(|name| dir.path().join(name));
        let vmm = FakeVmm::qmp(&socket);
        let config = format!(
            "[pool]\nmax = \"64MiB\"\npressure = false\n[writeback]\npath = {file:?}\nsize = \"64MiB\"\n\
             [balloon]\ninterval = \"{interval}\"\n[[vm]]\nname = \"web1\"\nsize = \"64MiB\"\n\
             squeeze = {{ vmm = \"qemu\", socket = {socket:?}, mode = \"fixed\", to = \"256MiB\" }}\n"
        );
        Self { daemon: Daemon::start(dir.path(), &config), vmm, _dir: dir }
    }

    fn until(&self, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        let start = Instant::now();
        loop {
            let vm = self.daemon.vm("web1");
            if is_so(&vm) {
                return vm;
            }
            assert!(start.elapsed() < PATIENCE, "not {what}: {vm}\n{}", self.daemon.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn ask(&self, args: &[&str]) {
        let answer = self.daemon.ask(args);
        assert!(answer.status.success(), "{args:?}: {answer:?}");
    }
}

#[test]
fn what_somebody_else_takes_is_given_back_though_the_target_is_the_same() {
    let host = Host::start();
    host.vmm.vm().actual_bytes = 100 * MIB;
    let start = Instant::now();
    while host.vmm.vm().actual_bytes != 256 * MIB {
        assert!(start.elapsed() < PATIENCE, "{}", host.daemon.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    // A guest that is on its way down, or a little below, is told nothing.
    host.vmm.vm().actual_bytes = 254 * MIB;
    host.vmm.vm().asked.clear();
    let looks = || host.vmm.vm().asked.iter().filter(|name| *name == "query-balloon").count();
    while looks() < 3 {
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(!host.vmm.vm().asked.contains(&"balloon".to_owned()));
}

#[test]
fn a_guest_that_is_given_memory_finds_its_pages_in_the_pool() {
    let host = Host::start();
    let (_disk, mut queue) = host.daemon.attach("web1");
    for slot in 1..=PAGES {
        queue.write_pages(slot, &[page_of(2, slot)]).unwrap();
    }
    host.ask(&["vm", "set", "web1", "--limit", "1MiB"]);
    let vm = host.until("in the file", |vm| vm["file_pages"].as_u64().unwrap() > PAGES / 2);
    host.ask(&["vm", "set", "web1", "--limit", "32MiB"]);
    let in_file = vm["file_pages"].as_u64().unwrap();
    assert_eq!(vm["counters"]["read_back_pages"], 0, "it was given nothing");

    host.ask(&["vm", "squeeze", "web1", "--to", "512MiB"]);
    let vm = host.until("back", |vm| vm["file_pages"] == 0);
    assert!(vm["counters"]["read_back_pages"].as_u64().unwrap() >= in_file, "{vm}");
    host.until("over", |vm| vm["balloon"]["reading_back_pages"] == 0);
    for slot in 1..=PAGES {
        assert!(queue.read_page(slot).unwrap() == page_of(2, slot), "slot {slot}");
    }
    let vm = host.daemon.vm("web1");
    assert_eq!(vm["counters"]["loaded_from_file"], 0, "all of them came from the pool");
    let log = host.daemon.log();
    let told = log.lines().filter(|line| line.contains("were read back from the writeback file")).count();
    assert_eq!(told, 1, "{log}");
}

#[test]
fn what_came_back_is_shown_as_of_the_tick_that_saw_it() {
    // Only what an operator does makes a tick.
    let host = Host::with_interval("60s");
    let first = host.until("looked at", |vm| vm["balloon"]["reachable"] == true);
    assert_eq!(
        (&first["balloon"]["promotion_ppm"], &first["balloon"]["state"]),
        (&0.into(), &"fixed".into())
    );
    let (_disk, mut queue) = host.daemon.attach("web1");
    for slot in 1..=PAGES {
        queue.write_pages(slot, &[page_of(2, slot)]).unwrap();
    }
    for slot in 1..=PAGES {
        queue.read_page(slot).unwrap();
    }
    host.ask(&["vm", "squeeze", "web1", "--to", "300MiB"]);
    let vm = host.until("looked at again", |vm| vm["balloon"]["target_bytes"] == 300 * MIB);
    for rate in ["promotion_ppm", "stall_ppm"] {
        assert!(vm["balloon"][rate].as_u64().unwrap() > 0, "{rate}: {vm}");
    }
}

#[test]
fn the_part_of_what_a_guest_pushes_out_that_goes_elsewhere_is_shown() {
    let host = Host::start();
    assert_eq!(host.daemon.vm("web1")["balloon"]["other_swap_ppm"], Value::Null, "it says nothing of that");
    let says = |swap_out_mib: u64| {
        let mut vm = host.vmm.vm();
        vm.stats = json!({ "stat-swap-in": 0, "stat-swap-out": swap_out_mib * MIB });
        vm.updated_seconds += 1;
    };
    let ppm = |vm: &Value| vm["balloon"]["other_swap_ppm"].as_u64();
    says(100);
    host.until("heard", |vm| ppm(vm) == Some(0));
    // None of it went through us.
    host.until("seen", |vm| {
        says(200);
        ppm(vm).is_some_and(|ppm| ppm > 990_000)
    });
}
