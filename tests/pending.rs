//! Requests for pages that are in the writeback file, through a real front end: they come back right, out of order,
//! and no ring, session or daemon ends in the middle of one.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]
#![allow(clippy::cast_possible_truncation, reason = "patterns made of numbers may wrap")]

mod support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ballast::frontend::{Device, Memory, Op, Options, Queue, Status, Wait};
use ballast::page::{PAGE_SIZE, Page};
use ballast::writeback::io::faulty::Fault;
use support::{Host, Setup, page_of};

const MEMORY_BYTES: usize = 32 << 20;
const PATIENCE: Duration = Duration::from_secs(60);
/// Long enough for anything that does not wait for the file.
const SHORT: Duration = Duration::from_millis(200);

fn host(names: &[&str]) -> Host {
    Host::with(names, Setup { file: true, ..Setup::default() })
}

fn attach(host: &Host, name: &str, options: Options) -> (Device, Vec<Queue>) {
    let memory = Memory::with_bytes(MEMORY_BYTES).expect("memory");
    let mut device = Device::connect(host.socket(name), memory, options).expect("the device answers");
    let queues = device.start().expect("rings start");
    (device, queues)
}

/// Pages that are not same-filled, and so can go to the file.
fn page(seed: u64) -> Page {
    page_of(1 + (seed % 4) as u8, seed)
}

fn read(disk: &mut Queue, tag: u16, slot: u64, pages: u32) {
    disk.stage(tag, Op::Read { sector: slot * 8, bytes: pages * 4096 }).unwrap();
    disk.publish().unwrap();
    disk.kick().unwrap();
}

fn data(disk: &Queue, tag: u16, pages: usize) -> Vec<Page> {
    let mut found = vec![[0; PAGE_SIZE]; pages];
    disk.read_data(tag, 0, found.as_flattened_mut()).unwrap();
    found
}

/// Holds all reads back that come until [`release_all`].
fn hold_reads(host: &Host) {
    (0..4000).for_each(|later| host.faulty().fail_read(later, Fault::Hold));
}

fn release_all(host: &Host) {
    host.faulty().heal();
    host.faulty().release();
}

/// Reads and overwrites at random, many requests at a time, while pages move to the file under it.
fn random_requests(pages_per_request: u32, rounds: u64) {
    const PAGES: u64 = 3000;
    let host = host(&["web1"]);
    let (_device, mut queues) = attach(&host, "web1", Options::default());
    let disk = &mut queues[0];
    let mut truth: Vec<u64> = (0..PAGES).collect();
    for at in (0..PAGES).step_by(30) {
        disk.write_pages(at, &(at..at + 30).map(page).collect::<Vec<_>>()).unwrap();
    }
    assert!(host.write_back("web1", 0..PAGES as u32) > 2000);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                host.write_back("web1", (0..PAGES as u32).step_by(7));
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        let mut noise = 1u64;
        let mut asked: Vec<Option<(u64, Option<u64>)>> = vec![None; usize::from(disk.depth())];
        let (mut sent, mut reads) = (0, 0u64);
        while sent < rounds || disk.in_flight() > 0 {
            while let Some(tag) = disk.free_tag().filter(|_| sent < rounds) {
                noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
                let slot = (noise >> 20) % (PAGES - u64::from(pages_per_request));
                let width = u64::from(pages_per_request);
                let overlaps = |other: &Option<(u64, Option<u64>)>| {
                    other.is_some_and(|(at, _)| at < slot + width && slot < at + width)
                };
                if asked.iter().any(overlaps) {
                    break;
                }
                let bytes = pages_per_request * 4096;
                let write = noise >> 60 < 5;
                if write {
                    let new: Vec<Page> = (0..width).map(|n| page(noise % 100_000 + n)).collect();
                    disk.write_data(tag, 0, new.as_flattened()).unwrap();
                    disk.stage(tag, Op::Write { sector: slot * 8, bytes }).unwrap();
                } else {
                    disk.stage(tag, Op::Read { sector: slot * 8, bytes }).unwrap();
                }
                asked[usize::from(tag)] = Some((slot, write.then_some(noise % 100_000)));
                sent += 1;
            }
            disk.publish().unwrap();
            let done = disk.wait(PATIENCE).unwrap();
            assert_eq!(done.status, Status::Ok);
            let (slot, written) = asked[usize::from(done.tag)].take().expect("answered once");
            let found = data(disk, done.tag, pages_per_request as usize);
            for (n, found) in found.iter().enumerate() {
                let at = slot as usize + n;
                match written {
                    Some(seed) => truth[at] = seed + n as u64,
                    None => assert!(*found == page(truth[at]), "slot {at}"),
                }
                reads += u64::from(written.is_none());
            }
        }
        over.store(true, Ordering::Relaxed);
        let events = host.pages("web1").accounting().events;
        assert!(events.loaded_from_file > reads / 20, "{} of {reads}", events.loaded_from_file);
        assert!(events.promoted_pages > 0);
    });
    host.store.validate();
    assert_eq!(host.vms[0].errors(), 0);
}

#[test]
fn single_pages_come_back_right_while_others_are_overwritten_and_moved() {
    random_requests(1, 10_000);
}

#[test]
fn long_requests_come_back_right_while_others_are_overwritten_and_moved() {
    random_requests(32, 1500);
}

#[test]
fn what_comes_from_the_file_wakes_a_worker_that_sleeps() {
    let host = Host::with(&["web1"], Setup { file: true, poll: Duration::ZERO, ..Setup::default() });
    let (_device, mut queues) = attach(&host, "web1", Options { queues: 2, ..Options::default() });
    for (n, disk) in queues.iter_mut().enumerate() {
        disk.write_pages(n as u64 * 1000, &(0..1000).map(page).collect::<Vec<_>>()).unwrap();
    }
    assert_eq!(host.write_back("web1", 0..2000), 2000);
    std::thread::scope(|scope| {
        for (n, disk) in queues.iter_mut().enumerate() {
            scope.spawn(move || {
                disk.set_wait(Wait::Sleep);
                for slot in 0..1000 {
                    assert!(disk.read_page(n as u64 * 1000 + slot).unwrap() == page(slot), "slot {slot}");
                }
            });
        }
    });
    assert_eq!(host.pages("web1").accounting().events.loaded_from_file, 2000);
}

#[test]
fn sectors_of_a_page_in_the_file_change_alone() {
    let host = host(&["web1"]);
    let (_device, mut queues) = attach(&host, "web1", Options::default());
    let disk = &mut queues[0];
    let pages: Vec<Page> = (0..24).map(page).collect();
    let mut truth = pages.as_flattened().to_vec();
    disk.write_pages(0, &pages).unwrap();
    for (n, (sector, sectors)) in
        [(1, 1), (0, 9), (7, 2), (15, 30), (8, 8), (100, 29), (20, 20)].into_iter().enumerate()
    {
        assert!(host.write_back("web1", 0..24) > 0);
        let bytes: Vec<u8> = (0..sectors * 512).map(|i| (i / 7 + n) as u8).collect();
        disk.write_bytes(sector as u64, &bytes).unwrap();
        truth[sector * 512..][..bytes.len()].copy_from_slice(&bytes);
        host.write_back("web1", 0..24);
        let zeroes = ballast::frontend::Range { sector: 130 + n as u64 * 3, sectors: 17, flags: 0 };
        disk.write_ranges(0, &[zeroes]).unwrap();
        disk.run_ok(Op::WriteZeroes { ranges: 1 }).unwrap();
        truth[(130 + n * 3) * 512..][..17 * 512].fill(0);
        host.write_back("web1", 0..24);
        let mut found = vec![0; truth.len()];
        disk.read_bytes(0, &mut found).unwrap();
        assert!(found == truth, "after write {n}");
        let mut odd = vec![0; 3 * 512];
        disk.read_bytes(6, &mut odd).unwrap();
        assert!(odd == truth[6 * 512..9 * 512]);
    }
    host.store.validate();
}

#[test]
fn a_slow_file_holds_nobody_else_up() {
    let host = host(&["web1", "web2"]);
    let (_device, mut queues) = attach(&host, "web1", Options::default());
    let (_other, mut other_queues) = attach(&host, "web2", Options::default());
    let disk = &mut queues[0];
    let pages: Vec<Page> = (0..1200).map(page).collect();
    disk.write_pages(0, &pages).unwrap();
    assert_eq!(host.write_back("web1", 0..1000), 1000);
    hold_reads(&host);
    // More than may be on their way at once.
    for tag in 0..31 {
        read(disk, tag, u64::from(tag) * 32, 32);
    }
    for slot in 1000..1200 {
        read(disk, 31, slot, 1);
        let done = disk.wait(PATIENCE).unwrap();
        assert_eq!((done.tag, done.status), (31, Status::Ok));
        assert!(data(disk, 31, 1)[0] == pages[slot as usize]);
    }
    other_queues[0].write_pages(3, &pages[..20]).unwrap();
    assert!(other_queues[0].read_pages(3, 20).unwrap() == pages[..20]);
    assert!(host.faulty().submitted().0 < 40, "{:?}", host.faulty().submitted());
    release_all(&host);
    for _ in 0..31 {
        let done = disk.wait(PATIENCE).unwrap();
        assert_eq!(done.status, Status::Ok);
        let from = usize::from(done.tag) * 32;
        assert!(data(disk, done.tag, 32) == pages[from..from + 32]);
    }
    host.store.validate();
}

#[test]
fn a_read_that_fails_twice_fails_its_request_and_the_page_can_be_read_again() {
    let host = host(&["web1"]);
    let (_device, mut queues) = attach(&host, "web1", Options::default());
    let disk = &mut queues[0];
    let pages: Vec<Page> = (0..8).map(page).collect();
    disk.write_pages(0, &pages).unwrap();
    assert_eq!(host.write_back("web1", 0..8), 8);
    host.faulty().damage(0..u64::MAX);
    assert_eq!(disk.run(Op::Read { sector: 0, bytes: 8 * 4096 }).unwrap(), Status::IoError);
    host.faulty().heal();
    let read_errors = host.store.shared().file.as_ref().unwrap().status().read_errors;
    let events = host.pages("web1").accounting().events;
    assert_eq!((host.vms[0].errors(), events.file_load_fail), (1, 1));
    assert_eq!(read_errors, 9, "all together, and then each alone");
    assert_eq!(events.decompress_fail, 0, "nothing is wrong with the page");
    assert!(disk.read_pages(0, 8).unwrap() == pages);
    host.faulty().damage(0..u64::MAX);
    disk.write_data(0, 0, &[7; 512]).unwrap();
    host.write_back("web1", 0..8);
    assert_eq!(disk.run(Op::Write { sector: 1, bytes: 512 }).unwrap(), Status::IoError);
    host.faulty().heal();
    assert!(disk.read_pages(0, 8).unwrap() == pages, "a store that failed changed nothing");
}

/// Lets a stop begin while reads are held, and releases them a while later; the stop must have waited.
fn stop_with_reads_outstanding(stop: impl FnOnce(&mut Device) + Send) -> (Host, Device, Vec<Queue>) {
    let host = host(&["web1"]);
    let (mut device, mut queues) = attach(&host, "web1", Options::default());
    let disk = &mut queues[0];
    let pages: Vec<Page> = (0..320).map(page).collect();
    disk.write_pages(0, &pages).unwrap();
    assert_eq!(host.write_back("web1", 0..160), 160);
    hold_reads(&host);
    for tag in 0..20 {
        read(disk, tag, u64::from(tag) * 16, 16);
    }
    for _ in 10..20 {
        assert_eq!(disk.wait(PATIENCE).unwrap().status, Status::Ok);
    }
    std::thread::scope(|scope| {
        let stopping = scope.spawn(|| {
            let start = Instant::now();
            stop(&mut device);
            start.elapsed()
        });
        std::thread::sleep(SHORT);
        release_all(&host);
        assert!(stopping.join().unwrap() >= SHORT / 2, "the ring stopped while the file owed it pages");
    });
    for _ in 0..10 {
        let done = disk.poll().unwrap().expect("what was taken is answered before the ring has stopped");
        assert_eq!(done.status, Status::Ok);
        let from = usize::from(done.tag) * 16;
        assert!(data(disk, done.tag, 16) == pages[from..from + 16]);
    }
    (host, device, queues)
}

#[test]
fn a_ring_stops_when_its_reads_have_ended() {
    let (host, mut device, mut queues) = stop_with_reads_outstanding(|device| {
        assert_eq!(device.stop().unwrap().len(), 1);
    });
    device.resume().unwrap();
    assert!(queues[0].read_page(5).unwrap() == page(5));
    host.store.validate();
}

#[test]
fn a_ring_is_disabled_when_its_reads_have_ended() {
    let (_host, mut device, mut queues) = stop_with_reads_outstanding(|device| {
        device.enable_ring(0, false).unwrap();
    });
    device.enable_ring(0, true).unwrap();
    assert!(queues[0].read_page(5).unwrap() == page(5));
}

#[test]
fn a_vmm_that_comes_back_runs_when_its_old_reads_have_ended() {
    let host = host(&["web1"]);
    let (mut device, mut queues) = attach(&host, "web1", Options::default());
    let disk = &mut queues[0];
    let pages: Vec<Page> = (0..320).map(page).collect();
    disk.write_pages(0, &pages).unwrap();
    assert_eq!(host.write_back("web1", 0..160), 160);
    hold_reads(&host);
    for tag in 0..20 {
        read(disk, tag, u64::from(tag) * 16, 16);
    }
    device.reconnect(PATIENCE).unwrap();
    std::thread::sleep(SHORT);
    // Asked of the new session, which must not run beside the old one.
    read(disk, 20, 200, 1);
    release_all(&host);
    for _ in 0..21 {
        let done = disk.wait(PATIENCE).unwrap();
        assert_eq!(done.status, Status::Ok);
        let from = if done.tag < 20 { usize::from(done.tag) * 16 } else { 200 };
        let count = if done.tag < 20 { 16 } else { 1 };
        assert!(data(disk, done.tag, count) == pages[from..from + count]);
    }
    assert!(disk.poll().unwrap().is_none());
    assert!(disk.read_page(5).unwrap() == pages[5]);
}

#[test]
fn a_successor_carries_out_what_was_waiting_for_the_file() {
    let host = host(&["web1"]);
    let (mut device, mut queues) = attach(&host, "web1", Options::default());
    let disk = &mut queues[0];
    let mut pages: Vec<Page> = (0..400).map(page).collect();
    disk.write_pages(0, &pages).unwrap();
    assert_eq!(host.write_back("web1", 0..200), 200);
    hold_reads(&host);
    for tag in 0..20 {
        read(disk, tag, u64::from(tag) * 16, 16);
    }
    disk.write_data(20, 0, &[7; 1024]).unwrap();
    disk.stage(20, Op::Write { sector: 13 * 8 + 1, bytes: 1024 }).unwrap();
    disk.publish().unwrap();
    disk.kick().unwrap();
    pages[13][512..1536].fill(7);
    // What is in the pool is answered out of order.
    for _ in 13..20 {
        assert!(disk.wait(PATIENCE).unwrap().tag >= 13);
    }
    assert!(disk.wait(SHORT).is_err());
    let successor = host.successor();
    device.reconnect(PATIENCE).unwrap();
    let mut answered = Vec::new();
    for _ in 0..14 {
        let done = disk.wait(PATIENCE).unwrap();
        assert_eq!(done.status, Status::Ok);
        answered.push(done.tag);
        if done.tag < 20 && done.tag != 0 {
            let from = usize::from(done.tag) * 16;
            assert!(data(disk, done.tag, 16) == pages[from..from + 16], "tag {}", done.tag);
        }
    }
    answered.sort_unstable();
    assert_eq!(answered, (0..13).chain([20]).collect::<Vec<_>>());
    // With event descriptors of its own: the ones before still wake the predecessor's worker.
    drop((device, queues));
    let (_device, mut queues) = attach(&successor, "web1", Options::default());
    assert!(queues[0].read_pages(0, 400).unwrap() == pages);
    successor.store.validate();
}

#[test]
fn what_a_broken_ring_had_taken_does_not_survive_a_reset() {
    let host = host(&["web1"]);
    let (mut device, mut queues) = attach(&host, "web1", Options::default());
    let disk = &mut queues[0];
    disk.write_pages(0, &(0..64).map(page).collect::<Vec<_>>()).unwrap();
    assert_eq!(host.write_back("web1", 0..64), 64);
    hold_reads(&host);
    (0..4).for_each(|tag| read(disk, tag, u64::from(tag) * 16, 16));
    assert!(disk.wait(SHORT).is_err());
    disk.ring().push(u16::MAX);
    disk.publish().unwrap();
    disk.kick().unwrap();
    assert!(disk.wait(SHORT).is_err());
    assert_eq!(host.vms[0].errors(), 1, "the ring is broken");
    vhost::vhost_user::VhostUserFrontend::reset_device(device.frontend().unwrap()).unwrap();
    let region = device.replace_inflight(None);
    drop((device, queues));

    let memory = Memory::with_bytes(MEMORY_BYTES).unwrap();
    let mut device = Device::connect(host.socket("web1"), memory, Options::default()).unwrap();
    device.replace_inflight(region);
    let mut queues = device.start().unwrap();
    assert!(matches!(queues[0].wait(SHORT), Err(ballast::frontend::Error::Timeout(_))));
    release_all(&host);
    assert!(queues[0].read_page(63).unwrap() == page(63));
    assert_eq!(host.vms[0].errors(), 1);
}

#[test]
fn a_guest_that_breaks_its_ring_again_and_again_has_no_more_reads_on_their_way() {
    let host = host(&["web1"]);
    let (mut device, mut queues) = attach(&host, "web1", Options::default());
    queues[0].write_pages(0, &(0..600).map(page).collect::<Vec<_>>()).unwrap();
    assert_eq!(host.write_back("web1", 0..600), 600);
    hold_reads(&host);
    let mut pages_left = Vec::new();
    for round in 1..9 {
        let disk = &mut queues[0];
        (0..18).for_each(|tag| read(disk, tag, u64::from(tag) * 32, 32));
        assert!(disk.wait(SHORT).is_err());
        disk.ring().push(u16::MAX);
        disk.publish().unwrap();
        disk.kick().unwrap();
        assert!(disk.wait(SHORT).is_err());
        assert_eq!(host.vms[0].errors(), round, "the ring is broken");
        pages_left.push(host.vms[0].fetches().left());
        vhost::vhost_user::VhostUserFrontend::reset_device(device.frontend().unwrap()).unwrap();
        drop((device, queues));
        (device, queues) = attach(&host, "web1", Options::default());
    }
    // Each ring has its share of a fourth, and the fifth finds all of it taken.
    assert_eq!(pages_left, [768, 512, 256, 0, 0, 0, 0, 0]);
    assert!(host.faulty().submitted().0 < 80, "{:?}", host.faulty().submitted());
    let disk = &mut queues[0];
    read(disk, 0, 100, 1);
    assert!(disk.wait(SHORT).is_err());
    release_all(&host);
    assert_eq!(disk.wait(PATIENCE).unwrap().status, Status::Ok, "it waited for what others had asked for");
    assert!(data(disk, 0, 1)[0] == page(100));
    // The others come one after another.
    let start = Instant::now();
    while host.vms[0].fetches().left() != 1024 {
        assert!(start.elapsed() < PATIENCE, "{} left", host.vms[0].fetches().left());
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(disk.read_pages(0, 600).unwrap(), (0..600).map(page).collect::<Vec<_>>());
}

#[test]
fn a_vm_has_so_many_sessions_at_most() {
    let host = host(&["web1"]);
    let (first, mut queues) = attach(&host, "web1", Options::default());
    let memory = || Memory::with_bytes(1 << 20).unwrap();
    let connect = || Device::connect(host.socket("web1"), memory(), Options::default());
    let others: Vec<Device> = (0..7).map(|_| connect().unwrap()).collect();
    assert!(connect().is_err(), "the ninth is let in");
    queues[0].write_pages(0, &[page(1)]).unwrap();
    drop((others, first));
    let deadline = Instant::now() + PATIENCE;
    while connect().is_err() {
        assert!(Instant::now() < deadline, "nobody is let in after the others went");
    }
}
