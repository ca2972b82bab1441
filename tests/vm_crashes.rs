//! The daemon dies at each point of adding and of removing a VM, one after the other. Its successor has a whole VM, or
//! none, or the pages of one that it doesn't serve; and the same command then does what it would have done.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use ballast::frontend::{Device, Memory, Options};
use ballast::page::Page;
use support::daemon::Daemon;
use support::page_of;

const CONFIG: &str = "workers = 1\n[pool]\nmax = \"64MiB\"\npressure = false\n\
    [[vm]]\nname = \"web1\"\nsize = \"16MiB\"\n";

fn pages() -> Vec<Page> {
    (0..9).map(|n| page_of(n, u64::from(n) + 1)).collect()
}

/// The pages of a VM, which takes more of them.
fn stored(daemon: &Daemon, name: &str) -> Vec<Page> {
    let memory = Memory::with_bytes(16 << 20).unwrap();
    let mut device = Device::connect(daemon.socket(name), memory, Options::default()).unwrap();
    let mut queue = device.start().unwrap().remove(0);
    let found = queue.read_pages(10, 9).unwrap();
    assert_eq!(&queue.read_page(0).unwrap()[4086..], b"SWAPSPACE2");
    queue.write_pages(100, &[page_of(3, 7)]).unwrap();
    assert!(queue.read_page(100).unwrap() == page_of(3, 7));
    found
}

fn store(daemon: &Daemon, name: &str) {
    let memory = Memory::with_bytes(16 << 20).unwrap();
    let mut device = Device::connect(daemon.socket(name), memory, Options::default()).unwrap();
    device.start().unwrap().remove(0).write_pages(10, &pages()).unwrap();
}

/// Runs `command` in daemons that die after more and more points, until one gets to the end of it; `prepared` makes the
/// state that each begins with, `check` looks at what each has left. How many died on the way.
fn die_on_the_way(
    command: &[&str],
    prepared: impl Fn(&mut Daemon),
    check: impl Fn(&mut Daemon, bool),
) -> u64 {
    let (mut deaths, mut point) = (0, 1);
    loop {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut daemon = Daemon::start(dir.path(), CONFIG);
        prepared(&mut daemon);
        if !daemon.restart_dying_after(point) {
            // Not yet: it died at its start, of which `crashes` has more to say.
            point += 1;
            continue;
        }
        let done = daemon.ask(command).status.success();
        let died = if done { daemon.has_died() } else { wait_for_death(&mut daemon) };
        assert!(done || died, "{}", daemon.log());
        daemon.restart();
        check(&mut daemon, done);
        store(&daemon, "web1");
        assert!(stored(&daemon, "web1") == pages());
        if !died {
            return deaths;
        }
        (deaths, point) = (deaths + 1, point + 1);
    }
}

/// Its connections end a moment before the process does.
fn wait_for_death(daemon: &mut Daemon) -> bool {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !daemon.has_died() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    daemon.has_died()
}

#[test]
fn a_vm_is_added_whole_or_not_at_all() {
    let add = ["vm", "add", "db", "--size", "16MiB", "--weight", "7"];
    let deaths = die_on_the_way(
        &add,
        |_| {},
        |daemon, done| {
            let vm = daemon.vm("db");
            assert!(!done || !vm.is_null());
            if vm.is_null() {
                assert!(!daemon.socket("db").exists());
                assert!(daemon.ask(&add).status.success());
            }
            assert_eq!((&daemon.vm("db")["state"], &daemon.vm("db")["weight"]), (&"ready".into(), &7.into()));
            store(daemon, "db");
            assert!(stored(daemon, "db") == pages());
        },
    );
    eprintln!("{deaths} deaths while a VM was added");
    assert!(deaths > 8, "{deaths}");
}

#[test]
fn a_vm_is_removed_with_all_its_pages_or_can_be_once_more() {
    let prepared = |daemon: &mut Daemon| {
        assert!(daemon.ask(&["vm", "add", "db", "--size", "16MiB"]).status.success());
        store(daemon, "db");
    };
    let remove = ["vm", "remove", "db", "--force"];
    let deaths = die_on_the_way(&remove, prepared, |daemon, done| {
        let vm = daemon.vm("db");
        assert!(!done || vm.is_null(), "{vm}");
        match vm["state"].as_str() {
            None => {}
            Some("ready") => assert!(stored(daemon, "db") == pages()),
            // Its socket's file may be left, as those of all daemons that were killed; nobody listens there.
            Some("unconfigured") => {
                assert!(
                    vm["stored_pages"] == 10 && UnixStream::connect(daemon.socket("db")).is_err(),
                    "{vm}"
                );
            }
            Some(_) => panic!("{vm}"),
        }
        if !vm.is_null() {
            assert!(daemon.ask(&remove).status.success());
        }
        assert!(daemon.vm("db").is_null() && !daemon.table("db").exists());
        // Nothing of it is in another that comes after it.
        assert!(daemon.ask(&["vm", "add", "db", "--size", "16MiB"]).status.success());
        assert!(stored(daemon, "db").iter().flatten().all(|byte| *byte == 0));
    });
    eprintln!("{deaths} deaths while a VM was removed");
    assert!(deaths > 3, "{deaths}");
}
