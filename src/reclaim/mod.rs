//! Reclaim: what leaves the pool, when and why. One shrinker thread carries out what a pure policy decides; it also
//! moves objects together (compaction), cleans the writeback file and moves pages to the pool that suits them (recompression).

pub mod policy;
pub mod pressure;
pub mod shrinker;

mod cleaning;
mod cold;
mod handle;
mod isolate;
mod read_back;
mod recompress;
mod requests;
mod stats;
mod trainer;

pub use recompress::ColdOptions;
pub use stats::{Reclaimed, ShrinkerStats};
