//! What is kept of the fuzzers' corpora, through the same functions without a fuzzer: see `tests/fuzz`.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

#[path = "support/fuzzed/mod.rs"]
mod fuzzed;

use std::fs;
use std::path::Path;

/// All corpora together are small enough to be kept.
const CORPORA_BYTES_MAX: u64 = 200 << 10;

fn corpus() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus")
}

/// Runs what is kept for one target, and nothing and noise besides.
fn replay(target: &str, run: fn(&[u8])) {
    let mut files: Vec<_> =
        fs::read_dir(corpus().join(target)).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 3, "{target} has {} files", files.len());
    run(&[]);
    for file in files {
        let bytes = fs::read(&file).unwrap();
        println!("{}", file.display());
        run(&bytes);
        run(&bytes[..bytes.len() / 2]);
    }
}

#[test]
fn requests() {
    replay("request", fuzzed::request::run);
}

#[test]
fn rings() {
    replay("ring", fuzzed::ring::run);
}

#[test]
fn balloons() {
    replay("balloon", fuzzed::balloon::run);
}

#[test]
fn messages() {
    replay("messages", fuzzed::messages::run);
}

#[test]
fn state_files() {
    replay("state", fuzzed::state::run);
}

#[test]
fn configurations() {
    replay("config", fuzzed::config::run);
}

#[test]
fn control_bodies() {
    replay("control", fuzzed::control::run);
}

#[test]
fn the_corpora_are_small_and_each_has_a_target() {
    let mut bytes = 0;
    for target in fs::read_dir(corpus()).unwrap() {
        let target = target.unwrap();
        let source = format!("fuzz/fuzz_targets/{}.rs", target.file_name().into_string().unwrap());
        assert!(Path::new(env!("CARGO_MANIFEST_DIR")).join(&source).exists(), "{source}");
        for file in fs::read_dir(target.path()).unwrap() {
            bytes += file.unwrap().metadata().unwrap().len();
        }
    }
    assert!(bytes <= CORPORA_BYTES_MAX, "{bytes} bytes of corpora");
}
