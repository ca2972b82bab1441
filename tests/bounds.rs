//! What the daemon takes of its host stays within the numbers of ARCHITECTURE.md's "Limits", whatever its guests, VMMs
//! and clients do: memory, descriptors, threads, messages, connections and lines of the log.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]
#![allow(clippy::cast_possible_truncation, reason = "patterns made of numbers may wrap")]

mod support;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use ballast::device::session::QUEUE_SIZE_MAX;
use ballast::device::vm::SESSIONS_MAX;
use ballast::frontend::{Descriptor, Device, Memory, Op, Options, Queue, Status};
use support::daemon::Daemon;
use support::page_of;
use support::usage::Usage;

const MIB: u64 = 1 << 20;
const VMS: u64 = 100;
const QUEUES: u16 = 2;
/// What the daemon may have for itself, with a hundred VMs that idle.
const PRIVATE_BYTES_MAX: u64 = 64 * MIB;
/// What one of them may add to that.
const VM_BYTES_MAX: u64 = MIB;
/// Descriptors of a VMM's session: its socket twice, a file for the region of memory and one for that in flight, and for
/// each queue a kick and a call.
const SESSION_DESCRIPTORS_MAX: u64 = 5 + 2 * QUEUES as u64;
/// A thread for each session, and one that asks for the status now and then.
const SLACK_THREADS: u64 = 8;
/// What is kept of what came and went: the allocator's, for the most part.
const SLACK_BYTES: u64 = 4 * MIB;
const PATIENCE: Duration = Duration::from_secs(60);
/// Lines about VMMs that come and go, a minute.
const COMINGS_PER_MINUTE: u64 = 60;

struct Setup {
    daemon: Daemon,
    _dir: tempfile::TempDir,
    _files: tempfile::TempDir,
}

/// A daemon with `vms` VMs of so many bytes, a writeback file and workers of which there are two wherever it runs.
fn start(vms: u64, vm_size: &str) -> Setup {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let files = tempfile::tempdir().unwrap();
    let sections: String = (0..vms)
        .map(|n| format!("[[vm]]\nname = \"vm{n}\"\nsize = \"{vm_size}\"\nqueues = {QUEUES}\n"))
        .collect();
    let config = format!(
        "workers = 2\n[pool]\nmax = \"256MiB\"\n[writeback]\npath = {:?}\nsize = \"64MiB\"\n{sections}",
        files.path().join("writeback")
    );
    Setup { daemon: Daemon::start(dir.path(), &config), _dir: dir, _files: files }
}

impl Setup {
    fn usage(&self) -> Usage {
        Usage::of(self.daemon.pid().unwrap())
    }

    fn attach(&self, n: u64) -> (Device, Vec<Queue>) {
        let options =
            Options { queues: QUEUES, queue_size: 64, depth: 16, data_bytes: 4096, ..Options::default() };
        let memory = Memory::with_bytes(MIB as usize).unwrap();
        let mut device = Device::connect(self.daemon.socket(&format!("vm{n}")), memory, options).unwrap();
        let queues = device.start().unwrap();
        (device, queues)
    }

    /// Waits until the daemon has so few descriptors and threads again, and says what it has.
    fn until_like(&self, before: Usage) -> Usage {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = self.usage();
            if now.descriptors <= before.descriptors && now.threads <= before.threads + SLACK_THREADS {
                return now;
            }
            assert!(Instant::now() < deadline, "{before:?} has become {now:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn log_lines(&self) -> u64 {
        self.daemon.log().lines().count() as u64
    }
}

/// A test holds both ends of what it attaches.
fn raise_open_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
}

#[test]
fn a_hundred_idle_vms_take_little_and_leave_nothing_behind() {
    raise_open_files();
    let setup = start(VMS, "64MiB");
    let before = setup.usage();
    let mut attached = Vec::new();
    for n in 0..VMS {
        let (device, mut queues) = setup.attach(n);
        for slot in 1..=64 {
            let queue = &mut queues[slot as usize % usize::from(QUEUES)];
            queue.write_pages(slot, &[page_of(4, n << 32 | slot)]).unwrap();
            assert!(queue.read_page(slot).unwrap() == page_of(4, n << 32 | slot));
        }
        attached.push((device, queues));
    }
    let idle = setup.usage();
    let grown = idle.private_bytes.saturating_sub(before.private_bytes);
    println!("before: {before:?}; with {VMS} VMMs: {idle:?}; {} KiB a VMM", (grown / VMS) >> 10);
    assert!(idle.private_bytes < PRIVATE_BYTES_MAX, "{idle:?}");
    assert!(grown / VMS < VM_BYTES_MAX, "{grown}");
    let each = (idle.descriptors - before.descriptors) / VMS;
    assert!(each <= SESSION_DESCRIPTORS_MAX, "{each} descriptors a session");
    assert!(idle.threads <= before.threads + VMS + SLACK_THREADS, "{before:?} {idle:?}");
    // Without VMMs each VM has its socket, its table and a thread that listens.
    assert!(before.descriptors <= 2 * VMS + 40 && before.threads <= VMS + 20, "{before:?}");

    drop(attached);
    let after = setup.until_like(before);
    assert!(after.private_bytes < idle.private_bytes + SLACK_BYTES, "{idle:?} {after:?}");
}

#[test]
fn vmms_that_come_and_go_leave_nothing_behind() {
    let setup = start(1, "64MiB");
    // What is made at the first use is there.
    drop(setup.attach(0));
    std::thread::sleep(Duration::from_millis(100));
    let (before, lines, start) = (setup.usage(), setup.log_lines(), Instant::now());
    for n in 0..200 {
        let (_device, mut queues) = setup.attach(0);
        let page = page_of(4, n);
        queues[0].write_pages(1 + n, &[page]).unwrap();
        assert!(queues[0].read_page(1 + n).unwrap() == page);
    }
    let after = setup.until_like(before);
    println!("before: {before:?}; after 200 VMMs: {after:?}");
    assert!(after.private_bytes < before.private_bytes + SLACK_BYTES, "{before:?} {after:?}");
    let minutes = start.elapsed().as_secs() / 60 + 2;
    let told = setup.log_lines() - lines;
    assert!(told <= COMINGS_PER_MINUTE * minutes, "{told} lines");
    assert!(told >= 30, "{told} lines: a VMM that comes is told");
}

/// Generations and pools of a VM's slots are kept in ordinary memory beside its table, for chunks that were used.
#[test]
fn memory_beside_a_page_table_is_four_bytes_a_slot() {
    const CHUNK_SLOTS: u64 = 4096;
    const CHUNKS: u64 = 512;
    let setup = start(1, "8GiB");
    let (_device, mut queues) = setup.attach(0);
    queues[0].write_pages(1, &[page_of(4, 1)]).unwrap();
    let (before, metadata) =
        (setup.usage(), setup.daemon.status()["pool"]["metadata_bytes"].as_u64().unwrap());
    for chunk in 1..CHUNKS {
        queues[0].write_pages(chunk * CHUNK_SLOTS, &[page_of(4, chunk)]).unwrap();
    }
    let grown = setup.usage().private_bytes.saturating_sub(before.private_bytes);
    let wanted = (CHUNKS - 1) * CHUNK_SLOTS * 4;
    println!("{grown} bytes for {} slots", (CHUNKS - 1) * CHUNK_SLOTS);
    assert!(grown < wanted + SLACK_BYTES, "{grown} bytes for {CHUNKS} chunks");
    let counted = setup.daemon.status()["pool"]["metadata_bytes"].as_u64().unwrap() - metadata;
    assert!(counted >= 4 * wanted, "entries, ages and these are counted: {counted}");
}

#[test]
fn a_session_too_many_is_refused_and_says_why() {
    let setup = start(1, "64MiB");
    let (_device, mut queues) = setup.attach(0);
    let before = setup.usage();
    let socket = setup.daemon.socket("vm0");
    let held: Vec<_> = (0..3 * SESSIONS_MAX).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    setup.daemon.wait_for_log(&format!("the VM has {SESSIONS_MAX} connections already"));
    // Those that were let in are left alone, the others were hung up on.
    let ended = |mut stream: &UnixStream| {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.read(&mut [0]).is_ok_and(|count| count == 0)
    };
    let refused = &held[SESSIONS_MAX as usize - 1..];
    assert!(refused.iter().all(ended), "nobody else is let in");
    let most = before.threads + u64::from(SESSIONS_MAX) - 1 + SLACK_THREADS;
    assert!(setup.usage().threads <= most, "{before:?} {:?}", setup.usage());
    queues[0].write_pages(1, &[page_of(4, 1)]).unwrap();
    drop(held);
    setup.until_like(before);
}

fn message(request: u32, claimed_bytes: u32, payload: &[u8]) -> Vec<u8> {
    let words = [request, 1 | 8, claimed_bytes].map(u32::to_le_bytes).concat();
    [&words[..], payload].concat()
}

#[test]
fn sizes_beyond_their_bounds_are_refused_and_nothing_is_made_for_them() {
    const SET_MEM_TABLE: u32 = 5;
    const SET_VRING_NUM: u32 = 8;
    const GET_INFLIGHT_FD: u32 = 31;
    let setup = start(1, "64MiB");
    drop(setup.attach(0));
    let before = setup.usage();
    let halves = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let queue_size = |size: u32| message(SET_VRING_NUM, 8, &halves(&[0, size]));
    let cases = [
        message(SET_MEM_TABLE, u32::MAX, &[]),
        message(SET_MEM_TABLE, 64 << 20, &[0; 4096]),
        message(SET_MEM_TABLE, 4097, &[0; 4097]),
        queue_size(u32::from(QUEUE_SIZE_MAX) * 2),
        queue_size(u32::MAX),
        message(GET_INFLIGHT_FD, 24, &halves(&[0, 0, 0, 0, u32::MAX, 0])),
    ];
    for (n, bytes) in cases.iter().enumerate() {
        let mut stream = UnixStream::connect(setup.daemon.socket("vm0")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(bytes).unwrap();
        // An answer, if it is one, says that it failed; then the connection ends.
        let mut answer = Vec::new();
        let ended = stream.read_to_end(&mut answer);
        let reset = |err: &std::io::Error| err.kind() == std::io::ErrorKind::ConnectionReset;
        assert!(ended.is_ok() || ended.as_ref().is_err_and(reset), "case {n}: {ended:?}");
        assert!(answer.get(12).is_none_or(|first| *first != 0), "case {n}: {answer:?}");
    }
    let after = setup.until_like(before);
    assert!(after.private_bytes < before.private_bytes + SLACK_BYTES, "{before:?} {after:?}");
    assert!(setup.daemon.log().contains("up to 1024"), "{}", setup.daemon.log());
    setup.attach(0).1[0].write_pages(1, &[page_of(4, 1)]).unwrap();
}

#[test]
fn a_guest_that_errs_a_hundred_thousand_times_is_told_of_a_few_times() {
    const ERRORS: u64 = 100_000;
    let setup = start(1, "64MiB");
    let (_device, mut queues) = setup.attach(0);
    let queue = &mut queues[0];
    let lines = setup.log_lines();
    let mut sent = 0;
    let mut answered = 0;
    while answered < ERRORS {
        while sent < ERRORS
            && let Some(tag) = queue.free_tag()
        {
            // Every other one is a request beyond the disk; the rest are chains that can't be answered at all.
            if sent % 2 == 0 {
                queue.stage(tag, Op::Read { sector: 1 << 40, bytes: 4096 }).unwrap();
            } else {
                let header =
                    Descriptor { address: queue.header_address(tag).0, bytes: 16, flags: 0, next: 0 };
                queue.write_header(tag, Op::Flush);
                queue.stage_raw(tag, &[header]).unwrap();
            }
            sent += 1;
        }
        queue.publish().unwrap();
        queue.kick().unwrap();
        let done = queue.wait(PATIENCE).unwrap();
        assert!(done.status != Status::Ok);
        answered += 1;
    }
    let errors = setup.daemon.vm("vm0")["errors"].as_u64().unwrap();
    let told = setup.log_lines() - lines;
    println!("{errors} errors, {told} lines");
    assert_eq!(errors, ERRORS);
    assert!((1..=40).contains(&told), "{told} lines:\n{}", setup.daemon.log());
}

/// The status line of the answer to a request on a connection of its own.
fn answer(setup: &Setup, request: &[u8]) -> String {
    let mut stream = UnixStream::connect(setup.daemon.socket("control")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // It may answer and hang up before it has heard all.
    let _ = stream.write_all(request);
    let mut text = Vec::new();
    let _ = stream.read_to_end(&mut text);
    String::from_utf8(text).unwrap()
}

#[test]
fn a_body_beyond_its_bound_is_refused_with_a_message() {
    let setup = start(1, "64MiB");
    let before = setup.usage();
    let claimed = "POST /api/v1/pool HTTP/1.1\r\nhost: b\r\nconnection: close\r\n";
    let long = [format!("{claimed}content-length: 1048576\r\n\r\n").as_bytes(), &[b' '; 1 << 20]].concat();
    let head = format!("{claimed}x: {}\r\n\r\n", "y".repeat(1 << 20));
    for (request, status) in [(&long[..], "413"), (head.as_bytes(), "431")] {
        let answer = answer(&setup, request);
        let line = answer.lines().next().unwrap_or_default();
        assert!(line.contains(status), "{status}: {answer}");
        assert!(status != "413" || answer.contains("{\"error\":\""), "{answer}");
    }
    let after = setup.until_like(before);
    assert!(after.private_bytes < before.private_bytes + SLACK_BYTES, "{before:?} {after:?}");
}

#[test]
fn clients_beyond_the_bound_wait_outside() {
    const CONNECTIONS_MAX: u64 = 64;
    raise_open_files();
    let setup = start(1, "64MiB");
    let before = setup.usage();
    let connect = || UnixStream::connect(setup.daemon.socket("control")).unwrap();
    // As many as are let in, and some that the kernel keeps meanwhile.
    let mut clients: Vec<_> = (0..CONNECTIONS_MAX + 40).map(|_| connect()).collect();
    for client in &mut clients {
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.write_all(b"GET /api/v1/status HTTP/1.1\r\nhost: b\r\n\r\n").unwrap();
    }
    let first = CONNECTIONS_MAX as usize;
    for client in &mut clients[..first] {
        assert!(client.read(&mut [0; 12]).unwrap() > 0, "whoever is in is answered");
    }
    let most = setup.usage();
    assert!(most.descriptors <= before.descriptors + CONNECTIONS_MAX, "{before:?} {most:?}");
    assert!(most.threads <= before.threads + SLACK_THREADS, "{before:?} {most:?}");
    // Those that leave make room for the others.
    clients.drain(..first).for_each(drop);
    for client in &mut clients {
        assert!(client.read(&mut [0; 12]).unwrap() > 0, "whoever waited is answered");
    }
    drop(clients);
    setup.until_like(before);
}
