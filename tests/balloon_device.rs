//! A balloon with a driver of our own: what is given up or reported is gone from the VMM's file and nothing else is, the
//! driver is told what is wanted and says what it has, and neither a VMM that comes back nor a successor of the daemon
//! changes that.
//!
//! Not tested here: a guest with an operating system. No VMM that attaches any vhost-user device is in Debian, and the guest
//! without an operating system that others of these tests boot in cloud-hypervisor has no driver for a balloon.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ballast::balloon::Word;
use ballast::balloon::vmm::VmmClient;
use ballast::balloon::vmm::own::Own;
use ballast::device::balloon::{Stats, Told};
use ballast::frontend::{Balloon, Manners, Options};
use ballast::page::PAGE_SIZE_U64;
use support::Random;
use support::balloon::{ALL, Ballooned, PATIENCE, REGION_PAGES, SECOND, content, memory, second, touch};

/// Behind what the driver keeps for itself.
const FREE: u32 = 2048;
const STATS: usize = 2;
const REPORT: usize = 3;

#[test]
fn pages_that_are_given_up_are_gone_and_their_neighbours_are_not() {
    let (host, memory) = (Ballooned::start(), memory());
    let mut guest = host.attach_linux(&memory);
    for page in 0..10 {
        touch(&memory, FREE + page, 7);
        touch(&memory, second(FREE + page), 8);
    }
    guest.inflate(&[FREE + 3, FREE + 1, second(FREE + 9), FREE + 2, second(FREE)]).unwrap();
    let look = host.until("counted", |look| look.given_bytes == 5 * 4096);
    assert_eq!((look.numbers.inflated_pages, look.numbers.punched_bytes), (5, 5 * 4096));
    let seen = |base: u32| (0..10).map(|page| content(&memory, base + page)).collect::<Vec<_>>();
    let all = |byte| vec![Some(byte); 10];
    let (mut first, mut other) = (all(7), all(8));
    first[1..4].fill(None);
    (other[0], other[9]) = (None, None);
    assert_eq!((seen(FREE), seen(second(FREE))), (first, other));
    // Who touches such a page finds zeros, and has a page again.
    let mut bytes = [9; 4096];
    memory.read(vm_memory::GuestAddress(u64::from(FREE + 2) * 4096), &mut bytes).unwrap();
    assert_eq!(bytes, [0; 4096]);
    touch(&memory, FREE + 1, 5);
    guest.deflate(&[FREE + 1, FREE + 2]).unwrap();
    let look = host.until("counted", |look| look.given_bytes == 3 * 4096);
    assert_eq!(look.numbers.deflated_pages, 2);
    assert_eq!((content(&memory, FREE + 1), content(&memory, FREE + 3)), (Some(5), None));
    assert_eq!(look.numbers.refused_pages + look.numbers.malformed + look.numbers.kept_bytes, 0);
}

#[test]
fn a_page_that_is_given_up_twice_counts_once_and_is_gone_again() {
    let (host, memory) = (Ballooned::start(), memory());
    let mut guest = host.attach_linux(&memory);
    guest.inflate(&[FREE, FREE, FREE + 1]).unwrap();
    touch(&memory, FREE, 7);
    guest.inflate(&[FREE]).unwrap();
    let look = host.until("counted", |look| look.numbers.inflated_again_pages == 2);
    assert_eq!((look.given_bytes, look.numbers.inflated_pages), (2 * 4096, 2));
    assert_eq!(content(&memory, FREE), None);
    guest.deflate(&[FREE, FREE, FREE + 7]).unwrap();
    assert_eq!(host.until("counted", |look| look.given_bytes == 4096).numbers.deflated_pages, 1);
}

#[test]
fn reported_pages_are_gone_and_are_the_guests_own_again() {
    // Where drivers have the queue: behind those that there are, or at its number in the specification.
    for (features, queues, queue) in [(&ALL[..], 4, 3), (&ALL[..], 5, 4), (&[5][..], 3, 2), (&[5][..], 5, 4)]
    {
        let (host, memory) = (Ballooned::start(), memory());
        let mut guest = host.attach(&memory, Options::for_balloon(queues, features));
        (0..2 * FREE).for_each(|page| touch(&memory, second(page), 7));
        let at = |page: u32| SECOND + u64::from(page) * PAGE_SIZE_U64;
        guest.report(queue, &[(at(0), 1 << 20), (at(300), 4096), (at(FREE), 4 << 20)]).unwrap();
        let look = host.until("counted", |look| look.numbers.punched_bytes == (5 << 20) + 4096);
        assert!(look.reports && look.given_bytes == 0);
        assert_eq!(look.numbers.reported_bytes, (5 << 20) + 4096);
        let gone = |page: &u32| content(&memory, second(*page)).is_none();
        let found: BTreeSet<u32> = (0..2 * FREE).filter(gone).collect();
        assert_eq!(found, (0..256).chain([300]).chain(FREE..FREE + 1024).collect());
        touch(&memory, second(5), 9);
        assert_eq!(content(&memory, second(5)), Some(9));
    }
}

#[test]
fn free_pages_keep_a_guests_poison() {
    let (host, memory) = (Ballooned::start(), memory());
    let mut guest = host.attach_linux(&memory);
    let range = [(SECOND, 4096)];
    touch(&memory, second(0), 0xaa);
    guest.say_poison(0xaaaa_aaaa).unwrap();
    guest.report(REPORT, &range).unwrap();
    assert_eq!(host.until("counted", |look| look.numbers.poisoned_bytes == 4096).numbers.punched_bytes, 0);
    assert_eq!(content(&memory, second(0)), Some(0xaa));
    // What is given up is filled anew when it is taken back.
    guest.inflate(&[second(0)]).unwrap();
    assert_eq!(content(&memory, second(0)), None);
    touch(&memory, second(1), 0);
    guest.say_poison(0).unwrap();
    guest.report(REPORT, &[(SECOND + 4096, 4096)]).unwrap();
    assert_eq!(content(&memory, second(1)), None, "a page of zeros is one that isn't there");
    // One that has not agreed to say what it fills pages with has not said so.
    let other = Ballooned::start();
    let mut guest = other.attach(&memory, Options::for_balloon(3, &[5]));
    guest.say_poison(1).unwrap();
    touch(&memory, second(2), 7);
    guest.report(2, &[(SECOND + 8192, 4096)]).unwrap();
    assert_eq!(content(&memory, second(2)), None);
}

#[test]
fn a_guest_is_told_how_large_its_balloon_is_to_be() {
    let (host, memory) = (Ballooned::start(), memory());
    assert_eq!(host.device.set_target(1 << 40), Ok(Told::Later), "nobody knows yet how large the guest is");
    let mut guest = host.attach_linux(&memory);
    let look = host.until("attached", |look| look.attached && look.listens);
    assert_eq!(
        (look.target_bytes, look.actual_bytes),
        (None, Some(0)),
        "a guest that boots has all of its memory"
    );
    assert_eq!(look.configured_bytes, 2 * u64::from(REGION_PAGES) * 4096);
    assert!(look.has_stats && look.deflates_on_oom);
    assert_eq!(guest.config().unwrap().num_pages, 0);
    let before = guest.changes(Duration::ZERO).unwrap();
    assert_eq!(host.device.set_target((8 << 20) + 5), Ok(Told::Now));
    assert_eq!(guest.changes(PATIENCE).unwrap(), before + 1);
    assert_eq!(guest.config().unwrap().num_pages, 2048);
    guest.say_actual(1000).unwrap();
    let look = host.device.look();
    assert_eq!((look.target_bytes, look.actual_bytes), (Some(8 << 20), Some(1000 * 4096)));
    assert_eq!(guest.config().unwrap().actual, 1000);
    for bytes in [look.configured_bytes, u64::MAX] {
        let err = host.device.set_target(bytes).unwrap_err();
        assert!(err.to_string().contains("33554432"), "{err}");
    }
    assert_eq!(host.device.look().target_bytes, Some(8 << 20));
    assert_eq!(host.device.set_target(0), Ok(Told::Now));
}

/// What the controller sees and does, through the device alone.
#[test]
fn the_controller_needs_no_vmm() {
    let (host, memory) = (Ballooned::start(), memory());
    let mut own = Own::new(std::sync::Arc::clone(&host.device), "/run/b/balloon/web1.sock".as_ref());
    let now = std::time::Instant::now();
    assert_eq!(own.look(now).unwrap_err().word(), Word::NoBalloon);
    let mut guest = host.attach_linux(&memory);
    guest.say_stats(STATS, &[(6, 5 << 20)]).unwrap();
    host.until("said", |look| look.stats.is_some() && look.listens);
    let all = 2 * u64::from(REGION_PAGES) * 4096;
    let seen = own.look(now).unwrap();
    assert_eq!((seen.configured_bytes, seen.actual_bytes), (all, all));
    assert_eq!(seen.guest.unwrap().available_bytes, Some(5 << 20));
    guest.finish(STATS).unwrap();
    own.set_target(all - (1 << 20), now).unwrap();
    assert_eq!(guest.config().unwrap().num_pages, 256);
    guest.say_actual(256).unwrap();
    assert_eq!(own.look(now).unwrap().actual_bytes, all - (1 << 20));
    own.set_target(u64::MAX, now).unwrap();
    assert_eq!(guest.config().unwrap().num_pages, 0);
    assert_eq!(own.set_target(0, now).unwrap_err().word(), Word::VmmRefused);
    guest.say_actual(u32::MAX).unwrap();
    assert_eq!(own.look(now).unwrap_err().word(), Word::VmmNonsense);
    // Another guest has all of its memory, and whoever squeezes learns that nobody has told it anything.
    drop(guest);
    let _guest = host.attach_linux(&support::balloon::memory());
    host.until("attached", |look| look.attached && look.target_bytes.is_none());
    assert_eq!(own.look(now).unwrap_err().word(), Word::VmmLate);
    assert_eq!(own.look(now).unwrap().actual_bytes, all);
}

#[test]
fn a_vmm_without_a_channel_is_no_reason_to_fail() {
    let (host, memory) = (Ballooned::start(), memory());
    // As cloud-hypervisor passes them on: none of the balloon's own.
    let mut options = Options { manners: Manners::CloudHypervisor, ..Options::for_balloon(2, &[]) };
    options.protocol_features.remove(vhost::vhost_user::message::VhostUserProtocolFeatures::BACKEND_REQ);
    let mut guest = host.attach(&memory, options);
    let look = host.until("attached", |look| look.attached);
    assert!(!look.listens && !look.has_stats && !look.reports && !look.deflates_on_oom);
    assert_eq!(host.device.set_target(1 << 20), Ok(Told::Unasked));
    assert_eq!(guest.config().unwrap().num_pages, 256);
    assert!(!host.device.ask_stats());
    touch(&memory, FREE, 7);
    guest.inflate(&[FREE]).unwrap();
    assert_eq!(content(&memory, FREE), None);
}

#[test]
fn statistics_come_when_they_are_asked_for() {
    let (host, memory) = (Ballooned::start(), memory());
    let mut guest = host.attach_linux(&memory);
    guest.say_stats(STATS, &[(6, 1 << 20), (2, 5), (77, 9)]).unwrap();
    let look = host.until("said", |look| look.stats.is_some());
    let first = Stats { available_bytes: Some(1 << 20), major_faults: Some(5), ..Stats::default() };
    assert_eq!(look.stats.unwrap().0, first);
    assert!(!guest.are_stats_wanted(STATS).unwrap(), "nobody has asked");
    assert!(host.device.ask_stats());
    guest.finish(STATS).unwrap();
    // Counters may go backwards; that is for others to judge.
    guest.say_stats(STATS, &[(2, 3)]).unwrap();
    let second = Stats { major_faults: Some(3), ..Stats::default() };
    host.until("said again", |look| look.stats.is_some_and(|(stats, _)| stats == second));
    assert!(host.device.ask_stats(), "a second later it will be asked");
}

/// A VMM of either kind comes back to the same balloon, and then to one that knows nothing of its past.
#[test]
fn nothing_that_was_under_way_is_lost_when_a_vmm_comes_back() {
    for manners in [Manners::Qemu, Manners::CloudHypervisor] {
        let (mut host, memory) = (Ballooned::start(), memory());
        let mut guest = host.attach(&memory, Options { manners, ..Options::for_balloon(4, &ALL) });
        guest.inflate(&[FREE]).unwrap();
        guest.say_stats(STATS, &[(6, 1)]).unwrap();
        guest.say_actual(1).unwrap();
        host.until("said", |look| look.stats.is_some());
        host.device.set_target(16384).unwrap();
        for round in 1..=3 {
            touch(&memory, FREE + round, 7);
            guest.device().disconnect();
            // The daemon dies after this is on the ring and before it is answered.
            guest.name(0, &[FREE + round]).unwrap();
            if round > 1 {
                host.successor();
                assert_eq!(host.device.look().actual_bytes, Some(u64::from(round) * 4096));
            }
            let changes = guest.changes(Duration::ZERO).unwrap();
            guest.reconnect(PATIENCE).unwrap();
            guest.finish(0).unwrap();
            assert_eq!(content(&memory, FREE + round), None);
            assert_eq!(guest.config().unwrap().num_pages, 4, "it would take its memory back");
            assert!(
                guest.changes(PATIENCE).unwrap() > changes,
                "it is told to look, and says how much it has"
            );
            guest.say_actual(round + 1).unwrap();
            host.until("said", |look| look.actual_bytes == Some(u64::from(round + 1) * 4096));
        }
        // The numbers that are in the buffer are of long ago.
        assert_eq!(host.device.look().stats, None);
        assert!(host.device.ask_stats());
        guest.finish(STATS).unwrap();
    }
}

#[test]
fn a_ring_that_is_stopped_goes_on_where_it_was() {
    let (host, memory) = (Ballooned::start(), memory());
    let mut guest = host.attach_linux(&memory);
    guest.inflate(&[FREE]).unwrap();
    guest.say_stats(STATS, &[(6, 1)]).unwrap();
    host.until("said", |look| look.stats.is_some());
    let bases = guest.device().stop().unwrap();
    assert_eq!(bases, [1, 0, 0, 0], "what is held is not done");
    assert!(!host.device.look().attached);
    guest.device().resume().unwrap();
    touch(&memory, FREE + 1, 7);
    guest.inflate(&[FREE + 1]).unwrap();
    assert_eq!(content(&memory, FREE + 1), None);
    host.until("attached", |look| look.attached);
    assert!(host.device.ask_stats());
    guest.finish(STATS).unwrap();
}

#[test]
fn a_second_vmm_waits_until_the_first_has_stopped() {
    let (host, memory) = (Ballooned::start(), memory());
    let mut guest = host.attach_linux(&memory);
    guest.inflate(&[FREE]).unwrap();
    let other_memory = support::balloon::memory();
    touch(&other_memory, FREE, 7);
    let mut other = host.attach_linux(&other_memory);
    other.say_actual(99).unwrap();
    other.name(0, &[FREE]).unwrap();
    guest.inflate(&[FREE + 1]).unwrap();
    assert_eq!(content(&other_memory, FREE), Some(7));
    assert_eq!(host.device.look().actual_bytes, Some(0), "nobody heeds it");
    drop(guest);
    other.finish(0).unwrap();
    assert_eq!(content(&other_memory, FREE), None);
    host.until("its own", |look| look.given_bytes == 4096);
}

/// What should be in each page of the second region, and which are given up.
struct Model {
    pages: BTreeMap<u32, Option<u8>>,
    given: BTreeSet<u32>,
    poisoned: bool,
    refused: u64,
}

impl Model {
    fn step(&mut self, random: &mut Random, guest: &mut Balloon, memory: &ballast::frontend::Memory) {
        let mut list: Vec<u32> = (0..random.below(20)).map(|_| random.below(PAGES + 2)).collect();
        if random.below(2) == 0 {
            // Neighbours, in either order.
            let first = random.below(PAGES - 30);
            list.extend((first..first + random.below(30)).rev());
        }
        let there = list.iter().copied().filter(|page| *page < PAGES);
        let numbers: Vec<u32> = list.iter().map(|page| second(FIRST + page)).collect();
        let outside = list.iter().filter(|page| **page >= PAGES).count() as u64;
        match random.below(5) {
            0 | 1 => {
                guest.inflate(&numbers).unwrap();
                self.refused += outside;
                there.for_each(|page| {
                    self.pages.insert(page, None);
                    self.given.insert(page);
                });
            }
            2 => {
                guest.deflate(&numbers).unwrap();
                self.refused += outside;
                self.given.retain(|page| !list.contains(page));
            }
            3 => {
                let byte = u8::try_from(random.below(255)).unwrap() + 1;
                for page in there.collect::<BTreeSet<_>>() {
                    touch(memory, second(FIRST + page), byte);
                    self.pages.insert(page, Some(byte));
                }
            }
            _ => {
                self.poisoned = random.below(3) == 0;
                guest.say_poison(u32::from(self.poisoned)).unwrap();
                let (first, count) = (random.below(PAGES), random.below(40) + 1);
                let at = SECOND + u64::from(FIRST + first) * 4096;
                guest.report(REPORT, &[(at, count * 4096)]).unwrap();
                let end = first + count;
                if !self.poisoned {
                    self.pages.extend((first..end.min(PAGES)).map(|page| (page, None)));
                    self.refused += u64::from(end.saturating_sub(PAGES));
                }
            }
        }
    }
}

const PAGES: u32 = 300;
/// The last pages of the region, so that what is behind them is outside.
const FIRST: u32 = REGION_PAGES - PAGES;

#[test]
fn the_files_holes_are_what_was_given_up_and_not_touched_since() {
    let (host, memory) = (Ballooned::start(), memory());
    let mut guest = host.attach_linux(&memory);
    let mut random = Random(5);
    let pages = (0..PAGES).map(|page| (page, None)).collect();
    let mut model = Model { pages, given: BTreeSet::new(), poisoned: false, refused: 0 };
    for step in 0..600 {
        model.step(&mut random, &mut guest, &memory);
        for (page, expected) in &model.pages {
            assert_eq!(content(&memory, second(FIRST + page)), *expected, "page {page} after step {step}");
        }
        let given_bytes = model.given.len() as u64 * 4096;
        host.until("counted", |look| {
            look.given_bytes == given_bytes && look.numbers.refused_pages == model.refused
        });
    }
}
