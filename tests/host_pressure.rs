//! A daemon on a host that runs short of memory. What it looks at is a file of the test's in place of `/proc/meminfo`, in
//! a mount namespace of its own without PSI, which takes root; in CI nothing else is an excuse.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use support::daemon::Daemon;
use support::page_of;

const PATIENCE: Duration = Duration::from_secs(60);
const PAGES: u64 = 2000;

/// A host with 100 GB, of which so many are available.
fn has_available(meminfo: &Path, gigabytes: u32) {
    fs::write(meminfo, format!("MemTotal: 100000000 kB\nMemAvailable: {gigabytes}000000 kB\n")).unwrap();
}

#[test]
fn a_host_that_runs_short_gets_memory_back_before_the_pool_is_full() {
    let namespaces = Command::new("unshare").args(["--mount", "true"]).status();
    if !namespaces.is_ok_and(|status| status.success()) {
        assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "CI has to make a mount namespace");
        eprintln!("NOT TESTED: no mount namespace can be made, which takes root");
        return;
    }
    let (dir, files) = (tempfile::tempdir_in("/dev/shm").unwrap(), tempfile::tempdir().unwrap());
    let meminfo = files.path().join("meminfo");
    has_available(&meminfo, 60);
    let hides = format!(
        "mount --bind {meminfo:?} /proc/meminfo && mount -t tmpfs none /proc/pressure && mount -t tmpfs none /sys/fs/cgroup && \
         exec \"$0\" \"$@\""
    );
    let config = format!(
        "[pool]\nmax = \"64MiB\"\n[writeback]\npath = {:?}\nsize = \"64MiB\"\n[[vm]]\nname = \"web1\"\nsize = \"64MiB\"\n",
        files.path().join("file")
    );
    let daemon = Daemon::start_by(&["unshare", "--mount", "sh", "-c", &hides], dir.path(), &config);
    let (_device, mut disk) = daemon.attach("web1");
    for slot in 1..=PAGES {
        disk.write_pages(slot, &[page_of(2, slot)]).unwrap();
    }
    let told = || {
        let status = daemon.status();
        let count = |value: &serde_json::Value| value.as_u64().unwrap();
        (count(&status["shrinker"]["runs_by_reason"]["pressure"]), count(&status["pool"]["file_pages"]))
    };
    assert_eq!(daemon.status()["pool"]["pressure_source"], "meminfo");
    assert_eq!(told(), (0, 0));
    has_available(&meminfo, 3);
    let deadline = Instant::now() + PATIENCE;
    while told().0 < 2 {
        assert!(Instant::now() < deadline, "{}\n{}", daemon.status(), daemon.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    has_available(&meminfo, 60);
    assert!(told().1 > 0, "pages left for the file");
    for slot in 1..=PAGES {
        assert!(disk.read_pages(slot, 1).unwrap() == [page_of(2, slot)], "slot {slot}");
    }
}
