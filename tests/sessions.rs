//! Sessions through a real front end: what a VMM may do to its connection while requests are under way.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]
#![allow(clippy::cast_possible_truncation, reason = "patterns made of numbers may wrap")]

mod support;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use ballast::frontend::{Device, Manners, Memory, MemoryMessages, Op, Options, Queue, Status};
use ballast::page::{PAGE_SIZE, Page, ZERO_PAGE};
use support::{Host, SLOTS, page_of};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

const MEMORY_BYTES: usize = 32 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

fn attach(host: &Host, name: &str, options: Options) -> (Device, Vec<Queue>) {
    let memory = Memory::with_bytes(MEMORY_BYTES).expect("memory");
    let mut device = Device::connect(host.socket(name), memory, options).expect("the device answers");
    let queues = device.start().expect("rings start");
    (device, queues)
}

#[test]
fn a_page_is_read_back_and_an_unwritten_one_is_zero() {
    let host = Host::start(&["web1"]);
    let (device, mut queues) = attach(&host, "web1", Options::default());
    assert_eq!(device.config().capacity_sectors, u64::from(SLOTS) * 8);
    let disk = &mut queues[0];
    let pages: Vec<Page> = (0..20).map(|n| page_of(n, u64::from(n))).collect();
    disk.write_pages(100, &pages).unwrap();
    assert_eq!(disk.read_pages(100, 20).unwrap(), pages);
    assert_eq!(disk.read_page(99).unwrap(), ZERO_PAGE);
    assert_eq!(disk.id().unwrap(), "ballast-web1");
    disk.flush().unwrap();
    disk.discard(105, 10).unwrap();
    disk.write_zeroes(100, 2, true).unwrap();
    let left = disk.read_pages(100, 20).unwrap();
    for (n, page) in left.iter().enumerate() {
        let dropped = (5..15).contains(&n) || n < 2;
        assert!(page == if dropped { &ZERO_PAGE } else { &pages[n] }, "page {n}");
    }
    host.store.validate();
}

#[test]
fn sectors_change_their_part_of_a_page_only() {
    let host = Host::start(&["web1"]);
    let (_device, mut queues) = attach(&host, "web1", Options::default());
    let disk = &mut queues[0];
    let mut truth = vec![0u8; 16 * PAGE_SIZE];
    for (n, (sector, sectors)) in
        [(1, 1), (0, 9), (7, 2), (15, 30), (8, 8), (100, 28)].into_iter().enumerate()
    {
        let bytes: Vec<u8> = (0..sectors * 512).map(|i| (i / 7 + n) as u8).collect();
        disk.write_bytes(sector as u64, &bytes).unwrap();
        truth[sector * 512..][..bytes.len()].copy_from_slice(&bytes);
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
fn two_vms_with_several_queues_keep_apart() {
    let host = Host::start(&["web1", "web2"]);
    let options = Options { queues: 4, depth: 8, ..Options::default() };
    let (_one, queues_one) = attach(&host, "web1", options.clone());
    let (_two, queues_two) = attach(&host, "web2", options);
    std::thread::scope(|scope| {
        for (n, mut disk) in queues_one.into_iter().chain(queues_two).enumerate() {
            scope.spawn(move || {
                let base = (n % 4) as u64 * 2000;
                for round in 0..3u64 {
                    for slot in (0..1000).step_by(16) {
                        let page = |at: u64| page_of(at as u8, at + round * 7 + n as u64 * 1000);
                        let pages: Vec<Page> = (slot..slot + 16).map(page).collect();
                        disk.write_pages(base + slot, &pages).unwrap();
                    }
                    for slot in 0..1000 {
                        let expected = page_of(slot as u8, slot + round * 7 + n as u64 * 1000);
                        assert!(disk.read_page(base + slot).unwrap() == expected, "queue {n} slot {slot}");
                    }
                }
            });
        }
    });
    host.store.validate();
    assert_eq!(host.vms.iter().map(|vm| vm.errors()).sum::<u64>(), 0);
}

#[test]
fn memory_comes_and_goes_in_regions() {
    let host = Host::start(&["web1"]);
    let options = Options { memory_messages: MemoryMessages::Slots, depth: 4, ..Options::default() };
    let memory = Memory::with_regions(&[(0, MEMORY_BYTES), (1 << 32, 1 << 20)]).unwrap();
    let mut device = Device::connect(host.socket("web1"), memory, options).unwrap();
    let mut queues = device.start().unwrap();
    let disk = &mut queues[0];
    disk.write_pages(1, &[page_of(2, 1)]).unwrap();
    let read_into = |disk: &mut Queue, address: u64| {
        let op = Op::Read { sector: 8, bytes: 4096 };
        disk.stage_buffers(0, op, &[(vm_memory::GuestAddress(address), 4096)]).unwrap();
        disk.publish().unwrap();
        disk.kick().unwrap();
        disk.wait(PATIENCE).unwrap().status
    };
    assert_eq!(read_into(disk, 1 << 32), Status::Ok);
    device.add_region(1 << 33, 1 << 20).unwrap();
    assert_eq!(read_into(disk, 1 << 33), Status::Ok);
    let mut found = ZERO_PAGE;
    device.memory().read(vm_memory::GuestAddress(1 << 33), &mut found).unwrap();
    assert!(found == page_of(2, 1));
    device.remove_region(1 << 33).unwrap();
    assert_ne!(read_into(disk, 1 << 33), Status::Ok, "that memory is gone");
    assert_eq!(read_into(disk, 1 << 32), Status::Ok, "the queue goes on");
}

/// Keeps every tag busy with writes while the connection is cut and made again, and checks that nothing that was
/// answered is lost and nothing that was asked stays unanswered.
fn load_through_reconnects(manners: Manners, reconnects: usize) {
    let host = Host::start(&["web1"]);
    let options = Options { manners, queues: 2, ..Options::default() };
    let (mut device, mut queues) = attach(&host, "web1", options);
    let mut truth: HashMap<u64, Page> = HashMap::new();
    let mut asked: HashMap<(usize, u16), (u64, Page)> = HashMap::new();
    let mut seed = 0u64;
    for _ in 0..reconnects {
        let until = Instant::now() + Duration::from_millis(30);
        while Instant::now() < until {
            for (n, disk) in queues.iter_mut().enumerate() {
                while let Some(tag) = disk.free_tag() {
                    seed += 1;
                    let slot = 1 + (n as u64) * 4000 + seed % 3500;
                    let page = page_of((seed % 251) as u8, seed);
                    if asked.values().any(|(other, _)| *other == slot) {
                        break;
                    }
                    disk.write_data(tag, 0, &page).unwrap();
                    disk.stage(tag, Op::Write { sector: slot * 8, bytes: 4096 }).unwrap();
                    asked.insert((n, tag), (slot, page));
                }
                disk.publish().unwrap();
                disk.kick().unwrap();
                while let Some(done) = disk.poll().unwrap() {
                    assert_eq!(done.status, Status::Ok);
                    let (slot, page) = asked.remove(&(n, done.tag)).expect("answered once");
                    truth.insert(slot, page);
                }
            }
        }
        device.reconnect(PATIENCE).unwrap();
    }
    for (n, disk) in queues.iter_mut().enumerate() {
        while disk.in_flight() > 0 {
            let done = disk.wait(PATIENCE).expect("what was in flight is answered after a reconnect");
            let (slot, page) = asked.remove(&(n, done.tag)).expect("answered once");
            truth.insert(slot, page);
        }
    }
    assert!(truth.len() > reconnects * 10, "{}", truth.len());
    for (slot, page) in &truth {
        assert!(&queues[0].read_page(*slot).unwrap() == page, "slot {slot}");
    }
    host.store.validate();
}

#[test]
fn nothing_is_lost_when_qemu_reconnects_under_load() {
    load_through_reconnects(Manners::Qemu, 20);
}

#[test]
fn nothing_is_lost_when_cloud_hypervisor_reconnects_under_load() {
    load_through_reconnects(Manners::CloudHypervisor, 20);
    load_through_reconnects(Manners::CloudHypervisorBefore2026, 5);
}

#[test]
fn another_vmm_finds_the_pages() {
    let host = Host::start(&["web1"]);
    let (device, mut queues) = attach(&host, "web1", Options::default());
    queues[0].write_pages(7, &[page_of(3, 7)]).unwrap();
    drop((device, queues));
    let options = Options { manners: Manners::CloudHypervisor, ..Options::default() };
    let (_device, mut queues) = attach(&host, "web1", options);
    assert!(queues[0].read_page(7).unwrap() == page_of(3, 7));
}

#[test]
fn a_second_session_starts_when_the_first_has_stopped() {
    let host = Host::start(&["web1"]);
    let (mut first, mut first_queues) = attach(&host, "web1", Options::default());
    first_queues[0].write_pages(7, &[page_of(3, 7)]).unwrap();
    let (_second, mut second_queues) = attach(&host, "web1", Options::default());
    let disk = &mut second_queues[0];
    disk.stage(0, Op::Read { sector: 56, bytes: 4096 }).unwrap();
    disk.publish().unwrap();
    disk.kick().unwrap();
    assert!(disk.wait(Duration::from_millis(200)).is_err(), "two sessions ran at once");
    assert!(first_queues[0].read_page(7).unwrap() == page_of(3, 7), "the first goes on");
    first.stop().unwrap();
    assert_eq!(disk.wait(PATIENCE).unwrap().status, Status::Ok);
    assert!(disk.read_page(7).unwrap() == page_of(3, 7));
}

#[test]
fn a_stopped_ring_has_answered_everything_and_goes_on_where_it_was() {
    let host = Host::start(&["web1"]);
    let (mut device, mut queues) = attach(&host, "web1", Options::default());
    for round in 0..50u64 {
        let disk = &mut queues[0];
        for tag in 0..32u16 {
            let slot = 1 + round * 32 + u64::from(tag);
            disk.write_data(tag, 0, &page_of(tag as u8, slot)).unwrap();
            disk.stage(tag, Op::Write { sector: slot * 8, bytes: 4096 }).unwrap();
        }
        disk.publish().unwrap();
        disk.kick().unwrap();
        let bases = device.stop().unwrap();
        // What the ring had taken is answered; what it had not, is answered after it goes on.
        assert_eq!(bases.len(), 1);
        device.resume().unwrap();
        for _ in 0..32 {
            assert_eq!(queues[0].wait(PATIENCE).unwrap().status, Status::Ok);
        }
    }
    for slot in 1..=50 * 32u64 {
        assert!(queues[0].read_page(slot).unwrap() == page_of(((slot - 1) % 32) as u8, slot), "slot {slot}");
    }
}

#[test]
fn memory_that_a_vmm_cuts_short_is_that_vms_loss_alone() {
    const SECOND: u64 = 1 << 32;
    let host = Host::start(&["web1", "web2"]);
    let (_other, mut other_queues) = attach(&host, "web2", Options::default());
    let (write, read) = (Op::Write { sector: 40, bytes: 4096 }, Op::Read { sector: 40, bytes: 4096 });
    // A load with another behind it is copied in another way.
    for (op, requests) in [(write, 1), (read, 1), (read, 2)] {
        let memory = Memory::with_regions(&[(0, MEMORY_BYTES), (SECOND, 1 << 20)]).unwrap();
        let mut device = Device::connect(host.socket("web1"), memory.clone(), Options::default()).unwrap();
        let disk = &mut device.start().unwrap()[0];
        disk.write_pages(5, &[page_of(3, 5)]).unwrap();
        let errors = host.vms[0].errors();
        let map = memory.map();
        let region = map.find_region(GuestAddress(SECOND)).unwrap();
        region.file_offset().unwrap().file().set_len(0).unwrap();
        for nth in 0..requests {
            disk.stage_buffers(nth, op, &[(GuestAddress(SECOND), 4096)]).unwrap();
        }
        disk.publish().unwrap();
        disk.kick().unwrap();
        let start = Instant::now();
        while host.vms[0].errors() == errors {
            assert!(start.elapsed() < PATIENCE, "{op:?}: nobody noticed");
            std::thread::sleep(Duration::from_millis(1));
        }
        other_queues[0].write_pages(9, &[page_of(4, 9)]).unwrap();
        assert!(other_queues[0].read_page(9).unwrap() == page_of(4, 9), "{op:?}: the other VM goes on");
        drop(device);
        // The zeros that stand in for what was cut off were not stored.
        let (_again, mut queues) = attach(&host, "web1", Options::default());
        assert!(queues[0].read_page(5).unwrap() == page_of(3, 5), "{op:?}");
    }
    host.store.validate();
}
