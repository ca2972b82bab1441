//! The daemon and VMMs that are told how much memory their guests are to have: what somebody else changes is put right, one
//! that refuses is shown, a balloon on its way stops when nobody drives it any more, and a guest that is given much memory
//! finds its pages in the pool before it asks for them.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::daemon::Daemon;
use support::fake_vmm::{FakeVmm, Step, answer_of};
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
        let host = Self::with_interval("1s", FakeVmm::qmp);
        host.until("squeezed", |vm| vm["balloon"]["actual_bytes"] == 256 * MIB);
        host
    }

    /// The same, a tick after the other so long, with this VMM; nobody has waited for the first.
    fn with_interval(interval: &str, vmm: impl FnOnce(&Path) -> FakeVmm) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let [socket, file] = ["web1.vmm", "writeback"].map(|name| dir.path().join(name));
        let vmm = vmm(&socket);
        let name = vmm.name();
        let config = format!(
            "[pool]\nmax = \"64MiB\"\npressure = false\n[writeback]\npath = {file:?}\nsize = \"64MiB\"\n\
             [balloon]\ninterval = \"{interval}\"\n[[vm]]\nname = \"web1\"\nsize = \"64MiB\"\n\
             squeeze = {{ vmm = \"{name}\", socket = {socket:?}, mode = \"fixed\", to = \"256MiB\", min = \"64MiB\" }}\n"
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

    /// What the log says of the balloon, by this word.
    fn logged(&self, word: &str) -> usize {
        let log = self.daemon.log();
        log.lines().filter(|line| line.contains("vm=\"web1\"") && line.contains(word)).count()
    }

    /// Waits until its VMM was asked this so many times more.
    fn wait_for_asked(&self, request: &str, times: usize) {
        let seen = || self.vmm.vm().asked.iter().filter(|name| *name == request).count();
        let (start, before) = (Instant::now(), seen());
        while seen() < before + times {
            assert!(start.elapsed() < PATIENCE, "{}", self.daemon.log());
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
fn a_balloon_on_its_way_stops_when_nobody_drives_it_any_more() {
    for how in ["--off", "--observe", "none"] {
        let host = Host::start();
        host.vmm.vm().least_bytes = 200 * MIB;
        host.ask(&["vm", "squeeze", "web1", "--to", "100MiB"]);
        host.until("on its way", |vm| vm["balloon"]["actual_bytes"] == 200 * MIB);
        assert_eq!(host.vmm.vm().told_bytes, Some(100 * MIB));
        if how == "none" {
            host.ask(&["vm", "set", "web1", "--squeeze", "none"]);
        } else {
            // Told again, if it doesn't take it the first time.
            host.vmm.script("balloon", not_today);
            host.ask(&["vm", "squeeze", "web1", how]);
        }
        let start = Instant::now();
        while host.vmm.vm().told_bytes != Some(200 * MIB) {
            assert!(start.elapsed() < PATIENCE, "{how}: {}", host.daemon.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// What a QEMU says that doesn't do what it is asked for.
fn not_today(id: u64) -> Vec<Step> {
    let error = json!({ "class": "GenericError", "desc": "not today" });
    vec![Step::Send(format!("{}\r\n", json!({ "error": error, "id": id })))]
}

/// What a cloud-hypervisor says that doesn't.
fn failed(_: u64) -> Vec<Step> {
    vec![Step::Send(answer_of("500 Internal Server Error", "[\"not today\"]"))]
}

type Answer = fn(u64) -> Vec<Step>;

/// A VMM that is well and answers this to every change, so many times.
fn refusing(path: &Path, kind: fn(&Path) -> FakeVmm, change: &str, answer: Answer) -> FakeVmm {
    let vmm = kind(path);
    (0..100).for_each(|_| vmm.script(change, answer));
    vmm
}

#[test]
fn a_vmm_that_refuses_what_it_is_told_is_shown_and_told_again_later_each_time() {
    let qmp: (fn(&Path) -> FakeVmm, _, _, Answer) = (FakeVmm::qmp, "balloon", "query-balloon", not_today);
    let rest: (fn(&Path) -> FakeVmm, _, _, Answer) =
        (FakeVmm::rest, "PUT /api/v1/vm.resize", "GET /api/v1/vm.info", failed);
    for (kind, change, look, answer) in [qmp, rest] {
        let host = Host::with_interval("1s", |path| refusing(path, kind, change, answer));
        let is_shown = |vm: &Value| vm["balloon"]["state"] == "vmm_refused";
        let vm = host.until("refused", is_shown);
        let balloon = &vm["balloon"];
        assert!(balloon["reason"].as_str().unwrap().contains("not today"), "{vm}");
        assert_eq!(balloon["reachable"], false, "it is as good as silent: {vm}");
        // Looked at once a tick, it stays so, and isn't told at each of them.
        host.wait_for_asked(change, 1);
        host.wait_for_asked(look, 10);
        assert!(is_shown(&host.daemon.vm("web1")));
        let changes = host.vmm.vm().asked.iter().filter(|name| *name == change).count();
        assert!(changes < 10, "{:?}", host.vmm.vm().asked);
        assert_eq!(host.logged("not today"), 1, "{}", host.daemon.log());
        // What an operator changes is tried at once, and what is taken is all that it takes.
        host.vmm.forget_scripts();
        host.ask(&["vm", "squeeze", "web1", "--to", "300MiB"]);
        host.until("taken", |vm| vm["balloon"]["actual_bytes"] == 300 * MIB);
        assert_eq!(host.daemon.vm("web1")["balloon"]["state"], "fixed");
    }
}

#[test]
fn a_vmm_that_says_only_to_a_change_that_its_guest_migrates_is_shown_as_migrating() {
    let migrating = |_| {
        let words = answer_of("500 Internal Server Error", "[\"VM is currently migrating\"]");
        vec![Step::Send(words)]
    };
    let host =
        Host::with_interval("1s", |path| refusing(path, FakeVmm::rest, "PUT /api/v1/vm.resize", migrating));
    host.until("migrating", |vm| vm["balloon"]["state"] == "migrating");
    host.wait_for_asked("GET /api/v1/vm.info", 5);
    assert_eq!(host.daemon.vm("web1")["balloon"]["state"], "migrating");
    host.vmm.forget_scripts();
    host.until("squeezed", |vm| vm["balloon"]["actual_bytes"] == 256 * MIB);
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
    let host = Host::with_interval("60s", FakeVmm::qmp);
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
