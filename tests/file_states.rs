//! What `status` says of a writeback file that takes nothing: one state for each reason, what to do about it, and that no
//! page is lost by it. Each is brought about in a real daemon.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use ballast::frontend::{Device, Queue};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::Value;
use support::daemon::Daemon;
use support::mount::Mount;
use support::page_of;

const PATIENCE: Duration = Duration::from_secs(60);
/// More than the smallest file takes, of pages that don't shrink; the pool is one of 1 MiB.
const PAGES: u64 = 20_000;

/// A VM whose stores fail soon when there is no room.
fn config(file: &Path, keys: &str) -> String {
    format!(
        "[pool]\nmax = \"1MiB\"\nstore_deadline_ms = 50\npressure = false\n[writeback]\npath = {file:?}\n{keys}\n\
         [[vm]]\nname = \"web1\"\nsize = \"128MiB\"\n"
    )
}

struct World {
    daemon: Daemon,
    _device: Device,
    disk: Queue,
    stored: Vec<u64>,
    dir: tempfile::TempDir,
}

impl World {
    fn new(file: &Path, keys: &str) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let daemon = Daemon::start(dir.path(), &config(file, keys));
        let (device, disk) = daemon.attach("web1");
        Self { daemon, _device: device, disk, stored: Vec::new(), dir }
    }

    fn file(&self) -> Value {
        self.daemon.status()["writeback"].take()
    }

    /// Stores pages until the file is in this state; how often it was looked at is not counted.
    fn store_until(&mut self, state: &str) -> Value {
        let deadline = Instant::now() + PATIENCE;
        for slot in 1..PAGES {
            if self.disk.write_pages(slot, &[page_of(4, slot)]).is_ok() {
                self.stored.push(slot);
            }
            if slot % 200 == 0 && self.file()["state"] == state {
                return self.file();
            }
            assert!(Instant::now() < deadline, "{}\n{}", self.file(), self.daemon.log());
        }
        panic!("all pages were stored, and the file is {}\n{}", self.file(), self.daemon.log());
    }

    /// All that was stored is there, and pages that can't leave are refused in the end.
    fn check(&mut self) {
        assert!(self.stored.len() > 200, "{} pages", self.stored.len());
        for slot in self.stored.iter().copied() {
            let found = self.disk.read_pages(slot, 1).unwrap();
            assert!(found == [page_of(4, slot)], "slot {slot}");
        }
        let shown = self.daemon.ask(&["status"]);
        let (shown, state) = (String::from_utf8(shown.stdout).unwrap(), self.file()["state"].take());
        assert!(shown.contains(state.as_str().unwrap()), "{shown}");
    }
}

#[test]
fn a_full_file_says_so_and_takes_pages_again_when_some_are_discarded() {
    let files = tempfile::tempdir().unwrap();
    let mut world = World::new(&files.path().join("file"), "size = \"64MiB\"");
    assert_eq!(world.file()["state"], "ready");
    let file = world.store_until("full");
    assert_eq!(file["message"], "make it larger, or discard pages");
    assert_eq!((&file["write_errors"], &file["no_space_errors"]), (&0.into(), &0.into()));
    world.check();
    let dropped = world.stored.split_off(200);
    for slot in &dropped {
        world.disk.discard(*slot, 1).unwrap();
    }
    // The next pages that leave find room.
    let deadline = Instant::now() + PATIENCE;
    while world.file()["state"] != "ready" {
        assert!(Instant::now() < deadline, "{}", world.file());
        for slot in &dropped[..400] {
            let _ = world.disk.write_pages(*slot, &[page_of(4, *slot)]);
        }
    }
}

#[test]
fn a_file_that_waits_for_the_next_day_says_so() {
    let files = tempfile::tempdir().unwrap();
    let mut world = World::new(&files.path().join("file"), "size = \"64MiB\"\ndaily_limit = \"2MiB\"");
    let file = world.store_until("waiting");
    assert_eq!(
        file["message"],
        "as much was written today as daily_limit allows: it goes on at midnight UTC, or when that is raised"
    );
    assert!(file["written_today_bytes"].as_u64().unwrap() <= 2 << 20, "{file}");
    assert_eq!(file["daily_limit_bytes"], 2 << 20);
    world.check();
}

#[test]
fn a_file_system_without_room_shows_and_is_no_failure() {
    let files = tempfile::tempdir().unwrap();
    let Some(_mount) = Mount::tmpfs(&files.path().join("small"), "5m") else { return };
    let mut world = World::new(&files.path().join("small/file"), "size = \"64MiB\"");
    let file = world.store_until("no_space");
    assert_eq!(file["message"], "the file system that it is in has no room: make some");
    assert!(file["no_space_errors"].as_u64().unwrap() > 0 && file["write_errors"] == 0, "{file}");
    world.check();
}

#[test]
fn a_file_that_fails_says_why_and_is_read_on() {
    let files = tempfile::tempdir().unwrap();
    let mut world = World::new(&files.path().join("file"), "size = \"64MiB\"");
    // What systemd calls LimitFSIZE=. The signal that comes with the error doesn't end the daemon.
    let limit = Rlimit { current: Some(4 << 20), maximum: Some(4 << 20) };
    let pid = Pid::from_raw(world.daemon.pid().unwrap().try_into().unwrap()).unwrap();
    prlimit(Some(pid), Resource::Fsize, limit).unwrap();
    let file = world.store_until("failed");
    let message = file["message"].as_str().unwrap();
    assert!(message.contains("a write to the file failed: File too large"), "{message}");
    assert_eq!(file["write_errors"], 1);
    assert_eq!(world.daemon.status()["pool"]["stuck"], "the writeback file failed");
    world.check();
    // The next start tries again.
    world.daemon.restart();
    assert_eq!(world.file()["state"], "ready");
    assert!(world.dir.path().join("state").is_dir());
}
