//! What a policy costs on a recorded history: how many loads have to come from the writeback file, and how many pages
//! are written to it, with a pool of a quarter, a half and three quarters of what the history needs at its peak.
//! `cargo bench --bench policies -- TRACE…`; ARCHITECTURE.md has the figures.
//!
//! A trace is a file of records of 16 bytes, little-endian: 0 microseconds u64, 8 slot u32, 12 VM u8, 13 what happened,
//! a letter: `s`tore, `l`oad or `d`iscard, 14 the bytes that the stored object takes in the arena u16, none for a
//! same-filled page. The daemon writes none; one call in `VmStore::publish` and one where a load is counted make it.

#![allow(clippy::unwrap_used, reason = "a bench says what went wrong by failing")]

use std::collections::{BTreeSet, HashMap};

use ballast::store::room::Marks;

/// One line of the table.
#[derive(Clone, Copy)]
struct Policy {
    name: &'static str,
    order: Order,
    comes_back: ComesBack,
}

/// Which page leaves first.
#[derive(Clone, Copy, PartialEq)]
enum Order {
    /// Pages that were loaded since they were stored, then the others; the longest stored first.
    LoadedFirst,
    /// The same, but pages that were loaded more often stand among the others, by their last use.
    LoadedOnceFirst,
    /// The longest unused; a load is a use.
    Lru,
    /// The longest stored, but each is passed over once, as in zswap.
    SecondChance,
    /// The longest unused; pages that were loaded since they were stored count as twice as old.
    LoadedTwiceAsOld,
    /// The same, but as much older as their VM's loaded pages were dropped rather than loaded again: once to eight times.
    LoadedByFate,
    /// What is loaded last, or never again.
    Ideal,
}

/// When a page that is loaded from the file comes back into the pool.
#[derive(Clone, Copy, PartialEq)]
enum ComesBack {
    Never,
    Twice,
    /// At the second load, when there is room or when it would be far from leaving again.
    Soon,
    /// When something is in the pool that is needed later.
    Ideal,
}

const POLICIES: [Policy; 12] = [
    Policy { name: "loaded pages first", order: Order::LoadedFirst, comes_back: ComesBack::Twice },
    Policy { name: "loaded once first", order: Order::LoadedOnceFirst, comes_back: ComesBack::Twice },
    Policy { name: "second chance", order: Order::SecondChance, comes_back: ComesBack::Twice },
    Policy { name: "LRU", order: Order::Lru, comes_back: ComesBack::Twice },
    Policy { name: "loaded count double", order: Order::LoadedTwiceAsOld, comes_back: ComesBack::Twice },
    Policy { name: "loaded pages first, back soon", order: Order::LoadedFirst, comes_back: ComesBack::Soon },
    Policy { name: "second chance, back soon", order: Order::SecondChance, comes_back: ComesBack::Soon },
    Policy { name: "LRU, back soon", order: Order::Lru, comes_back: ComesBack::Soon },
    Policy { name: "LRU, never back", order: Order::Lru, comes_back: ComesBack::Never },
    Policy {
        name: "loaded count double, back soon",
        order: Order::LoadedTwiceAsOld,
        comes_back: ComesBack::Soon,
    },
    Policy {
        name: "loaded count by fate, back soon (ours)",
        order: Order::LoadedByFate,
        comes_back: ComesBack::Soon,
    },
    Policy { name: "ideal", order: Order::Ideal, comes_back: ComesBack::Ideal },
];

#[derive(Clone, Copy)]
struct Event {
    us: u64,
    /// Slots of all VMs, numbered in the order of their first use.
    page: usize,
    vm: usize,
    what: u8,
    bytes: u64,
    /// The event that loads the page next, before it is stored again or dropped.
    next_load: Option<usize>,
}

fn read(path: &str) -> Vec<Event> {
    let raw = std::fs::read(path).unwrap_or_else(|err| panic!("{path}: {err}"));
    let mut pages = HashMap::new();
    let mut events: Vec<Event> = Vec::new();
    for record in raw.as_chunks::<16>().0 {
        let slot = u32::from_le_bytes(record[8..12].try_into().unwrap());
        let new = pages.len();
        events.push(Event {
            us: u64::from_le_bytes(record[..8].try_into().unwrap()),
            page: *pages.entry((record[12], slot)).or_insert(new),
            vm: record[12].into(),
            what: record[13],
            bytes: u16::from_le_bytes(record[14..].try_into().unwrap()).into(),
            next_load: None,
        });
    }
    let mut next = vec![None; pages.len()];
    for (index, event) in events.iter_mut().enumerate().rev() {
        event.next_load = next[event.page];
        next[event.page] = (event.what == b'l').then_some(index);
    }
    events
}

#[derive(Clone, Copy, Default, PartialEq)]
enum Place {
    #[default]
    Nowhere,
    Pool,
    File,
}

#[derive(Clone, Copy, Default)]
struct Page {
    place: Place,
    vm: usize,
    bytes: u64,
    stored_us: u64,
    used_us: u64,
    loads: u32,
    /// Since it is in the file.
    file_loads: u32,
    passed_over: bool,
    /// Its key in the queue of those that were loaded, or of the others; the least leaves first.
    queued: (usize, u64),
}

/// What is taken for granted of a VM's loaded pages before anything is seen, and when what was seen counts half.
const FATES_FIRST: f64 = 64.0;
const FATES_MAX: f64 = 8192.0;

struct Pool {
    policy: Policy,
    marks: Marks,
    pages: Vec<Page>,
    queues: [BTreeSet<(u64, usize)>; 2],
    used_bytes: u64,
    peak_bytes: u64,
    /// For each VM, when the page that left last was used, and by how much its age counts.
    left: [(u64, f64); 256],
    /// For each VM, how many pages that it had loaded were loaded again, and dropped or overwritten.
    fates: [[f64; 2]; 256],
    events: u64,
    file_loads: u64,
    written: u64,
}

impl Pool {
    fn replay(policy: Policy, max_bytes: u64, events: &[Event]) -> Self {
        let mut marks = Marks::new(max_bytes, 90);
        if policy.order == Order::Ideal {
            marks.stop_bytes = marks.start_bytes;
        }
        let pages = vec![Page::default(); events.iter().map(|event| event.page + 1).max().unwrap_or(0)];
        let mut pool = Self {
            policy,
            marks,
            pages,
            queues: Default::default(),
            used_bytes: 0,
            peak_bytes: 0,
            left: [(0, 1.0); 256],
            fates: [[FATES_FIRST; 2]; 256],
            events: 0,
            file_loads: 0,
            written: 0,
        };
        events.iter().for_each(|event| pool.step(event));
        pool
    }

    fn step(&mut self, event: &Event) {
        self.events += 1;
        let before = self.pages[event.page];
        self.take_out(event.page);
        if before.loads > 0 && before.place == Place::Pool {
            let fates = &mut self.fates[event.vm];
            fates[usize::from(event.what != b'l')] += 1.0;
            if fates[0] + fates[1] > FATES_MAX {
                fates.iter_mut().for_each(|fate| *fate /= 2.0);
            }
        }
        if event.what == b'd' {
            self.pages[event.page].place = Place::Nowhere;
        }
        match (event.what, before.place) {
            (b's', _) => {
                let (stored_us, used_us) = (event.us, event.us);
                let (vm, bytes) = (event.vm, event.bytes);
                self.pages[event.page] = Page { vm, bytes, stored_us, used_us, ..Page::default() };
                if event.bytes > 0 {
                    self.put_in(event);
                }
            }
            (b'l', Place::Pool) => {
                self.pages[event.page] = Page { used_us: event.us, loads: before.loads + 1, ..before };
                self.put_in(event);
            }
            (b'l', Place::File) => {
                self.file_loads += 1;
                let file_loads = before.file_loads + 1;
                self.pages[event.page] = Page { used_us: event.us, file_loads, ..before };
                if self.comes_back(event, &before) {
                    let (stored_us, loads, passed_over) = (event.us, self.loads_when_back(), false);
                    let page = self.pages[event.page];
                    self.pages[event.page] = Page { stored_us, loads, passed_over, ..page };
                    self.put_in(event);
                }
            }
            _ => {}
        }
        if self.used_bytes > self.marks.start_bytes {
            while self.used_bytes > self.marks.stop_bytes {
                self.evict(event.us);
            }
        }
    }

    fn comes_back(&self, event: &Event, before: &Page) -> bool {
        match self.policy.comes_back {
            ComesBack::Never => false,
            ComesBack::Twice => before.file_loads > 0,
            ComesBack::Soon => {
                let (used_us, factor) = self.left[event.vm];
                let room = self.used_bytes < self.marks.stop_bytes;
                before.file_loads > 0
                    && (room
                        || (event.us - before.used_us) as f64 * 2.0 * self.factor(event.vm)
                            < (event.us - used_us) as f64 * factor)
            }
            ComesBack::Ideal => {
                let needed_last = self.queues[0].first().map_or(0, |(key, _)| *key);
                let room = self.used_bytes + before.bytes < self.marks.start_bytes;
                event.next_load.is_some() && (room || key_of(event.next_load) > needed_last)
            }
        }
    }

    /// By how much a loaded page of a VM is older than it is.
    fn factor(&self, vm: usize) -> f64 {
        match self.policy.order {
            Order::LoadedTwiceAsOld => 2.0,
            Order::LoadedByFate => {
                let [again, dropped] = self.fates[vm];
                ((again + dropped) / again).clamp(1.0, 8.0)
            }
            _ => 1.0,
        }
    }

    /// A page that came back counts as stored, or as the copy that it is.
    fn loads_when_back(&self) -> u32 {
        u32::from(matches!(self.policy.order, Order::LoadedTwiceAsOld | Order::LoadedByFate))
    }

    fn put_in(&mut self, event: &Event) {
        let page = &mut self.pages[event.page];
        page.place = Place::Pool;
        page.queued = match self.policy.order {
            Order::LoadedFirst => (usize::from(page.loads > 0), page.stored_us),
            Order::LoadedOnceFirst if page.loads == 1 => (1, page.stored_us),
            Order::LoadedOnceFirst | Order::Lru => (0, page.used_us),
            Order::SecondChance if page.loads > 0 => page.queued,
            Order::SecondChance => (0, self.events),
            Order::LoadedTwiceAsOld | Order::LoadedByFate => (usize::from(page.loads > 0), page.used_us),
            Order::Ideal => (0, key_of(event.next_load)),
        };
        let (queue, key) = page.queued;
        self.used_bytes += page.bytes;
        self.peak_bytes = self.peak_bytes.max(self.used_bytes);
        self.queues[queue].insert((key, event.page));
    }

    fn take_out(&mut self, page: usize) {
        let Page { place, bytes, queued: (queue, key), .. } = self.pages[page];
        if place == Place::Pool {
            self.queues[queue].remove(&(key, page));
            self.used_bytes -= bytes;
            self.pages[page].place = Place::Nowhere;
        }
    }

    fn evict(&mut self, now_us: u64) {
        loop {
            let [others, loaded] = [0, 1].map(|queue| self.queues[queue].first().copied());
            let loaded_goes = match (others, loaded) {
                (Some((other, _)), Some((loaded, page))) => {
                    let by_age = matches!(self.policy.order, Order::LoadedTwiceAsOld | Order::LoadedByFate);
                    let vm = self.pages[page].vm;
                    !by_age || (now_us - loaded) as f64 * self.factor(vm) >= (now_us - other) as f64
                }
                (others, _) => others.is_none(),
            };
            let queue = usize::from(loaded_goes);
            let (key, index) = self.queues[queue].pop_first().expect("a pool above its mark holds pages");
            let page = &mut self.pages[index];
            if self.policy.order == Order::SecondChance && !page.passed_over {
                page.passed_over = true;
                self.events += 1;
                page.queued = (0, self.events);
                self.queues[0].insert((self.events, index));
                continue;
            }
            debug_assert_eq!(page.queued, (queue, key));
            let (vm, used_us, was_loaded) = (page.vm, page.used_us, page.loads > 0);
            self.used_bytes -= page.bytes;
            (page.place, page.loads, page.file_loads) = (Place::File, 0, 0);
            self.written += 1;
            self.left[vm] = (used_us, if was_loaded { self.factor(vm) } else { 1.0 });
            return;
        }
    }
}

/// The sooner it is loaded, the greater.
fn key_of(next_load: Option<usize>) -> u64 {
    next_load.map_or(0, |event| u64::MAX - event as u64)
}

fn percent(part: u64, whole: u64) -> u64 {
    (part * 100).checked_div(whole).unwrap_or(0)
}

fn main() {
    let traces: Vec<String> =
        std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    if traces.is_empty() {
        println!("skipped: no traces given (cargo bench --bench policies -- TRACE…)");
    }
    for path in traces {
        let events = read(&path);
        let peak_bytes = Pool::replay(POLICIES[0], u64::MAX, &events).peak_bytes;
        let loads = events.iter().filter(|event| event.what == b'l').count();
        println!("{path}: {} events, {loads} loads, {} KiB at most", events.len(), peak_bytes >> 10);
        println!("{:40}{:>26}{:>26}{:>26}", "loads from the file, pages written", "1/4", "1/2", "3/4");
        let mut first: Option<[Pool; 3]> = None;
        for policy in POLICIES {
            let pools = [1, 2, 3].map(|quarters| Pool::replay(policy, peak_bytes / 4 * quarters, &events));
            print!("{:40}", policy.name);
            for (pool, first) in pools.iter().zip(first.as_ref().unwrap_or(&pools)) {
                let loads_percent = percent(pool.file_loads, first.file_loads);
                let written_percent = percent(pool.written, first.written);
                print!("{:>9} {loads_percent:>3} %, {written_percent:>4} %", pool.file_loads);
            }
            println!();
            first = first.or(Some(pools));
        }
    }
}
