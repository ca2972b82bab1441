//! The report: what the stored pages of each VM are like, what keeping them saves, and what limit the VM needs. Made when
//! somebody asks, by looking at every entry and at a sample of the pages; none of them counts as used by that.

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::status::VmState;

/// Pages of each VM that a report compresses again, when nothing is said.
pub const SAMPLE_PAGES_DEFAULT: u32 = 512;
/// What may be said: with none, nothing is compressed; one or two seconds' work is the most that one VM may cost.
pub const SAMPLE_PAGES: RangeInclusive<u32> = 0..=8192;

/// How `GET /api/v1/report` is meant. The answer is a [`Report`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Reporting {
    /// The only VM; all of them when it is left out.
    #[serde(default)]
    pub vm: Option<String>,
    /// Pages of each VM that are compressed again, up to 8192; 512 when it is left out. With many VMs it may be fewer.
    #[serde(default)]
    pub sample_pages: Option<u32>,
}

/// `GET /api/v1/report`: the stored pages of the VMs as they are now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Report {
    /// The daemon's version.
    pub version: String,
    /// When it was made, in seconds since 1970.
    pub time_seconds: u64,
    /// How long stores and loads have been counted: since the daemon started.
    pub counted_seconds: u64,
    /// What new pages are compressed with.
    pub compressor: String,
    /// What pages are compressed with anew when they get cold; null where they stay as they are.
    pub cold_compressor: Option<String>,
    /// The VMs, in the order of the status.
    pub vms: Vec<VmReport>,
}

/// One VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct VmReport {
    /// Its name.
    pub name: String,
    /// Whether its device is served.
    pub state: VmState,
    /// Why it isn't, when it isn't.
    pub message: Option<String>,
    /// What its pages are like; null of a VM that is out of service or quarantined.
    pub survey: Option<Survey>,
}

/// What the pages of a VM are like. They come and go while they are counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Survey {
    /// Pages that are kept in memory, same-filled ones included.
    pub stored_pages: u64,
    /// Those of them that repeat one word and cost no pool memory.
    pub same_filled_pages: u64,
    /// Pages in memory and in the file without the swap header.
    pub guest_pages: u64,
    /// Those in memory that the guest read since it wrote them, and may still have.
    pub duplicates: u64,
    /// Those of these that it will not read again, going by what became of others: an estimate, 0 before 64 have shown it.
    pub zombie_pages: u64,
    /// Pages in the writeback file.
    pub file_pages: u64,
    /// What those in memory take of the pool.
    pub pool_bytes: u64,
    /// How long the oldest page has not been used; null without any.
    pub oldest_seconds: Option<u64>,
    /// All pages by how long they have not been used. Each is in one of these.
    pub ages: Vec<AgeBucket>,
    /// How much was used within some times: the pages that are there now and were stored or loaded since. What the guest
    /// uses in its own memory is not seen here, nor is a load of a same-filled page.
    pub working_set: Vec<WorkingSet>,
    /// Pages that the guest wrote, since the daemon started.
    pub stores: u64,
    /// Pages that it read.
    pub loads: u64,
    /// Those of them that came from the writeback file.
    pub loads_from_file: u64,
    /// What compressors make of some of its pages.
    pub sample: Sample,
    /// What keeping its pages saves.
    pub savings: Savings,
    /// What limit it needs.
    pub need: Need,
}

/// Pages that have not been used for about equally long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct AgeBucket {
    /// They are younger than this, and not younger than that of the bucket before; null in the last, which has no end.
    pub below_seconds: Option<u64>,
    /// Pages in memory, same-filled ones included.
    pub stored_pages: u64,
    /// Those of them that repeat one word.
    pub same_filled_pages: u64,
    /// Pages in the writeback file.
    pub file_pages: u64,
    /// What those in memory take of the pool.
    pub pool_bytes: u64,
}

/// What was used within a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct WorkingSet {
    /// The time; null for any.
    pub within_seconds: Option<u64>,
    /// The pages that were used, in bytes as the guest has them.
    pub used_bytes: u64,
    /// What they take of the pool, or would if those in the file were back.
    pub pool_bytes: u64,
}

/// What compressors make of some of a VM's pages, each taken with the same chance from those in the pool. Pages that are
/// kept as one count as one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Sample {
    /// How many were taken.
    pub pages: u64,
    /// What these take of the pool now.
    pub pool_bytes: u64,
    /// Those that are the same as another one that was taken before: among all pages it is at least this share.
    pub equal_pages: u64,
    /// Those that could not be read.
    pub bad_pages: u64,
    /// What each compressor makes of them; empty without pages. One with a dictionary is tried with the VM's latest one,
    /// and left out while it has none.
    pub compressors: Vec<CompressorTrial>,
}

/// What a compressor makes of a sample.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct CompressorTrial {
    /// The compressor, as in the configuration.
    pub compressor: String,
    /// What the sample would take of the pool, headers and size classes included.
    pub pool_bytes: u64,
    /// Pages of the sample that would not shrink.
    pub incompressible_pages: u64,
    /// What all pages of the VM that are in the pool would take by that.
    pub estimated_pool_bytes: u64,
    /// How long half of the pages took at most to be compressed, in nanoseconds, on this host now.
    pub compress_ns_p50: u64,
    /// The same to be decompressed.
    pub decompress_ns_p50: u64,
}

/// What keeping a VM's pages saves. The parts of all VMs make up what the status has of the whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Savings {
    /// What its pages in memory would take as they are.
    pub stored_bytes: u64,
    /// What those in the writeback file would.
    pub file_bytes: u64,
    /// Its part of the memory that the pool takes.
    pub arena_bytes: u64,
    /// Its page table, and its part of what is kept beside the pool.
    pub metadata_bytes: u64,
    /// Its part of the daemon's own memory, the same for all VMs.
    pub daemon_bytes: u64,
    /// What is left of the first two without the others; less than nothing where that costs more.
    pub saved_bytes: i64,
}

/// What limit a VM needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Need {
    /// The time within which pages were used that are to stay; null for all pages, because none can leave for a file.
    pub within_seconds: Option<u64>,
    /// What they take of the pool, or would if all were there.
    pub used_bytes: u64,
    /// The limit that leaves them there, with an eighth for more.
    pub limit_bytes: u64,
    /// The other pages.
    pub rest_pages: u64,
    /// What these take of the writeback file, or would.
    pub rest_file_bytes: u64,
    /// The limit that the VM has; null for none.
    pub current_limit_bytes: Option<u64>,
    /// How that stands to what it needs.
    pub fit: LimitFit,
    /// Whether pages of the VM may move to a writeback file: there is one, and its `writeback` is not false.
    pub writeback: bool,
}

/// How a limit stands to what its VM needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LimitFit {
    /// It is less: pages that are used leave, or stores fail.
    Below,
    /// It is right.
    #[default]
    Fits,
    /// It is more than four times as much, and holds nobody back.
    FarAbove,
}
