//! The counters of `status --json`, of a real daemon: each is brought to a number that the test knows, or away from zero
//! beside others that stay there, so that no two of them can be exchanged.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::time::{Duration, Instant};

use ballast::frontend::{Device, Queue};
use serde_json::Value;
use support::daemon::Daemon;
use support::page_of;

const PATIENCE: Duration = Duration::from_secs(60);

/// The number at these names.
fn at(status: &Value, path: &[&str]) -> u64 {
    let found = path.iter().fold(status, |value, name| &value[name]);
    found.as_u64().unwrap_or_else(|| panic!("{path:?} is {found}"))
}

/// Entries of a histogram.
fn counted(buckets: &Value) -> u64 {
    buckets.as_array().unwrap().iter().map(|bucket| at(bucket, &["count"])).sum()
}

struct World {
    daemon: Daemon,
    _device: Device,
    disk: Queue,
    _dirs: [tempfile::TempDir; 2],
}

impl World {
    /// A VM of 64 MiB with these keys, and a file if the pool is to have one.
    fn new(keys: &str, has_file: bool) -> Self {
        let (dir, files) = (tempfile::tempdir_in("/dev/shm").unwrap(), tempfile::tempdir().unwrap());
        let file = format!("[writeback]\npath = {:?}\nsize = \"64MiB\"\n", files.path().join("file"));
        let config = format!(
            "[pool]\nmax = \"64MiB\"\nstore_deadline_ms = 50\npressure = false\ncold_compressor = \"none\"\n{}\
             [[vm]]\nname = \"web1\"\nsize = \"64MiB\"\n{keys}\n",
            if has_file { &file } else { "" }
        );
        let daemon = Daemon::start(dir.path(), &config);
        let (device, disk) = daemon.attach("web1");
        Self { daemon, _device: device, disk, _dirs: [dir, files] }
    }

    fn vm(&self, counter: &str) -> u64 {
        at(&self.daemon.vm("web1"), &["counters", counter])
    }

    fn shrinker(&self, path: &[&str]) -> u64 {
        at(&self.daemon.status()["shrinker"], path)
    }

    fn wait_for(&self, what: &str, mut is_so: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !is_so(self) {
            assert!(Instant::now() < deadline, "{what}: {}", self.daemon.status());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn store(&mut self, kind: u8, slots: std::ops::Range<u64>) {
        for slot in slots {
            self.disk.write_pages(slot, &[page_of(kind, slot)]).unwrap();
        }
    }

    fn load(&mut self, kind: u8, slots: std::ops::Range<u64>) {
        for slot in slots {
            assert!(self.disk.read_pages(slot, 1).unwrap() == [page_of(kind, slot)], "slot {slot}");
        }
    }
}

#[test]
fn what_stays_in_memory_is_counted_by_what_it_is() {
    let mut world = World::new("", false);
    let before = world.daemon.vm("web1");
    world.store(4, 100..200);
    world.store(1, 200..260);
    world.store(0, 300..330);
    world.load(4, 100..140);
    world.load(4, 100..140);
    world.load(1, 200..210);
    let vm = world.daemon.vm("web1");
    let grown = |path: &[&str]| at(&vm, path) - at(&before, path);
    assert_eq!(grown(&["stored_pages"]), 190);
    assert_eq!(grown(&["incompressible_pages"]), 100);
    assert_eq!(grown(&["counters", "stored_incompressible_pages"]), 100);
    assert_eq!(grown(&["counters", "reject_compress_poor"]), 100);
    // Half of those words have room in an entry.
    assert_eq!((grown(&["same_filled_pages"]), grown(&["duplicates"])), (15, 50));
    assert_eq!((grown(&["stores"]), grown(&["loads"])), (190, 90));
    assert_eq!(counted(&world.daemon.status()["pool"]["refault_age_seconds"]), 90);
    // A check uses no page.
    assert!(world.daemon.ask(&["check", "web1"]).status.success());
    assert_eq!(world.vm("checked_pages"), at(&vm, &["stored_pages"]));
    assert_eq!((world.vm("bad_pages"), at(&world.daemon.vm("web1"), &["loads"])), (0, at(&vm, &["loads"])));
    // Three of four pages go, and what is left moves together.
    world.store(2, 1000..5000);
    for slot in (1000..5000).filter(|slot| slot % 4 > 0) {
        world.disk.discard(slot, 1).unwrap();
    }
    world.wait_for("objects are moved together", |world| world.vm("compacted_pages") > 0);
    assert_eq!(world.vm("compacted_pages"), world.shrinker(&["compacted_objects"]));
    assert_eq!(world.vm("recompressed_pages"), 0);
    let changed = world.daemon.ask(&["pool", "set", "--compressor", "zstd:1", "--recompress"]);
    assert!(changed.status.success());
    world.wait_for("pages are compressed anew", |world| world.vm("recompressed_pages") > 900);
    for counter in ["pool_limit_hit", "limit_hit", "delayed_stores", "written_back_pages", "loaded_from_file"]
    {
        assert_eq!(world.vm(counter), 0, "{counter}");
    }
}

#[test]
fn what_finds_no_room_is_counted_by_why() {
    let mut world = World::new("limit = \"2MiB\"\nwriteback = false", true);
    let refused =
        (100..700).filter(|slot| world.disk.write_pages(*slot, &[page_of(4, *slot)]).is_err()).count();
    assert!((50..500).contains(&refused), "{refused}");
    assert_eq!(world.vm("reject_reclaim_fail"), refused as u64);
    assert!(world.vm("limit_hit") >= refused as u64);
    for counter in ["pool_limit_hit", "reject_alloc_fail", "written_back_pages"] {
        assert_eq!(world.vm(counter), 0, "{counter}");
    }
    assert_eq!(world.shrinker(&["evicted_pages"]), 0);
}

#[test]
fn what_leaves_and_comes_back_is_counted_each_way() {
    let mut world = World::new("limit = \"2MiB\"", true);
    let mut stored: Vec<u64> = Vec::new();
    for slot in 100..1700 {
        if world.disk.write_pages(slot, &[page_of(4, slot)]).is_ok() {
            stored.push(slot);
        }
    }
    world.wait_for("the VM is below its limit", |world| {
        at(&world.daemon.vm("web1"), &["pool_bytes"]) < 2 << 20
    });
    let status = world.daemon.status();
    let written_back = world.vm("written_back_pages");
    assert!(written_back > 1000, "{status}");
    assert_eq!(at(&status, &["shrinker", "evicted_pages"]), written_back);
    assert_eq!(at(&status, &["writeback", "written_records"]), written_back);
    assert_eq!(at(&world.daemon.vm("web1"), &["file_pages"]), written_back);
    let runs = &status["shrinker"]["runs_by_reason"];
    assert!(at(runs, &["limit"]) > 0, "{runs}");
    assert_eq!((at(runs, &["pool_full"]), at(runs, &["pressure"]), at(runs, &["idle"])), (0, 0, 0));
    let (loads, sums) = (at(&world.daemon.vm("web1"), &["loads"]), stored.len() as u64);
    for slot in stored {
        assert!(world.disk.read_pages(slot, 1).unwrap() == [page_of(4, slot)], "slot {slot}");
    }
    let vm = world.daemon.vm("web1");
    assert_eq!(at(&vm, &["loads"]) - loads, sums);
    let from_file = world.vm("loaded_from_file");
    // The swap header left as well, and nobody has read it.
    assert!(from_file + world.vm("promoted_pages") + 1 >= written_back && from_file < sums, "{vm}");
    assert_eq!(
        (world.vm("file_load_fail"), world.vm("decompress_fail"), world.vm("read_back_pages")),
        (0, 0, 0)
    );
    assert_eq!(counted(&world.daemon.status()["pool"]["store_delay_ms"]), world.vm("delayed_stores"));
}
