//! A check of stored pages: what is asked for, and how far it is. Whoever began it asks again until it is done; it goes
//! on without that, and ends when another is begun.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// `POST /api/v1/check`: what is to be looked at. The answer is the [`CheckStatus`] of a check that begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckOrder {
    /// The only VM; all of them when it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// Bytes of pages a second, at least a megabyte.
    pub rate_bytes: u64,
}

/// The least that may be asked for.
pub const CHECK_RATE_BYTES_MIN: u64 = 1 << 20;

/// `GET /api/v1/check`: the check that was begun last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct CheckStatus {
    /// Tells this check from the one before.
    pub number: u64,
    /// Whether it goes on.
    pub state: CheckState,
    /// The only VM; null for all.
    pub vm: Option<String>,
    /// Bytes of pages a second.
    pub rate_bytes: u64,
    /// Pages that were stored when it began. Others come and go meanwhile.
    pub expected_pages: u64,
    /// Same-filled pages that were looked at.
    pub same_filled_pages: u64,
    /// Pages in memory that were looked at, same-filled ones not included.
    pub memory_pages: u64,
    /// Pages in the writeback file that were looked at.
    pub file_pages: u64,
    /// Pages that can't be read, wherever they are.
    pub bad_pages: u64,
    /// The first of them, a hundred at most.
    pub bad: Vec<BadPage>,
    /// Pages in a writeback file that is missing: they could not be looked at.
    pub missing_pages: u64,
    /// VMs that are out of service.
    pub not_checked: Vec<String>,
}

impl CheckStatus {
    /// Pages that were looked at.
    #[must_use]
    pub fn checked_pages(&self) -> u64 {
        // Whatever a daemon says, whoever asks it only shows it.
        [self.same_filled_pages, self.memory_pages, self.file_pages, self.bad_pages]
            .into_iter()
            .fold(0, u64::saturating_add)
    }
}

/// Whether a check is under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum CheckState {
    /// It is.
    #[default]
    Running,
    /// It looked at all there was.
    Done,
}

/// A page that can't be read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct BadPage {
    /// Whose.
    pub vm: String,
    /// Which page of its disk.
    pub slot: u32,
    /// What is wrong.
    pub reason: String,
}
