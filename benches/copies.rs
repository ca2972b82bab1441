//! What a page takes on its way into guest memory that another core has just read, as a guest's has that loads pages again and
//! again; and what that core takes to read it then: by an ordinary copy and past the caches. `cargo bench --bench copies`
//! measures between cores 0 and 1, `cargo bench --bench copies -- 0 8` between others; PERFORMANCE.md has the figures.

#![allow(clippy::unwrap_used, reason = "a bench says what went wrong by failing")]

use std::hint::{black_box, spin_loop};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ballast::device::stream::stream_page;
use ballast::page::{PAGE_SIZE, Page, ZERO_PAGE};
use rustix::thread::{CpuSet, sched_setaffinity};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

/// Pages at a time, as many as a front end has requests in flight.
const PAGES: u32 = 32;
const ROUNDS: u32 = 20_000;

type Copy = fn(&Page, &VolatileSlice<'_>);

fn pin(core: usize) {
    let mut set = CpuSet::new();
    set.set(core);
    sched_setaffinity(None, &set).expect("the core is there");
}

fn slices(memory: &GuestMemoryMmap) -> Vec<VolatileSlice<'_>> {
    let at = |nth: u32| GuestAddress(u64::from(nth) * PAGE_SIZE as u64);
    (0..PAGES).map(|nth| memory.get_slice(at(nth), PAGE_SIZE).unwrap()).collect()
}

/// What a page takes to be copied by one core, and to be read by the other, if that one reads it at all.
fn measure(copy: Copy, reads: bool, [writer, reader]: [usize; 2]) -> [Duration; 2] {
    let length = PAGES as usize * PAGE_SIZE;
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), length)]).unwrap();
    // Even while the pages are the writer's.
    let turn = AtomicU64::new(0);
    let wait = |for_turn: u64| {
        while turn.load(Ordering::Acquire) != for_turn {
            spin_loop();
        }
        Instant::now()
    };
    let (page, mut into) = (Box::new([7; PAGE_SIZE]), ZERO_PAGE);
    thread::scope(|scope| {
        let written = scope.spawn(|| {
            pin(writer);
            let (slices, mut took) = (slices(&memory), Duration::ZERO);
            for round in 0..u64::from(ROUNDS) {
                let start = wait(2 * round);
                slices.iter().for_each(|slice| copy(black_box(&page), slice));
                // Whatever is still on its way counts.
                std::sync::atomic::fence(Ordering::SeqCst);
                took += start.elapsed();
                turn.store(2 * round + 1, Ordering::Release);
            }
            took
        });
        pin(reader);
        let (slices, mut took) = (slices(&memory), Duration::ZERO);
        for round in 0..u64::from(ROUNDS) {
            let start = wait(2 * round + 1);
            for slice in slices.iter().filter(|_| reads) {
                slice.copy_to(&mut into[..]);
                black_box(&into);
            }
            took += start.elapsed();
            turn.store(2 * round + 2, Ordering::Release);
        }
        [written.join().unwrap(), took].map(|took| took / ROUNDS / PAGES)
    })
}

fn main() {
    let given: Vec<usize> = std::env::args().skip(1).filter_map(|word| word.parse().ok()).collect();
    let cores = match given[..] {
        [] => [0, 1],
        [writer, reader] if writer != reader => [writer, reader],
        _ => panic!("give two cores, or none for 0 and 1"),
    };
    // Before there are two threads that would wait for each other for ever.
    cores.into_iter().for_each(pin);
    println!("ns a page, copied by core {} and read by core {}", cores[0], cores[1]);
    println!("| | nobody else reads it: copy | another core does: copy | read |\n| --- | --- | --- | --- |");
    let ordinary: Copy = |page, slice| slice.copy_from(&page[..]);
    for (name, copy) in [("ordinary", ordinary), ("past the caches", stream_page::<()>)] {
        let [[alone, _], [copied, read]] = [false, true].map(|reads| measure(copy, reads, cores));
        println!("| {name} | {} | {} | {} |", alone.as_nanos(), copied.as_nanos(), read.as_nanos());
    }
}
