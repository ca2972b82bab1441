//! Store, load and invalidate pages; knows no virtio, no sockets, no serde.
pub mod arena;
pub mod codec;
pub mod entry;
pub mod mapping;
pub mod object;
pub mod same_filled;
