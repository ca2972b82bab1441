//! The daemon as `GET /api/v1/status` shows it. What a daemon doesn't know yet is zero or null to a newer client.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::balloon::BalloonStatus;
use super::counters::{Bucket, Counters};
use super::histogram::{Histogram, LatencyBySource};
use crate::page::PAGE_SIZE_U64;

/// `GET /api/v1/status`: the daemon as it is now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Status {
    /// The daemon's version.
    pub version: String,
    /// Where its pages are.
    pub state_dir: String,
    /// When it started, in seconds since 1970.
    pub start_time_seconds: u64,
    /// What all VMs share.
    pub pool: PoolStatus,
    /// What takes pages out of the pool.
    pub shrinker: ShrinkerStatus,
    /// The file that they move to, when there is one or should be.
    pub writeback: Option<WritebackStatus>,
    /// How long tasks of this host stand still for want of memory, as the kernel tells; null where it keeps no PSI.
    pub memory_pressure: Option<MemoryPressure>,
    /// The VMs of the configuration in its order, then those that only the state directory knows.
    pub vms: Vec<VmStatus>,
}

/// The shares of the last ten seconds in which tasks of the host stood still for want of memory, in millionths: `avg10` of
/// `/proc/pressure/memory`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct MemoryPressure {
    /// At least one did.
    pub some_avg10_ppm: u64,
    /// All of them did.
    pub full_avg10_ppm: u64,
}

/// The memory that all VMs share.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct PoolStatus {
    /// Most bytes that the arena may take.
    pub max_bytes: u64,
    /// Bytes that the arena takes: objects, and what is lost between them.
    pub used_bytes: u64,
    /// Bytes of the objects: compressed pages with their headers, each in its size class.
    pub object_bytes: u64,
    /// Bytes of the compressed pages themselves.
    pub payload_bytes: u64,
    /// Bytes of everything that is kept beside the arena: page tables, lists, generations.
    pub metadata_bytes: u64,
    /// Pages that are kept in memory, same-filled ones included (as in zswap).
    pub stored_pages: u64,
    /// Those of them that repeat one word and cost no pool memory.
    pub same_filled_pages: u64,
    /// Those of them that their guest read since it wrote them, and may still have.
    pub duplicates: u64,
    /// Those of these that no guest will read again, going by what became of others: an estimate.
    pub zombie_pages: u64,
    /// Those of them that are kept as objects which equal pages of their VM may share.
    pub shared_pages: u64,
    /// These objects.
    pub shared_objects: u64,
    /// Bytes of the arena that these pages don't take because equal ones are kept once.
    pub deduplicated_bytes: u64,
    /// Pages that are in the writeback file now.
    pub file_pages: u64,
    /// Pages that could not be kept: reading them is an error until they are written again.
    pub lost_pages: u64,
    /// Writes that wait for room now.
    pub waiting_stores: u64,
    /// Whether the pool was at its maximum and hasn't fallen below the accept threshold since.
    pub full: bool,
    /// Why no page leaves a pool that is full; null when they do, or need not.
    pub stuck: Option<String>,
    /// The share of the maximum below which a pool that was full counts as not full again.
    pub accept_threshold_percent: u32,
    /// What new pages are compressed with.
    pub compressor: String,
    /// The pool that new pages go to, then those that drain.
    pub pools: Vec<CompressorPool>,
    /// Pages of the arena that could not be read any more and were replaced, since the daemon started: the host's memory or
    /// a disk is failing.
    pub mended_pages: u32,
    /// How the daemon learns that the host's memory is short: `psi`, `psi+cgroup` or `meminfo`; null when it doesn't.
    pub pressure_source: Option<String>,
    /// The sums over all VMs.
    pub counters: Counters,
    /// How long pages had not been used when a guest loaded them, all VMs together.
    pub refault_age_seconds: Vec<Bucket>,
    /// The sum of what this counts.
    pub refault_age_seconds_sum: u64,
    /// How long stores waited for room, all VMs together.
    pub store_delay_ms: Vec<Bucket>,
    /// The sum of what this counts.
    pub store_delay_ms_sum: u64,
}

impl PoolStatus {
    /// What the VMs' pages would take as they are, in memory and in the file, less all the memory that they take, in bytes.
    #[must_use]
    pub fn saved_bytes(&self) -> u64 {
        saved_bytes(self.stored_pages, self.file_pages, [self.used_bytes, self.metadata_bytes])
    }
}

impl VmStatus {
    /// The same of one VM, without its part of what is lost between objects.
    #[must_use]
    pub fn saved_bytes(&self) -> u64 {
        saved_bytes(self.stored_pages, self.file_pages, [self.pool_bytes, self.metadata_bytes])
    }
}

/// None where they take more than they are.
fn saved_bytes(stored_pages: u64, file_pages: u64, [pages_bytes, metadata_bytes]: [u64; 2]) -> u64 {
    let whole_bytes = stored_pages.saturating_add(file_pages).saturating_mul(PAGE_SIZE_U64);
    whole_bytes.saturating_sub(pages_bytes.saturating_add(metadata_bytes))
}

/// What one compressor made, and is still held.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct CompressorPool {
    /// The compressor, as in the configuration.
    pub compressor: String,
    /// Whether new pages go here.
    pub state: CompressorPoolState,
    /// Objects in the arena that it made.
    pub objects: u64,
    /// What this was when new pages ceased to go here, or when the daemon started; 0 of the current pool.
    pub objects_at_first: u64,
}

/// Whether new pages go to a pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum CompressorPoolState {
    /// They do.
    #[default]
    Current,
    /// Pages go there that nobody has used for a while.
    Cold,
    /// They don't, and it is gone when its last object is.
    Draining,
}

impl CompressorPoolState {
    /// The word that `status` shows; the same as in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Current => "current",
            Self::Cold => "cold",
            Self::Draining => "draining",
        }
    }
}

/// What takes pages out of the pool, since the daemon started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct ShrinkerStatus {
    /// Its runs, by what they were for.
    pub runs_by_reason: RunsByReason,
    /// Pages that it moved out of the arena.
    pub evicted_pages: u64,
    /// Objects that it moved to other places, to make the arena smaller.
    pub compacted_objects: u64,
    /// Objects that it compressed again because the compressor changed.
    pub recompressed_objects: u64,
    /// Objects that there were to compress again when that was asked for; 0 when it has ended.
    pub recompression_objects: u64,
    /// Those of them that are left.
    pub recompression_objects_left: u64,
    /// Whether objects that are to be compressed again found no room: they are tried again, less and less often.
    pub recompression_waits: bool,
    /// Bytes of the objects of the pages that left.
    pub evicted_bytes: u64,
    /// Pages that were written in vain: they had changed meanwhile.
    pub stale_pages: u64,
    /// Segments of the writeback file that were cleaned.
    pub cleaned_segments: u64,
}

/// Runs of the shrinker, by what they were for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct RunsByReason {
    /// The pool was at its maximum, or near it.
    pub pool_full: u64,
    /// A VM was at its limit.
    pub limit: u64,
    /// The host's memory was short.
    pub pressure: u64,
    /// Pages had been idle for long, and the disk was idle too.
    pub idle: u64,
}

/// The file that pages move to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct WritebackStatus {
    /// Whether pages can move to it.
    pub state: WritebackState,
    /// Why they can't, when they can't.
    pub message: Option<String>,
    /// The file or the block device.
    pub path: String,
    /// How much of it is used at most.
    pub size_bytes: u64,
    /// Segments that this is divided into.
    pub segments: u64,
    /// Segments with nothing in them.
    pub free_segments: u64,
    /// Bytes in the file that an entry names.
    pub live_bytes: u64,
    /// Bytes written to it since its state was made, by all daemons.
    pub written_bytes: u64,
    /// Bytes written to it today.
    pub written_today_bytes: u64,
    /// Most bytes that may be written to it in a day; null for any number.
    pub daily_limit_bytes: Option<u64>,
    /// How it is read and written: `io_uring` or `threads`.
    pub io: String,
    /// Records written, one for each page, since the daemon started.
    pub written_records: u64,
    /// Records read.
    pub read_records: u64,
    /// Records that cleaning moved within the file.
    pub moved_records: u64,
    /// Batches that failed to be written.
    pub write_errors: u64,
    /// Batches for which the file system had no room.
    pub no_space_errors: u64,
    /// Failed writes of what the state directory has to know of the file.
    pub state_errors: u64,
    /// Transfers that failed to be read.
    pub read_errors: u64,
    /// Failed attempts to give segments back to the file system.
    pub discard_errors: u64,
}

/// Whether pages can move to the writeback file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WritebackState {
    /// They can.
    #[default]
    Ready,
    /// Not now: a write takes seconds.
    Slow,
    /// Not now: what is in it fills it.
    Full,
    /// Not now: the file system that it is in has no room for it.
    NoSpace,
    /// Not today: the daily limit is used up.
    Waiting,
    /// Not any more: it couldn't be written.
    Failed,
    /// Not before another start: it was not to be had, or is not the one that pages are in.
    Missing,
}

impl WritebackState {
    /// The word that `status` shows; the same as in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Slow => "slow",
            Self::Full => "full",
            Self::NoSpace => "no_space",
            Self::Waiting => "waiting",
            Self::Failed => "failed",
            Self::Missing => "missing",
        }
    }
}

/// One VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct VmStatus {
    /// Its name.
    pub name: String,
    /// Whether its device is served.
    pub state: VmState,
    /// Why it isn't, when it isn't.
    pub message: Option<String>,
    /// What the guest sees.
    pub size_bytes: u64,
    /// Most pool bytes that it may hold.
    pub limit_bytes: u64,
    /// Pool bytes that it keeps whatever the others need.
    pub reserve_bytes: u64,
    /// Its share of the pool against the other VMs'.
    pub weight: u32,
    /// Whether its pages may move to the writeback file.
    pub writeback: bool,
    /// Pages that are kept in memory, same-filled ones included.
    pub stored_pages: u64,
    /// Those of them that repeat one word.
    pub same_filled_pages: u64,
    /// Those of them that would not shrink and are kept as they are.
    pub incompressible_pages: u64,
    /// Those of them that the guest read since it wrote them, and may still have.
    pub duplicates: u64,
    /// Those of these that it will not read again, going by what became of others: an estimate, 0 before 64 have shown it.
    pub zombie_pages: u64,
    /// Those of them that are kept as objects which equal pages of the VM may share.
    pub shared_pages: u64,
    /// These objects.
    pub shared_objects: u64,
    /// Bytes of the pool that these pages don't take because equal ones are kept once.
    pub deduplicated_bytes: u64,
    /// Pages that are in the writeback file now.
    pub file_pages: u64,
    /// Dictionaries that its pages are compressed with, the latest one included.
    pub dictionaries: u64,
    /// Pages that could not be kept: reading them is an error until they are written again.
    pub lost_pages: u64,
    /// What they take of the pool.
    pub pool_bytes: u64,
    /// Bytes of the compressed pages themselves.
    pub payload_bytes: u64,
    /// Bytes of everything that is kept beside them: the page table, generations, dictionaries.
    pub metadata_bytes: u64,
    /// Writes that wait for room now.
    pub waiting_stores: u64,
    /// Pages that the guest wrote, since the daemon started.
    pub stores: u64,
    /// Pages that the guest read, since the daemon started.
    pub loads: u64,
    /// Pages that the guest discarded or overwrote, since the daemon started.
    pub invalidates: u64,
    /// Requests that ended in an error, since the daemon started.
    pub errors: u64,
    /// Times in a row that the daemon crashed while it worked for the VM, as far as the state directory knows.
    pub crashes: u64,
    /// Whether a VMM is connected.
    pub connected: bool,
    /// Its balloon, if it is squeezed.
    pub balloon: Option<BalloonStatus>,
    /// What happened to it, since the daemon started.
    pub counters: Counters,
    /// How long pages had not been used when they were read, in seconds.
    pub refault_age_seconds: Vec<Bucket>,
    /// The sum of what this counts.
    pub refault_age_seconds_sum: u64,
    /// How long writes waited for room, those that did, in milliseconds.
    pub store_delay_ms: Vec<Bucket>,
    /// The sum of what this counts.
    pub store_delay_ms_sum: u64,
    /// How long requests to write took, from when they were taken off the ring to their answers, in nanoseconds.
    pub store_latency_ns: LatencyBySource,
    /// The same of requests to read, by where their pages were.
    pub load_latency_ns: LatencyBySource,
    /// What the pages that it wrote were compressed to, in bytes; without those that repeat one word.
    pub compressed_bytes: Histogram,
}

/// Whether a VM's device is served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum VmState {
    /// It is.
    #[default]
    Ready,
    /// It isn't: its file in the state directory is damaged, and left alone.
    Damaged,
    /// It isn't: the state directory has its pages, but the configuration doesn't name it.
    Unconfigured,
    /// It isn't: the daemon crashed again and again while it worked for it. Its pages are kept.
    Quarantined,
}

impl VmState {
    /// The word that `status` shows; the same as in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Damaged => "damaged",
            Self::Unconfigured => "unconfigured",
            Self::Quarantined => "quarantined",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_without_the_newer_fields_is_understood() {
        let text = r#"{"version": "0.1.0", "state_dir": "/s", "pool": {"max_bytes": 7},
            "vms": [{"name": "a", "state": "damaged", "from_the_future": 1}]}"#;
        let status: Status = serde_json::from_str(text).unwrap();
        assert_eq!((status.pool.max_bytes, status.vms[0].state), (7, VmState::Damaged));
        assert_eq!((status.writeback, status.vms[0].counters), (None, Counters::default()));
    }

    #[test]
    fn words_are_the_same_in_json() {
        let json = |value: serde_json::Result<String>| value.unwrap().trim_matches('"').to_owned();
        for state in [VmState::Ready, VmState::Damaged, VmState::Unconfigured, VmState::Quarantined] {
            assert_eq!(json(serde_json::to_string(&state)), state.as_str());
        }
        for state in [CompressorPoolState::Current, CompressorPoolState::Cold, CompressorPoolState::Draining]
        {
            assert_eq!(json(serde_json::to_string(&state)), state.as_str());
        }
        use WritebackState::{Failed, Full, Missing, NoSpace, Ready, Slow, Waiting};
        for state in [Ready, Slow, Full, NoSpace, Waiting, Failed, Missing] {
            assert_eq!(json(serde_json::to_string(&state)), state.as_str());
        }
    }
}
