//! Stores that find the pool or their VM full, through a real front end: they wait for room, the VM's own loads and
//! the other VMs don't, and in the end they are done or fail.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]
#![allow(clippy::cast_possible_truncation, reason = "patterns made of numbers may wrap")]

mod support;

use std::time::{Duration, Instant};

use ballast::frontend::{Device, Memory, Op, Options, Queue, Status};
use ballast::ids::Slot;
use ballast::page::Page;
use ballast::store::accounting::Events;
use ballast::store::codec::Scratch;
use ballast::store::lru::Age;
use ballast::store::vm::Limits;
use support::{Host, Setup, page_of};
use vhost::vhost_user::message::VhostUserProtocolFeatures;

const PATIENCE: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(200);
const POOL_BYTES: u64 = 4 << 20;

fn host(setup: Setup) -> Host {
    Host::with(&["web1", "filler"], Setup { file: true, pool_bytes: POOL_BYTES, ..setup })
}

fn attach(host: &Host, name: &str, options: Options) -> (Device, Vec<Queue>) {
    let memory = Memory::with_bytes(32 << 20).expect("memory");
    let mut device = Device::connect(host.socket(name), memory, options).expect("the device answers");
    let queues = device.start().expect("rings start");
    (device, queues)
}

/// A page that takes a whole place of the arena.
fn page(seed: u64) -> Page {
    page_of(4, seed)
}

/// Has the other VM store until there is no room. Returns how many pages it holds.
fn fill(host: &Host) -> u32 {
    let (vm, mut scratch) = (host.pages("filler"), Scratch::default());
    let full = |slot: &u32| vm.store(Slot(*slot), &page(u64::from(*slot)), Age::now(), &mut scratch).is_err();
    (0..10_000).find(full).expect("the pool is full at last")
}

/// Has the other VM drop pages.
fn make_room(host: &Host, slots: std::ops::Range<u32>) {
    let vm = host.pages("filler");
    slots.for_each(|slot| vm.invalidate(Slot(slot)));
}

fn write(disk: &mut Queue, tag: u16, slot: u64, page: &Page) {
    disk.write_data(tag, 0, page).unwrap();
    disk.stage(tag, Op::Write { sector: slot * 8, bytes: 4096 }).unwrap();
}

fn send(disk: &mut Queue) {
    disk.publish().unwrap();
    disk.kick().unwrap();
}

fn events(host: &Host) -> Events {
    host.pages("web1").accounting().events
}

#[test]
fn stores_wait_for_room_and_loads_do_not() {
    let host = host(Setup { store_deadline: PATIENCE, ..Setup::default() });
    let (_device, mut queues) = attach(&host, "web1", Options::default());
    let disk = &mut queues[0];
    let old: Vec<Page> = (0..20).map(page).collect();
    disk.write_pages(0, &old).unwrap();
    fill(&host);
    for tag in 1..21 {
        write(disk, tag, 100 + u64::from(tag), &page(1000 + u64::from(tag)));
    }
    send(disk);
    for slot in 0..200 {
        disk.stage(0, Op::Read { sector: slot % 20 * 8, bytes: 4096 }).unwrap();
        send(disk);
        let done = disk.wait(PATIENCE).unwrap();
        assert_eq!((done.tag, done.status), (0, Status::Ok));
        let mut found = page(0);
        disk.read_data(0, 0, &mut found).unwrap();
        assert!(found == old[(slot % 20) as usize]);
    }
    assert!(disk.wait(SHORT).is_err(), "a store was answered while there was no room");
    assert_eq!((events(&host).pool_limit_hit, events(&host).delayed_stores), (1, 0), "one was tried");
    assert_eq!(host.vms[0].waiting_stores(), 20);
    // Room for some of them only.
    make_room(&host, 0..8);
    host.device.wake_waiting();
    let mut done: Vec<u16> = (0..8).map(|_| disk.wait(PATIENCE).unwrap().tag).collect();
    assert_eq!(done, (1..9).collect::<Vec<_>>(), "in their order");
    assert!(disk.wait(SHORT).is_err());
    assert_eq!(host.vms[0].waiting_stores(), 12);
    make_room(&host, 8..100);
    host.device.wake_waiting();
    done.extend((0..12).map(|_| disk.wait(PATIENCE).unwrap().tag));
    for tag in done {
        assert_eq!(disk.status(tag), Status::Ok);
        assert!(disk.read_page(100 + u64::from(tag)).unwrap() == page(1000 + u64::from(tag)));
    }
    let events = events(&host);
    assert_eq!((events.delayed_stores, events.reject_reclaim_fail), (20, 0));
    assert_eq!(host.vms[0].waiting_stores(), 0);
    host.store.validate();
}

#[test]
fn a_store_finds_room_that_nobody_told_of() {
    let host = host(Setup::default());
    let (_device, mut queues) = attach(&host, "web1", Options::default());
    let disk = &mut queues[0];
    fill(&host);
    // A long one, which needs room for each of its pages.
    let pages: Vec<Page> = (0..32).map(|n| page(5000 + n)).collect();
    disk.write_data(0, 0, pages.as_flattened()).unwrap();
    disk.stage(0, Op::Write { sector: 0, bytes: 32 * 4096 }).unwrap();
    send(disk);
    for from in (0..32).step_by(8) {
        assert!(disk.poll().unwrap().is_none());
        make_room(&host, from..from + 8);
        std::thread::sleep(Duration::from_millis(15));
    }
    make_room(&host, 32..64);
    assert_eq!(disk.wait(PATIENCE).unwrap().status, Status::Ok);
    assert!(disk.read_pages(0, 32).unwrap() == pages);
    assert_eq!(events(&host).delayed_stores, 1);
    host.store.validate();
}

#[test]
fn a_store_fails_when_its_time_is_over() {
    let deadline = Duration::from_millis(300);
    let host = host(Setup { store_deadline: deadline, ..Setup::default() });
    let (_device, mut queues) = attach(&host, "web1", Options::default());
    let disk = &mut queues[0];
    fill(&host);
    let start = Instant::now();
    (0..20).for_each(|tag| write(disk, tag, u64::from(tag), &page(u64::from(tag))));
    send(disk);
    for tag in 0..20 {
        let done = disk.wait(PATIENCE).unwrap();
        assert_eq!((done.tag, done.status), (tag, Status::IoError));
        assert!(start.elapsed() >= deadline, "{:?}", start.elapsed());
    }
    assert!(start.elapsed() < deadline * 3, "{:?}", start.elapsed());
    let events = events(&host);
    assert_eq!((events.reject_reclaim_fail, events.delayed_stores, host.vms[0].errors()), (20, 20, 20));
    let delays = events.store_delay_ms.counts;
    assert_eq!(delays[..9], [0; 9], "none of them was answered within 256 ms");
    assert_eq!((delays.iter().sum::<u64>(), host.vms[0].waiting_stores()), (20, 0));
    make_room(&host, 0..20);
    disk.write_pages(0, &[page(1)]).unwrap();
    host.store.validate();
}

#[test]
fn half_of_a_ring_waits_at_most() {
    let host = host(Setup { store_deadline: PATIENCE, ..Setup::default() });
    let options = Options { queue_size: 16, depth: 16, indirect_entries: 8, ..Options::default() };
    let (_device, mut queues) = attach(&host, "web1", options);
    let disk = &mut queues[0];
    disk.write_pages(50, &[page(50)]).unwrap();
    fill(&host);
    (0..15).for_each(|tag| write(disk, tag, u64::from(tag), &page(u64::from(tag))));
    send(disk);
    for tag in 8..15 {
        let done = disk.wait(PATIENCE).unwrap();
        assert_eq!((done.tag, done.status), (tag, Status::IoError));
    }
    disk.stage(15, Op::Read { sector: 400, bytes: 4096 }).unwrap();
    send(disk);
    assert_eq!(disk.wait(PATIENCE).unwrap().status, Status::Ok);
    assert_eq!(events(&host).reject_reclaim_fail, 7);
    make_room(&host, 0..20);
    host.device.wake_waiting();
    for tag in 0..8 {
        let done = disk.wait(PATIENCE).unwrap();
        assert_eq!((done.tag, done.status), (tag, Status::Ok));
    }
}

#[test]
fn nobody_waits_for_what_cannot_come() {
    for setup in [Setup { file: false, ..Setup::default() }, Setup::default()] {
        let deadline = if setup.file { PATIENCE } else { Duration::ZERO };
        let setup = Setup { pool_bytes: POOL_BYTES, file: !setup.file, store_deadline: deadline, ..setup };
        let host = Host::with(&["web1", "filler"], setup);
        let (_device, mut queues) = attach(&host, "web1", Options::default());
        fill(&host);
        queues[0].write_data(0, 0, &page(1)).unwrap();
        let start = Instant::now();
        let status = queues[0].run(Op::Write { sector: 0, bytes: 4096 }).unwrap();
        assert_eq!(status, Status::IoError);
        assert!(start.elapsed() < SHORT);
        let events = events(&host);
        assert_eq!((events.reject_reclaim_fail, events.delayed_stores), (1, 0));
    }
}

#[test]
fn a_vm_at_its_limit_delays_no_other() {
    let limit_bytes = 1 << 20;
    let host = Host::with(
        &["web1", "web2"],
        Setup { file: true, limit_bytes, store_deadline: PATIENCE, ..Setup::default() },
    );
    // Two of its queues are at one worker, so the other VM's are at both.
    let (_device, mut queues) = attach(&host, "web1", Options { queues: 4, ..Options::default() });
    let (_other, mut others) = attach(&host, "web2", Options { queues: 4, ..Options::default() });
    let mut slot = 0;
    let mut held = 0;
    while held < limit_bytes - 8192 {
        queues[0].write_pages(slot, &[page(slot)]).unwrap();
        held = host.pages("web1").accounting().held.pool_bytes;
        slot += 1;
    }
    for disk in &mut queues {
        (0..10).for_each(|tag| {
            write(disk, tag, slot + u64::from(tag), &page(9));
            slot += 10;
        });
        send(disk);
    }
    let pages: Vec<Page> = (0..32).map(page).collect();
    for disk in &mut others {
        let start = Instant::now();
        disk.write_pages(0, &pages).unwrap();
        assert!(disk.read_pages(0, 32).unwrap() == pages);
        assert!(start.elapsed() < SHORT, "{:?}", start.elapsed());
    }
    assert!(queues.iter_mut().any(|disk| disk.in_flight() > 8));
    // Its own pages leave for the file, as they do when somebody shrinks it.
    assert!(host.write_back("web1", 0..200) > 100);
    host.device.wake_waiting();
    for disk in &mut queues {
        while disk.in_flight() > 0 {
            assert_eq!(disk.wait(PATIENCE).unwrap().status, Status::Ok);
        }
    }
    host.store.validate();
}

/// Ten stores that find no room and wait.
fn ten_that_wait(disk: &mut Queue) {
    (0..10).for_each(|tag| write(disk, tag, u64::from(tag), &page(u64::from(tag))));
    send(disk);
    assert!(disk.wait(SHORT).is_err());
}

fn assert_settled(host: &Host, disk: &mut Queue) {
    for _ in 0..10 {
        assert_eq!(disk.wait(SHORT * 5).unwrap().status, Status::IoError);
    }
    assert_eq!((events(host).reject_reclaim_fail, host.vms[0].waiting_stores()), (10, 0));
    make_room(host, 0..1);
    disk.write_pages(50, &[page(1)]).unwrap();
    host.store.validate();
}

#[test]
fn a_ring_that_stops_settles_what_waits() {
    for by_disabling in [false, true] {
        let host = host(Setup { store_deadline: PATIENCE, ..Setup::default() });
        let (mut device, mut queues) = attach(&host, "web1", Options::default());
        fill(&host);
        ten_that_wait(&mut queues[0]);
        assert_eq!(host.vms[0].waiting_stores(), 10);
        if by_disabling {
            device.enable_ring(0, false).unwrap();
            device.enable_ring(0, true).unwrap();
        } else {
            device.stop().unwrap();
            device.resume().unwrap();
        }
        assert_settled(&host, &mut queues[0]);
    }
}

#[test]
fn what_waits_when_the_vmm_hangs_up_is_carried_out_once_it_is_back() {
    let host = host(Setup { store_deadline: PATIENCE, ..Setup::default() });
    let (mut device, mut queues) = attach(&host, "web1", Options::default());
    let disk = &mut queues[0];
    disk.write_pages(50, &[page(50)]).unwrap();
    fill(&host);
    ten_that_wait(disk);
    for _ in 0..3 {
        device.reconnect(PATIENCE).unwrap();
        disk.stage(15, Op::Read { sector: 400, bytes: 4096 }).unwrap();
        send(disk);
        let done = disk.wait(PATIENCE).unwrap();
        assert_eq!(
            (done.tag, done.status),
            (15, Status::Ok),
            "the new session runs, and nothing else was answered"
        );
    }
    make_room(&host, 0..40);
    host.device.wake_waiting();
    for _ in 0..10 {
        assert_eq!(disk.wait(PATIENCE).unwrap().status, Status::Ok);
    }
    assert_eq!(disk.read_pages(0, 10).unwrap(), (0..10).map(page).collect::<Vec<_>>());
    assert_eq!((events(&host).reject_reclaim_fail, host.vms[0].errors()), (0, 0));
    host.store.validate();
}

#[test]
fn what_waits_when_a_vmm_without_an_inflight_region_hangs_up_is_settled() {
    let host = host(Setup { store_deadline: PATIENCE, ..Setup::default() });
    let mut options = Options::default();
    options.protocol_features.remove(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
    let (mut device, mut queues) = attach(&host, "web1", options);
    fill(&host);
    ten_that_wait(&mut queues[0]);
    device.reconnect(PATIENCE).unwrap();
    assert_settled(&host, &mut queues[0]);
}

#[test]
fn parts_of_pages_in_the_file_wait_too() {
    let host = host(Setup { store_deadline: PATIENCE, ..Setup::default() });
    let (_device, mut queues) = attach(&host, "web1", Options::default());
    let disk = &mut queues[0];
    let mut pages: Vec<Page> = (0..20).map(page).collect();
    disk.write_pages(0, &pages).unwrap();
    assert_eq!(host.write_back("web1", 0..20), 20);
    fill(&host);
    for tag in 0..10u16 {
        disk.write_data(tag, 0, &[tag as u8; 512]).unwrap();
        disk.stage(tag, Op::Write { sector: u64::from(tag) * 8 + 3, bytes: 512 }).unwrap();
        pages[usize::from(tag)][3 * 512..4 * 512].fill(tag as u8);
    }
    send(disk);
    assert!(disk.wait(SHORT).is_err());
    disk.stage(10, Op::Read { sector: 15 * 8, bytes: 4096 }).unwrap();
    send(disk);
    let done = disk.wait(PATIENCE).unwrap();
    assert_eq!((done.tag, done.status), (10, Status::Ok));
    make_room(&host, 0..40);
    host.device.wake_waiting();
    for _ in 0..10 {
        assert_eq!(disk.wait(PATIENCE).unwrap().status, Status::Ok);
    }
    assert!(disk.read_pages(0, 20).unwrap() == pages);
    host.store.validate();
}

#[test]
fn a_part_of_a_page_that_finds_no_room_is_counted_as_a_page_is() {
    let part = |disk: &mut Queue, slot: u64| {
        disk.write_data(0, 0, &page(slot)[..512]).unwrap();
        disk.run(Op::Write { sector: slot * 8, bytes: 512 }).unwrap()
    };
    let refusals = |host: &Host| (events(host).pool_limit_hit, events(host).limit_hit);
    let host = host(Setup { store_deadline: SHORT, ..Setup::default() });
    let (_device, mut queues) = attach(&host, "web1", Options::default());
    fill(&host);
    for slot in 0..3 {
        assert_eq!(part(&mut queues[0], slot), Status::IoError);
        assert_eq!(refusals(&host), (slot + 1, 0), "once, however often it is tried");
    }
    make_room(&host, 0..40);
    let vm = host.pages("web1");
    vm.set_limits(Limits { limit_bytes: 100, ..vm.limits() });
    assert_eq!(part(&mut queues[0], 0), Status::IoError);
    assert_eq!(refusals(&host), (3, 1));
    host.store.validate();
}

#[test]
fn nothing_waits_at_a_ring_that_broke() {
    let host = host(Setup { store_deadline: PATIENCE, ..Setup::default() });
    let (_device, mut queues) = attach(&host, "web1", Options { queues: 2, ..Options::default() });
    fill(&host);
    for disk in &mut queues {
        (0..10).for_each(|tag| write(disk, tag, u64::from(tag), &page(u64::from(tag))));
        send(disk);
        assert!(disk.wait(SHORT).is_err());
    }
    assert_eq!(host.vms[0].waiting_stores(), 20);
    queues[0].ring().push(u16::MAX);
    send(&mut queues[0]);
    let start = Instant::now();
    while host.vms[0].waiting_stores() != 10 {
        assert!(start.elapsed() < PATIENCE, "{} wait", host.vms[0].waiting_stores());
        std::thread::sleep(Duration::from_millis(1));
    }
}
