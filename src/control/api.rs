//! What the control socket speaks: HTTP/1.1 with JSON bodies, under `/api/v1`. Other people script against the
//! names here, so they are only ever added to. Sizes are bytes, units stand last in the names.

use serde::{Deserialize, Serialize};

use crate::config::known_vms;

/// `GET`: a [`Status`].
pub const STATUS_PATH: &str = "/api/v1/status";

/// `GET /api/v1/status`: the daemon as it is now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The daemon's version.
    pub version: String,
    /// Where its pages are.
    pub state_dir: String,
    /// What all VMs share.
    pub pool: PoolStatus,
    /// The VMs of the configuration in its order, then those that only the state directory knows.
    pub vms: Vec<VmStatus>,
}

/// The memory that all VMs share.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolStatus {
    /// Most bytes that the arena may take.
    pub max_bytes: u64,
    /// Bytes that the arena takes: objects, and what is lost between them.
    pub used_bytes: u64,
    /// Bytes of the compressed pages themselves.
    pub payload_bytes: u64,
    /// Bytes of everything that is kept beside the arena: page tables, lists, generations.
    pub metadata_bytes: u64,
    /// Pages that are kept, same-filled ones included (as in zswap).
    pub stored_pages: u64,
    /// Those of them that repeat one word and cost no pool memory.
    pub same_filled_pages: u64,
    /// What new pages are compressed with.
    pub compressor: String,
}

/// One VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Pages that are kept, same-filled ones included.
    pub stored_pages: u64,
    /// Those of them that repeat one word.
    pub same_filled_pages: u64,
    /// Those of them that would not shrink and are kept as they are.
    pub incompressible_pages: u64,
    /// What they take of the pool.
    pub pool_bytes: u64,
    /// Bytes of the compressed pages themselves.
    pub payload_bytes: u64,
    /// Pages that the guest wrote, since the daemon started.
    pub stores: u64,
    /// Pages that the guest read, since the daemon started.
    pub loads: u64,
    /// Pages that the guest discarded or overwrote, since the daemon started.
    pub invalidates: u64,
    /// Requests that ended in an error, since the daemon started.
    pub errors: u64,
    /// Whether a VMM is connected.
    pub connected: bool,
}

/// Whether a VM's device is served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VmState {
    /// It is.
    #[default]
    Ready,
    /// It isn't: its file in the state directory is damaged, and left alone.
    Damaged,
    /// It isn't: the state directory has its pages, but the configuration doesn't name it.
    Unconfigured,
}

impl VmState {
    /// The word that `status` shows; the same as in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Damaged => "damaged",
            Self::Unconfigured => "unconfigured",
        }
    }
}

/// The body of every answer that isn't a success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What went wrong, for people.
    pub error: String,
    /// When a VM was named that doesn't exist: those that do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub known: Option<Vec<String>>,
}

/// Why a VM's pages weren't dropped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClearError {
    /// There is no such VM (404).
    #[error("there is no VM {name:?}; {}", known_vms(.known))]
    Unknown {
        /// What was asked for.
        name: String,
        /// What exists.
        known: Vec<String>,
    },
    /// It is running (409).
    #[error(
        "a VMM is connected to the VM {name:?}: power it off first, its swap would turn to zeros under it"
    )]
    Connected {
        /// The VM.
        name: String,
    },
    /// It went wrong (500).
    #[error("{message}")]
    Failed {
        /// What happened.
        message: String,
    },
}

/// The daemon, as the control server sees it.
pub trait Host: Send + Sync {
    /// The daemon as it is now.
    fn status(&self) -> Status;

    /// Drops all pages of a powered-off VM and gives it a fresh swap header. May take a while.
    ///
    /// # Errors
    /// When there is no such VM, when it is connected, or when it went wrong.
    fn clear_vm(&self, name: &str) -> Result<(), ClearError>;
}
