//! See `tests/support/fuzzed/balloon.rs`.
#![no_main]

#[path = "../../tests/support/fuzzed/mod.rs"]
mod fuzzed;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzzed::balloon::run(bytes));
