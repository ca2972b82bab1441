//! A request that crashes the daemon: carried out again once, then failed, and when its VM goes on crashing the daemon
//! that VM is quarantined, until an operator releases it. Nobody loses a page by it, and its neighbour goes on.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::{Duration, Instant};

use ballast::crash_point::{CRASH_HEARING, CRASH_STORING};
use ballast::frontend::{Device, Manners, Memory, Op, Options, Queue, Status};
use ballast::page::Page;
use support::daemon::Daemon;
use support::fake_vmm::FakeVmm;
use support::page_of;

const PATIENCE: Duration = Duration::from_secs(60);
const SLOTS: u64 = 200;
/// A store here crashes the daemon when it is told to.
const FATAL_SLOT: u64 = 77;
const CONFIG: &str = "[[vm]]\nname = \"web1\"\nsize = \"1MiB\"\n[[vm]]\nname = \"web2\"\nsize = \"1MiB\"\n";

/// A VM with its disk.
struct Vm {
    device: Device,
    queue: Queue,
}

impl Vm {
    fn attach(daemon: &Daemon, name: &str, manners: Manners) -> Self {
        let options = Options { manners, queues: 1, depth: 4, data_bytes: 4096, ..Options::default() };
        let memory = Memory::with_bytes(4 << 20).unwrap();
        let mut device = Device::connect(daemon.socket(name), memory, options).unwrap();
        let queue = device.start().unwrap().remove(0);
        Self { device, queue }
    }

    fn reconnect(&mut self) {
        self.device.reconnect(PATIENCE).unwrap();
    }

    /// Asks for a store and doesn't wait for it.
    fn begin_store(&mut self, slot: u64, page: &Page) {
        let tag = self.queue.free_tag().unwrap();
        self.queue.write_data(tag, 0, page).unwrap();
        self.queue.stage(tag, Op::Write { sector: slot * 8, bytes: 4096 }).unwrap();
        self.queue.publish().unwrap();
        self.queue.kick().unwrap();
    }

    fn answer(&mut self) -> Status {
        self.queue.wait(PATIENCE).unwrap().status
    }

    fn store(&mut self, slot: u64, seed: u64) {
        self.queue.write_pages(slot, &[page(slot, seed)]).unwrap();
    }

    /// All slots but the fatal one.
    fn store_all(&mut self, seed: u64) {
        others().for_each(|slot| self.store(slot, seed));
    }

    fn assert_all(&mut self, seed: u64) {
        for slot in others() {
            assert!(self.queue.read_page(slot).unwrap() == page(slot, seed), "slot {slot}");
        }
    }
}

fn reconnect(vms: [&mut Vm; 2]) {
    vms.into_iter().for_each(Vm::reconnect);
}

fn others() -> impl Iterator<Item = u64> {
    (1..SLOTS).filter(|slot| *slot != FATAL_SLOT)
}

fn page(slot: u64, seed: u64) -> Page {
    page_of(2, slot + 1000 * seed)
}

/// Waits until the daemon has ended by itself, and says by which signal.
fn wait_for_crash(daemon: &mut Daemon) -> Option<i32> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = daemon.ended() {
            return status.signal();
        }
        assert!(Instant::now() < deadline, "the daemon lives:\n{}", daemon.log());
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn crashes(daemon: &Daemon, name: &str) -> (u64, String) {
    let vm = daemon.vm(name);
    (vm["crashes"].as_u64().unwrap(), vm["state"].as_str().unwrap().to_owned())
}

#[test]
fn a_vm_that_crashes_the_daemon_again_and_again_is_quarantined_and_its_neighbour_goes_on() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut daemon = Daemon::start(dir.path(), CONFIG);
    let mut web1 = Vm::attach(&daemon, "web1", Manners::CloudHypervisor);
    let mut web2 = Vm::attach(&daemon, "web2", Manners::Qemu);
    for vm in [&mut web1, &mut web2] {
        vm.store_all(1);
    }
    web1.store(FATAL_SLOT, 1);

    let deadly = (CRASH_STORING, &*format!("web1:{FATAL_SLOT}:abort"));
    daemon.restart_with(&[deadly]);
    reconnect([&mut web1, &mut web2]);
    web1.begin_store(FATAL_SLOT, &page(FATAL_SLOT, 2));
    assert_eq!(wait_for_crash(&mut daemon), Some(libc::SIGABRT));

    // Carried out again.
    daemon.restart_with(&[deadly]);
    assert_eq!(crashes(&daemon, "web1"), (1, "ready".to_owned()));
    web2.reconnect();
    web2.assert_all(1);
    web2.store_all(2);
    // The daemon may be gone before all is said.
    let _ = web1.device.reconnect(Duration::from_millis(100));
    assert_eq!(wait_for_crash(&mut daemon), Some(libc::SIGABRT));

    // And not again: the request fails, what the slot held is there, and the VM goes on.
    daemon.restart_with(&[deadly]);
    reconnect([&mut web1, &mut web2]);
    assert_eq!(web1.answer(), Status::IoError);
    assert!(web1.queue.read_page(FATAL_SLOT).unwrap() == page(FATAL_SLOT, 1));
    web1.assert_all(1);
    web1.store_all(3);
    let vm = daemon.vm("web1");
    assert_eq!((&vm["counters"]["reject_fatal"], &vm["errors"]), (&1.into(), &1.into()));
    assert!(daemon.log().contains("crashed twice while it carried it out: Store of sector 616"));

    // It asks for the same again.
    web1.begin_store(FATAL_SLOT, &page(FATAL_SLOT, 2));
    assert_eq!(wait_for_crash(&mut daemon), Some(libc::SIGABRT));
    for _ in 0..2 {
        // Whoever starts it again, and however often.
        daemon.restart_with(&[deadly]);
        assert_eq!(crashes(&daemon, "web1"), (3, "quarantined".to_owned()));
        let refused = web1.device.reconnect(Duration::from_millis(300));
        assert!(refused.is_err() && !web1.device.is_connected());
        web2.reconnect();
        web2.assert_all(2);
    }
    web2.store_all(4);
    assert_eq!(crashes(&daemon, "web2"), (0, "ready".to_owned()));
    let vm = daemon.vm("web1");
    assert!(vm["message"].as_str().unwrap().contains("`ballast vm release web1`"), "{vm}");
    assert_eq!(vm["stored_pages"], SLOTS, "all of them, and the swap header for slot 0");

    // Mended and released: what was in flight is done, and every page is there.
    daemon.restart();
    assert_eq!(crashes(&daemon, "web1").1, "quarantined");
    let released = daemon.ask(&["vm", "release", "web1"]);
    assert!(released.status.success(), "{released:?}");
    let said = String::from_utf8_lossy(&released.stdout).into_owned();
    assert_eq!(said, "web1: it is in no quarantine any more; its VMM may attach\n");
    assert_eq!(crashes(&daemon, "web1"), (0, "ready".to_owned()));
    reconnect([&mut web1, &mut web2]);
    assert_eq!(web1.answer(), Status::Ok);
    assert!(web1.queue.read_page(FATAL_SLOT).unwrap() == page(FATAL_SLOT, 2));
    web1.assert_all(3);
    web2.assert_all(4);
}

#[test]
fn whatever_way_it_crashes_counts_and_what_comes_from_outside_does_not() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut daemon = Daemon::start(dir.path(), CONFIG);
    let mut web1 = Vm::attach(&daemon, "web1", Manners::Qemu);
    web1.store_all(1);
    for (seed, how) in [(2, "abort"), (3, "panic"), (4, "overflow")] {
        daemon.restart_with(&[(CRASH_STORING, &*format!("web1:{FATAL_SLOT}:{how}"))]);
        web1.reconnect();
        web1.begin_store(FATAL_SLOT, &page(FATAL_SLOT, seed));
        assert_eq!(wait_for_crash(&mut daemon), Some(libc::SIGABRT), "{how}");
        daemon.restart();
        assert_eq!(crashes(&daemon, "web1"), (1, "ready".to_owned()), "{how}");
        web1.reconnect();
        assert_eq!(web1.answer(), Status::Ok, "{how}");
        assert!(daemon.ask(&["vm", "release", "web1"]).status.success());
    }
    for (name, signal) in [("ABRT", libc::SIGABRT), ("SEGV", libc::SIGSEGV), ("BUS", libc::SIGBUS)] {
        let pid = daemon.pid().unwrap().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
        assert_eq!(wait_for_crash(&mut daemon), Some(signal));
        daemon.restart();
        assert_eq!(crashes(&daemon, "web1"), (0, "ready".to_owned()), "{name}");
        web1.reconnect();
    }
    web1.assert_all(1);
    assert!(web1.queue.read_page(FATAL_SLOT).unwrap() == page(FATAL_SLOT, 4));
}

#[test]
fn a_vmm_whose_messages_crash_the_daemon_is_quarantined_too() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut daemon = Daemon::start(dir.path(), CONFIG);
    let mut web1 = Vm::attach(&daemon, "web1", Manners::Qemu);
    let mut web2 = Vm::attach(&daemon, "web2", Manners::Qemu);
    [&mut web1, &mut web2].into_iter().for_each(|vm| vm.store_all(1));
    for (count, how) in [(1, "abort"), (2, "panic"), (3, "overflow")] {
        daemon.restart_with(&[(CRASH_HEARING, &*format!("web1:{how}"))]);
        web2.reconnect();
        web2.assert_all(1);
        // The daemon may be gone before all is said.
        let _ = web1.device.reconnect(Duration::from_millis(100));
        assert_eq!(wait_for_crash(&mut daemon), Some(libc::SIGABRT), "{how}");
        daemon.restart();
        assert_eq!(crashes(&daemon, "web1").0, count, "{how}");
    }
    assert_eq!(crashes(&daemon, "web1").1, "quarantined");
    assert!(web1.device.reconnect(Duration::from_millis(300)).is_err());
    assert_eq!(crashes(&daemon, "web2"), (0, "ready".to_owned()));
    web2.reconnect();
    web2.assert_all(1);
    assert!(daemon.ask(&["vm", "release", "web1"]).status.success());
    web1.reconnect();
    web1.assert_all(1);
}

#[test]
fn a_vmm_whose_answers_crash_the_daemon_is_not_asked_again() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let vmms = ["web1", "web2"].map(|name| FakeVmm::qmp(&dir.path().join(format!("{name}.qmp"))));
    let squeezed = ["web1", "web2"].map(|name| {
        let socket = dir.path().join(format!("{name}.qmp"));
        format!(
            "[[vm]]\nname = \"{name}\"\nsize = \"1GiB\"\n\
             squeeze = {{ vmm = \"qemu\", socket = {socket:?}, min = \"256MiB\" }}\n"
        )
    });
    let with_budget = |budget: &str| format!("[balloon]\ninterval = \"1s\"\n{budget}{}", squeezed.concat());
    let squeezed = with_budget("");
    let mut daemon = Daemon::start(dir.path(), &squeezed);
    let deadline = Instant::now() + PATIENCE;
    while !daemon.vm("web1")["balloon"]["actual_bytes"].is_u64() {
        assert!(Instant::now() < deadline, "{}", daemon.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    for (count, how) in [(1, "abort"), (2, "panic"), (3, "overflow")] {
        daemon.configure(&CONFIG.replace("1MiB", "1GiB"));
        daemon.restart_with(&[(CRASH_HEARING, &*format!("web1:{how}"))]);
        daemon.configure(&squeezed);
        // It may be gone before it has answered.
        daemon.ask(&["reload"]);
        assert_eq!(wait_for_crash(&mut daemon), Some(libc::SIGABRT), "{how}");
        daemon.restart();
        assert_eq!(crashes(&daemon, "web1").0, count, "{how}");
    }
    assert_eq!(crashes(&daemon, "web1").1, "quarantined");
    assert_eq!(crashes(&daemon, "web2"), (0, "ready".to_owned()));
    // What its guest has is not given to the other.
    daemon.configure(&with_budget("budget = \"768MiB\"\n"));
    daemon.restart_with(&[(CRASH_HEARING, "web1:abort")]);
    let [first, second] = vmms.each_ref().map(|vmm| vmm.vm().asked.len());
    let have = || vmms.iter().map(|vmm| vmm.vm().actual_bytes).sum::<u64>();
    let deadline = Instant::now() + PATIENCE;
    while vmms[1].vm().asked.len() < second + 10 || have() > 768 << 20 {
        assert!(daemon.ended().is_none() && Instant::now() < deadline, "{}", daemon.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(vmms[0].vm().asked.len(), first);
    let balloon = &daemon.vm("web1")["balloon"];
    assert_eq!((&balloon["state"], &balloon["reachable"]), (&"quarantined".into(), &false.into()));
    assert!(balloon["target_bytes"].as_u64().unwrap() >= vmms[0].vm().actual_bytes, "{balloon}");
}

#[test]
fn a_quarantine_is_shown_and_ends_with_the_pages_too() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut daemon = Daemon::start(dir.path(), CONFIG);
    daemon.kill();
    // As after three crashes in a row.
    let table = File::options().write(true).open(daemon.table("web1")).unwrap();
    table.write_all_at(&[3; 4], 164).unwrap();
    daemon.restart();
    let shown = String::from_utf8(daemon.ask(&["status"]).stdout).unwrap();
    let row = shown.lines().find(|line| line.starts_with("web1 ")).unwrap();
    assert!(row.contains("quarantined") && shown.contains("`ballast vm release web1`"), "{shown}");
    assert!(daemon.log().contains("the VM is quarantined"), "{}", daemon.log());
    let memory = Memory::with_bytes(4 << 20).unwrap();
    assert!(Device::connect(daemon.socket("web1"), memory, Options::default()).is_err());
    let unknown = daemon.ask(&["vm", "release", "web3"]);
    assert!(!unknown.status.success() && String::from_utf8_lossy(&unknown.stderr).contains("web3"));
    assert!(daemon.ask(&["vm", "clear", "web1"]).status.success());
    assert_eq!(crashes(&daemon, "web1"), (0, "ready".to_owned()));
    Vm::attach(&daemon, "web1", Manners::Qemu).store_all(1);
}
