//! The one place that counts. A VM's numbers change under its lock, together with the entry that they describe, so
//! they are never off by one; the pool's are sums over the VMs, made when somebody asks.

use std::ops::AddAssign;
use std::time::Duration;

use super::entry::{Entry, Location};
use super::fates::Fates;
use super::histogram::{PowersOfTwo, Sizes};
use super::object::{HEADER_BYTES, PAYLOAD_MAX};
use super::pool::{POOLS_MAX, PoolId};

/// The numbers of one VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accounting {
    /// What is held now.
    pub held: Held,
    /// What has happened since the daemon started.
    pub events: Events,
    /// What became of pages that were loaded.
    pub fates: Fates,
}

/// What a VM holds now. Recounted from its entries at start and by `validate`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Pages that read as something: same-filled ones, objects in the arena, and records in the writeback file.
    pub stored_pages: u64,
    /// Pages of these that repeat one word and cost no pool memory.
    pub same_filled_pages: u64,
    /// Pages of these that did not shrink and are kept raw, in the arena.
    pub incompressible_pages: u64,
    /// Pages of these that are in the writeback file.
    pub file_pages: u64,
    /// Pages of the arena that were loaded since they were stored: their guest has a copy.
    pub duplicate_pages: u64,
    /// Bytes of the arena that the objects take: those of their size classes.
    pub pool_bytes: u64,
    /// Bytes of the payloads of the objects in the arena.
    pub payload_bytes: u64,
    /// Pages of the arena that name an object which others may name as well: their pages are the same.
    pub shared_pages: u64,
    /// Those objects.
    pub shared_objects: u64,
    /// Bytes of the arena that these pages don't take because each object is kept, and charged, once.
    pub deduplicated_bytes: u64,
    /// Slots whose page could not be kept.
    pub lost_pages: u64,
    /// Objects in the arena by the pool that made them.
    pub objects_by_pool: [u64; POOLS_MAX],
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
    /// Stores that found the VM at its limit.
    pub limit_hit: u64,
    /// Stores that found the pool at its maximum.
    pub pool_limit_hit: u64,
    /// Stores that found no memory left in the state directory.
    pub reject_alloc_fail: u64,
    /// Stores failed because nothing could leave, or not in time.
    pub reject_reclaim_fail: u64,
    /// Pages that did not shrink and were kept raw.
    pub reject_compress_poor: u64,
    /// Requests failed because they had been carried out at two crashes of the daemon.
    pub reject_fatal: u64,
    /// Stores that had to wait for room, those that waited in vain included.
    pub delayed_stores: u64,
    /// Loads refused because the stored page failed its checks.
    pub decompress_fail: u64,
    /// Loads failed because the writeback file did not give the page, or gave a damaged or foreign record.
    pub file_load_fail: u64,
    /// Pages looked at by a check or a round of scrubbing.
    pub checked_pages: u64,
    /// Pages found bad, by a load or a check; each counts once until it is overwritten, and 1024 at most are known as bad
    /// at once.
    pub bad_pages: u64,
    /// Pages written to the writeback file.
    pub written_back_pages: u64,
    /// Pages loaded from the writeback file.
    pub loaded_from_file: u64,
    /// Pages that came back from the file into the pool because they were loaded again soon.
    pub promoted_pages: u64,
    /// Pages that were brought back from the file into the pool because their guest was given memory.
    pub read_back_pages: u64,
    /// Pages whose objects were moved within the arena by compaction.
    pub compacted_pages: u64,
    /// Objects compressed anew for another pool.
    pub recompressed_pages: u64,
    /// Pages of these that are now kept as another page of the VM that is the same.
    pub deduplicated_pages: u64,
    /// Pages given up because what is stored of them is damaged.
    pub given_up_pages: u64,
    /// How long pages had not been used when they were loaded, in seconds.
    pub refault_age_seconds: PowersOfTwo,
    /// How long stores waited for room, in milliseconds.
    pub store_delay_ms: PowersOfTwo,
    /// Payloads of the pages that were stored into the arena, in bytes.
    pub compressed_bytes: Sizes,
}

impl Events {
    /// Counts a load of a page that had not been used for `age`.
    pub fn refault(&mut self, age: Duration) {
        self.refault_age_seconds.count(age.as_secs());
    }

    /// Counts the end of a store that waited for room.
    pub fn delayed(&mut self, waited: Duration) {
        self.delayed_stores += 1;
        self.store_delay_ms.count(u64::try_from(waited.as_millis()).unwrap_or(u64::MAX));
    }
}

/// For the numbers of VMs that are gone: what has happened stays counted.
impl AddAssign for Events {
    fn add_assign(&mut self, more: Self) {
        self.stores += more.stores;
        self.loads += more.loads;
        self.invalidates += more.invalidates;
        self.limit_hit += more.limit_hit;
        self.pool_limit_hit += more.pool_limit_hit;
        self.reject_alloc_fail += more.reject_alloc_fail;
        self.reject_reclaim_fail += more.reject_reclaim_fail;
        self.reject_compress_poor += more.reject_compress_poor;
        self.reject_fatal += more.reject_fatal;
        self.delayed_stores += more.delayed_stores;
        self.decompress_fail += more.decompress_fail;
        self.file_load_fail += more.file_load_fail;
        self.checked_pages += more.checked_pages;
        self.bad_pages += more.bad_pages;
        self.written_back_pages += more.written_back_pages;
        self.loaded_from_file += more.loaded_from_file;
        self.promoted_pages += more.promoted_pages;
        self.read_back_pages += more.read_back_pages;
        self.compacted_pages += more.compacted_pages;
        self.recompressed_pages += more.recompressed_pages;
        self.deduplicated_pages += more.deduplicated_pages;
        self.given_up_pages += more.given_up_pages;
        self.refault_age_seconds += more.refault_age_seconds;
        self.store_delay_ms += more.store_delay_ms;
        self.compressed_bytes += more.compressed_bytes;
    }
}

/// What one slot adds to what its VM holds.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    /// The slot's entry.
    pub entry: Entry,
    /// For an object in the arena: the bytes of its size class.
    pub charged_bytes: u64,
    /// For an object in the arena: the pool that made it.
    pub pool: PoolId,
    /// For a page in the arena: whether it was loaded since it was stored.
    pub loaded: bool,
    /// Whether the object is another slot's as well, which it is charged to.
    pub others: bool,
}

impl Share {
    /// That of an empty slot.
    pub const NONE: Self =
        Self { entry: Entry::Empty, charged_bytes: 0, pool: PoolId::EARLIER, loaded: false, others: false };
}

impl Share {
    /// The bytes that the VM's pool grows by when the slot gets this, and shrinks by when it goes.
    #[must_use]
    pub fn pool_bytes(&self) -> u64 {
        if self.others { 0 } else { self.charged_bytes }
    }
}

impl Held {
    /// Adds a slot's share.
    pub fn add(&mut self, share: Share) {
        self.apply(share, u64::checked_add);
    }

    /// Takes a slot's share away.
    ///
    /// # Panics
    /// When it was never added.
    pub fn remove(&mut self, share: Share) {
        self.apply(share, u64::checked_sub);
    }

    fn apply(&mut self, share: Share, by: impl Fn(u64, u64) -> Option<u64>) {
        let change = |number: &mut u64, amount: u64| {
            *number =
                by(*number, amount).expect("a page is counted once when it comes and once when it goes");
        };
        match share.entry {
            Entry::Empty => {}
            Entry::Lost => change(&mut self.lost_pages, 1),
            Entry::SameFilled(_) => {
                change(&mut self.stored_pages, 1);
                change(&mut self.same_filled_pages, 1);
            }
            Entry::File(_) => {
                change(&mut self.stored_pages, 1);
                change(&mut self.file_pages, 1);
            }
            Entry::Arena(Location { payload_bytes, .. }) | Entry::Shared(Location { payload_bytes, .. }) => {
                change(&mut self.stored_pages, 1);
                change(&mut self.incompressible_pages, u64::from(payload_bytes == PAYLOAD_MAX));
                change(&mut self.duplicate_pages, u64::from(share.loaded));
                let shared = matches!(share.entry, Entry::Shared(_));
                change(&mut self.shared_pages, u64::from(shared));
                if share.others {
                    change(&mut self.deduplicated_bytes, share.charged_bytes);
                    return;
                }
                change(&mut self.shared_objects, u64::from(shared));
                change(&mut self.pool_bytes, share.charged_bytes);
                change(&mut self.payload_bytes, payload_bytes as u64);
                change(&mut self.objects_by_pool[share.pool.index()], 1);
            }
        }
    }

    /// Pages in the arena.
    #[must_use]
    pub fn arena_pages(&self) -> u64 {
        self.stored_pages - self.same_filled_pages - self.file_pages
    }

    /// Objects in the arena.
    #[must_use]
    pub fn objects(&self) -> u64 {
        self.arena_pages() - self.shared_pages + self.shared_objects
    }
}

/// Bytes of the largest object, header included.
#[must_use]
pub fn object_bytes_max() -> usize {
    HEADER_BYTES + PAYLOAD_MAX
}

/// Bytes of an object with this payload, header included.
#[must_use]
pub fn object_bytes(location: Location) -> usize {
    HEADER_BYTES + location.payload_bytes
}
