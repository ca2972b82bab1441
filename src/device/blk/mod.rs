//! The virtio block device: what a request is, and how it is carried out on a VM's pages. Knows guest memory and the
//! store, but no rings, connections or threads.

pub mod config_space;
mod copy;
pub mod execute;
mod ranges;
pub mod request;
pub mod swap_header;
