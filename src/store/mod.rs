//! Store, load and invalidate pages; knows no virtio, no sockets, no serde.
