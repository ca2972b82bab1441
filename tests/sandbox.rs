//! What a running daemon has given up: as the kernel tells it of each thread, and as a worker finds that tries.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::fs;

use ballast::frontend::{Device, Memory, Options};
use support::daemon::Daemon;
use support::page_of;
use support::working::free_address;

const ONE_VM: &str = "[pool]\nmax = \"64MiB\"\n[[vm]]\nname = \"web1\"\nsize = \"16MiB\"\n";

#[test]
fn no_thread_of_a_serving_daemon_has_a_capability_or_may_start_a_program() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut daemon = Daemon::start(dir.path(), &format!("metrics = \"{}\"\n{ONE_VM}", free_address()));
    let memory = Memory::with_bytes(16 << 20).unwrap();
    let mut device = Device::connect(daemon.socket("web1"), memory, Options::default()).unwrap();
    let mut queue = device.start().unwrap().remove(0);
    queue.write_pages(10, &[page_of(1, 1)]).unwrap();
    daemon.restart();
    device.reconnect(std::time::Duration::from_secs(60)).unwrap();
    assert!(queue.read_page(10).unwrap() == page_of(1, 1));

    let threads = fs::read_dir(format!("/proc/{}/task", daemon.pid().unwrap())).unwrap();
    let mut names = Vec::new();
    for thread in threads {
        let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        let line = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).unwrap().trim();
        let name = line("Name:");
        assert_eq!(u64::from_str_radix(line("CapEff:"), 16), Ok(0), "{name}");
        assert_eq!(u64::from_str_radix(line("CapPrm:"), 16), Ok(0), "{name}");
        assert_eq!((line("NoNewPrivs:"), line("Seccomp:")), ("1", "2"), "{name}");
        // A filter of its own on top of everybody's; a thread that another one started has that one's besides.
        assert!(line("Seccomp_filters:").parse::<u32>().unwrap() >= 2, "{name}");
        names.push(name.to_owned());
    }
    for expected in ["worker-0", "shrinker", "session-web1", "control", "metrics"] {
        assert!(names.iter().any(|name| name == expected), "{expected} is not among {names:?}");
    }
}

#[test]
fn a_worker_that_tries_gets_no_socket_no_file_and_no_program() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut daemon = Daemon::start(dir.path(), ONE_VM);
    daemon.restart_with(&[(ballast::crash_point::CRASH_STORING, "web1:10:forbidden")]);
    let memory = Memory::with_bytes(16 << 20).unwrap();
    let mut device = Device::connect(daemon.socket("web1"), memory, Options::default()).unwrap();
    let mut queue = device.start().unwrap().remove(0);
    queue.write_pages(10, &[page_of(1, 1)]).unwrap();
    assert!(daemon.log().contains("a worker tried what is forbidden, and was refused"), "{}", daemon.log());
    assert!(queue.read_page(10).unwrap() == page_of(1, 1) && daemon.ended().is_none());
}

/// Kilobytes of a process's mappings of a file that are locked.
fn locked_kb(pid: u32, file: &str) -> u64 {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut ours, mut found, mut sum) = (false, false, 0);
    for line in maps.lines() {
        // A mapping begins with its addresses.
        if line.split(' ').next().is_some_and(|word| word.contains('-') && !word.ends_with(':')) {
            ours = line.contains(file);
            found |= ours;
        } else if let Some(kb) = line.strip_prefix("Locked:").filter(|_| ours) {
            sum += kb.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
        }
    }
    assert!(found, "{file} is not mapped");
    sum
}

#[test]
fn what_the_daemon_holds_is_locked_in_memory_when_asked_for_and_guest_memory_is_not() {
    for (config, least_kb, most_kb) in [("", 0, 0), ("lock_memory = true\n", 400, u64::MAX)] {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let daemon = Daemon::start(dir.path(), &format!("{config}{ONE_VM}"));
        let memory = Memory::with_bytes(16 << 20).unwrap();
        let mut device = Device::connect(daemon.socket("web1"), memory, Options::default()).unwrap();
        let mut queue = device.start().unwrap().remove(0);
        let pages: Vec<_> = (0..100).map(|n| page_of(4, n)).collect();
        queue.write_pages(10, &pages).unwrap();
        assert!(queue.read_pages(10, 100).unwrap() == pages);
        let pid = daemon.pid().unwrap();
        let arena_kb = locked_kb(pid, "state/arena");
        assert!((least_kb..=most_kb).contains(&arena_kb), "{config}: {arena_kb} kB of the arena are locked");
        assert_eq!(locked_kb(pid, "/memfd:guest-memory"), 0, "{config}: of guest memory");
    }
}
