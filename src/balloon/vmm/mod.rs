//! What the controller needs of a VMM, whichever it is: to see the guest's memory, and to change how much it has.
//!
//! **How it talks to VMMs.** One client a VM, used by one thread, one request at a time. QEMU is asked by QMP ([`qmp`]) on
//! a monitor of our own, cloud-hypervisor by its REST API ([`cloud_hypervisor`]), both over Unix sockets, and VMs with our
//! own balloon device ([`own`]) need neither. A client connects when something is asked, and a call ends after [`TIME_OUT`] at the
//! latest, however its VMM behaves: an answer that is late, longer than it can be or no answer at all ends the connection,
//! so that nothing of it is ever taken for the next one's. The next connection is made a second later at the earliest,
//! then two, at most half a minute; until then a call gives the state that there was. That a VMM is busy, paused,
//! migrating or gone is such a state ([`Unreachable`]), to be shown and waited out, and no error to be logged at each
//! look. Nothing that a VMM or its guest says is believed that can't be. A client never starts, stops or pauses anything.

mod backoff;
pub mod cloud_hypervisor;
mod http;
pub mod own;
pub mod qmp;
mod socket;
mod unreachable;

use std::time::{Duration, Instant};

use serde_json::Value;

pub(crate) use self::backoff::Backoff;
pub use self::unreachable::Unreachable;

/// How long a call may take. A VMM that is well answers in milliseconds; one that holds its big lock for longer is as
/// good as away.
pub const TIME_OUT: Duration = Duration::from_secs(2);

/// One VM's VMM.
pub trait VmmClient: Send {
    /// Makes what it takes to ask, before that is done by a thread that may not make anything.
    fn prepare(&mut self) {}

    /// The guest's memory as it is. `now` is the time, by which the next attempt to connect is put off.
    ///
    /// # Errors
    /// The state that the VMM or its VM is in, if there is nothing to be seen or done in it.
    fn look(&mut self, now: Instant) -> Result<GuestMemory, Unreachable>;

    /// Asks for a guest of this many bytes, those that its balloon doesn't have. More than it was booted with is as much as
    /// that. It returns before the guest has done anything, and whether it ever does is seen in
    /// [`GuestMemory::actual_bytes`] alone.
    ///
    /// # Errors
    /// As for [`Self::look`]. After [`Unreachable::Late`] it isn't known whether the VMM will still do it.
    fn set_target(&mut self, bytes: u64, now: Instant) -> Result<(), Unreachable>;
}

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
    /// Another number each time that it does, if there is one: what was said once is no news at the next look.
    pub update: Option<u64>,
    /// Memory that it could use without swapping, in bytes: free, and cache that can be dropped.
    pub available_bytes: Option<u64>,
    /// Memory that nobody uses, in bytes.
    pub free_bytes: Option<u64>,
    /// All that its kernel manages, in bytes: without the balloon; with it, where the balloon may be deflated on OOM (Linux
    /// leaves its total as it was then).
    pub total_bytes: Option<u64>,
    /// Faults that waited for a disk, since boot.
    pub major_faults: Option<u64>,
    /// Bytes read from swap since boot, wherever that is; Linux leaves out pages of zeros and what its zswap holds.
    pub swap_in_bytes: Option<u64>,
    /// Bytes written to swap since boot, in the same way.
    pub swap_out_bytes: Option<u64>,
    /// Processes killed for want of memory since boot; guests before Linux 6.12 don't say.
    pub oom_kills: Option<u64>,
}

/// A statistic that the guest gave. QEMU has all bits set where it didn't, and prints them as -1 or as 2^64 - 1, by its
/// version; nothing that is counted comes near the half of that.
fn known(value: &Value) -> Option<u64> {
    value.as_u64().filter(|value| i64::try_from(*value).is_ok())
}
