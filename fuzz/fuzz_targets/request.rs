//! See `tests/support/fuzzed/request.rs`.
#![no_main]

#[path = "../../tests/support/fuzzed/mod.rs"]
mod fuzzed;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzzed::request::run(bytes));
