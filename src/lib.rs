//! Ballast keeps the swapped-out pages of a host's virtual machines, compressed, in host memory: every VM has a
//! vhost-user disk that it swaps to, and all of them share one arena, one order by age and one shrinker.
//!
//! # Rooms
//! Each module is a room with one job, and imports go downwards in this list. `ARCHITECTURE.md` has the files inside
//! them, the formats of the state, and the reasons; `tests/tidy.rs` holds both to the tree.
//!
//! | room | job |
//! | --- | --- |
//! | [`demo`] | two guests on one daemon, shown live |
//! | [`bench`](mod@bench) | drives any vhost-user disk and compares every byte |
//! | [`top`] | what the VMs do, live on a terminal |
//! | [`report`] | what stored pages are like, as text and as a picture |
//! | [`runtime`] | the daemon: starts the rooms below in order, answers control requests |
//! | [`metrics`] | the status as text for Prometheus |
//! | [`control`] | the control socket: its types, server and client |
//! | [`config`] | TOML to a checked configuration |
//! | [`balloon`] | how much memory each guest has |
//! | [`frontend`] | what a VMM is to the device, for bench and tests |
//! | [`device`] | virtio and vhost-user, which no other room knows |
//! | [`reclaim`] | what leaves the pool, when and why |
//! | [`survey`] | what stored pages are like: how old, how dense, what limit their VM needs |
//! | [`scrub`] | looks at stored pages before their guests do |
//! | [`store`] | pages by VM and slot, compressed in the arena |
//! | [`writeback`] | the file of cold pages |
//! | [`logging`] | where the log goes, and how it looks |
//! | [`threads`] | how threads are started and confined |
//! | [`private`] | files that nobody else may look into |
//! | [`heap`] | what the allocator keeps for itself |
//! | [`crash_point`] | where tests make the daemon die |
//! | [`ids`], [`page`] | the words that all of them use |
//!
//! # Data flow
//! ```text
//!  guest ─ virtqueue ─► device::ring ─► store::vm ─► codec ─► arena ◄── compaction, recompression
//!                          ▲   │ no room: waits        │ publish: the entry in the page table, under the VM's lock
//!                          │   ▼                       ▼
//!                          └─ made room ◄── reclaim::shrinker ─► writeback ─► file
//!                          └─ what was read ◄─────────────────── writeback ◄─ file
//! ```
//! An entry, one 64-bit word for each slot, is the only authority over where a page is: whatever else is kept can be
//! rebuilt from the entries, and is when a daemon starts after the one before it was killed.

pub mod balloon;
pub mod bench;
pub mod config;
pub mod control;
pub mod crash_point;
pub mod demo;
pub mod device;
pub mod frontend;
pub mod heap;
pub mod ids;
pub mod logging;
pub mod metrics;
pub mod page;
pub mod private;
pub mod reclaim;
pub mod report;
pub mod runtime;
pub mod scrub;
pub mod store;
pub mod survey;
pub mod threads;
pub mod top;
pub mod writeback;
