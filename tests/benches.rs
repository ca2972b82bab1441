//! `peers` and `overcommit` run from their beginning to their end, on few pages, and what isn't a time in their tables is
//! right.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use ballast::page::PAGE_SIZE;

/// Runs one with the program that the tests are of; returns what it printed. One at a time: the pages of one would wait for
/// the processor that the other takes.
fn run(name: &str, args: &[&str]) -> String {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bench").join(name));
    let done = command.args(args).args(["--ballast", env!("CARGO_BIN_EXE_ballast")]).output();
    let done = done.unwrap_or_else(|err| panic!("tests/bench/{name} needs Debian's python3: {err}"));
    let [printed, said] = [done.stdout, done.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    assert!(done.status.success(), "{name} {args:?}: {}\n{printed}\n{said}", done.status);
    printed
}

/// The cells of the row that begins with these, without them. The first such row counts.
fn row<'a>(printed: &'a str, begins: &[&str]) -> Vec<&'a str> {
    let cells = |line: &'a str| line.trim_matches(['|', ' ']).split(" | ").map(str::trim).collect::<Vec<_>>();
    let mut rows = printed.lines().filter(|line| line.starts_with('|')).map(cells);
    let found = rows.find(|cells| cells.starts_with(begins));
    found.unwrap_or_else(|| panic!("there is no row {begins:?} in\n{printed}"))[begins.len()..].to_vec()
}

/// The number that a cell begins with.
fn number(cell: &str) -> f64 {
    let end = cell.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(cell.len());
    cell[..end].parse().unwrap_or_else(|_| panic!("{cell:?} begins with no number"))
}

/// Pages of lines that come again in other pages, but hardly in the same one. Three of four are different, and the fourth is
/// always the same.
fn corpus(pages: usize) -> Vec<u8> {
    const LINES: usize = 512;
    // Knuth's linear congruential generator: the same numbers in every run.
    let mut state = 1u64;
    let mut below = |end: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % end
    };
    let letters = b"abcdefghijklmnopqrstuvwxyz";
    let mut line = || (0..60).map(|_| letters[below(letters.len())]).collect();
    let lines: Vec<Vec<u8>> = (0..LINES).map(|_| line()).collect();
    let mut page = || {
        let text: Vec<u8> = (0..PAGE_SIZE.div_ceil(60)).flat_map(|_| lines[below(LINES)].clone()).collect();
        text[..PAGE_SIZE].to_vec()
    };
    let same = page();
    (0..pages).flat_map(|nth| if nth.is_multiple_of(4) { same.clone() } else { page() }).collect()
}

#[test]
fn peers_fills_every_table_with_ballast_alone() {
    const PAGES: usize = 1024;
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let [file, json, charts] = ["text.pages", "rounds.json", "charts"].map(|name| dir.path().join(name));
    std::fs::write(&file, corpus(PAGES)).unwrap();
    let [file, json_path, charts_path] = [&file, &json, &charts].map(|path| path.to_str().unwrap());
    let pages = PAGES.to_string();
    let options = ["--only", "ballast", "--rounds", "1", "--rest", "--pages", &pages];
    let files = ["--json", json_path, "--svg", charts_path, "--corpus", file];
    let printed = run("peers", &[&options[..], &files[..]].concat());

    for measured in ["store 4 KiB, QD32", "load 4 KiB, QD1, p50", "store 128 KiB, QD32", "the same at rest"] {
        assert!(number(row(&printed, &[measured])[0]) > 0.0, "{measured}");
    }
    for operation in ["store", "load", "mixed", "discard"] {
        let of_operation = printed.split(&format!("**{operation}**")).nth(1).unwrap();
        assert!(number(row(of_operation, &["4KiB, depth 32, 1 queue, 256 VMs"])[0]) > 0.0, "{operation}");
        assert!(charts.join(format!("peers-{operation}.svg")).exists(), "{operation}");
    }
    for reached in [
        "load at depth 32, of the codec, checksum and one copy alone",
        "mixed, 256 VMs, of one VM's",
        "store, two workers, of one's, 128KiB, two VMs whose front ends sleep",
        "service time of loads, depth 1, mixed, p99.9 of p50",
    ] {
        assert!(number(row(&printed, &[reached])[0]) > 0.0, "{reached}");
    }
    let lz4 = row(&printed, &["lz4"]);
    let zstd = row(&printed, &["zstd:9"]);
    assert!(number(zstd[1]) < number(lz4[1]) && number(zstd[3]) < number(zstd[1]), "{lz4:?} {zstd:?}");
    let [apart, together] = ["false", "true"].map(|deduplicate| row(&printed, &["text.pages", deduplicate]));
    assert!(number(together[0]) < number(apart[0]), "{apart:?} {together:?}");
    assert_eq!(together[3], format!("{} of {PAGES}, as 1 objects", PAGES / 4));
    let rounds: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&json).unwrap()).unwrap();
    assert_eq!(rounds["backends"]["Ballast (lz4)"].as_array().map(Vec::len), Some(1));
}

#[test]
fn overcommit_loses_no_page() {
    let files = tempfile::tempdir_in("/var/tmp").unwrap();
    let file_dir = files.path().to_str().unwrap();
    let printed = run("overcommit", &["--rounds", "1", "--pages", "16384", "--file-dir", file_dir]);
    let failed = row(&printed, &["requests failed"]);
    assert_eq!((failed[0], failed[1]), ("0", "0"), "in memory, and with the file");
    assert!(number(failed[2]) > 0.0, "without it there is not room for all");
    assert!(printed.contains("lost to the flood: 0."), "{printed}");
    assert!(number(row(&printed, &["p99, front end sleeping"])[2]) > 0.0);
}
