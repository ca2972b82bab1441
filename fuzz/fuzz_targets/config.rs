//! See `tests/support/fuzzed/config.rs`.
#![no_main]

#[path = "../../tests/support/fuzzed/mod.rs"]
mod fuzzed;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzzed::config::run(bytes));
