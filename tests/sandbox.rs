//! What a running daemon has given up, as the kernel tells it.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::fs;

use ballast::frontend::{Device, Memory, Options};
use support::daemon::Daemon;
use support::page_of;

const ONE_VM: &str = "[pool]\nmax = \"64MiB\"\n[[vm]]\nname = \"web1\"\nsize = \"16MiB\"\n";

#[test]
fn no_thread_of_a_serving_daemon_has_a_capability_or_may_start_a_program() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut daemon = Daemon::start(dir.path(), ONE_VM);
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
        // A worker has a filter of its own on top of everybody's.
        let filters = if name.starts_with("worker") { "2" } else { "1" };
        assert_eq!(line("Seccomp_filters:"), filters, "{name}");
        names.push(name.to_owned());
    }
    for expected in ["worker-0", "shrinker", "session-web1", "control"] {
        assert!(names.iter().any(|name| name == expected), "{expected} is not among {names:?}");
    }
}
