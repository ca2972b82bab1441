//! See `tests/support/fuzzed/state.rs`.
#![no_main]

#[path = "../../tests/support/fuzzed/mod.rs"]
mod fuzzed;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzzed::state::run(bytes));
