//! Looking at stored pages before their guests do: all of them, wherever they are, without using them; what is bad is
//! counted and told once, and a client that goes away or a disk that hangs leaves nothing stuck.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ballast::frontend::{Device, Memory, Options};
use ballast::ids::Slot;
use ballast::scrub::{Handle, Order, Progress, Scrubber, State};
use ballast::store::accounting::{Events, Held};
use ballast::store::entry::Entry;
use ballast::store::fates::CopyFactor;
use ballast::store::lru::coldest;
use ballast::writeback::io::faulty::Fault;
use rustix::io::Errno;
use support::daemon::Daemon;
use support::file::{file_options, place_of};
use support::page_of;
use support::world::{NAMES, World};

const FILE_BYTES: u64 = 24 << 20;
const PATIENCE: Duration = Duration::from_secs(60);
const FAST: u64 = 1 << 30;

/// A world in which pages of every VM are in the pool and in the file.
fn world() -> World {
    let mut world = World::new(1 << 20, FILE_BYTES);
    while world.file_pages() < 300 {
        world.use_pages(500);
    }
    world
}

fn scrubber(world: &World, period: Option<Duration>) -> Handle {
    Scrubber::new(Arc::clone(world.store()), period).start().unwrap()
}

fn order(vm: Option<&str>, rate_bytes: u64) -> Order {
    Order { vm: vm.map(str::to_owned), rate_bytes }
}

/// Begins a check, and waits until it is done.
fn check(handle: &Handle, vm: Option<&str>) -> Progress {
    let begun = handle.check(order(vm, FAST)).unwrap();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let progress = handle.progress().unwrap();
        assert_eq!(progress.number, begun.number);
        if progress.state == State::Done {
            return progress;
        }
        assert!(Instant::now() < deadline, "{progress:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn held(world: &World, vms: std::ops::Range<usize>) -> (u64, u64, u64) {
    let held: Vec<Held> = vms.map(|vm| world.vm(vm).accounting().held).collect();
    let sum = |of: fn(&Held) -> u64| held.iter().map(of).sum();
    (sum(|held| held.same_filled_pages), sum(Held::objects), sum(|held| held.file_pages))
}

fn events(world: &World, of: fn(&Events) -> u64) -> u64 {
    (0..NAMES.len()).map(|vm| of(&world.vm(vm).accounting().events)).sum()
}

fn open(world: &World, path: &str) -> File {
    OpenOptions::new().read(true).write(true).open(world.dir.path().join(path)).unwrap()
}

fn flip(file: &File, at: u64) {
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
}

fn entry(world: &World, vm: usize, slot: u32) -> Entry {
    let raw = world.vm(vm).table().record(Slot(slot)).unwrap().entry.load(Ordering::Relaxed);
    Entry::unpack(raw, Slot(slot)).unwrap()
}

#[test]
fn a_check_looks_at_every_page_and_uses_none() {
    let mut world = world();
    let handle = scrubber(&world, None);
    let cold = |world: &World| {
        let now = ballast::store::lru::Age::stored(Duration::from_secs(1 << 24));
        [0, 1, 2].map(|vm| coldest(world.vm(vm).table(), usize::MAX >> 1, now, CopyFactor::DOUBLE, |_| true))
    };
    let before = (held(&world, 0..3), cold(&world), events(&world, |events| events.loads));
    let progress = check(&handle, None);
    assert_eq!(before, (held(&world, 0..3), cold(&world), events(&world, |events| events.loads)));
    let seen = (progress.same_filled_pages, progress.arena_pages, progress.file_pages);
    assert_eq!((seen, progress.bad_pages, progress.bad), (before.0, 0, Vec::new()));
    assert_eq!(progress.expected_pages, seen.0 + seen.1 + seen.2);
    assert_eq!(events(&world, |events| events.checked_pages), progress.expected_pages);

    let progress = check(&handle, Some(NAMES[1]));
    let seen = (progress.same_filled_pages, progress.arena_pages, progress.file_pages);
    assert_eq!((seen, progress.order.vm.as_deref()), (held(&world, 1..2), Some(NAMES[1])));
    assert!(handle.check(order(Some("nobody"), FAST)).is_err());
    world.store().validate();
    world.check();
}

#[test]
fn what_is_bad_is_found_wherever_it_is_and_counted_once() {
    let mut world = world();
    let handle = scrubber(&world, None);
    let mut pages: Vec<_> = world.truth.keys().copied().collect();
    pages.sort_unstable();
    let arena = pages.iter().copied().find(|(vm, slot)| matches!(entry(&world, *vm, *slot), Entry::Arena(_)));
    let same =
        pages.iter().copied().find(|(vm, slot)| matches!(entry(&world, *vm, *slot), Entry::SameFilled(_)));
    let file = world.in_file().last();
    let [arena, same, file] = [arena, same, file].map(Option::unwrap);
    let Entry::Arena(location) = entry(&world, arena.0, arena.1) else { panic!() };
    flip(&open(&world, "state/arena"), location.offset + 20);
    let table = format!("state/vms/{}.table", NAMES[same.0]);
    flip(&open(&world, &table), 4096 + 8 * u64::from(same.1) + 5);
    let place = place_of(&world.vm(file.0), file.1).unwrap();
    let path = file_options(world.dir.path(), FILE_BYTES).path;
    flip(&OpenOptions::new().read(true).write(true).open(path).unwrap(), place.offset + 30);

    let mut expected = vec![arena, same, file];
    expected.sort_unstable();
    for _ in 0..2 {
        let progress = check(&handle, None);
        let mut bad: Vec<_> = progress.bad.iter().map(|page| (page.vm.as_str(), page.slot.0)).collect();
        bad.sort_unstable();
        assert_eq!(bad, expected.iter().map(|(vm, slot)| (NAMES[*vm], *slot)).collect::<Vec<_>>());
        assert_eq!(progress.bad_pages, 3);
        assert_eq!(events(&world, |events| events.bad_pages), 3, "each counts once");
        for (vm, slot) in &expected {
            world.load(*vm, *slot).unwrap_err();
            assert!(!world.vm(*vm).note_bad(Slot(*slot)), "its load need not tell it again");
        }
    }
    for (vm, slot) in expected {
        world.put(vm, slot, 1);
    }
    assert_eq!(check(&handle, None).bad_pages, 0);
    world.check();
    world.store().validate();
}

#[test]
fn checks_and_rounds_find_nothing_bad_in_pages_that_come_go_and_move() {
    let mut world = world();
    let handle = scrubber(&world, Some(Duration::from_millis(100)));
    let mut checks = 0;
    for step in 0..60u8 {
        world.use_pages(100);
        if step % 3 == 0 {
            let _ = world.shrinker().turn();
        }
        if handle.progress().is_none_or(|progress| progress.state == State::Done) {
            assert_eq!(handle.progress().map_or(0, |progress| progress.bad_pages), 0);
            handle.check(order(None, FAST)).unwrap();
            checks += 1;
        }
        if step == 30 {
            world.clear(1);
        }
    }
    assert!(checks > 1 && events(&world, |events| events.checked_pages) > 1000);
    assert_eq!(events(&world, |events| events.bad_pages), 0);
    drop(handle);
    world.store().validate();
    world.check();
}

#[test]
fn a_check_takes_the_place_of_one_that_nobody_waits_for() {
    let world = world();
    let handle = scrubber(&world, None);
    // Would take hours.
    let slow = handle.check(order(None, 4096)).unwrap();
    assert_eq!(slow.state, State::Running);
    let progress = check(&handle, None);
    assert!(progress.number > slow.number && progress.arena_pages > 0);
}

/// Begins a check whose first read of the file is held back, and waits until it is.
fn check_until_it_reads(world: &World, handle: &Handle) {
    let reads = world.faulty().submitted().0;
    world.faulty().fail_read(0, Fault::Hold);
    handle.check(order(None, FAST)).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while world.faulty().submitted().0 == reads {
        assert!(Instant::now() < deadline, "the check reads the file");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_disk_that_hangs_keeps_nobody() {
    let mut world = world();
    let handle = scrubber(&world, None);
    check_until_it_reads(&world, &handle);
    // The next check does not wait for it, nor does the end.
    assert_eq!(check(&handle, None).bad_pages, 0);
    assert_eq!(world.faulty().release(), 1);
    check_until_it_reads(&world, &handle);
    drop(handle);
    assert_eq!(world.faulty().release(), 1);
    world.check();
    world.store().validate();
}

#[test]
fn a_page_that_is_overwritten_while_it_is_read_is_not_bad() {
    let mut world = world();
    let handle = scrubber(&world, None);
    check_until_it_reads(&world, &handle);
    for (vm, slot) in world.in_file().collect::<Vec<_>>() {
        world.put(vm, slot, 1);
    }
    world.faulty().release();
    let deadline = Instant::now() + PATIENCE;
    while handle.progress().unwrap().state != State::Done {
        assert!(Instant::now() < deadline, "{:?}", handle.progress());
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(handle.progress().unwrap().bad_pages, 0);
    world.store().validate();
    world.check();
}

#[test]
fn a_page_that_cannot_be_read_is_bad() {
    let world = world();
    let handle = scrubber(&world, None);
    // All that are read together, and each alone.
    (0..9).for_each(|later| world.faulty().fail_read(later, Fault::Error(Errno::IO)));
    let progress = check(&handle, None);
    assert!((1..=8).contains(&progress.bad_pages), "{progress:?}");
    assert!(progress.bad.iter().all(|page| page.reason.contains("a read from the writeback file failed")));
    assert_eq!(check(&handle, None).bad_pages, 0);
}

#[test]
fn rounds_come_by_themselves_when_they_are_configured() {
    let world = world();
    let (same_filled, arena, file) = held(&world, 0..3);
    let pages = same_filled + arena + file;
    let handle = scrubber(&world, Some(Duration::from_millis(500)));
    let deadline = Instant::now() + PATIENCE;
    while events(&world, |events| events.checked_pages) < 2 * pages {
        assert!(Instant::now() < deadline, "{} of {pages}", events(&world, |events| events.checked_pages));
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(handle.progress().is_none(), "nobody asked");
    assert_eq!(events(&world, |events| events.bad_pages), 0);
}

#[test]
fn a_bad_page_of_a_running_daemon_is_an_error_that_is_told_once() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let daemon = Daemon::start(
        dir.path(),
        "workers = 1\nscrub = \"1h\"\n[pool]\nmax = \"64MiB\"\n[[vm]]\nname = \"web1\"\nsize = \"16MiB\"\n\
         [[vm]]\nname = \"web2\"\nsize = \"16MiB\"\n",
    );
    let memory = Memory::with_bytes(16 << 20).unwrap();
    let mut device = Device::connect(daemon.socket("web1"), memory, Options::default()).unwrap();
    let mut disk = device.start().unwrap().remove(0);
    let pages: Vec<_> = (0..100).map(|n| page_of(4, n)).collect();
    disk.write_pages(1000, &pages).unwrap();
    let good = daemon.ask(&["check"]);
    let said = String::from_utf8_lossy(&good.stdout).into_owned();
    assert!(good.status.success() && said.contains("102 in memory"), "{said}");

    // Raw pages are in the arena as they are.
    let arena = OpenOptions::new().read(true).write(true).open(dir.path().join("state/arena")).unwrap();
    let start = rustix::fs::seek(&arena, rustix::fs::SeekFrom::Data(0)).unwrap();
    let mut found = None;
    let mut at = start;
    while found.is_none() {
        at = rustix::fs::seek(&arena, rustix::fs::SeekFrom::Data(at)).unwrap();
        let mut bytes = vec![0; 1 << 16];
        let length = arena.read_at(&mut bytes, at).unwrap();
        found =
            bytes[..length].windows(64).position(|window| window == &pages[7][..64]).map(|n| at + n as u64);
        at += 1 << 15;
    }
    flip(&arena, found.unwrap() + 1000);

    let bad = daemon.ask(&["check", "web1"]);
    let said = String::from_utf8_lossy(&bad.stdout).into_owned();
    assert_eq!(bad.status.code(), Some(1));
    assert!(said.contains("bad: web1 slot 1007: the checksum"), "{said}");
    for _ in 0..5 {
        assert!(disk.read_page(1007).is_err());
    }
    let json = daemon.ask(&["check", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!((&json["bad"][0]["slot"], &json["bad_pages"]), (&1007.into(), &1.into()), "{json}");
    let log = daemon.log();
    assert_eq!(log.matches("slot 1007").count(), 1, "{log}");
    let (vm, status) = (daemon.vm("web1"), daemon.status());
    assert_eq!((&vm["counters"]["bad_pages"], &vm["counters"]["decompress_fail"]), (&1.into(), &5.into()));
    assert_eq!(status["pool"]["counters"]["bad_pages"], 1);
    for (n, page) in pages.iter().enumerate().filter(|(n, _)| *n != 7) {
        assert!(&disk.read_page(1000 + n as u64).unwrap() == page, "page {n}");
    }
    disk.write_pages(1007, &pages[7..8]).unwrap();
    assert!(daemon.ask(&["check"]).status.success());
    let unknown = daemon.ask(&["check", "web3"]);
    let said = String::from_utf8_lossy(&unknown.stderr).into_owned();
    assert!(unknown.status.code() == Some(1) && said.contains("web1, web2"), "{said}");
}
