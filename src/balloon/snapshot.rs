//! What the policy is told: the host and each VM at one tick, as plain numbers. A trace holds exactly this, so that a
//! decision can be made again later; whatever is not in here can't have had a part in it.

use serde::{Deserialize, Serialize};

use super::Mode;
use super::vmm::{GuestMemory, Unreachable};
use super::word::Word;

/// The host at a tick.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// The boot-time clock, in milliseconds.
    pub now_ms: u64,
    /// From tick to tick, in milliseconds. All times of the policy are multiples of it.
    pub interval_ms: u64,
    /// Most bytes that all guests under the policy may have together.
    pub budget_bytes: Option<u64>,
    /// Whether the host is short of memory.
    pub pressure: Pressure,
    /// What the pool's arena takes, in bytes.
    pub pool_bytes: u64,
    /// The most that it may take, in bytes.
    pub pool_max_bytes: u64,
    /// What the shrinker leaves it at, in bytes: above this it makes room. Not known before version 4 of the trace.
    #[serde(default)]
    pub pool_start_bytes: Option<u64>,
    /// Stores of any VM that wait for room at this moment.
    #[serde(default)]
    pub waiting_stores: u64,
}

impl Host {
    /// Whether stores wait in a pool that is full: it takes what leaves it, and no more. Those that wait in one that the
    /// shrinker is content with wait for a limit of their VM's.
    pub(super) fn is_stuck(&self) -> bool {
        let is_full = self.pool_start_bytes.is_some_and(|start_bytes| self.pool_bytes > start_bytes);
        self.waiting_stores > 0 && is_full
    }
}

/// How short of memory the host is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pressure {
    /// Not at all.
    #[default]
    None,
    /// Somebody waits for memory.
    Moderate,
    /// Everybody does.
    Severe,
}

/// A VM at a tick.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// Its name.
    pub vm: String,
    /// How far the policy may go.
    pub mode: Mode,
    /// The least memory that its guest may have, in bytes.
    pub min_bytes: u64,
    /// The most, in bytes; what it was booted with, if that is less.
    pub max_bytes: u64,
    /// Its share against other VMs' when the host takes memory.
    pub weight: u32,
    /// How much of its working set may come back from us in a minute, in parts per million.
    pub promotion_ppm: u64,
    /// What its VMM says.
    pub vmm: Vmm,
    /// What has happened to its pages since the daemon started.
    pub counters: Counters,
    /// What it holds.
    pub held: Held,
}

#[cfg(test)]
impl Snapshot {
    /// A VM of which its VMM alone says anything, for tests that go by that.
    pub(crate) fn of_nothing(vmm: Vmm) -> Self {
        Self {
            vm: "web1".to_owned(),
            mode: Mode::Auto,
            min_bytes: 0,
            max_bytes: u64::MAX,
            weight: 100,
            promotion_ppm: 2000,
            vmm,
            counters: Counters::default(),
            held: Held::default(),
        }
    }
}

/// What a VMM says, or why it says nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Vmm {
    /// Its guest runs and has this memory.
    Answers(GuestMemory),
    /// It is paused, migrating or doesn't answer: its guest keeps what it has.
    Silent(Silence),
    /// It is gone, in its client's words, and its guest's memory with it.
    Gone(String),
}

/// Why a VMM says nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Silence {
    /// In a word.
    pub word: Word,
    /// In its client's words.
    pub text: String,
}

impl From<&Unreachable> for Silence {
    fn from(why: &Unreachable) -> Self {
        Self { word: why.word(), text: why.to_string() }
    }
}

/// What has happened to a VM's pages since the daemon started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counters {
    /// Pages that the guest pushed out.
    pub stores: u64,
    /// Pages that the guest loaded, those included of which nothing was stored but a word.
    #[serde(default)]
    pub loads: u64,
    /// Pages that came back, wherever they were.
    pub promoted: u64,
    /// Pages of these that had been unused for at most some minutes: the guest misses what was taken.
    pub promoted_young: u64,
    /// How long the guest's loads took, all together, in nanoseconds: what the file gave weighs by how long that took.
    pub load_ns: u64,
    /// Stores that waited for room.
    pub delayed_stores: u64,
    /// Stores that failed for want of room.
    pub failed_stores: u64,
}

/// What a VM holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Held {
    /// Pages on its disk.
    pub stored_pages: u64,
    /// Pages of these that are objects in the pool.
    pub pool_pages: u64,
    /// What those take, in bytes.
    pub pool_bytes: u64,
    /// The most that they may, in bytes.
    pub limit_bytes: u64,
    /// The disk, in bytes.
    pub size_bytes: u64,
    /// Whether its pages can leave the pool for the file.
    pub writeback: bool,
    /// Stores that wait for room at this moment.
    pub waiting_stores: u64,
}
