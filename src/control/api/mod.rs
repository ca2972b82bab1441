//! What the control socket speaks: HTTP/1.1 with JSON bodies, under `/api/v1`. Other people script against the
//! names here, so they are only ever added to. Sizes are bytes, units stand last in the names.

mod balloon;
mod change;
mod check;
mod counters;
mod exposition;
mod histogram;
mod reload;
mod report;
mod squeeze;
mod status;
mod vm;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use self::balloon::BalloonStatus;
pub use self::change::{PoolChange, SetError, VmChange};
pub use self::check::{BadPage, CHECK_RATE_BYTES_MIN, CheckOrder, CheckState, CheckStatus};
pub use self::counters::{Bucket, Counters, buckets};
pub use self::exposition::{Exposition, METRICS_PATH};
pub use self::histogram::{Histogram, LatencyBySource};
pub use self::reload::{Change, ChangeOutcome, MigrationName, ReloadReport, Reloading, SettingValue};
pub use self::report::{
    AgeBucket, CompressorTrial, LimitFit, Need, Report, Reporting, SAMPLE_PAGES, SAMPLE_PAGES_DEFAULT,
    Sample, Savings, Survey, VmReport, WorkingSet,
};
pub use self::squeeze::{Squeeze, SqueezeMode};
pub use self::status::{
    CompressorPool, CompressorPoolState, MemoryPressure, PoolStatus, RunsByReason, ShrinkerStatus, Status,
    VmState, VmStatus, WritebackState, WritebackStatus,
};
pub use self::vm::{Clearing, NewVm, Removal, Setting, SettingSource, VmDetails, VmList, VmRemoved};
use crate::config::known_vms;

/// `GET`: a [`Status`].
pub const STATUS_PATH: &str = "/api/v1/status";

/// `POST` of a [`PoolChange`]: the [`PoolStatus`] after it.
pub const POOL_PATH: &str = "/api/v1/pool";

/// `POST` of a [`CheckOrder`] begins a check; `GET` says how far the last one is. Both give a [`CheckStatus`].
pub const CHECK_PATH: &str = "/api/v1/check";

/// `GET` with a [`Reporting`]: a [`Report`].
pub const REPORT_PATH: &str = "/api/v1/report";

/// `GET`: a [`VmList`]. Below it, by its name, a VM: `GET` gives its [`VmDetails`], `PUT` of a [`NewVm`] adds it, `POST` of
/// a [`VmChange`] changes it, `DELETE` with a [`Removal`] removes it.
pub const VMS_PATH: &str = "/api/v1/vms";

/// `POST` with a [`Reloading`] reads the configuration again: a [`ReloadReport`].
pub const RELOAD_PATH: &str = "/api/v1/reload";

/// `GET`: the description of all this, in the form of OpenAPI 3.1.
pub const OPENAPI_PATH: &str = "/api/v1/openapi.json";

/// The body of every answer that isn't a success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
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
        "a VMM is connected to the VM {name:?}: power it off first, its swap would turn to zeros under it; or hang up on \
         it with --force"
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

    /// All that is known of one VM.
    ///
    /// # Errors
    /// When there is no such VM.
    fn vm(&self, name: &str) -> Result<VmDetails, SetError>;

    /// Adds a VM and serves it; gives it as it is then.
    ///
    /// # Errors
    /// When there is one of that name, what it is to be isn't allowed, or it went wrong.
    fn add_vm(&self, name: &str, vm: NewVm) -> Result<VmDetails, SetError>;

    /// Removes a VM, with its socket and its pages. May take a while.
    ///
    /// # Errors
    /// When there is no such VM, it is connected or holds pages, it is the configuration file's, or it went wrong.
    fn remove_vm(&self, name: &str, removal: Removal) -> Result<VmRemoved, SetError>;

    /// Reads the configuration again and goes by it as far as a running daemon can.
    ///
    /// # Errors
    /// When the configuration is refused; nothing is changed then.
    fn reload(&self, reloading: Reloading) -> Result<ReloadReport, SetError>;

    /// The same as metrics for Prometheus.
    fn metrics(&self, exposition: Exposition) -> String;

    /// Drops all pages of a powered-off VM and gives it a fresh swap header. May take a while.
    ///
    /// # Errors
    /// When there is no such VM, when it is connected, or when it went wrong.
    fn clear_vm(&self, name: &str, clearing: Clearing) -> Result<(), ClearError>;

    /// Changes a VM's share of the pool; gives the VM as it is then.
    ///
    /// # Errors
    /// When there is no such VM, when the change isn't allowed, or when it went wrong.
    fn set_vm(&self, name: &str, change: VmChange) -> Result<VmStatus, SetError>;

    /// Ends a VM's quarantine, for good; gives the VM as it is then. One that is in none stays as it is.
    ///
    /// # Errors
    /// When there is no such VM, or it is out of service.
    fn release_vm(&self, name: &str) -> Result<VmStatus, SetError>;

    /// Changes what new pages are compressed with; gives the pool as it is then.
    ///
    /// # Errors
    /// When it went wrong.
    fn set_pool(&self, change: PoolChange) -> Result<PoolStatus, SetError>;

    /// Begins to look at stored pages, in place of a check that may be under way.
    ///
    /// # Errors
    /// When there is no such VM, it is out of service, or the rate isn't allowed.
    fn begin_check(&self, order: CheckOrder) -> Result<CheckStatus, SetError>;

    /// How far the check is that was begun last; `None` when none was.
    fn check(&self) -> Option<CheckStatus>;

    /// What stored pages are like. Takes seconds.
    ///
    /// # Errors
    /// When there is no such VM, the sample isn't allowed, or another report is being made.
    fn report(&self, reporting: Reporting) -> Result<Report, SetError>;
}
