//! Files of kinds that no VMM hands over, and more of them than one needs: pages that are huge, descriptors that block or
//! never end, regions without end. Each is refused with its connection, and the next VMM, and the other VM, are served.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]
#![allow(clippy::cast_possible_truncation, reason = "patterns made of numbers may wrap")]

mod support;
#[path = "support/wire.rs"]
mod wire;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ballast::device::memory_share::{MEMORY_SLOTS_MAX, VM_BYTES_MAX, VM_REGIONS_MAX};
use ballast::frontend::{Device, Memory, Op, Options, Queue};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, OFlags, fcntl_getfl, fcntl_setfl, memfd_create};
use rustix::process::{PidfdFlags, PidfdGetfdFlags};
use support::{Host, page_of};
use wire::{FLAGS, PROTOCOL, PROTOCOL_FEATURES, half_words, message, words};

const VMM: u64 = 0x7f00_0000_0000;
const HUGE_PAGE: u64 = 2 << 20;
const HUGE_NAME: &str = "hostile-huge";
const PATIENCE: Duration = Duration::from_secs(20);
const WORD: usize = wire::HEADER_BYTES + 8;

fn memfd(name: &str, flags: MemfdFlags, bytes: u64) -> OwnedFd {
    let fd = memfd_create(name, flags | MemfdFlags::CLOEXEC).expect("this kernel has such memfds");
    rustix::fs::ftruncate(&fd, bytes).unwrap();
    fd
}

fn huge(bytes: u64) -> OwnedFd {
    memfd(HUGE_NAME, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB, bytes)
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

/// A front end that has agreed on features.
struct FrontEnd(UnixStream);

impl FrontEnd {
    fn connect(host: &Host, vm: &str) -> Self {
        let stream = UnixStream::connect(host.socket(vm)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let features = words(&[PROTOCOL_FEATURES | 1 << 32]);
        let greeting = [
            message(wire::GET_FEATURES, 1, &[]),
            message(wire::SET_FEATURES, 1, &features),
            message(wire::GET_PROTOCOL_FEATURES, 1, &[]),
            message(wire::SET_PROTOCOL_FEATURES, 1, &words(&[PROTOCOL | 2])),
        ];
        assert!(wire::send(&stream, &greeting.concat(), &[]));
        wire::receive(&stream, 2 * WORD).unwrap();
        Self(stream)
    }

    /// Whether the message is accepted. When it is not, the connection ends.
    fn say(&self, request: u32, payload: &[u8], fd: Option<&OwnedFd>) -> bool {
        let fds: Vec<_> = fd.map(AsFd::as_fd).into_iter().collect();
        wire::send(&self.0, &message(request, FLAGS, payload), &fds)
            && matches!(wire::receive(&self.0, WORD), Ok((answer, _)) if answer[12..] == [0; 8])
    }

    fn must(&self, request: u32, payload: &[u8], fd: Option<&OwnedFd>) {
        assert!(self.say(request, payload, fd), "{request} was refused");
    }

    fn add_region(&self, guest: u64, bytes: u64, fd: &OwnedFd) -> bool {
        self.say(wire::ADD_MEM_REG, &wire::region(guest, bytes, VMM + guest, 0), Some(fd))
    }
}

fn attach(host: &Host, vm: &str) -> (Device, Vec<Queue>) {
    let memory = Memory::with_bytes(32 << 20).unwrap();
    let mut device = Device::connect(host.socket(vm), memory, Options::default()).unwrap();
    let queues = device.start().unwrap();
    (device, queues)
}

fn works(queues: &mut [Queue], seed: u64) {
    queues[0].write_pages(7, &[page_of(3, seed)]).unwrap();
    assert!(queues[0].read_page(7).unwrap() == page_of(3, seed));
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Mappings of huge pages that the front ends here made.
fn mappings() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains(HUGE_NAME)).count()
}

#[test]
fn parts_of_huge_pages_are_refused_and_whole_ones_cost_at_most_their_own_vm() {
    let host = Host::start(&["web1", "web2"]);
    let (_device, mut others) = attach(&host, "web2");
    let pages = huge(2 * HUGE_PAGE);
    let cases: [(u32, Vec<u8>); 5] = [
        (wire::SET_MEM_TABLE, wire::region(0, HUGE_PAGE / 2, VMM, 0)),
        (wire::SET_MEM_TABLE, wire::region(0, HUGE_PAGE + 4096, VMM, 0)),
        (wire::ADD_MEM_REG, wire::region(0, 4096, VMM, 0)),
        (wire::SET_INFLIGHT_FD, wire::inflight(8192, 1, 16)),
        // SET_LOG_BASE
        (6, words(&[4096, 0])),
    ];
    for (request, payload) in cases {
        let front_end = FrontEnd::connect(&host, "web1");
        assert!(!front_end.say(request, &payload, Some(&pages)), "{request} is taken");
        works(&mut others, u64::from(request));
    }
    assert_eq!(mappings(), 0);

    // Where no huge page is free the first touch is a signal; elsewhere it finds zeros.
    let front_end = FrontEnd::connect(&host, "web1");
    front_end.must(wire::SET_MEM_TABLE, &wire::region(0, 2 * HUGE_PAGE, VMM, 0), Some(&pages));
    assert!(mappings() > 0, "it is mapped");
    front_end.must(wire::SET_VRING_NUM, &half_words(&[0, 16]), None);
    front_end.must(wire::SET_VRING_BASE, &half_words(&[0, 0]), None);
    let second = VMM + HUGE_PAGE;
    front_end.must(wire::SET_VRING_ADDR, &wire::addresses(0, VMM, second, second + 0x1000), None);
    front_end.must(wire::SET_VRING_CALL, &words(&[0]), Some(&event()));
    front_end.must(wire::SET_VRING_KICK, &words(&[0]), Some(&event()));
    front_end.must(wire::SET_VRING_ENABLE, &half_words(&[0, 1]), None);
    front_end.must(wire::GET_VRING_BASE, &half_words(&[0, 0]), None);
    works(&mut others, 9);
    drop(front_end);
    until("web1 is free again", || !host.vms[0].connected());
    until("nothing is left mapped", || mappings() == 0);
    works(&mut attach(&host, "web1").1, 10);
}

#[test]
fn kicks_calls_and_errors_come_through_eventfds_alone() {
    let host = Host::start(&["web1"]);
    for request in [wire::SET_VRING_KICK, wire::SET_VRING_CALL, wire::SET_VRING_ERR] {
        let (read, write) = std::io::pipe().unwrap();
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        let (socket, _other) = UnixStream::pair().unwrap();
        let files: [OwnedFd; 5] =
            [read.into(), write.into(), null.into(), socket.into(), memfd("small", MemfdFlags::empty(), 8)];
        for file in &files {
            let front_end = FrontEnd::connect(&host, "web1");
            assert!(!front_end.say(request, &words(&[0]), Some(file)), "{request} takes {file:?}");
        }
        FrontEnd::connect(&host, "web1").must(request, &words(&[0]), Some(&event()));
    }
    until("they are gone", || !host.vms[0].connected());
    works(&mut attach(&host, "web1").1, 1);
}

/// A region of memory is a descriptor at the other end, which is in this process.
fn raise_open_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
}

#[test]
fn a_vm_maps_so_many_regions_and_bytes_and_no_more() {
    raise_open_files();
    let host = Host::start(&["web1", "web2"]);
    let memory = memfd("small", MemfdFlags::empty(), VM_BYTES_MAX);
    let front_ends: Vec<_> = (0..3).map(|_| FrontEnd::connect(&host, "web1")).collect();
    for front_end in &front_ends[..2] {
        for n in 0..MEMORY_SLOTS_MAX {
            assert!(front_end.add_region(n * 8192, 4096, &memory), "region {n}");
        }
    }
    let mapped = host.vms[0].mapped();
    assert_eq!(mapped.lock().regions, VM_REGIONS_MAX);
    assert!(!front_ends[2].add_region(0, 4096, &memory), "a third session has none left");
    assert!(!front_ends[0].add_region(MEMORY_SLOTS_MAX * 8192, 4096, &memory), "one has so many");
    // The other VM is served meanwhile.
    works(&mut attach(&host, "web2").1, 1);
    drop(front_ends);
    until("what they had is given back", || mapped.lock().regions == 0 && !host.vms[0].connected());

    let (one, other) = (FrontEnd::connect(&host, "web1"), FrontEnd::connect(&host, "web1"));
    assert!(one.add_region(0, VM_BYTES_MAX - 4096, &memory));
    assert!(!other.add_region(0, 8192, &memory), "bytes are shared too");
    assert!(!one.add_region(VM_BYTES_MAX, 8192, &memory));
    drop((one, other));
    until("what they had is given back", || Arc::clone(mapped).lock().bytes == 0);
    works(&mut attach(&host, "web1").1, 2);
}

/// A descriptor of this process once more.
fn duplicate(fd: RawFd) -> OwnedFd {
    let this = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty()).unwrap();
    rustix::process::pidfd_getfd(&this, fd, PidfdGetfdFlags::empty()).unwrap()
}

/// What the back end made not to block blocks again.
fn let_block(event: &OwnedFd) {
    let flags = fcntl_getfl(event).unwrap();
    assert!(flags.contains(OFlags::NONBLOCK), "the back end has seen to that");
    fcntl_setfl(event, flags - OFlags::NONBLOCK).unwrap();
}

#[test]
fn eventfds_that_are_made_to_block_hold_nobody_up_for_long() {
    let host = Host::start(&["web1", "web2"]);
    let memory = Memory::with_bytes(32 << 20).unwrap();
    let mut device =
        Device::connect(host.socket("web2"), memory, Options { queues: 2, ..Options::default() }).unwrap();
    // One on each worker.
    let mut others = device.start().unwrap();
    let mut work = |seed| {
        others.iter_mut().for_each(|queue| works(std::slice::from_mut(queue), seed));
    };
    work(1);
    for round in 0..3 {
        // A call that can't be taken any more.
        let (_device, mut queues) = attach(&host, "web1");
        let call = duplicate(queues[0].call_event());
        // When it was handed over, and when the ring started, which may be after the last message was answered.
        let mut calls = 0;
        until("two calls for the start", || {
            let mut count = [0; 8];
            let more = rustix::io::read(&call, &mut count).map_or(0, |_| u64::from_ne_bytes(count));
            calls += more;
            calls == 2
        });
        rustix::io::write(&call, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let_block(&call);
        queues[0].stage(0, Op::Read { sector: 0, bytes: 4096 }).unwrap();
        queues[0].publish().unwrap();
        until("an answer", || queues[0].poll().unwrap().is_some());
        work(10 * round + 2);
        // The ring has no more turns.
        queues[0].stage(0, Op::Read { sector: 0, bytes: 4096 }).unwrap();
        queues[0].kick().unwrap();
        work(10 * round + 3);
        assert!(queues[0].poll().unwrap().is_none());
    }
    let (_device, mut queues) = attach(&host, "web1");
    works(&mut queues, 6);
}
