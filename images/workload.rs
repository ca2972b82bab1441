//! The guest's workload: fills more memory than the guest has with pages that it can compute again, overwrites
//! some at random, checks every one, and says so in one line. The contents of a page follow from (seed, page,
//! generation) alone, so a page that comes back lost, torn, stale or another's is seen. It is started by `init`,
//! is linked statically, needs nothing but std, and must not know what its swap is made of.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// Where orders come from.
const ORDERS: &str = "/dev/ttyS1";
/// How often it is told how fast that goes.
const REPORTED_EVERY: Duration = Duration::from_secs(1);

const WORDS: usize = 512;

/// A page that takes this long to come is told of: whoever serves it was away.
const PAUSE: Duration = Duration::from_millis(50);

/// One page of guest memory. Aligned, so that it is exactly what the guest's kernel swaps.
#[derive(Clone, PartialEq)]
#[repr(align(4096))]
struct Page([u64; WORDS]);

/// A small generator (SplitMix64): all that must hold is that equal seeds give equal pages.
struct Random(u64);

impl Random {
    fn of(seed: u64, page: usize, generation: u32) -> Self {
        let mut random = Self(seed ^ (page as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mixed = random.next();
        Self(mixed ^ u64::from(generation).wrapping_mul(0xd1b5_4a32_d192_ed03))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// What a page looks like, in the shares that heaps of real programs have, roughly.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Zero,
    Same,
    Text,
    Heap,
    Noise,
}

const KINDS: [Kind; 5] = [Kind::Zero, Kind::Same, Kind::Text, Kind::Heap, Kind::Noise];

fn kind(random: &mut Random) -> Kind {
    match random.next() % 100 {
        0..5 => Kind::Zero,
        5..12 => Kind::Same,
        12..50 => Kind::Text,
        50..92 => Kind::Heap,
        _ => Kind::Noise,
    }
}

/// Phrases of two words, so that a text page costs a store per word and no copying.
const PHRASES: [&[u8; 16]; 16] = [
    b"request answered",
    b" by host 7 in 12",
    b" ms\nGET /v1/user",
    b"?page=3&order=ts",
    b" status=200 4096",
    b" bytes sent, key",
    b" found in cache\n",
    b" miss at 10:24:3",
    b"7 worker thread ",
    b"connection close",
    b"d by peer, retry",
    b" WARN slow query",
    b": SELECT id FROM",
    b" orders WHERE id",
    b" = 1 LIMIT 100;\n",
    b"                ",
];

/// The contents of `page` in its `generation`.
fn fill(page: &mut Page, seed: u64, number: usize, generation: u32) -> Kind {
    let mut random = Random::of(seed, number, generation);
    let kind = kind(&mut random);
    match kind {
        Kind::Zero => page.0.fill(0),
        Kind::Same => page.0.fill(same_word(&mut random)),
        Kind::Text => fill_text(page, &mut random),
        Kind::Heap => fill_heap(page, &mut random),
        Kind::Noise => page.0.iter_mut().for_each(|word| *word = random.next()),
    }
    kind
}

/// What programs fill pages with: a byte, a small number, now and then a word of no pattern.
fn same_word(random: &mut Random) -> u64 {
    let bits = random.next();
    match bits & 3 {
        0 | 1 => 0x0101_0101_0101_0101 * (1 + (bits >> 8) % 255),
        2 => 1 + (bits >> 44),
        _ => bits,
    }
}

fn fill_text(page: &mut Page, random: &mut Random) {
    // The first word tells two text pages apart even if the rest were equal.
    let (first, rest) = page.0.split_first_mut().expect("a page has words");
    *first = random.next();
    for words in rest.chunks_mut(32) {
        let mut bits = random.next();
        for pair in words.chunks_mut(2) {
            let phrase = u128::from_le_bytes(*PHRASES[(bits & 15) as usize]);
            for (word, shift) in pair.iter_mut().zip([0, 64]) {
                *word = (phrase >> shift) as u64;
            }
            bits >>= 4;
        }
    }
}

fn fill_heap(page: &mut Page, random: &mut Random) {
    // Objects of four words: a type pointer, a reference count, a pointer to a neighbour, a small number.
    let base = 0x7f00_0000_0000 | (random.next() & 0xff_ffff_f000);
    for object in page.0.chunks_exact_mut(4) {
        let bits = random.next();
        object[0] = base | (bits & 3) << 6;
        object[1] = 1 + (bits >> 2 & 3);
        object[2] = base + ((bits >> 8 & 0xff) << 4);
        object[3] = bits >> 32 & 7;
    }
}

struct Plan {
    mib: usize,
    rounds: u32,
    seed: u64,
    overwrite_percent: usize,
    /// Whether it is told on another serial line what to work on.
    orders: bool,
    /// How long it rests after each pass over what it was told to work on.
    rest: Duration,
}

impl Plan {
    fn from_arguments() -> Result<Self, String> {
        let rest = Duration::ZERO;
        let mut plan = Self { mib: 300, rounds: 2, seed: 1, overwrite_percent: 5, orders: false, rest };
        for argument in std::env::args().skip(1) {
            let parsed =
                argument.split_once('=').and_then(|(key, value)| Some((key, value.parse::<u32>().ok()?)));
            match parsed {
                Some(("mib", n @ 1..=65536)) => plan.mib = n as usize,
                Some(("rounds", n @ 1..)) => plan.rounds = n,
                Some(("seed", n)) => plan.seed = u64::from(n),
                Some(("overwrite", n @ 0..=100)) => plan.overwrite_percent = n as usize,
                Some(("orders", n @ 0..=1)) => plan.orders = n == 1,
                Some(("rest_ms", n)) => plan.rest = Duration::from_millis(n.into()),
                _ => {
                    return Err(format!(
                        "{argument:?} is not mib=, rounds=, seed=, overwrite=, orders= or rest_ms= and a number"
                    ));
                }
            }
        }
        Ok(plan)
    }
}

struct Workload {
    plan: Plan,
    pages: Vec<Page>,
    generations: Vec<u32>,
    expected: Page,
    checked: u64,
    overwritten: u64,
    bad: u64,
}

impl Workload {
    fn new(plan: Plan) -> Self {
        let count = plan.mib * 256;
        Self {
            plan,
            pages: Vec::with_capacity(count),
            generations: vec![0; count],
            expected: Page([0; WORDS]),
            checked: 0,
            overwritten: 0,
            bad: 0,
        }
    }

    fn run(&mut self) {
        self.fill_all();
        if self.plan.orders {
            self.work_on_orders();
        }
        for round in 1..=self.plan.rounds {
            self.overwrite_some(round);
            self.check_all(round);
        }
    }

    fn progress(&self, what: &str, round: u32, done: usize, of: usize) {
        // Ten lines a phase: a serial console is slow.
        if done % (of / 10).max(1) == 0 && done > 0 {
            println!(
                "BALLAST-GUEST PROGRESS round {round}/{} {what} {}% bad={}",
                self.plan.rounds,
                (done * 100 / of).min(100),
                self.bad
            );
        }
    }

    fn fill_all(&mut self) {
        let count = self.generations.len();
        let mut kinds = [0usize; KINDS.len()];
        for number in 0..count {
            self.progress("fill", 0, number, count);
            let kind = fill(&mut self.expected, self.plan.seed, number, 0);
            kinds[kind as usize] += 1;
            self.pages.push(self.expected.clone());
        }
        println!(
            "BALLAST-GUEST filled {count} pages: {}",
            kinds.iter().zip(KINDS).map(|(n, kind)| format!("{n} {kind:?}")).collect::<Vec<_>>().join(", ")
        );
    }

    /// Reads so many mebibytes over and over as it was told last, and nothing else, until it is told 0.
    fn work_on_orders(&mut self) {
        let (tell, told) = mpsc::channel();
        thread::spawn(move || {
            let orders = BufReader::new(File::open(ORDERS).expect("a second serial line")).lines();
            for order in orders.map_while(Result::ok).filter_map(|order| order.trim().parse::<usize>().ok()) {
                if tell.send(order).is_err() {
                    break;
                }
            }
        });
        let words: Vec<u64> = self.pages.iter().map(|page| page.0[0]).collect();
        println!("BALLAST-GUEST PROGRESS waits for orders");
        let mut hot_mib = told.recv().unwrap_or(0);
        while hot_mib > 0 {
            let (began, mut touched) = (Instant::now(), 0u64);
            while began.elapsed() < REPORTED_EVERY {
                for (page, word) in self.pages.iter().zip(&words).take(hot_mib * 256) {
                    self.bad += u64::from(page.0[0] != *word);
                    touched += 1;
                }
                thread::sleep(self.plan.rest);
            }
            let passes = touched as f64 / (hot_mib * 256) as f64 / began.elapsed().as_secs_f64();
            println!("BALLAST-GUEST PROGRESS hot={hot_mib} passes_per_s={passes:.1} bad={}", self.bad);
            hot_mib = told.try_iter().last().unwrap_or(hot_mib);
        }
    }

    fn overwrite_some(&mut self, round: u32) {
        let count = self.generations.len();
        let times = count * self.plan.overwrite_percent / 100;
        let mut random = Random::of(!self.plan.seed, count, round);
        for time in 0..times {
            self.progress("overwrite", round, time, times);
            let number = (random.next() % count as u64) as usize;
            self.check(number);
            self.generations[number] += 1;
            fill(&mut self.pages[number], self.plan.seed, number, self.generations[number]);
            self.overwritten += 1;
        }
    }

    fn check_all(&mut self, round: u32) {
        let count = self.generations.len();
        for number in 0..count {
            self.progress("check", round, number, count);
            self.check(number);
        }
    }

    fn check(&mut self, number: usize) {
        let generation = self.generations[number];
        let kind = fill(&mut self.expected, self.plan.seed, number, generation);
        self.checked += 1;
        let asked = Instant::now();
        std::hint::black_box(self.pages[number].0[0]);
        let waited = asked.elapsed();
        if waited >= PAUSE {
            println!("BALLAST-GUEST PAUSE {}", waited.as_millis());
        }
        if self.pages[number] != self.expected {
            self.bad += 1;
            if self.bad <= 10 {
                self.explain(number, generation, kind);
            }
        }
    }

    /// Says what a wrong page holds instead, because that names the culprit.
    fn explain(&mut self, number: usize, generation: u32, kind: Kind) {
        let page = &self.pages[number];
        let first = page.0.iter().zip(&self.expected.0).position(|(a, b)| a != b).unwrap_or(WORDS);
        let wrong = page.0.iter().zip(&self.expected.0).filter(|(a, b)| a != b).count();
        let mut other = Page([0; WORDS]);
        let stale = (0..generation).rev().find(|old| {
            fill(&mut other, self.plan.seed, number, *old);
            other == *page
        });
        let what = match stale {
            Some(old) => format!("its old generation {old}"),
            None if page.0.iter().all(|word| *word == 0) => "zeros".to_owned(),
            None => format!("{wrong} wrong words from word {first}"),
        };
        println!("BALLAST-GUEST BAD page {number} generation {generation} ({kind:?}) holds {what}");
    }
}

/// A counter of /proc/vmstat; 0 where it can't be read.
fn vmstat(name: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/vmstat").unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()).unwrap_or(0)
}

fn main() -> ExitCode {
    let plan = match Plan::from_arguments() {
        Ok(plan) => plan,
        Err(message) => {
            println!("BALLAST-GUEST FAIL workload: {message}");
            return ExitCode::from(2);
        }
    };
    let mut work = Workload::new(plan);
    work.run();
    let (out, back) = (vmstat("pswpout "), vmstat("pswpin "));
    // A guest that never swapped has proven nothing about its swap.
    let pass = work.bad == 0 && out > 0 && back > 0;
    println!(
        "BALLAST-GUEST {} pages={} checked={} overwritten={} bad={} swapped_out={out} swapped_in={back}",
        if pass { "PASS" } else { "FAIL" },
        work.pages.len(),
        work.checked,
        work.overwritten,
        work.bad,
    );
    if pass { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
