//! The daemon without the writeback file that pages are in: it starts, says what it misses, serves all that it has, and
//! lets no other file take the place of that one while an entry names it.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ballast::frontend::{Device, Memory, Options, Queue};
use ballast::page::{Page, ZERO_PAGE};
use support::daemon::{Daemon, serve};
use support::page_of;

const VMS: &str = "workers = 2\n[pool]\nmax = \"1MiB\"\n[[vm]]\nname = \"web1\"\nsize = \"16MiB\"\n\
    [[vm]]\nname = \"small\"\nsize = \"16MiB\"\nwriteback = false\n";
/// Slots of web1 that have a page, from 1 on.
const PAGES: u64 = 1500;
const SMALL: u64 = 20;

fn with(path: &Path) -> String {
    format!("{VMS}[writeback]\npath = {path:?}\nsize = \"64MiB\"\n")
}

fn attach(daemon: &Daemon, name: &str) -> (Device, Queue) {
    let memory = Memory::with_bytes(16 << 20).unwrap();
    let mut device = Device::connect(daemon.socket(name), memory, Options::default()).unwrap();
    let queue = device.start().unwrap().remove(0);
    (device, queue)
}

fn wait_until_gone(daemon: &Daemon, name: &str) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while daemon.vm(name)["connected"] != false {
        assert!(Instant::now() < deadline, "{name} is still connected");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A daemon with most of a VM's pages in a file, and what it should hold.
struct World {
    dir: tempfile::TempDir,
    files: tempfile::TempDir,
    daemon: Daemon,
    wanted: Vec<Page>,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let files = tempfile::tempdir().unwrap();
        let daemon = Daemon::start(dir.path(), &with(&files.path().join("first")));
        let wanted: Vec<Page> = (0..PAGES).map(|n| page_of(2, n)).collect();
        let small: Vec<Page> = (0..SMALL).map(|n| page_of(1, n)).collect();
        attach(&daemon, "small").1.write_pages(1, &small).unwrap();
        let (_device, mut disk) = attach(&daemon, "web1");
        for (slot, pages) in (1..).step_by(30).zip(wanted.chunks(30)) {
            disk.write_pages(slot, pages).unwrap();
        }
        Self { dir, files, daemon, wanted }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    fn restart_with(&mut self, config: &str) {
        self.daemon.kill();
        self.daemon.configure(config);
        self.daemon.restart();
    }

    fn number(&self, at: &str) -> u64 {
        let status = self.daemon.status();
        status.pointer(at).and_then(serde_json::Value::as_u64).unwrap_or_else(|| panic!("{at}: {status}"))
    }

    /// Every page of both VMs is there.
    fn check_all(&self) {
        self.check_small();
        let (_device, mut disk) = attach(&self.daemon, "web1");
        for (slot, page) in (1..).zip(&self.wanted) {
            assert!(&disk.read_page(slot).unwrap() == page, "slot {slot}");
        }
    }

    fn check_small(&self) {
        let (_device, mut disk) = attach(&self.daemon, "small");
        for (slot, n) in (1..).zip(0..SMALL) {
            assert!(disk.read_page(slot).unwrap() == page_of(1, n), "slot {slot}");
        }
        disk.write_pages(100, &[page_of(1, 77)]).unwrap();
        assert!(disk.read_page(100).unwrap() == page_of(1, 77));
    }

    /// The daemon runs without the file: its status says so, pages in memory are served, others are errors. Returns the
    /// slots whose pages can't be read.
    fn check_missing(&self, found: &str) -> Vec<u64> {
        let status = self.daemon.status();
        let message = status["writeback"]["message"].as_str().unwrap_or_default().to_owned();
        assert_eq!(status["writeback"]["state"], "missing", "{status}");
        assert!(message.contains("pages of this state are in the writeback file"), "{message}");
        assert!(message.contains(found) && message.contains("or clear the VMs"), "{message}");
        assert!(self.daemon.log().contains("writeback is off until the next start"), "{}", self.daemon.log());
        let text = String::from_utf8(self.daemon.ask(&["status"]).stdout).unwrap();
        assert!(text.contains(&format!("writeback: missing ({message})")), "{text}");
        self.check_small();
        let told = || self.daemon.log().matches("a writeback file that is missing").count();
        let told_before = told();
        assert_eq!(self.daemon.vm("web1")["state"], "ready");
        let (_device, mut disk) = attach(&self.daemon, "web1");
        // Slot 0 has the swap header, which no guest has read yet: among the first to leave.
        assert!(disk.read_page(0).is_err());
        let mut failed = Vec::new();
        for (slot, page) in (1..).zip(&self.wanted) {
            match disk.read_page(slot) {
                Ok(read) => assert!(read == *page, "slot {slot}"),
                Err(_) => failed.push(slot),
            }
        }
        let vm = self.daemon.vm("web1");
        let counted = failed.len() as u64 + 1;
        assert!(counted > 300 && counted < PAGES, "{counted}");
        assert_eq!(vm["file_pages"].as_u64(), Some(counted), "{vm}");
        assert_eq!(vm["counters"]["file_load_fail"].as_u64(), Some(counted), "{vm}");
        // That is no damage: nothing is called bad, and the log tells of it as of whatever fails again and again.
        let check = self.daemon.ask(&["check"]);
        let said = String::from_utf8(check.stdout).unwrap();
        let not_checked = format!("not checked: {counted} pages in a writeback file that is missing");
        assert!(check.status.code() == Some(1) && said.contains(&not_checked), "{said}");
        assert!(said.contains(", 0 bad\n") && !said.contains("bad: "), "{said}");
        assert_eq!(self.daemon.vm("web1")["counters"]["bad_pages"], 0);
        let told = told() - told_before;
        assert!((1..=1 + counted.ilog2() as usize).contains(&told), "{told} lines about {counted} loads");
        failed
    }
}

#[test]
fn with_another_file_or_none_all_is_served_but_what_is_in_the_missing_one() {
    let mut world = World::new();
    for at in ["/pool/file_pages", "/pool/counters/written_back_pages", "/writeback/written_records"] {
        assert!(world.number(at) > 300, "{at}");
    }
    assert_eq!(world.daemon.status()["writeback"]["state"], "ready");
    let [first, other, damaged, letters] =
        ["first", "other", "damaged", "letters"].map(|name| world.path(name));
    // Somebody else's writeback file.
    let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
    drop(Daemon::start(elsewhere.path(), &with(&other)));
    fs::copy(&first, &damaged).unwrap();
    let mut bytes = fs::read(&damaged).unwrap();
    // Each copy of the header.
    for copy in [0, 4096] {
        bytes[copy + 20] ^= 1;
    }
    fs::write(&damaged, &bytes).unwrap();
    fs::write(&letters, b"somebody's letters").unwrap();

    let cases = [
        (&other, "is the writeback file"),
        (&damaged, "with a damaged header"),
        (&letters, "no writeback file"),
        (&world.path("nothing"), "No such file"),
        (&world.path("no/directory"), "No such file"),
    ];
    for (path, found) in cases {
        let before = fs::read(path).ok();
        world.restart_with(&with(path));
        world.check_missing(found);
        world.daemon.kill();
        assert!(fs::read(path).ok() == before, "{found}: nothing is made or changed");
    }
    world.restart_with(VMS);
    world.check_missing("none is configured");

    // The right one again.
    world.restart_with(&with(&first));
    assert_eq!(world.daemon.status()["writeback"]["state"], "ready");
    world.check_all();
}

#[test]
fn pages_of_a_missing_file_can_be_replaced_and_the_rest_comes_back_with_it() {
    let mut world = World::new();
    let other = world.path("other");
    world.restart_with(&with(&other));
    let failed = world.check_missing("No such file");
    {
        let (_device, mut disk) = attach(&world.daemon, "web1");
        let [overwritten, discarded, zeroed] = [failed[0], failed[70], failed[200]];
        // A part of a page can't be changed while the rest of it is not there.
        assert!(disk.write_bytes(failed[5] * 8 + 1, &[7; 512]).is_err());
        disk.write_pages(overwritten, &[page_of(1, 9999)]).unwrap();
        disk.discard(discarded, 1).unwrap();
        disk.write_zeroes(zeroed, 1, true).unwrap();
        world.wanted[usize::try_from(overwritten).unwrap() - 1] = page_of(1, 9999);
        world.wanted[usize::try_from(discarded).unwrap() - 1] = ZERO_PAGE;
        world.wanted[usize::try_from(zeroed).unwrap() - 1] = ZERO_PAGE;
    }
    assert_eq!(world.daemon.vm("web1")["file_pages"].as_u64(), Some(failed.len() as u64 + 1 - 3));
    // Without it again, the entries are as they were left.
    world.restart_with(VMS);
    assert_eq!(world.check_missing("none is configured").len(), failed.len() - 3);
    let first = world.path("first");
    world.restart_with(&with(&first));
    world.check_all();
    assert!(!other.exists());
}

#[test]
fn another_file_takes_over_when_no_page_is_in_the_old_one() {
    let mut world = World::new();
    let [other, third] = ["other", "third"].map(|name| world.path(name));
    world.restart_with(VMS);
    wait_until_gone(&world.daemon, "web1");
    assert!(world.daemon.ask(&["vm", "clear", "web1"]).status.success());
    // That was the last page in the old file: the state forgot it.
    world.restart_with(&with(&other));
    assert_eq!(world.daemon.status()["writeback"]["state"], "ready");
    {
        let (_device, mut disk) = attach(&world.daemon, "web1");
        assert!(disk.read_page(1).unwrap() == ZERO_PAGE);
        for (slot, pages) in (1..).step_by(30).zip(world.wanted.chunks(30)) {
            disk.write_pages(slot, pages).unwrap();
        }
    }
    assert!(world.number("/pool/file_pages") > 300);
    world.check_all();

    // Discarded while the file is away, which nobody told the state.
    world.restart_with(&with(&third));
    assert_eq!(world.daemon.status()["writeback"]["state"], "missing");
    attach(&world.daemon, "web1").1.discard(0, 2000).unwrap();
    assert_eq!(world.number("/pool/file_pages"), 0);
    world.restart_with(&with(&third));
    assert_eq!(world.daemon.status()["writeback"]["state"], "ready");
    assert!(third.exists());
    world.check_small();
}

#[test]
fn what_only_a_person_can_mend_is_refused_at_the_start() {
    let mut world = World::new();
    let directory = world.path("directory");
    fs::create_dir(&directory).unwrap();
    world.daemon.kill();
    world.daemon.configure(&with(&directory));
    let refused = serve(&world.daemon.config()).output().unwrap();
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(1) && message.contains("directory"), "{message}");

    // A state that knows no file has nothing to lose, and the path is more likely wrong than the disk.
    let fresh = tempfile::tempdir_in("/dev/shm").unwrap();
    let config = fresh.path().join("ballast.toml");
    for path in [world.path("no/directory"), directory] {
        let state = fresh.path().join("state");
        let text = format!("state_dir = {state:?}\nruntime_dir = {:?}\n{}", fresh.path(), with(&path));
        fs::write(&config, text).unwrap();
        assert_eq!(serve(&config).output().unwrap().status.code(), Some(1), "{path:?}");
    }
    let first = world.path("first");
    world.restart_with(&with(&first));
    world.check_all();
    assert!(world.dir.path().exists());
}
