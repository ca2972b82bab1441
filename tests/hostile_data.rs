//! Data and ranges that are unusual but legal, which must work to the last byte, beside those that are not, which must
//! leave every page as it was.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]
#![allow(clippy::cast_possible_truncation, reason = "patterns made of numbers may wrap")]

mod support;

use std::time::Duration;

use ballast::frontend::{Descriptor, Device, Memory, Op, Options, Queue, Range, Status};
use ballast::page::{PAGE_SIZE, Page, ZERO_PAGE};
use support::{Host, SLOTS, page_of};
use vm_memory::GuestAddress;

const PATIENCE: Duration = Duration::from_secs(60);
const CAPACITY: u64 = SLOTS as u64 * 8;
const NEXT: u16 = Descriptor::NEXT;
const WRITE: u16 = Descriptor::WRITE;

fn attach(host: &Host, options: Options) -> (Device, Vec<Queue>) {
    let memory = Memory::with_bytes(32 << 20).unwrap();
    let mut device = Device::connect(host.socket("web1"), memory, options).unwrap();
    let queues = device.start().unwrap();
    (device, queues)
}

/// Two tags with 512 descriptors each.
fn roomy() -> Options {
    Options { depth: 2, queue_size: 1024, data_bytes: 2 << 20, ..Options::default() }
}

/// Sends a chain of these descriptors behind each other; gives the status and the bytes that were written.
fn send(queue: &mut Queue, parts: &[(u64, u32, u16)]) -> (Status, u32) {
    let last = parts.len() - 1;
    let descriptor = |(n, part): (usize, &(u64, u32, u16))| Descriptor {
        address: part.0,
        bytes: part.1,
        flags: part.2 | if n < last { NEXT } else { 0 },
        next: n as u16 + 1,
    };
    let chain: Vec<_> = parts.iter().enumerate().map(descriptor).collect();
    queue.stage_raw(0, &chain).unwrap();
    queue.publish().unwrap();
    let done = queue.wait(PATIENCE).unwrap();
    (done.status, done.used_bytes)
}

/// Cuts `bytes` from `address` on into pieces of unlike lengths.
fn pieces(address: u64, bytes: u32, lengths: &[u32]) -> Vec<(GuestAddress, u32)> {
    let (mut pieces, mut done) = (Vec::new(), 0);
    for length in lengths.iter().cycle() {
        if done == bytes {
            break;
        }
        let length = (*length).min(bytes - done);
        pieces.push((GuestAddress(address + u64::from(done)), length));
        done += length;
    }
    pieces
}

#[test]
fn header_status_and_data_may_be_cut_in_any_way() {
    let host = Host::start(&["web1"]);
    let (device, mut queues) = attach(&host, roomy());
    let queue = &mut queues[0];
    let (header, data) = (queue.header_address(0).0, queue.data_address(0).0);
    let status = queue.status_address(0).0;
    let page = page_of(4, 1);
    device.memory().write(GuestAddress(data), &page).unwrap();
    let op = Op::Write { sector: 80, bytes: 4096 };
    queue.write_header(0, op);
    let cut = [(header, 1, 0), (header + 1, 7, 0), (header + 8, 8, 0), (data, 4096, 0), (status, 1, WRITE)];
    assert_eq!(send(queue, &cut), (Status::Ok, 1));
    // The header and the data in one descriptor, and one that has parts of both.
    let both = device.memory().allocate(8192).unwrap().0;
    let mut bytes = [0; 16];
    device.memory().read(GuestAddress(header), &mut bytes).unwrap();
    device.memory().write(GuestAddress(both), &bytes).unwrap();
    device.memory().write(GuestAddress(both + 16), &page_of(4, 2)).unwrap();
    queue.write_header(0, op);
    assert_eq!(send(queue, &[(both, 4112, 0), (status, 1, WRITE)]), (Status::Ok, 1));
    assert!(queue.read_page(10).unwrap() == page_of(4, 2));
    queue.write_header(0, op);
    assert_eq!(send(queue, &[(both, 5, 0), (both + 5, 4107, 0), (status, 1, WRITE)]), (Status::Ok, 1));
    // The status is the last byte of the descriptor that the data goes to.
    let op = Op::Read { sector: 80, bytes: 4096 };
    for parts in [&[4097][..], &[4096 - 512, 513], &[1, 4096], &[4095, 1, 1]] {
        device.memory().write(GuestAddress(both), &[0xee; 4200]).unwrap();
        queue.write_header(0, op);
        let mut chain = vec![(header, 16, 0)];
        chain.extend(pieces(both, 4097, parts).iter().map(|piece| (piece.0.0, piece.1, WRITE)));
        assert_eq!(send(queue, &chain), (Status::Unwritten, 4097), "the frame's status is not used");
        let mut found = [0; 4098];
        device.memory().read(GuestAddress(both), &mut found).unwrap();
        assert!(found[..4096] == page_of(4, 2) && found[4096..] == [0, 0xee], "{parts:?}");
    }
    assert_eq!(host.vms[0].errors(), 0);
    host.store.validate();
}

#[test]
fn a_long_request_in_odd_pieces_is_read_back() {
    let host = Host::start(&["web1"]);
    let (device, mut queues) = attach(&host, roomy());
    let queue = &mut queues[0];
    let (from, to, bytes) = (queue.data_address(0).0, queue.data_address(1).0, 1 << 20);
    let pages: Vec<Page> = (0..256).map(|n| page_of(n as u8, n)).collect();
    device.memory().write(GuestAddress(from), pages.as_flattened()).unwrap();
    for (write, read) in [
        (&[513, 4095, 1, 8191, 2047][..], &[4095, 513, 20_000][..]),
        (&[3, 100_000], &[1 << 20]),
        (&[65_537], &[4096, 4097, 511, 7000]),
    ] {
        for (op, at, lengths) in
            [(Op::Write { sector: 803, bytes }, from, write), (Op::Read { sector: 803, bytes }, to, read)]
        {
            device.memory().write(GuestAddress(to), &vec![0xee; bytes as usize]).unwrap();
            queue.stage_buffers(0, op, &pieces(at, bytes, lengths)).unwrap();
            queue.publish().unwrap();
            assert_eq!(queue.wait(PATIENCE).unwrap().status, Status::Ok);
        }
        let mut found = vec![0; bytes as usize];
        device.memory().read(GuestAddress(to), &mut found).unwrap();
        assert!(found == pages.as_flattened(), "{write:?} {read:?}");
    }
    // The same buffer for every page of a write, and of a read, whose last page stays in it.
    let twice = [(GuestAddress(from + 4096), 4096), (GuestAddress(from + 4096), 4096)];
    for op in [Op::Write { sector: 8, bytes: 0 }, Op::Read { sector: 8 * 200, bytes: 0 }] {
        queue.stage_buffers(0, op, &twice).unwrap();
        queue.publish().unwrap();
        assert_eq!(queue.wait(PATIENCE).unwrap().status, Status::Ok);
    }
    let mut last = ZERO_PAGE;
    device.memory().read(GuestAddress(from + 4096), &mut last).unwrap();
    assert!(last == queue.read_page(201).unwrap());
    assert_eq!(queue.read_pages(1, 2).unwrap(), [pages[1], pages[1]]);
    host.store.validate();
}

#[test]
fn get_id_fills_what_room_there_is() {
    let host = Host::start(&["web1"]);
    let (device, mut queues) = attach(&host, roomy());
    let queue = &mut queues[0];
    let (header, data) = (queue.header_address(0).0, queue.data_address(0).0);
    let status = queue.status_address(0).0;
    for room in [1, 5, 19, 20, 21, 4096] {
        device.memory().write(GuestAddress(data), &[0xee; 32]).unwrap();
        queue.write_header(0, Op::GetId);
        let chain = [(header, 16, 0), (data, room, WRITE), (status, 1, WRITE)];
        assert_eq!(send(queue, &chain), (Status::Ok, room.min(20) + 1), "{room}");
        let mut found = [0; 32];
        device.memory().read(GuestAddress(data), &mut found).unwrap();
        let written = room.min(20) as usize;
        assert!(found[..written] == b"ballast-web1\0\0\0\0\0\0\0\0"[..written], "{room}");
        assert!(found[written..].iter().all(|byte| *byte == 0xee), "{room}");
    }
}

#[test]
fn ranges_that_cannot_be_drop_nothing() {
    let host = Host::start(&["web1"]);
    let (_device, mut queues) = attach(&host, roomy());
    let queue = &mut queues[0];
    let pages: Vec<Page> = (0..20).map(|n| page_of(n, u64::from(n) + 1)).collect();
    queue.write_pages(100, &pages).unwrap();
    let range = |sector, sectors, flags| Range { sector, sectors, flags };
    let good = range(800, 160, 0);
    let discard = |ranges| Op::Discard { ranges };
    let zero = |ranges| Op::WriteZeroes { ranges };
    let cut = |kind, bytes| Op::Other { kind, sector: 0, bytes, device_writes: false };
    let cases: Vec<(Op, Vec<Range>, Status)> = vec![
        (discard(2), vec![good, range(800, 8, 1)], Status::Unsupported),
        (discard(1), vec![range(800, 8, 2)], Status::Unsupported),
        (discard(1), vec![range(800, 8, u32::MAX)], Status::Unsupported),
        (zero(2), vec![good, range(800, 8, 2)], Status::Unsupported),
        (zero(1), vec![range(800, 8, 1 << 31)], Status::Unsupported),
        (discard(2), vec![good, range(CAPACITY, 1, 0)], Status::IoError),
        (discard(2), vec![good, range(CAPACITY - 1, 2, 0)], Status::IoError),
        (zero(2), vec![good, range(CAPACITY - 7, 8, 0)], Status::IoError),
        (discard(1), vec![range(0, u32::MAX, 0)], Status::IoError),
        (zero(1), vec![range(0, u32::MAX, 1)], Status::IoError),
        (discard(1), vec![range(u64::MAX, u32::MAX, 0)], Status::IoError),
        (zero(1), vec![range(u64::MAX / 512, 1, 0)], Status::IoError),
        (zero(1), vec![range(1 << 55, 8, 0)], Status::IoError),
        (discard(257), vec![good; 257], Status::IoError),
        (zero(257), vec![good; 257], Status::IoError),
        (discard(0), vec![], Status::IoError),
        (zero(0), vec![], Status::IoError),
        (cut(11, 24), vec![good; 2], Status::IoError),
        (cut(13, 15), vec![good], Status::IoError),
    ];
    let bad = cases.len() as u64;
    for (n, (op, ranges, expected)) in cases.into_iter().enumerate() {
        queue.write_ranges(0, &ranges).unwrap();
        assert_eq!(queue.run(op).unwrap(), expected, "case {n}: {op:?}");
        assert!(queue.read_pages(100, 20).unwrap() == pages, "case {n}: {op:?}");
    }
    assert_eq!(host.vms[0].errors(), bad);
    host.store.validate();
}

#[test]
fn ranges_drop_whole_pages_and_zero_single_sectors() {
    let host = Host::start(&["web1"]);
    let (_device, mut queues) = attach(&host, roomy());
    let queue = &mut queues[0];
    let range = |sector, sectors, flags| Range { sector, sectors, flags };
    let cases: [(bool, Vec<Range>); 8] = [
        (false, vec![range(801, 7, 0)]),
        (false, vec![range(807, 30, 0), range(900, 1, 0)]),
        (false, vec![range(800, 80, 0), range(840, 80, 0), range(800, 80, 0)]),
        (false, vec![range(800, 0, 0), range(CAPACITY, 0, 0), range(CAPACITY - 8, 8, 0)]),
        (false, (0..256).map(|n| range(800 + n % 160, 1 + n as u32 % 20, 0)).collect()),
        (true, vec![range(801, 6, 0), range(815, 1, 1)]),
        (true, vec![range(803, 77, 1), range(850, 100, 0), range(860, 3, 0)]),
        (true, (0..256).filter(|n| n % 3 == 0).map(|n| range(800 + n % 200, 1, 1)).collect()),
    ];
    for (n, (zeroes, ranges)) in cases.into_iter().enumerate() {
        let pages: Vec<Page> = (0..30).map(|at| page_of(at % 4 + 1, u64::from(at) + 1)).collect();
        queue.write_pages(100, &pages).unwrap();
        let mut truth = pages.as_flattened().to_vec();
        for range in ranges.iter().filter(|range| range.sector < 800 + 240) {
            let (start, end) = (range.sector - 800, range.sector - 800 + u64::from(range.sectors));
            let whole = |at: u64| zeroes || (at / 8 * 8 >= start && (at / 8 + 1) * 8 <= end);
            for at in (start..end).filter(|at| whole(*at)) {
                truth[at as usize * 512..][..512].fill(0);
            }
        }
        queue.write_ranges(0, &ranges).unwrap();
        let count = ranges.len() as u32;
        let op = if zeroes { Op::WriteZeroes { ranges: count } } else { Op::Discard { ranges: count } };
        assert_eq!(queue.run(op).unwrap(), Status::Ok, "case {n}");
        let found = queue.read_pages(100, 30).unwrap();
        assert!(found.as_flattened() == truth, "case {n}");
    }
    assert_eq!(host.vms[0].errors(), 0);
    host.store.validate();
}

#[test]
fn two_queues_that_write_sectors_of_the_same_pages_lose_none() {
    let host = Host::start(&["web1"]);
    let options = Options { queues: 2, depth: 8, ..Options::default() };
    let (_device, queues) = attach(&host, options);
    let sector_of = |queue: usize, sector: u64, round: u64| -> Vec<u8> {
        (0..512u64).map(|at| (at / 9 * round + sector * 31 + queue as u64) as u8).collect()
    };
    const ROUNDS: u64 = 60;
    let mut queues: Vec<Queue> = std::thread::scope(|scope| {
        let write = |(n, mut queue): (usize, Queue)| {
            scope.spawn(move || {
                for round in 1..=ROUNDS {
                    for sector in (n as u64..64).step_by(2) {
                        let bytes = sector_of(n, sector, round);
                        queue.write_bytes(800 + sector, &bytes).unwrap();
                        let mut found = [0; 512];
                        queue.read_bytes(800 + sector, &mut found).unwrap();
                        assert!(found[..] == bytes, "queue {n} sector {sector} round {round}");
                    }
                }
                queue
            })
        };
        let threads: Vec<_> = queues.into_iter().enumerate().map(write).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let found = queues[0].read_pages(100, 8).unwrap();
    for (sector, bytes) in found.as_flattened().chunks(512).enumerate() {
        assert!(bytes == sector_of(sector % 2, sector as u64, ROUNDS), "sector {sector}");
    }
    assert_eq!(found.len() * PAGE_SIZE, 64 * 512);
    host.store.validate();
}
