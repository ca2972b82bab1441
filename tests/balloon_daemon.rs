//! The daemon's own balloons: a socket for each VM that is squeezed by one, what the controller wants reaches the guest, and
//! a daemon that is killed while pages are given up is followed by one that goes on where it was. The guest is a driver of
//! ours that does what it is told.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use ballast::frontend::{Balloon, Manners, Memory, Options};
use support::balloon::{ALL, PATIENCE, content, touch};
use support::daemon::Daemon;
use support::page_of;

const FREE: u32 = 4096;
/// Of 256 MiB the guest is to have 192.
const WANTED_PAGES: u32 = (64 << 20) / 4096;

fn config(squeeze: &str) -> String {
    format!(
        "[pool]\nmax = \"64MiB\"\n[balloon]\ninterval = \"1s\"\n[[vm]]\nname = \"web1\"\nsize = \"64MiB\"\nsqueeze = {squeeze}"
    )
}

fn attach(dir: &Path, memory: &Memory) -> Balloon {
    let options = Options { manners: Manners::CloudHypervisor, ..Options::for_balloon(4, &ALL) };
    let (socket, start) = (dir.join("run/balloon/web1.sock"), Instant::now());
    while !socket.exists() {
        assert!(start.elapsed() < PATIENCE, "no socket");
        std::thread::sleep(Duration::from_millis(10));
    }
    Balloon::attach(socket, memory.clone(), options).unwrap()
}

/// Does what is wanted until that is this.
fn obey(guest: &mut Balloon, wanted_pages: u32) {
    let start = Instant::now();
    loop {
        let config = guest.config().unwrap();
        if config.actual != config.num_pages {
            guest.say_actual(config.num_pages).unwrap();
        }
        if config.num_pages == wanted_pages {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "{config:?}");
        guest.changes(Duration::from_millis(100)).unwrap();
    }
}

#[test]
fn what_is_wanted_reaches_the_guest_and_a_killed_daemons_successor_wants_the_same() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let fixed = "{ vmm = \"vhost-user\", mode = \"fixed\", to = \"192MiB\" }";
    let mut daemon = Daemon::start(dir.path(), &config(fixed));
    let memory = Memory::with_bytes(256 << 20).unwrap();
    let mut guest = attach(dir.path(), &memory);
    guest.inflate(&[FREE + 100]).unwrap();
    obey(&mut guest, WANTED_PAGES);
    for round in 0..3 {
        touch(&memory, FREE + round, 7);
        daemon.kill();
        guest.device().disconnect();
        guest.name(0, &[FREE + round]).unwrap();
        daemon.restart();
        guest.reconnect(PATIENCE).unwrap();
        let config = guest.config().unwrap();
        assert_eq!(
            (config.num_pages, config.actual),
            (WANTED_PAGES, WANTED_PAGES),
            "it would take its memory back"
        );
        guest.finish(0).unwrap();
        assert_eq!(content(&memory, FREE + round), None);
    }
    // A guest that boots is told anew.
    drop(guest);
    let memory = Memory::with_bytes(256 << 20).unwrap();
    let mut guest = attach(dir.path(), &memory);
    obey(&mut guest, WANTED_PAGES);
}

#[test]
fn a_balloon_is_there_for_as_long_as_its_vm_is_squeezed_by_it() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let daemon = Daemon::start(dir.path(), &config("{ vmm = \"vhost-user\", mode = \"off\" }"));
    let memory = Memory::with_bytes(64 << 20).unwrap();
    let mut guest = attach(dir.path(), &memory);
    guest.inflate(&[FREE]).unwrap();
    assert_eq!(guest.config().unwrap().num_pages, 0, "nobody squeezes it");
    let answer = daemon.ask(&["vm", "set", "web1", "--squeeze", "none"]);
    assert!(answer.status.success(), "{answer:?}");
    let start = Instant::now();
    while guest.device().is_connected() || dir.path().join("run/balloon/web1.sock").exists() {
        assert!(start.elapsed() < PATIENCE, "it is still there");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Waits until it is so.
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "not {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn ok(daemon: &Daemon, args: &[&str]) {
    let answer = daemon.ask(args);
    assert!(answer.status.success(), "{args:?}: {answer:?}");
}

#[test]
fn a_vm_that_is_cleared_keeps_its_balloon_and_one_that_is_removed_does_not() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut daemon = Daemon::start(dir.path(), "[pool]\nmax = \"64MiB\"\n[balloon]\ninterval = \"1s\"");
    let add = ["vm", "add", "web1", "--size", "64MiB", "--squeeze", "vmm=vhost-user,mode=fixed,to=192MiB"];
    ok(&daemon, &add);
    let memory = Memory::with_bytes(256 << 20).unwrap();
    let mut guest = attach(dir.path(), &memory);
    obey(&mut guest, WANTED_PAGES);
    let (_disk, mut queue) = daemon.attach("web1");
    for slot in 1..100 {
        queue.write_pages(slot, &[page_of(2, slot)]).unwrap();
    }
    let refused = daemon.ask(&["vm", "clear", "web1"]);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");

    ok(&daemon, &["vm", "clear", "web1", "--force"]);
    assert_eq!(daemon.vm("web1")["stored_pages"], 1, "the swap header");
    touch(&memory, FREE, 7);
    guest.inflate(&[FREE]).unwrap();
    assert_eq!(content(&memory, FREE), None, "it is served as before");
    // Its new page table knows the balloon too, for a daemon that comes after this one.
    daemon.kill();
    guest.device().disconnect();
    daemon.restart();
    guest.reconnect(PATIENCE).unwrap();
    let config = guest.config().unwrap();
    assert_eq!((config.num_pages, config.actual), (WANTED_PAGES, WANTED_PAGES));
    ok(&daemon, &["vm", "squeeze", "web1", "--to", "128MiB"]);
    obey(&mut guest, 2 * WANTED_PAGES);

    let (disk, mut queue) = daemon.attach("web1");
    queue.write_pages(7, &[page_of(2, 7)]).unwrap();
    ok(&daemon, &["vm", "remove", "web1", "--force"]);
    let socket = dir.path().join("run/balloon/web1.sock");
    until("over", || {
        !guest.device().is_connected()
            && !disk.is_connected()
            && !socket.exists()
            && daemon.vm("web1").is_null()
    });
    // Another VM by that name has one of its own, in which nothing is left of the first.
    ok(&daemon, &add);
    let memory = Memory::with_bytes(256 << 20).unwrap();
    let mut guest = attach(dir.path(), &memory);
    obey(&mut guest, WANTED_PAGES);
    assert_eq!(daemon.vm("web1")["stored_pages"], 1);
}

#[test]
fn changes_one_after_the_other_are_few_ticks() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let began = Instant::now();
    let daemon = Daemon::start(dir.path(), &config("{ vmm = \"vhost-user\", min = \"64MiB\" }"));
    for way in ["--observe", "--auto"].into_iter().cycle().take(60) {
        assert!(daemon.ask(&["vm", "squeeze", "web1", way]).status.success());
    }
    let trace = std::fs::read_to_string(dir.path().join("state/balloon.trace")).unwrap();
    // Each is a step for every VM, and an interval is a second.
    let (ticks, halves) = (trace.lines().count() as u128, began.elapsed().as_millis() / 500 + 2);
    assert!((1..=halves).contains(&ticks), "{ticks} ticks, {halves} half intervals");
}
