//! The `[writeback]` section: the file that cold pages move to, how large it is, and how much may be written to it.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;
use toml::Value;

use super::value::Key;
use super::{ConfigError, WritebackConfig};
use crate::ids::Bytes;

/// Less than this is no worthwhile number of segments.
const SIZE_BYTES_MIN: u64 = 64 << 20;
/// As much as the disks of the largest VM twice over.
const SIZE_BYTES_MAX: u64 = 16 << 40;
const DAILY_LIMIT_BYTES_MIN: u64 = 1 << 20;
/// More than any disk takes in a day.
const DAILY_LIMIT_BYTES_MAX: u64 = 1 << 50;
/// The ages of pages are kept for two years; a month is as good as never.
const IDLE_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

#[derive(Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "the section [writeback] with its keys: path, size, daily_limit, idle"
)]
pub(super) struct Writeback {
    path: Option<Value>,
    size: Option<Value>,
    daily_limit: Option<Value>,
    idle: Option<Value>,
}

pub(super) fn parse(writeback: &Writeback) -> Result<WritebackConfig, ConfigError> {
    let size = Key::new("writeback.size", writeback.size.as_ref());
    let daily_limit = Key::new("writeback.daily_limit", writeback.daily_limit.as_ref());
    Ok(WritebackConfig {
        path: Key::new("writeback.path", writeback.path.as_ref()).file()?,
        size_bytes: size.optional_size(SIZE_BYTES_MIN..=SIZE_BYTES_MAX)?,
        daily_limit_bytes: daily_limit.optional_size(DAILY_LIMIT_BYTES_MIN..=DAILY_LIMIT_BYTES_MAX)?,
        idle: Key::new("writeback.idle", writeback.idle.as_ref())
            .optional_duration(Duration::from_secs(1)..=IDLE_MAX)?,
    })
}

/// A block device has a size of its own; for anything else, one that is yet to be made included, it must be given.
pub(super) fn check_size(writeback: &WritebackConfig) -> Result<(), ConfigError> {
    if writeback.size_bytes.is_some() || !sizeless(&writeback.path) {
        return Ok(());
    }
    Err(ConfigError::Missing {
        key: "writeback.size".to_owned(),
        allowed: format!(
            "{:?} is not a block device, so it must be a size of at least {}",
            writeback.path,
            Bytes(SIZE_BYTES_MIN)
        ),
    })
}

/// Whether there is certainly no block device here. Who may not look into a directory can't tell, and leaves it to the
/// daemon.
fn sizeless(path: &Path) -> bool {
    match path.metadata() {
        Ok(metadata) => !metadata.file_type().is_block_device(),
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}
