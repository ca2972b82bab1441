//! A guest that moves, while it runs, from one VMM to another on the same host, as for an upgrade of the VMM: what the
//! device writes to its memory is logged, and its stored pages are there for whoever has the VM.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ballast::frontend::{Device, Error, Memory, Op, Options, Queue, Status};
use ballast::page::{PAGE_SIZE, Page};
use serde_json::{Value, json};
use support::guests::{Guests, MIB, VM};
use support::{Host, Setup, page_of};
use vm_memory::GuestAddress;

const PATIENCE: Duration = Duration::from_secs(300);
/// What a booted guest has, all of it in one piece from address 0 on.
const MEMORY_BYTES: usize = 128 << 20;
/// Pages that it loads after most of its memory was sent.
const LOADS_MEANWHILE: u64 = 4000;
/// Where the pages that are compared lie: nothing of the driver's own is there.
const DATA: u64 = 1 << 32;
const DATA_PAGES: usize = 256;

fn data(memory: &Memory) -> Vec<Page> {
    let mut bytes = vec![0; DATA_PAGES * PAGE_SIZE];
    memory.read(GuestAddress(DATA), &mut bytes).unwrap();
    bytes.as_chunks().0.to_vec()
}

/// Loads the slots from 1 on, each with a page to two places, into every fourth page of the data.
fn load_some(disk: &mut Queue, first_page: u64) {
    for n in 0..20u64 {
        let address = DATA + (first_page + n * 4) * 4096;
        // One in three lies across two pages of memory.
        let address = if n % 3 == 0 { address + 512 } else { address };
        disk.stage_buffers(
            0,
            Op::Read { sector: 8 * (1 + n), bytes: 4096 },
            &[(GuestAddress(address), 4096)],
        )
        .unwrap();
        disk.publish().unwrap();
        disk.kick().unwrap();
        assert_eq!(disk.wait(PATIENCE).unwrap().status, Status::Ok);
    }
}

#[test]
fn what_a_migrating_vmm_copies_by_the_log_is_the_guests_memory() {
    let host = Host::start(&["web1"]);
    let memory = Memory::with_regions(&[(0, 16 << 20), (DATA, DATA_PAGES * PAGE_SIZE)]).unwrap();
    let options = Options { queues: 2, ..Options::default() };
    let mut device = Device::connect(host.socket("web1"), memory.clone(), options).unwrap();
    let mut queues = device.start().unwrap();
    let pages: Vec<Page> = (0..20).map(|n| page_of(n, 3)).collect();
    queues[0].write_pages(1, &pages).unwrap();
    load_some(&mut queues[0], 1);

    device.start_log().unwrap();
    // A worker that goes to sleep notes in the used ring what it waits for.
    let logged = device.take_logged().unwrap();
    assert!(
        logged.iter().all(|page| *page < DATA / 4096),
        "what was written before is copied as it is: {logged:?}"
    );
    let mut copy = data(&memory);
    for first_page in [2, 3, 100] {
        load_some(&mut queues[0], first_page);
        load_some(&mut queues[1], first_page + 60);
        let (before, now) = (data(&memory), device.take_logged().unwrap());
        let (data_pages, others): (Vec<u64>, Vec<u64>) =
            now.into_iter().partition(|page| *page >= DATA / 4096);
        for page in data_pages {
            let n = usize::try_from(page - DATA / 4096).unwrap();
            copy[n] = before[n];
        }
        assert!(copy == before, "a page was written and not logged");
        // Each queue's used ring and the places of its statuses.
        assert!((4..=8).contains(&others.len()), "{others:?}");
    }

    // Stores write answers to the guest's memory, and none of its data.
    queues[0].write_pages(1, &pages).unwrap();
    let logged = device.take_logged().unwrap();
    assert!(!logged.is_empty() && logged.iter().all(|page| *page < DATA / 4096), "{logged:?}");
    // A migration that was given up. The last index is logged after it was written, so it may have been seen before.
    device.stop_log().unwrap();
    device.take_logged().unwrap();
    load_some(&mut queues[0], 1);
    assert!(device.take_logged().unwrap().is_empty());
    // And another, of a guest whose memory has grown meanwhile.
    device.add_region(DATA * 2, 1 << 20).unwrap();
    device.start_log().unwrap();
    queues[0].write_pages(1, &pages).unwrap();
    let address = GuestAddress(DATA * 2);
    queues[0].stage_buffers(0, Op::Read { sector: 8, bytes: 4096 }, &[(address, 4096)]).unwrap();
    queues[0].publish().unwrap();
    queues[0].kick().unwrap();
    assert_eq!(queues[0].wait(PATIENCE).unwrap().status, Status::Ok);
    assert!(device.take_logged().unwrap().contains(&(DATA * 2 / 4096)));
}

/// What a back end had written before it died may be lost with its log, whatever the VMM had seen of that.
#[test]
fn a_vmm_that_migrates_when_its_back_end_dies_is_told_to_copy_all_again() {
    let host = Host::with(&["web1"], Setup { file: true, ..Setup::default() });
    let memory = Memory::with_regions(&[(0, 16 << 20), (DATA, DATA_PAGES * PAGE_SIZE)]).unwrap();
    let mut device = Device::connect(host.socket("web1"), memory.clone(), Options::default()).unwrap();
    let mut queues = device.start().unwrap();
    queues[0].write_pages(1, &(0..20).map(|n| page_of(n, 3)).collect::<Vec<_>>()).unwrap();
    device.start_log().unwrap();
    load_some(&mut queues[0], 1);

    let host = host.successor();
    device.reconnect(PATIENCE).unwrap();
    let all: Vec<u64> = (0..(16 << 20) / 4096).chain(DATA / 4096..DATA / 4096 + DATA_PAGES as u64).collect();
    assert_eq!(device.take_logged().unwrap(), all);
    // And goes on as before, without doing so again.
    load_some(&mut queues[0], 2);
    let logged = device.take_logged().unwrap();
    assert!(logged.contains(&(DATA / 4096 + 2)) && logged.len() < 60, "{logged:?}");
    device.stop_log().unwrap();
    device.start_log().unwrap();
    assert!(device.take_logged().unwrap().len() < 8, "a migration that begins copies what is there as it is");
    drop(host);
}

#[test]
fn no_log_is_offered_to_a_vm_that_may_not_move() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let vm = "[[vm]]\nname = \"web1\"\nsize = \"16MiB\"\n";
    let daemon = support::daemon::Daemon::start(dir.path(), vm);
    let memory = Memory::with_bytes(8 << 20).unwrap();
    let mut device = Device::connect(daemon.socket("web1"), memory, Options::default()).unwrap();
    let mut queues = device.start().unwrap();
    assert!(matches!(device.start_log(), Err(Error::Missing { .. })));
    queues[0].flush().unwrap();
}

/// A QEMU's monitor.
struct Qmp {
    stream: UnixStream,
    answers: BufReader<UnixStream>,
}

impl Qmp {
    fn connect(socket: &Path) -> Self {
        let deadline = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(err) => assert!(Instant::now() < deadline, "{}: {err}", socket.display()),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let answers = BufReader::new(stream.try_clone().unwrap());
        let mut qmp = Self { stream, answers };
        qmp.ask(&json!({"execute": "qmp_capabilities"}));
        qmp
    }

    /// What QEMU returns; events and its greeting are passed over.
    fn ask(&mut self, command: &Value) -> Value {
        // In one piece: one that is told to quit does so at the last brace.
        self.stream.write_all(format!("{command}\n").as_bytes()).unwrap();
        loop {
            let mut line = String::new();
            self.answers.read_line(&mut line).unwrap();
            let answer: Value = serde_json::from_str(&line).unwrap();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if let Some(answer) = answer.get("return") {
                return answer.clone();
            }
        }
    }

    /// Sends the guest's memory to the QEMU that listens at `to`: most of it, then hardly any until `meanwhile` has
    /// returned, then, the guest being stopped, what is left. Were it not stopped, its own writes could be lost: QEMU's
    /// translator misses those that follow a look at the log which finds only pages that wait to be sent already.
    fn migrate(&mut self, to: &Path, meanwhile: impl FnOnce()) -> Value {
        self.limit(64 << 20, 1);
        self.ask(&json!({"execute": "migrate", "arguments": {"uri": format!("unix:{}", to.display())}}));
        self.wait_for_migration(|state| {
            state["ram"]["remaining"].as_u64().is_some_and(|bytes| bytes < MEMORY_BYTES as u64 / 4)
        });
        self.limit(1 << 20, 1);
        meanwhile();
        self.ask(&json!({"execute": "stop"}));
        self.limit(1 << 30, 2000);
        self.wait_for_migration(|state| state["status"] == "completed")
    }

    fn wait_for_migration(&mut self, done: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let state = self.ask(&json!({"execute": "query-migrate"}));
            if done(&state) {
                return state;
            }
            let failed = matches!(state["status"].as_str(), Some("failed" | "cancelled"));
            assert!(!failed && Instant::now() < deadline, "{state}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A guest is stopped for the rest of its memory once that takes no longer than the downtime.
    fn limit(&mut self, bytes_per_second: u64, downtime_ms: u64) {
        let arguments = json!({"max-bandwidth": bytes_per_second, "downtime-limit": downtime_ms});
        self.ask(&json!({"execute": "migrate-set-parameters", "arguments": arguments}));
    }

    /// The guest's memory, whole.
    fn memory(&mut self, file: &Path) -> Vec<u8> {
        let arguments = json!({"val": 0, "size": MEMORY_BYTES, "filename": file});
        self.ask(&json!({"execute": "pmemsave", "arguments": arguments}));
        let memory = fs::read(file).unwrap();
        fs::remove_file(file).unwrap();
        memory
    }
}

/// Where a QEMU of the test has its monitor, and where it waits for a guest.
fn monitor_of(dir: &Path, n: u32) -> PathBuf {
    dir.join(format!("{n}.qmp"))
}

fn monitor(dir: &Path, n: u32) -> Vec<OsString> {
    vec!["-qmp".into(), format!("unix:{},server=on,wait=off", monitor_of(dir, n).display()).into()]
}

fn loads(guests: &Guests) -> u64 {
    guests.daemon.status().unwrap().vm(VM).unwrap().loads
}

fn wait_for_loads(guests: &Guests, more: u64) {
    let (before, deadline) = (loads(guests), Instant::now() + PATIENCE);
    while loads(guests) < before + more {
        assert!(Instant::now() < deadline, "the guest hardly loads: {} more", loads(guests) - before);
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Moves the guest from QEMU `n` to the next one, while it loads and the daemon is killed so often; both then have the
/// same memory, to the last page.
fn move_on(guests: &mut Guests, mut from: Qmp, n: u32, kills: u64) -> Qmp {
    let dir = guests.path().to_owned();
    let incoming = dir.join(format!("{n}.in"));
    let mut arguments = monitor(&dir, n + 1);
    // Stopped, so that nothing changes before it was looked at.
    arguments.extend(["-S".into(), "-incoming".into(), format!("unix:{}", incoming.display()).into()]);
    guests.boot_twin(&format!("{VM}-{}", n + 1), arguments);
    let mut to = Qmp::connect(&monitor_of(&dir, n + 1));
    let moved = from.migrate(&incoming, || {
        for _ in 0..kills {
            wait_for_loads(guests, LOADS_MEANWHILE / (kills + 1));
            guests.daemon.kill_and_restart().unwrap();
        }
        wait_for_loads(guests, LOADS_MEANWHILE / (kills + 1));
    });
    let (source, target) = (from.memory(&dir.join("memory")), to.memory(&dir.join("memory")));
    assert!(source.len() == MEMORY_BYTES && target.len() == MEMORY_BYTES);
    let differ =
        source.chunks(PAGE_SIZE).zip(target.chunks(PAGE_SIZE)).filter(|(source, target)| source != target);
    assert_eq!(differ.count(), 0, "pages of the guest's memory differ after it was moved");
    println!("moved: {} pages sent", moved["ram"]["normal"]);
    from.ask(&json!({"execute": "quit"}));
    to
}

/// A guest that has filled its memory, on QEMU 0, and that one's monitor.
fn boot() -> (Guests, Qmp) {
    let mut guests = Guests::boot_several(&[VM], 1, 2, MIB, |daemon, guest| {
        daemon.vm_keys = "migration = \"same-host\"".to_owned();
        guest.arguments = monitor(&guest.directory, 0);
        // Who zeroes memory before it is loaded into has logged it already.
        guest.kernel_arguments = "init_on_alloc=0".to_owned();
    });
    guests.reach(12);
    let monitor = Qmp::connect(&monitor_of(guests.path(), 0));
    (guests, monitor)
}

#[test]
fn a_guest_that_swaps_moves_to_another_qemu_twice_with_every_page() {
    let (mut guests, first) = boot();
    // While it overwrites, and while it checks what it has.
    let mut second = move_on(&mut guests, first, 0, 0);
    second.ask(&json!({"execute": "cont"}));
    guests.reach(9);
    let mut third = move_on(&mut guests, second, 1, 0);
    third.ask(&json!({"execute": "cont"}));
    guests.finish_guest(2, VM);
}

/// QEMU 7.2 forgets what the log of a back end that dies had told; and the one that waits for the guest doesn't negotiate
/// with the next daemon, so there it ends.
#[test]
fn no_page_is_left_behind_when_the_daemon_dies_in_the_middle_of_a_move() {
    let (mut guests, from) = boot();
    move_on(&mut guests, from, 0, 2);
}
