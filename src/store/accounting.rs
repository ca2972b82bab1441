//! The one place that counts. A VM's numbers change under its lock, together with the entry that they describe, so
//! they are never off by one; the pool's are sums over the VMs, made when somebody asks.

use super::entry::{Entry, Location};
use super::object::{HEADER_BYTES, PAYLOAD_MAX};

/// The numbers of one VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accounting {
    /// What is held now.
    pub held: Held,
    /// What has happened since the daemon started.
    pub events: Events,
}

/// What a VM holds now. Recounted from its entries at start and by `validate`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Pages that read as something: same-filled ones, and objects in the arena.
    pub stored_pages: u64,
    /// Pages of these that repeat one word and cost no pool memory.
    pub same_filled_pages: u64,
    /// Pages of these that did not shrink and are kept raw.
    pub incompressible_pages: u64,
    /// Bytes of the arena that the objects take: those of their size classes.
    pub pool_bytes: u64,
    /// Bytes of the objects' payloads.
    pub payload_bytes: u64,
    /// Slots whose page could not be kept.
    pub lost_pages: u64,
}

/// What has happened to a VM, one counter per reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Events {
    /// Pages stored.
    pub stores: u64,
    /// Pages loaded, empty slots included.
    pub loads: u64,
    /// Pages dropped by discard, write-zeroes or overwrite.
    pub invalidates: u64,
    /// Stores refused because the VM is at its limit.
    pub limit_hit: u64,
    /// Stores refused because the pool is at its maximum.
    pub pool_limit_hit: u64,
    /// Stores refused because the state directory has no memory left.
    pub reject_alloc_fail: u64,
    /// Loads refused because the stored page failed its checks.
    pub decompress_fail: u64,
}

impl Held {
    /// Adds what `entry` stands for; `charged_bytes` are those of its size class.
    pub fn add(&mut self, entry: Entry, charged_bytes: u64) {
        self.apply(entry, charged_bytes, u64::checked_add);
    }

    /// Takes away what `entry` stood for.
    ///
    /// # Panics
    /// When it was never added.
    pub fn remove(&mut self, entry: Entry, charged_bytes: u64) {
        self.apply(entry, charged_bytes, u64::checked_sub);
    }

    fn apply(&mut self, entry: Entry, charged_bytes: u64, by: impl Fn(u64, u64) -> Option<u64>) {
        let change = |number: &mut u64, amount: u64| {
            *number =
                by(*number, amount).expect("a page is counted once when it comes and once when it goes");
        };
        match entry {
            Entry::Empty => {}
            Entry::Lost => change(&mut self.lost_pages, 1),
            Entry::SameFilled(_) => {
                change(&mut self.stored_pages, 1);
                change(&mut self.same_filled_pages, 1);
            }
            Entry::Arena(Location { payload_bytes, .. }) => {
                change(&mut self.stored_pages, 1);
                change(&mut self.incompressible_pages, u64::from(payload_bytes == PAYLOAD_MAX));
                change(&mut self.pool_bytes, charged_bytes);
                change(&mut self.payload_bytes, payload_bytes as u64);
            }
        }
    }
}

/// Bytes of an object with this payload, header included.
#[must_use]
pub fn object_bytes(location: Location) -> usize {
    HEADER_BYTES + location.payload_bytes
}
