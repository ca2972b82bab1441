//! What the controller needs of a VMM, whichever it is: to see the guest's memory, and to change how much it has.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A guest's memory as its VMM sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestMemory {
    /// What the guest was booted with, in bytes.
    pub configured_bytes: u64,
    /// What it has now, in bytes: all but the balloon.
    pub actual_bytes: u64,
    /// What it says of itself; `None` if it never did, or its VMM doesn't pass that on.
    pub guest: Option<GuestStats>,
}

/// What a guest says of its memory through the statistics queue of its balloon (virtio 1.2, 5.5.6.4). Counters begin at
/// its boot. A guest leaves out what it doesn't know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStats {
    /// How long ago it said so.
    pub age: Duration,
    /// Memory that it could use without swapping, in bytes: free, and cache that can be dropped.
    pub available_bytes: Option<u64>,
    /// Memory that nobody uses, in bytes.
    pub free_bytes: Option<u64>,
    /// All that its kernel manages, in bytes: without the balloon.
    pub total_bytes: Option<u64>,
    /// Faults that waited for a disk, since boot.
    pub major_faults: Option<u64>,
    /// Bytes read from swap since boot.
    pub swap_in_bytes: Option<u64>,
    /// Bytes written to swap since boot.
    pub swap_out_bytes: Option<u64>,
    /// Processes killed for want of memory since boot; guests before Linux 6.12 don't say.
    pub oom_kills: Option<u64>,
}
