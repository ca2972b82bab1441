//! What a page costs: instructions for each step of its way, counted by valgrind's callgrind because times are noisy; and
//! bytes, with all that is kept beside it. Both are compared with what they were, in `cost.txt`: who makes them larger finds
//! out here, and who makes them smaller writes down by how much: `BALLAST_COST=write tests/run --test cost`.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ballast::ids::Slot;
use ballast::reclaim::ColdOptions;
use ballast::reclaim::shrinker::{Options, Shrinker};
use ballast::store::Store;
use ballast::store::codec::{Compressor, Scratch};
use ballast::store::lru::Age;
use support::steps::STEPS;
use support::{open_store, page_of, records};

/// Of a hundred, what a number may be larger, or smaller before that is to be written down: other compilers make somewhat other
/// instructions.
const OTHER_PERCENT: u64 = 10;
/// The same for short steps: what is inlined where changes with how the compiler happens to cut the crate in pieces.
const OTHER_PERCENT_SHORT: u64 = 60;
/// The same for a page's whole way beside its codec, whose pieces make up for each other.
const OTHER_PERCENT_WAY: u64 = 15;
const SHORT: u64 = 10_000;

/// How often a step is done in the longer of two runs, and in the shorter: what they have in common counts for neither.
const TIMES: [u64; 2] = [1024, 512];

/// What a page takes beside its codec is guarded on its own: a tenth of the whole is more than all of it.
const BESIDE_CODEC: [(&str, &str); 2] =
    [("page stored", "lz4, compress"), ("page loaded", "lz4, decompress")];

/// In a process that valgrind counts: which step is to be done, and how often.
const STEP: &str = "BALLAST_COST_STEP";

fn path() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cost.txt"))
}

/// The numbers that were written down, by their names.
fn known() -> BTreeMap<String, u64> {
    let text = std::fs::read_to_string(path()).unwrap();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (number, name) = line.trim().split_once(' ').unwrap();
            (name.to_owned(), number.parse().unwrap())
        })
        .collect()
}

/// Does a step in a process of its own, and counts that.
fn instructions(step: usize, times: u64) -> u64 {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "a_page_costs_what_it_did", "--test-threads=1"])
        .env(STEP, format!("{step} {times}"))
        .output()
        .expect("valgrind is there: images/install-missing tests");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stdout));
    let collected = text.lines().find_map(|line| line.split_once("Collected : "));
    collected.unwrap_or_else(|| panic!("{text}")).1.trim().parse().unwrap()
}

fn bytes_a_page(store: &Store) -> u64 {
    let vm = store.ready("web1").unwrap();
    let pages = vm.accounting().held.stored_pages;
    (store.arena().used_bytes() + store.arena().metadata_bytes() + vm.metadata_bytes()) / pages
}

/// Bytes a page once it was stored, and at rest.
fn bytes() -> [(String, u64); 2] {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let store = Arc::new(open_store(dir.path(), &["web1"], Compressor::Lz4, 1 << 30, 1 << 30));
    store.shared().pools.set_cold(Some(Compressor::ZstdWithDictionary(9))).unwrap();
    let (vm, mut scratch) = (store.ready("web1").unwrap(), Scratch::default());
    for slot in 0..8000_u32 {
        let seed = u64::from(slot);
        let page = if slot % 4 == 3 { page_of(2, seed) } else { records(seed) };
        vm.store(Slot(slot), &page, Age::from_bits(0), &mut scratch).unwrap();
    }
    let stored = bytes_a_page(&store);
    let cold = ColdOptions { after: Duration::from_secs(1), cpu_percent: 100, ..ColdOptions::default() };
    let mut shrinker = Shrinker::new(Arc::clone(&store), Options { cold, ..Options::default() }, || {});
    let cold = store.shared().pools.cold().unwrap().id;
    let (mut rests, start) = (0, Instant::now());
    while rests < 20 {
        assert!(start.elapsed() < Duration::from_secs(120), "it never comes to rest");
        let is_cold = vm.accounting().held.objects_by_pool[cold.index()] == 8000;
        let used = store.arena().used_bytes();
        shrinker.turn();
        rests = if is_cold && store.arena().used_bytes() == used { rests + 1 } else { 0 };
        std::thread::sleep(Duration::from_millis(1));
    }
    [("bytes a page, stored".to_owned(), stored), ("bytes a page, at rest".to_owned(), bytes_a_page(&store))]
}

#[test]
fn a_page_costs_what_it_did() {
    if let Ok(step) = std::env::var(STEP) {
        let (step, times) = step.split_once(' ').unwrap();
        let (_, make) = STEPS[step.parse::<usize>().unwrap()];
        let mut step = make();
        return (0..times.parse::<u64>().unwrap()).for_each(|_| step());
    }
    let mut found: Vec<(String, u64)> = bytes().into();
    for (step, (name, _)) in STEPS.iter().enumerate() {
        // Side by side: what is counted is not time.
        let [more, less] = std::thread::scope(|scope| {
            TIMES.map(|times| scope.spawn(move || instructions(step, times))).map(|run| run.join().unwrap())
        });
        found.push((format!("instructions, {name}"), (more - less) / (TIMES[0] - TIMES[1])));
    }
    for (whole, part) in BESIDE_CODEC {
        let number = |wanted: &str| {
            let name = format!("instructions, {wanted}");
            found.iter().find(|(name_of, _)| *name_of == name).unwrap().1
        };
        found.push((format!("instructions, {whole} without {part}"), number(whole) - number(part)));
    }
    let mut text =
        "# What tests/cost.rs found, and compares with. BALLAST_COST=write tests/run --test cost\n"
            .to_owned();
    for (name, number) in &found {
        writeln!(text, "{number:>7} {name}").unwrap();
    }
    println!("{text}");
    if std::env::var("BALLAST_COST").is_ok_and(|what| what == "write") {
        std::fs::write(path(), &text).unwrap();
    }
    let known = known();
    assert_eq!(known.len(), found.len(), "cost.txt has other numbers: BALLAST_COST=write");
    for (name, number) in found {
        let was = *known.get(&name).unwrap_or_else(|| panic!("cost.txt has no {name:?}: BALLAST_COST=write"));
        let is_short = name.starts_with("instructions") && (was < SHORT || name.contains("coldest"));
        let percent = match is_short {
            true if name.starts_with("instructions, page") => OTHER_PERCENT_WAY,
            true => OTHER_PERCENT_SHORT,
            false => OTHER_PERCENT,
        };
        let other = was * percent / 100;
        assert!(number <= was + other, "{name}: {number}, and it was {was}");
        assert!(
            number + other >= was,
            "{name}: {number}, and it was {was}: write it down with BALLAST_COST=write"
        );
    }
}
