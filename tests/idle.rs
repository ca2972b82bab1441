//! Workers sleep when no request can go on, whatever a guest leaves behind on its rings. One test only: it counts
//! the processor time of all workers of this process.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::fs;
use std::time::Duration;

use ballast::frontend::{Device, Memory, Op, Options, Queue};
use ballast::ids::Slot;
use ballast::store::codec::Scratch;
use ballast::store::lru::Age;
use ballast::writeback::io::faulty::Fault;
use support::{Host, Setup, page_of};

fn attach(host: &Host, name: &str) -> (Device, Vec<Queue>) {
    let memory = Memory::with_bytes(32 << 20).expect("memory");
    let options = Options { queue_size: 16, depth: 16, indirect_entries: 8, ..Options::default() };
    let mut device = Device::connect(host.socket(name), memory, options).expect("the device answers");
    let queues = device.start().expect("rings start");
    (device, queues)
}

/// Processor time of all workers so far.
fn workers_used() -> Duration {
    let mut used = 0;
    for thread in fs::read_dir("/proc/self/task").unwrap() {
        let path = thread.unwrap().path();
        if fs::read_to_string(path.join("comm")).unwrap_or_default().starts_with("worker-") {
            let stat = fs::read_to_string(path.join("schedstat")).unwrap();
            used += stat.split(' ').next().unwrap().parse::<u64>().unwrap();
        }
    }
    Duration::from_nanos(used)
}

fn sleeps(when: &str) {
    std::thread::sleep(Duration::from_millis(50));
    let before = workers_used();
    std::thread::sleep(Duration::from_millis(500));
    let used = workers_used() - before;
    assert!(used < Duration::from_millis(150), "{when}: {used:?} of half a second");
}

fn send(disk: &mut Queue) {
    disk.publish().unwrap();
    disk.kick().unwrap();
}

#[test]
fn a_worker_sleeps_when_nothing_can_go_on() {
    let setup = Setup { file: true, pool_bytes: 4 << 20, ..Setup::default() };
    let host = Host::with(&["web1", "web2"], Setup { store_deadline: Duration::from_secs(60), ..setup });
    sleeps("nobody is there");
    let (_device, mut queues) = attach(&host, "web1");
    let disk = &mut queues[0];
    disk.write_pages(0, &(0..40).map(|n| page_of(4, n)).collect::<Vec<_>>()).unwrap();
    sleeps("nothing is asked");

    assert_eq!(host.write_back("web1", 0..20), 20);
    (0..100).for_each(|later| host.faulty().fail_read(later, Fault::Hold));
    for tag in 0..16 {
        disk.stage(tag, Op::Read { sector: u64::from(tag) * 8, bytes: 4096 }).unwrap();
    }
    send(disk);
    // The ring is full, and here is more: the same heads again.
    let again = disk.descriptor_index(3, 0);
    disk.ring().push(again);
    let _ = disk.ring().publish();
    disk.kick().unwrap();
    sleeps("the file owes a full ring of pages");
    host.faulty().heal();
    host.faulty().release();

    let (_other, mut others) = attach(&host, "web2");
    let (filler, mut scratch) = (host.pages("web2"), Scratch::default());
    let full = |slot: &u32| filler.store(Slot(*slot), &page_of(4, 7), Age::now(), &mut scratch).is_err();
    (0..10_000).find(full).unwrap();
    for tag in 0..5 {
        others[0].write_data(tag, 0, &page_of(4, 9)).unwrap();
        others[0].stage(tag, Op::Write { sector: 79_000 + u64::from(tag) * 8, bytes: 4096 }).unwrap();
    }
    send(&mut others[0]);
    sleeps("stores wait for room");
    assert!(others[0].poll().unwrap().is_none());

    others[0].ring().push(u16::MAX);
    send(&mut others[0]);
    sleeps("a ring is broken");
    others[0].kick().unwrap();
    sleeps("a broken ring was kicked");
    assert_eq!(host.vms[1].errors(), 1);
}
