//! What the fuzz targets do with the bytes that they are given: one function each, called by `fuzz/fuzz_targets` with
//! what a fuzzer thinks of and by `tests/fuzz_corpus.rs` with what is kept in `fuzz/corpus`. Whatever the bytes, nothing
//! may panic, hang, or touch what isn't there; what else must hold each function asserts.
#![allow(dead_code, reason = "a fuzz target uses its own function")]

use std::path::Path;

use ballast::store::StoreConfig;
use ballast::store::codec::Compressor;

pub mod balloon;
pub mod config;
pub mod control;
#[path = "../file.rs"]
pub mod file;
pub mod messages;
pub mod request;
pub mod ring;
pub mod script;
pub mod state;
#[path = "../wire.rs"]
pub mod wire;

/// What a store is opened with here.
pub fn store_config(dir: &Path, compressor: Compressor, pool: u64) -> StoreConfig {
    StoreConfig {
        state_dir: dir.to_owned(),
        pool_max_bytes: pool,
        accept_percent: 90,
        compressor,
        host_bytes: 1 << 30,
    }
}
