//! A balloon whose driver, or whose VMM, says what makes no sense: chains and lists of every wrong shape, pages that
//! aren't there, rings in pages that were given up, memory that is cut short. Each harms its own VM at worst, is bounded,
//! and the next driver is served.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::time::Duration;

use ballast::frontend::{Descriptor, Memory, Options};
use support::balloon::{ALL, Ballooned, SECOND, content, memory, second, touch};
use support::{Random, page_of};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

const FREE: u32 = 2048;
const STATS: usize = 2;
const REPORT: usize = 3;
const READ: u16 = 0;
const NEXT: u16 = Descriptor::NEXT;
const WRITE: u16 = Descriptor::WRITE;
const INDIRECT: u16 = Descriptor::INDIRECT;
const BEYOND: u64 = 1 << 40;

fn descriptor(address: u64, bytes: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor { address, bytes, flags, next }
}

fn numbers(memory: &Memory, pages: &[u32]) -> u64 {
    let at = memory.allocate(pages.len() * 4).unwrap();
    let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
    memory.write(at, &bytes).unwrap();
    at.0
}

#[test]
fn chains_that_make_no_sense_are_handed_back_and_counted() {
    let (host, memory) = (Ballooned::start(), memory());
    let mut guest = host.attach_linux(&memory);
    let list = numbers(&memory, &[FREE]);
    touch(&memory, FREE, 7);
    let nested = memory.allocate(64).unwrap().0;
    let table = [list.to_le_bytes(), (4u64 | u64::from(INDIRECT) << 32).to_le_bytes()].concat();
    memory.write(GuestAddress(nested), &table).unwrap();
    let malformed = [
        vec![descriptor(list, 4, NEXT, 0)],      // it loops
        vec![descriptor(list, 4, NEXT, 60_000)], // it leaves the table
        vec![descriptor(list, 0, READ, 0)],      // nothing
        vec![descriptor(list, 4, WRITE | NEXT, 1), descriptor(list, 4, 0, 0)], // directions are mixed
        vec![descriptor(nested, 16, INDIRECT, 0)], // a table in a table
        vec![descriptor(nested, 17, INDIRECT, 0)], // a part of a descriptor
        vec![descriptor(BEYOND, 16, INDIRECT, 0)], // a table that isn't there
        vec![descriptor(BEYOND, 4, READ, 0)],    // a list that isn't there
        vec![descriptor(list, u32::MAX, READ, 0)], // a list that ends elsewhere
        vec![descriptor(u64::MAX - 1, 4, READ, 0)],
    ];
    let mut expected = 0;
    for chain in malformed {
        for queue in [0, 1] {
            guest.put(queue, &chain).unwrap();
            guest.finish(queue).unwrap_or_else(|err| panic!("{chain:?}: {err}"));
            expected += 1;
        }
    }
    host.until("counted", |look| look.numbers.malformed == expected);
    assert_eq!(content(&memory, FREE), Some(7));
    // Wherever the list is cut, it is one; what is only written to is none.
    guest.put(0, &[descriptor(list, 4, WRITE, 0)]).unwrap();
    guest.finish(0).unwrap();
    assert_eq!(content(&memory, FREE), Some(7));
    let first = guest.queue(0).descriptor_index(0, 0);
    guest.put(0, &[descriptor(list, 1, NEXT, first + 1), descriptor(list + 1, 3, READ, 0)]).unwrap();
    guest.finish(0).unwrap();
    assert_eq!(content(&memory, FREE), None);
}

#[test]
fn pages_that_are_not_there_are_ignored_and_the_others_of_the_list_are_not() {
    let (host, memory) = (Ballooned::start(), memory());
    let mut guest = host.attach_linux(&memory);
    touch(&memory, second(0), 7);
    let absent = [4096, second(0) - 1, second(4096), u32::MAX];
    guest.inflate(&[absent.as_slice(), &[second(0)]].concat()).unwrap();
    guest.deflate(&absent).unwrap();
    let look = host.until("counted", |look| look.numbers.refused_pages == 8);
    assert_eq!((look.given_bytes, content(&memory, second(0))), (4096, None));
    // Ranges that begin outside, end outside, wrap, and are no pages.
    touch(&memory, second(4095), 7);
    touch(&memory, second(1), 7);
    let ranges =
        [(BEYOND, 4096), (SECOND + 4095 * 4096, 8192), (u64::MAX - 5, 4096), (SECOND + 4096 + 1, 4094)];
    guest.report(REPORT, &ranges).unwrap();
    let look = host.until("counted", |look| look.numbers.refused_pages == 8 + 3);
    assert_eq!((look.numbers.kept_bytes, look.numbers.punched_bytes), (4094, 2 * 4096));
    assert_eq!((content(&memory, second(4095)), content(&memory, second(1))), (None, Some(7)));
}

#[test]
fn lists_and_ranges_without_end_are_cut() {
    let (host, memory) = (Ballooned::start(), memory());
    let mut guest = host.attach_linux(&memory);
    // The same page a hundred thousand times.
    guest.inflate(&vec![FREE; 100_000]).unwrap();
    let look = host.until("counted", |look| look.numbers.refused_pages == 100_000 - 65_536);
    assert_eq!((look.given_bytes, look.numbers.inflated_again_pages), (4096, 65_535));
    // All of the guest's memory, and once more.
    let region = 4096 * 4096;
    guest.report(REPORT, &[(SECOND, region), (SECOND, region), (SECOND, region), (SECOND, region)]).unwrap();
    let look = host.until("counted", |look| look.numbers.refused_pages == 100_000 - 65_536 + 2 * 4096);
    assert_eq!(look.numbers.reported_bytes, 2 * u64::from(region));
    guest.report(REPORT, &[(SECOND, u32::MAX); 8]).unwrap();
    guest.inflate(&[FREE + 1]).unwrap();
}

#[test]
fn statistics_of_any_shape_are_read_no_further_than_they_mean_something() {
    let (host, memory) = (Ballooned::start(), memory());
    let mut guest = host.attach_linux(&memory);
    let all = u32::try_from(memory.map().iter().next().unwrap().len()).unwrap();
    guest.put(STATS, &[descriptor(0, all, READ, 0)]).unwrap();
    host.until("said", |look| look.stats.is_some());
    // A second buffer is not looked at before the first was wanted.
    guest.queue(STATS).stage_raw(1, &[descriptor(0, 0, READ, 0)]).unwrap();
    guest.queue(STATS).publish().unwrap();
    guest.inflate(&[FREE]).unwrap();
    assert!(!guest.are_stats_wanted(STATS).unwrap());
    assert!(host.device.ask_stats());
    // Both come back: the second makes no sense.
    for _ in 0..2 {
        guest.finish(STATS).unwrap();
    }
}

#[test]
fn a_queue_that_nobody_agreed_on_does_nothing() {
    let (host, memory) = (Ballooned::start(), memory());
    let mut guest = host.attach(&memory, Options::for_balloon(5, &[]));
    touch(&memory, second(0), 7);
    for queue in 2..5 {
        guest.report(queue, &[(SECOND, 4096)]).unwrap();
    }
    host.until("counted", |look| look.numbers.malformed == 3);
    assert_eq!(content(&memory, second(0)), Some(7));
}

#[test]
fn a_ring_that_makes_no_sense_is_left_alone_and_the_others_are_not() {
    let (host, memory) = (Ballooned::start(), memory());
    let mut guest = host.attach_linux(&memory);
    guest.inflate(&[FREE]).unwrap();
    guest.queue(1).ring().publish_index(30_000);
    guest.queue(1).kick().unwrap();
    host.until("broken", |look| look.numbers.malformed == 1);
    guest.queue(1).kick().unwrap();
    touch(&memory, FREE + 1, 7);
    guest.inflate(&[FREE + 1]).unwrap();
    assert_eq!(content(&memory, FREE + 1), None);
    drop(guest);
    let mut guest = host.attach_linux(&memory);
    guest.deflate(&[FREE]).unwrap();
}

#[test]
fn a_guest_that_gives_everything_up_harms_itself() {
    let (host, memory) = (Ballooned::start(), memory());
    let mut guest = host.attach_linux(&memory);
    // All but the list itself: its rings are the first to go.
    let all: Vec<u32> = (256..4096).collect();
    guest.name(0, &all).unwrap();
    host.until("given up", |look| look.numbers.inflated_pages == 3840);
    drop(guest);
    let memory = support::balloon::memory();
    let mut guest = host.attach_linux(&memory);
    guest.inflate(&[FREE]).unwrap();
    other_vm_is_served(&host);
}

fn other_vm_is_served(host: &Ballooned) {
    let memory = Memory::with_bytes(32 << 20).unwrap();
    let mut disk =
        ballast::frontend::Device::connect(host.host.socket("web2"), memory, Options::default()).unwrap();
    let mut queues = disk.start().unwrap();
    queues[0].write_pages(3, &[page_of(3, 9)]).unwrap();
    assert_eq!(queues[0].read_page(3).unwrap(), page_of(3, 9));
}

#[test]
fn memory_that_is_cut_short_loses_that_balloon_alone() {
    let (host, memory) = (Ballooned::start(), memory());
    let mut guest = host.attach_linux(&memory);
    guest.inflate(&[FREE]).unwrap();
    let file = {
        let map = memory.map();
        map.iter().next().unwrap().file_offset().unwrap().file().try_clone().unwrap()
    };
    file.set_len(0).unwrap();
    // Nothing can be put on a ring any more, but called it can be.
    for queue in 0..4 {
        guest.queue(queue).kick().unwrap();
    }
    host.until("given up", |look| look.numbers.malformed == 4);
    guest.config().unwrap();
    guest.device().disconnect();
    let fresh = support::balloon::memory();
    let mut guest = host.attach_linux(&fresh);
    guest.inflate(&[FREE]).unwrap();
    other_vm_is_served(&host);
}

#[test]
fn any_words_on_the_rings_and_any_writes_to_the_configuration_end_nothing() {
    let host = Ballooned::start();
    let mut random = Random(9);
    for round in 0..40u32 {
        let memory = memory();
        (0..500).for_each(|_| touch(&memory, random.below(4096), u8::try_from(random.below(16)).unwrap()));
        let mut guest = host.attach(&memory, Options::for_balloon(5, &ALL));
        for _ in 0..50 {
            let queue = random.below(5) as usize;
            let address = match random.below(3) {
                0 => u64::from(random.below(8192)) * 4096,
                1 => SECOND + u64::from(random.below(u32::MAX)),
                _ => u64::from(random.below(u32::MAX)) << random.below(33),
            };
            let flags = u16::try_from(random.below(8)).unwrap();
            let next = u16::try_from(random.below(140)).unwrap();
            let length = random.below(u32::MAX) >> random.below(32);
            let chain = [descriptor(address, length, flags, next); 3];
            let tag = u16::try_from(random.below(16)).unwrap();
            // One that is in flight stays there.
            let _ = guest.queue(queue).stage_raw(tag, &chain);
            let _ = guest.queue(queue).publish();
            let length = random.below(20) as usize + 1;
            let _ = guest
                .write_config(random.below(30), &[u8::try_from(random.below(256)).unwrap(); 20][..length]);
            host.device.ask_stats();
            let _ = host.device.set_target(u64::from(random.below(1 << 24)));
        }
        assert!(guest.config().is_ok(), "round {round}");
        assert!(guest.changes(Duration::ZERO).is_ok());
    }
    let fresh = support::balloon::memory();
    let mut guest = host.attach_linux(&fresh);
    guest.inflate(&[FREE]).unwrap();
    other_vm_is_served(&host);
}
