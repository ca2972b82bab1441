//! Requests that no well-behaved driver sends: each is answered as the specification wants or not at all, and the
//! queue it came on, the other queues and the pages go on as if it had not been.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]
#![allow(clippy::cast_possible_truncation, reason = "patterns made of numbers may wrap")]

mod support;

use std::time::Duration;

use ballast::frontend::{Descriptor, Device, Error, Memory, Op, Options, Queue, Status};
use support::{Host, SLOTS, page_of};
use vm_memory::GuestAddress;

const LOW_BYTES: u64 = 32 << 20;
/// Two more regions that adjoin each other, far above the first.
const HIGH: u64 = 1 << 32;
const HIGH_BYTES: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);
const CAPACITY: u64 = SLOTS as u64 * 8;
const QUEUE_SIZE: u16 = 128;

const NEXT: u16 = Descriptor::NEXT;
const WRITE: u16 = Descriptor::WRITE;
const INDIRECT: u16 = Descriptor::INDIRECT;

fn attach(host: &Host, name: &str, options: Options) -> (Device, Vec<Queue>) {
    let (low, high) = (LOW_BYTES as usize, HIGH_BYTES as usize);
    let memory = Memory::with_regions(&[(0, low), (HIGH, high), (HIGH + HIGH_BYTES, high)]).unwrap();
    let mut device = Device::connect(host.socket(name), memory, options).unwrap();
    let queues = device.start().unwrap();
    (device, queues)
}

/// Two tags with many descriptors each.
fn roomy() -> Options {
    Options { depth: 2, queue_size: QUEUE_SIZE, data_bytes: 2 << 20, ..Options::default() }
}

/// What is expected back: a status, or the head alone, with nothing written.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Answer {
    Is(Status),
    Nothing,
}

const OK: Answer = Answer::Is(Status::Ok);
const IO_ERROR: Answer = Answer::Is(Status::IoError);
const UNSUPPORTED: Answer = Answer::Is(Status::Unsupported);

type Case = (&'static str, Op, Vec<Descriptor>, Answer);

/// Makes descriptors, each followed by the next one in the table unless its flags say otherwise.
fn chain(parts: &[(u64, u32, u16)]) -> Vec<Descriptor> {
    let descriptor = |(n, part): (usize, &(u64, u32, u16))| Descriptor {
        address: part.0,
        bytes: part.1,
        flags: part.2,
        next: n as u16 + 1,
    };
    parts.iter().enumerate().map(descriptor).collect()
}

/// Where the pieces of tag 0 are.
struct Places {
    header: u64,
    data: u64,
    status: u64,
    /// Room for an indirect table.
    table: u64,
}

impl Places {
    fn of(queue: &Queue, memory: &Memory) -> Self {
        Self {
            header: queue.header_address(0).0,
            data: queue.data_address(0).0,
            status: queue.status_address(0).0,
            table: memory.allocate(64 << 10).unwrap().0,
        }
    }

    fn header(&self) -> (u64, u32, u16) {
        (self.header, 16, NEXT)
    }

    fn status(&self) -> (u64, u32, u16) {
        (self.status, 1, WRITE)
    }

    /// A chain of a header, one data descriptor and a status.
    fn with(&self, address: u64, bytes: u32, flags: u16) -> Vec<Descriptor> {
        chain(&[self.header(), (address, bytes, flags | NEXT), self.status()])
    }
}

/// Sends the cases one after another. After each, the queue must do its work.
fn check(host: &Host, queue: &mut Queue, cases: Vec<Case>) {
    for (n, (name, op, descriptors, expected)) in cases.into_iter().enumerate() {
        let errors = host.vms[0].errors();
        queue.write_header(0, op);
        queue.stage_raw(0, &descriptors).unwrap();
        queue.publish().unwrap();
        let done = queue.wait(PATIENCE).unwrap_or_else(|err| panic!("{name}: {err}"));
        match expected {
            Answer::Is(status) => assert_eq!(done.status, status, "{name}"),
            Answer::Nothing => assert_eq!((done.status, done.used_bytes), (Status::Unwritten, 0), "{name}"),
        }
        assert_eq!(host.vms[0].errors(), errors + u64::from(expected != OK), "{name}");
        let page = page_of(n as u8, n as u64);
        queue.write_pages(5000, &[page]).unwrap_or_else(|err| panic!("after {name}: {err}"));
        assert!(queue.read_page(5000).unwrap() == page, "after {name}");
    }
    host.store.validate();
}

const READ: Op = Op::Read { sector: 0, bytes: 4096 };
const STORE: Op = Op::Write { sector: 0, bytes: 4096 };

#[test]
fn descriptors_of_the_wrong_direction_length_or_place_are_refused() {
    let host = Host::start(&["web1"]);
    let (device, mut queues) = attach(&host, "web1", roomy());
    let at = Places::of(&queues[0], device.memory());
    let (header, status, data) = (at.header(), at.status(), at.data);
    let writable_header = (at.header, 16, NEXT | WRITE);
    let readable_status = (at.status, 1, 0);
    let end = HIGH + 2 * HIGH_BYTES;
    let nothing = Answer::Nothing;
    let cases: Vec<Case> = vec![
        (
            "read, header writable",
            READ,
            chain(&[writable_header, (data, 4096, NEXT | WRITE), status]),
            IO_ERROR,
        ),
        ("write, header writable", STORE, chain(&[writable_header, (data, 4096, NEXT), status]), nothing),
        ("status readable", READ, chain(&[header, (data, 4096, NEXT | WRITE), readable_status]), nothing),
        ("flush, status readable", Op::Flush, chain(&[header, readable_status]), nothing),
        ("no status", STORE, chain(&[header, (data, 4096, 0)]), nothing),
        ("header only", Op::Flush, chain(&[(at.header, 16, 0)]), nothing),
        ("status only", Op::Flush, chain(&[status]), IO_ERROR),
        ("read into readable data", READ, at.with(data, 4096, 0), IO_ERROR),
        ("write from writable data", STORE, at.with(data, 4096, WRITE), IO_ERROR),
        ("short header", Op::Flush, chain(&[(at.header, 15, NEXT), status]), IO_ERROR),
        ("empty header", READ, chain(&[(at.header, 0, NEXT), (data, 4096, NEXT | WRITE), status]), nothing),
        ("empty data", STORE, at.with(data, 0, 0), nothing),
        ("empty status", Op::Flush, chain(&[header, (at.status, 0, WRITE)]), nothing),
        ("data of 4 GiB", READ, at.with(data, u32::MAX, WRITE), IO_ERROR),
        ("data of 4 GiB to store", STORE, at.with(data, u32::MAX, 0), IO_ERROR),
        ("header of 4 GiB", Op::Flush, chain(&[(at.header, u32::MAX, NEXT), status]), IO_ERROR),
        ("data in no region", READ, at.with(1 << 40, 4096, WRITE), IO_ERROR),
        ("data past the end", READ, at.with(end - 512, 4096, WRITE), IO_ERROR),
        ("data across a hole", STORE, at.with(LOW_BYTES - 512, 4096, 0), IO_ERROR),
        ("data around the address space", READ, at.with(u64::MAX - 511, 4096, WRITE), IO_ERROR),
        ("data at the last address", READ, at.with(u64::MAX, 1, WRITE), IO_ERROR),
        ("header outside", READ, chain(&[(1 << 40, 16, NEXT), status]), IO_ERROR),
        ("status outside", Op::Flush, chain(&[header, (1 << 40, 1, WRITE)]), nothing),
        ("data across adjoining regions", READ, at.with(HIGH + HIGH_BYTES - 512, 4096, WRITE), OK),
        ("store across adjoining regions", STORE, at.with(HIGH + HIGH_BYTES - 512, 4096, 0), OK),
    ];
    check(&host, &mut queues[0], cases);
}

#[test]
fn sectors_lengths_and_types_that_cannot_be_are_refused() {
    let host = Host::start(&["web1"]);
    let (device, mut queues) = attach(&host, "web1", roomy());
    let at = Places::of(&queues[0], device.memory());
    let (header, status, data) = (at.header(), at.status(), at.data);
    let wide_status = (at.status - 1, 2, WRITE);
    let read = |sector| Op::Read { sector, bytes: 0 };
    let write = |sector| Op::Write { sector, bytes: 0 };
    let other = |kind, sector| Op::Other { kind, sector, bytes: 0, device_writes: true };
    let mut cases: Vec<Case> = vec![
        ("flush with data", Op::Flush, at.with(data, 512, 0), OK),
        ("read of nothing", read(0), chain(&[header, status]), OK),
        ("GET_ID without room", Op::GetId, chain(&[header, status]), IO_ERROR),
        ("GET_ID into readable data", Op::GetId, at.with(data, 20, 0), IO_ERROR),
        ("write with a wide status", STORE, chain(&[header, (data, 4096, NEXT), wide_status]), IO_ERROR),
        ("last sectors", read(CAPACITY - 8), at.with(data, 4096, WRITE), OK),
    ];
    for bytes in [1, 511, 513, 4095] {
        cases.push(("part of a sector read", read(0), at.with(data, bytes, WRITE), IO_ERROR));
        cases.push(("part of a sector written", write(0), at.with(data, bytes, 0), IO_ERROR));
    }
    for sector in [u64::MAX, u64::MAX / 512, u64::MAX / 512 + 1, 1 << 55, CAPACITY, CAPACITY - 1] {
        cases.push(("read past the end", read(sector), at.with(data, 4096, WRITE), IO_ERROR));
        cases.push(("write past the end", write(sector), at.with(data, 4096, 0), IO_ERROR));
    }
    for kind in [2, 3, 5, 10, 12, 14, 99, 1 << 31, u32::MAX] {
        cases.push(("unknown type", other(kind, 0), at.with(data, 4096, WRITE), UNSUPPORTED));
        cases.push(("unknown type", other(kind, u64::MAX), at.with(data, 4096, 0), UNSUPPORTED));
        cases.push(("unknown type", other(kind, 0), chain(&[header, status]), UNSUPPORTED));
    }
    check(&host, &mut queues[0], cases);
}

#[test]
fn chains_that_loop_or_leave_their_table_end() {
    let host = Host::start(&["web1"]);
    let (device, mut queues) = attach(&host, "web1", roomy());
    let at = Places::of(&queues[0], device.memory());
    let nothing = Answer::Nothing;
    let to = |next: u16| Descriptor { address: at.data, bytes: 512, flags: NEXT, next };
    let first = chain(&[at.header()])[0];
    let cases: Vec<Case> = vec![
        ("loop of one", STORE, vec![Descriptor { next: 0, ..first }], nothing),
        ("loop of two", STORE, vec![first, to(0)], nothing),
        ("loop behind the header", STORE, vec![first, to(2), to(1)], nothing),
        ("next just outside", STORE, vec![first, to(QUEUE_SIZE)], nothing),
        ("next far outside", STORE, vec![first, to(u16::MAX)], nothing),
    ];
    check(&host, &mut queues[0], cases);
}

#[test]
fn indirect_tables_that_cannot_be_are_refused() {
    let host = Host::start(&["web1"]);
    let (device, mut queues) = attach(&host, "web1", roomy());
    let at = Places::of(&queues[0], device.memory());
    let table = |bytes, flags| chain(&[(at.table, bytes, flags | INDIRECT)]);
    let nothing = Answer::Nothing;
    let whole = at.with(at.data, 4096, WRITE);
    let loops = vec![whole[0], Descriptor { next: 1, ..whole[1] }];
    let mut beyond = whole.clone();
    beyond[1].next = 3;
    let nested = vec![whole[0], chain(&[(at.table, 48, INDIRECT)])[0]];
    let mut long = vec![(at.data, 1, NEXT | WRITE); 1100];
    long[0] = at.header();
    long[1099] = at.status();
    let after_header = chain(&[at.header(), (at.table + 16, 32, INDIRECT)]);
    let relative = vec![whole[0], Descriptor { next: 1, ..whole[1] }, whole[2]];
    let tables: Vec<(&str, Vec<Descriptor>, Vec<Descriptor>, Answer)> = vec![
        ("sound", whole.clone(), table(48, 0), OK),
        ("sound and called writable", whole.clone(), table(48, WRITE), OK),
        ("behind a direct header", relative, after_header, OK),
        ("empty", whole.clone(), table(0, 0), nothing),
        ("no multiple of 16", whole.clone(), table(47, 0), nothing),
        ("shorter than its chain", whole.clone(), table(32, 0), nothing),
        ("of 4 GiB", whole.clone(), table(u32::MAX - 15, 0), nothing),
        ("with NEXT", whole.clone(), table(48, NEXT), nothing),
        ("of itself", table(48, 0), table(48, 0), nothing),
        ("nested", nested, table(32, 0), nothing),
        ("looping", loops, table(48, 0), nothing),
        ("left by a next", beyond, table(48, 0), nothing),
        ("of more places than any queue", chain(&long), table(1100 * 16, 0), nothing),
        ("in no region", whole.clone(), chain(&[(1 << 40, 48, INDIRECT)]), nothing),
        ("past the end", whole, chain(&[(HIGH + 2 * HIGH_BYTES - 16, 48, INDIRECT)]), nothing),
    ];
    for (name, content, descriptors, expected) in tables {
        let bytes: Vec<u8> = content.iter().flat_map(encode).collect();
        device.memory().write(GuestAddress(at.table), &bytes).unwrap();
        check(&host, &mut queues[0], vec![(name, READ, descriptors, expected)]);
    }
}

fn encode(descriptor: &Descriptor) -> Vec<u8> {
    let mut bytes = descriptor.address.to_le_bytes().to_vec();
    bytes.extend(descriptor.bytes.to_le_bytes());
    bytes.extend(descriptor.flags.to_le_bytes());
    bytes.extend(descriptor.next.to_le_bytes());
    bytes
}

#[test]
fn a_ring_that_makes_no_sense_harms_nobody_else_and_works_again_after_a_new_start() {
    let host = Host::start(&["web1", "web2"]);
    let (_other, mut other_queues) = attach(&host, "web2", Options::default());
    let options = Options { queues: 2, ..Options::default() };
    let spoils: [fn(&mut Queue); 4] = [
        |queue| queue.ring().push(QUEUE_SIZE),
        |queue| queue.ring().push(u16::MAX),
        |queue| queue.ring().publish_index(QUEUE_SIZE + 100),
        |queue| queue.ring().publish_index(u16::MAX),
    ];
    for (n, spoil) in spoils.into_iter().enumerate() {
        let (device, mut queues) = attach(&host, "web1", options.clone());
        spoil(&mut queues[0]);
        if n < 2 {
            queues[0].publish().unwrap();
        }
        for _ in 0..3 {
            queues[0].kick().unwrap();
            let none = queues[0].wait(Duration::from_millis(50));
            assert!(matches!(none, Err(Error::Timeout(_))), "spoil {n}: {none:?}");
        }
        assert_eq!(host.vms[0].errors(), n as u64 + 1, "a broken ring counts once");
        for queue in [&mut queues[1], &mut other_queues[0]] {
            let page = page_of(n as u8, 77);
            queue.write_pages(9, &[page]).unwrap();
            assert!(queue.read_page(9).unwrap() == page);
        }
        drop((device, queues));
        let (_device, mut queues) = attach(&host, "web1", options.clone());
        assert!(queues[0].read_page(9).unwrap() == page_of(n as u8, 77));
    }
    host.store.validate();
}
