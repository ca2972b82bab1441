//! What may happen to the state directory under a real daemon: wiped, exchanged, full, read-only, its files cut short or
//! removed. No guest is ever served zeros or another state's pages for its own; who can't be served is told why and
//! what to do, and nobody else is harmed.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use ballast::frontend::{Device, Memory, Options, Queue};
use ballast::page::{Page, ZERO_PAGE};
use support::daemon::{Daemon, serve};
use support::mount::{Mount, mount};
use support::page_of;

const TWO_VMS: &str = "workers = 2\n[pool]\nmax = \"64MiB\"\n\
    [[vm]]\nname = \"web1\"\nsize = \"32MiB\"\n[[vm]]\nname = \"web2\"\nsize = \"32MiB\"\n";
const PATIENCE: Duration = Duration::from_secs(60);
const FIRST: u64 = 10;

fn tmpfs() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

fn attach(daemon: &Daemon, name: &str) -> (Device, Queue) {
    let memory = Memory::with_bytes(16 << 20).unwrap();
    let mut device = Device::connect(daemon.socket(name), memory, Options::default()).unwrap();
    let queue = device.start().unwrap().remove(0);
    (device, queue)
}

/// Pages of every kind; in all more than a chunk of the page table has slots for.
fn pages() -> Vec<Page> {
    (0..200).map(|n| page_of(u8::try_from(n % 251).unwrap(), n + 1)).collect()
}

/// Writes [`pages`] to a VM, in the first chunk of its table and in the second.
fn put(daemon: &Daemon, name: &str) -> (Device, Queue) {
    let (device, mut disk) = attach(daemon, name);
    for at in [FIRST, 5000] {
        disk.write_pages(at, &pages()).unwrap();
    }
    (device, disk)
}

fn assert_there(disk: &mut Queue) {
    for at in [FIRST, 5000] {
        assert!(disk.read_pages(at, 200).unwrap() == pages(), "from slot {at}");
    }
}

/// A VMM that has lost its daemon comes back with what it has, and is not let in.
fn assert_refused(daemon: &Daemon, device: &mut Device) {
    device.reconnect(Duration::from_millis(500)).unwrap_err();
    daemon.wait_for_log(
        "pages that are not here any more: the state directory is another, or the VM's page table was removed",
    );
}

/// What a daemon says that is expected to give up.
fn serve_in_vain(daemon: &Daemon) -> String {
    let mut child = serve(&daemon.config()).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    said
}

/// Waits until the daemon has ended by itself, with all its threads.
fn wait_for_its_end(daemon: &mut Daemon) {
    let stat = format!("/proc/{}/stat", daemon.pid().unwrap());
    let deadline = Instant::now() + PATIENCE;
    while fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
        assert!(Instant::now() < deadline, "the daemon lives on");
        std::thread::sleep(Duration::from_millis(10));
    }
    daemon.kill();
}

#[test]
fn a_state_that_is_wiped_or_exchanged_serves_no_guest_of_the_old_one() {
    let (dir, other_dir) = (tmpfs(), tmpfs());
    let mut daemon = Daemon::start(dir.path(), TWO_VMS);
    let mut other = Daemon::start(other_dir.path(), TWO_VMS);
    drop(put(&other, "web1"));
    other.kill();
    let (mut device, mut disk) = put(&daemon, "web1");
    let state = dir.path().join("state");
    let (aside, theirs) = (dir.path().join("aside"), other_dir.path().join("state"));

    // Moved away under the running daemon, which has all it needs open.
    fs::rename(&state, &aside).unwrap();
    assert_there(&mut disk);
    disk.write_pages(FIRST, &pages()).unwrap();
    daemon.restart();
    assert_refused(&daemon, &mut device);
    // Another state, with pages at the same slots.
    daemon.kill();
    fs::remove_dir_all(&state).unwrap();
    fs::rename(&theirs, &state).unwrap();
    daemon.restart();
    assert_refused(&daemon, &mut device);
    assert_there(&mut attach(&daemon, "web1").1);
    // Its own again.
    daemon.kill();
    fs::rename(&state, &theirs).unwrap();
    fs::rename(&aside, &state).unwrap();
    daemon.restart();
    device.reconnect(PATIENCE).unwrap();
    assert_there(&mut disk);
    // Wiped for good, while it runs: the guest that runs has its pages as long as this daemon lives.
    fs::remove_dir_all(&state).unwrap();
    assert_there(&mut disk);
    daemon.restart();
    assert_refused(&daemon, &mut device);
    assert!(attach(&daemon, "web1").1.read_page(FIRST).unwrap() == ZERO_PAGE, "a new guest starts afresh");
}

#[test]
fn a_table_that_is_removed_takes_that_guest_out_of_service_only() {
    let dir = tmpfs();
    let mut daemon = Daemon::start(dir.path(), TWO_VMS);
    let (mut one, mut disk_one) = put(&daemon, "web1");
    let (mut two, mut disk_two) = put(&daemon, "web2");
    fs::remove_file(daemon.table("web1")).unwrap();
    assert_there(&mut disk_one);
    daemon.restart();
    assert_refused(&daemon, &mut one);
    two.reconnect(PATIENCE).unwrap();
    assert_there(&mut disk_two);
    // The guest that is started afterwards finds a new disk.
    drop((one, disk_one));
    let (_device, mut disk) = attach(&daemon, "web1");
    assert!(disk.read_page(FIRST).unwrap() == ZERO_PAGE);
    assert_eq!(&disk.read_page(0).unwrap()[4086..], b"SWAPSPACE2");
}

#[test]
fn a_cleared_vms_guest_does_not_come_back_to_zeros() {
    let dir = tmpfs();
    let mut daemon = Daemon::start(dir.path(), TWO_VMS);
    let (mut device, _disk) = put(&daemon, "web1");
    device.disconnect();
    daemon.restart();
    assert!(daemon.ask(&["vm", "clear", "web1"]).status.success());
    assert_refused(&daemon, &mut device);
}

#[test]
fn a_table_that_is_cut_short_ends_the_daemon_and_then_that_vm() {
    for (length, word) in [(0, "header is damaged"), (8192, "cut short"), (4096 + 49152 + 100, "cut short")] {
        let dir = tmpfs();
        let mut daemon = Daemon::start(dir.path(), TWO_VMS);
        let (mut one, mut disk_one) = put(&daemon, "web1");
        let (mut two, mut disk_two) = put(&daemon, "web2");
        let table = OpenOptions::new().write(true).open(daemon.table("web1")).unwrap();
        table.set_len(length).unwrap();
        // It waits for an answer that never comes.
        let _reader = std::thread::spawn(move || disk_one.read_page(5000 + 199).map(|_| ()));
        wait_for_its_end(&mut daemon);
        assert!(daemon.log().contains("a file in the state directory was cut short"), "{}", daemon.log());
        daemon.restart();
        let vm = daemon.vm("web1");
        let message = vm["message"].as_str().unwrap_or_default();
        assert!(vm["state"] == "damaged" && message.contains(word), "{length}: {vm}");
        assert!(message.contains("web1.table") && message.contains("ballast vm clear web1"), "{message}");
        one.reconnect(Duration::from_millis(300)).unwrap_err();
        two.reconnect(PATIENCE).unwrap();
        assert_there(&mut disk_two);
        // Still so after one more start: nothing has made the file longer.
        daemon.restart();
        assert_eq!(daemon.vm("web1")["state"], "damaged", "{length}");
        two.reconnect(PATIENCE).unwrap();
        assert_there(&mut disk_two);
        drop(one);
        assert!(daemon.ask(&["vm", "clear", "web1"]).status.success());
        assert!(attach(&daemon, "web1").1.read_page(FIRST).unwrap() == ZERO_PAGE);
    }
}

#[test]
fn a_state_without_its_arena_is_refused() {
    let dir = tmpfs();
    let mut daemon = Daemon::start(dir.path(), TWO_VMS);
    drop(put(&daemon, "web1"));
    daemon.kill();
    let arena = dir.path().join("state/arena");
    let length = fs::metadata(&arena).unwrap().len();
    let aside = dir.path().join("aside");
    fs::rename(&arena, &aside).unwrap();
    for cut in [None, Some(length / 2)] {
        if let Some(length) = cut {
            OpenOptions::new().write(true).open(&arena).unwrap().set_len(length).unwrap();
        }
        let said = serve_in_vain(&daemon);
        assert!(said.contains("arena") && said.contains("cut short or removed"), "{said}");
        assert!(said.contains("power the VMs off"), "{said}");
    }
    fs::rename(&aside, &arena).unwrap();
    daemon.restart();
    assert_there(&mut attach(&daemon, "web1").1);
    // The state's own file.
    daemon.kill();
    fs::rename(dir.path().join("state/state"), &aside).unwrap();
    let said = serve_in_vain(&daemon);
    assert!(said.contains("damaged or not a Ballast state") && said.contains("power the VMs off"), "{said}");
    fs::rename(&aside, dir.path().join("state/state")).unwrap();
    daemon.restart();
    assert_there(&mut attach(&daemon, "web1").1);
}

/// Makes a state file one of this version: both copies of its header, which end where their checksums are.
fn make_it_version(path: &Path, version: u32, copies: [(u64, u64); 2]) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    for (start, end) in copies {
        file.write_all_at(&version.to_le_bytes(), start + 8).unwrap();
        let mut covered = vec![0; usize::try_from(end - start).unwrap()];
        file.read_exact_at(&mut covered, start).unwrap();
        file.write_all_at(&crc32c::crc32c(&covered).to_le_bytes(), end).unwrap();
    }
}

#[test]
fn pages_of_an_earlier_version_are_served_and_those_of_a_later_one_refused_unread() {
    let dir = tmpfs();
    let mut daemon = Daemon::start(dir.path(), TWO_VMS);
    for name in ["web1", "web2"] {
        drop(put(&daemon, name));
    }
    let state = dir.path().join("state/state");
    let current = u32::from(fs::read(&state).unwrap()[8]);
    let make = |daemon: &mut Daemon, version| {
        daemon.kill();
        make_it_version(&state, version, [(0, 60), (64, 124)]);
        for name in ["web1", "web2"] {
            make_it_version(&daemon.table(name), version, [(0, 88), (2048, 2048 + 88)]);
        }
    };
    // What version 3 and later ones have, this one has in the same place.
    for version in 3..current {
        make(&mut daemon, version);
        daemon.restart();
        assert!(daemon.log().contains("the state is of an earlier version"), "{}", daemon.log());
        for name in ["web1", "web2"] {
            assert_there(&mut attach(&daemon, name).1);
        }
        assert_eq!(u32::from(fs::read(&state).unwrap()[8]), current);
    }
    make(&mut daemon, current + 1);
    let before = fs::read(daemon.table("web1")).unwrap();
    let said = serve_in_vain(&daemon);
    assert!(
        said.contains(&format!("version {}", current + 1)) && said.contains("run the build that wrote it"),
        "{said}"
    );
    assert!(fs::read(daemon.table("web1")).unwrap() == before, "it is left alone");
    make(&mut daemon, current);
    daemon.restart();
    assert_there(&mut attach(&daemon, "web1").1);
}

#[test]
fn an_arena_that_is_cut_short_ends_the_daemon() {
    let dir = tmpfs();
    let mut daemon = Daemon::start(dir.path(), TWO_VMS);
    let (_device, mut disk) = put(&daemon, "web1");
    let arena = OpenOptions::new().write(true).open(dir.path().join("state/arena")).unwrap();
    arena.set_len(4096).unwrap();
    let _reader = std::thread::spawn(move || disk.read_pages(FIRST, 200).map(|_| ()));
    wait_for_its_end(&mut daemon);
    let said = serve_in_vain(&daemon);
    assert!(said.contains("cut short or removed") && said.contains("power the VMs off"), "{said}");
}

/// Stores pages that don't shrink from `from` on, one at a time. Those that were kept.
fn fill(disk: &mut Queue, from: u64, count: u64) -> Vec<u64> {
    (from..from + count).filter(|slot| disk.write_pages(*slot, &[page_of(4, *slot)]).is_ok()).collect()
}

fn assert_kept(disk: &mut Queue, slots: std::ops::Range<u64>, kept: &[u64]) {
    for slot in slots {
        let right = if kept.contains(&slot) { page_of(4, slot) } else { ZERO_PAGE };
        assert!(disk.read_page(slot).unwrap() == right, "slot {slot}");
    }
}

/// Leaves the file system so many pages of room, by a file that takes the others. How many bytes that has.
fn fill_up(path: &Path, free_pages: u64) -> u64 {
    let mut file = OpenOptions::new().create(true).append(true).open(path).unwrap();
    while file.write_all(&[1; 4096]).is_ok() {}
    let bytes = file.metadata().unwrap().len() / 4096 * 4096 - free_pages * 4096;
    file.set_len(bytes).unwrap();
    bytes
}

#[test]
fn a_full_state_directory_refuses_stores_and_nothing_else() {
    let dir = tmpfs();
    let state = dir.path().join("state");
    let Some(_mount) = Mount::tmpfs(&state, "4M") else { return };
    let config = TWO_VMS.replace("[pool]", "[pool]\nstore_deadline_ms = 100\npressure = false");
    let mut daemon = Daemon::start(dir.path(), &config);
    let (mut device, mut disk) = attach(&daemon, "web1");
    let kept = fill(&mut disk, 1, 1500);
    assert!((500..1100).contains(&kept.len()), "{} pages in 4 MiB", kept.len());
    assert_kept(&mut disk, 1..1501, &kept);
    let status = daemon.status();
    assert!(status["vms"][0]["counters"]["reject_alloc_fail"].as_u64() > Some(0), "{status}");
    assert!(daemon.log().contains("the state directory has no memory left"), "{}", daemon.log());
    // A chunk of the page table that was never used can't be had either.
    assert!(disk.write_pages(8000, &[page_of(4, 1)]).is_err());
    assert!(disk.read_page(8000).unwrap() == ZERO_PAGE);
    // Full is how the next daemon finds it.
    daemon.restart();
    device.reconnect(PATIENCE).unwrap();
    assert_kept(&mut disk, 1..1501, &kept);
    // A VM that is new then is out of service and says why; the others are served.
    drop((device, disk));
    daemon.configure(&format!("{config}[[vm]]\nname = \"late\"\nsize = \"32MiB\"\n"));
    for free_pages in 0..3 {
        daemon.kill();
        let filled = fill_up(&state.join("filler"), free_pages);
        daemon.restart();
        let late = daemon.vm("late");
        let message = late["message"].as_str().unwrap_or_default();
        assert!(late["state"] == "damaged" && message.contains("ballast vm clear late"), "{late}");
        assert!(message.contains("No space left") || message.contains("no memory left"), "{filled}: {late}");
        assert!(daemon.log().contains("the VM is out of service"), "{}", daemon.log());
        assert_kept(&mut attach(&daemon, "web1").1, 1..1501, &kept);
    }
    fs::remove_file(state.join("filler")).unwrap();
    let (_device, mut disk) = attach(&daemon, "web1");
    // What a guest gives up makes room, and so does whoever makes it larger.
    disk.discard(kept[0], 100).unwrap();
    assert!(fill(&mut disk, kept[0], 10).len() == 10);
    mount(&["-o", "remount,size=32M"], &state).unwrap();
    assert_eq!(fill(&mut disk, 2000, 1000).len(), 1000);
    assert!(disk.write_pages(8000, &[page_of(4, 1)]).is_ok());
    assert!(daemon.ask(&["vm", "clear", "late"]).status.success());
    assert_eq!(daemon.vm("late")["state"], "ready");
    drop(put(&daemon, "late"));
    // Before it was there, too: a daemon that starts without room for its files says what it needs.
    daemon.kill();
    drop(disk);
    let small = dir.path().join("small");
    let Some(_small) = Mount::tmpfs(&small, "4k") else { return };
    let text = fs::read_to_string(daemon.config()).unwrap().replace("/state\"", "/small\"");
    fs::write(daemon.config(), text).unwrap();
    let said = serve_in_vain(&daemon);
    assert!(said.contains("small") && said.contains("needs room"), "{said}");
}

#[test]
fn pages_leave_a_full_state_directory_for_the_file() {
    let (dir, files) = (tmpfs(), tempfile::tempdir().unwrap());
    let Some(_mount) = Mount::tmpfs(&dir.path().join("state"), "6M") else { return };
    let file = files.path().join("writeback");
    let config = format!("{TWO_VMS}[writeback]\npath = {file:?}\nsize = \"64MiB\"\n");
    let daemon = Daemon::start(dir.path(), &config);
    let (_device, mut disk) = attach(&daemon, "web1");
    let kept = fill(&mut disk, 1, 3000);
    assert_eq!(kept.len(), 3000, "{}", daemon.status());
    assert!(daemon.status()["pool"]["file_pages"].as_u64() > Some(1000), "{}", daemon.status());
    assert_kept(&mut disk, 1..3001, &kept);
}

#[test]
fn a_read_only_state_directory_is_an_error_that_says_so() {
    let dir = tmpfs();
    let state = dir.path().join("state");
    let Some(_mount) = Mount::tmpfs(&state, "32M") else { return };
    let mut daemon = Daemon::start(dir.path(), TWO_VMS);
    let (_device, mut disk) = put(&daemon, "web1");
    // The kernel refuses this as long as the daemon has its files.
    mount(&["-o", "remount,ro"], &state).unwrap_err();
    let read_only = Mount::read_only(&state);
    assert_there(&mut disk);
    disk.write_pages(3000, &pages()).unwrap();
    assert!(disk.read_pages(3000, 200).unwrap() == pages());
    // What needs another file fails, says why, and leaves everything as it was.
    drop(put(&daemon, "web2"));
    wait_until_gone(&daemon, "web2");
    let clear = daemon.ask(&["vm", "clear", "web2"]);
    let said = String::from_utf8_lossy(&clear.stderr).into_owned();
    assert!(clear.status.code() == Some(1) && said.contains("mount it read-write"), "{said}");
    assert_there(&mut attach(&daemon, "web2").1);
    // Nor is it a start.
    daemon.kill();
    let said = serve_in_vain(&daemon);
    assert!(said.contains("Read-only file system") && said.contains("mount it read-write"), "{said}");
    drop(read_only);
    daemon.restart();
    assert_there(&mut attach(&daemon, "web1").1);
}

fn wait_until_gone(daemon: &Daemon, name: &str) {
    let deadline = Instant::now() + PATIENCE;
    while daemon.vm(name)["connected"] == true {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Not only where it is mounted: the directory itself.
#[test]
fn a_state_directory_that_cannot_be_made_is_named() {
    let dir = tmpfs();
    let daemon = Daemon::start(dir.path(), TWO_VMS);
    let text = fs::read_to_string(daemon.config()).unwrap();
    drop(daemon);
    let at: &Path = &dir.path().join("ballast.toml");
    fs::write(at, text.replace("/state\"", "/log/state\"")).unwrap();
    let output = serve(at).stderr(Stdio::piped()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    // What it remembers is looked for there first, and that is part of the configuration.
    assert!(output.status.code() == Some(2) && said.contains("/log/state"), "{said}");
}
