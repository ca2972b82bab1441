//! Ballast keeps the swapped-out pages of a host's virtual machines, compressed, in host memory.

pub mod bench;
pub mod config;
pub mod control;
pub mod demo;
pub mod device;
pub mod frontend;
pub mod ids;
pub mod page;
pub mod private;
pub mod reclaim;
pub mod runtime;
pub mod store;
pub mod writeback;
