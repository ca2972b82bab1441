//! One value of the file: takes the TOML value of a key and gives back what it means, or the error that names the
//! key, what was given and what is allowed. The types are checked here rather than by serde, whose messages would
//! speak of Rust's types.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use toml::Value;

use super::ConfigError;
use crate::ids::Bytes;

/// A key that may be there, under the name that messages call it by.
pub(super) struct Key<'a> {
    name: String,
    value: Option<&'a Value>,
}

impl<'a> Key<'a> {
    pub(super) fn new(name: impl Into<String>, value: Option<&'a Value>) -> Self {
        Self { name: name.into(), value }
    }

    /// The error for this key: it is missing, or its value isn't `allowed`.
    pub(super) fn error(&self, allowed: impl Into<String>) -> ConfigError {
        let (key, allowed) = (self.name.clone(), allowed.into());
        match self.value {
            Some(value) => ConfigError::Value { key, given: value.to_string(), allowed },
            None => ConfigError::Missing { key, allowed },
        }
    }

    /// Whether there is a value.
    pub(super) fn is_given(&self) -> bool {
        self.value.is_some()
    }

    /// The value, if it is a text.
    pub(super) fn text(&self) -> Option<&'a str> {
        self.value.and_then(Value::as_str)
    }

    /// What `read` makes of the value, or `default` when the key isn't there; `allowed` says what `read` takes.
    pub(super) fn or<T>(
        &self,
        default: T,
        allowed: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<T, ConfigError> {
        match self.value {
            None => Ok(default),
            Some(value) => read(value).ok_or_else(|| self.error(allowed)),
        }
    }

    /// The same for a value with a size in it: who wrote another unit is told what was probably meant.
    pub(super) fn size_or<T>(
        &self,
        default: T,
        allowed: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<T, ConfigError> {
        let meant = self.text().and_then(|text| text.parse::<Bytes>().err()?.meant());
        let meant = meant.map(|meant| format!("; did you mean \"{meant}\"?")).unwrap_or_default();
        self.or(default, &format!("{allowed}{meant}"), read)
    }

    /// A whole number.
    pub(super) fn number(&self, default: u32, allowed: RangeInclusive<u32>) -> Result<u32, ConfigError> {
        let text = format!("must be a whole number from {} to {}", allowed.start(), allowed.end());
        self.or(default, &text, |value| {
            let number = u32::try_from(value.as_integer()?).ok()?;
            allowed.contains(&number).then_some(number)
        })
    }

    /// True or false.
    pub(super) fn boolean(&self, default: bool) -> Result<bool, ConfigError> {
        self.or(default, "must be true or false", Value::as_bool)
    }

    /// A size in bytes that may be left out.
    pub(super) fn optional_size(&self, allowed: RangeInclusive<u64>) -> Result<Option<u64>, ConfigError> {
        self.value.map(|_| self.size(None, allowed, 1)).transpose()
    }

    /// A duration that may be left out.
    pub(super) fn optional_duration(
        &self,
        allowed: RangeInclusive<Duration>,
    ) -> Result<Option<Duration>, ConfigError> {
        let usual = Duration::from_secs(30 * 60);
        let example = if allowed.contains(&usual) { usual } else { *allowed.start() * 2 };
        let text = format!(
            "must be a duration from {} to {}, a whole number and s, m, h or d, for example \"{}\"",
            in_units(*allowed.start()),
            in_units(*allowed.end()),
            in_units(example.min(*allowed.end()))
        );
        let read =
            |value: &Value| duration(value.as_str()?).filter(|given| allowed.contains(given)).map(Some);
        self.or(None, &text, read)
    }

    /// A TCP address that may be left out. No names: the daemon would have to ask the network before it serves a page.
    pub(super) fn optional_address(&self) -> Result<Option<SocketAddr>, ConfigError> {
        let allowed = "must be a numeric IP address and a port, such as \"127.0.0.1:9464\" or \"[::1]:9464\"";
        self.or(None, allowed, |value| {
            let address: SocketAddr = value.as_str()?.parse().ok()?;
            (address.port() > 0).then_some(Some(address))
        })
    }

    /// A size in bytes. Without a default the key must be there.
    pub(super) fn size(
        &self,
        default: Option<u64>,
        allowed: RangeInclusive<u64>,
        multiple: u64,
    ) -> Result<u64, ConfigError> {
        let mut text = format!(
            "must be a size from {} to {} with its unit, for example \"512MiB\"",
            Bytes(*allowed.start()),
            Bytes(*allowed.end())
        );
        if multiple > 1 {
            text = format!("{text}, and a multiple of {}", Bytes(multiple));
        }
        if !self.is_given() {
            return default.ok_or_else(|| self.error(text));
        }
        self.size_or(0, &text, |value| {
            bytes(value).filter(|bytes| allowed.contains(bytes) && bytes.is_multiple_of(multiple))
        })
    }

    /// A file that the daemon keeps for itself, by its absolute path.
    pub(super) fn own_file(&self, default: PathBuf) -> Result<PathBuf, ConfigError> {
        let allowed = "must be the absolute path of a file, without control characters";
        self.or(default, allowed, |value| value.as_str().filter(is_file_path).map(PathBuf::from))
    }

    /// A file or a device, by its absolute path. The key must be there.
    pub(super) fn file(&self) -> Result<PathBuf, ConfigError> {
        let allowed = "must be the absolute path of a file or a block device, without control characters";
        self.text().filter(is_file_path).map(PathBuf::from).ok_or_else(|| self.error(allowed))
    }

    /// A directory, by its absolute path.
    pub(super) fn directory(&self, default: &str) -> Result<PathBuf, ConfigError> {
        // VMMs separate the parts of an option by commas, and cloud-hypervisor knows no way to write one.
        let allowed = "must be an absolute path without commas and control characters";
        self.or(PathBuf::from(default), allowed, |value| {
            let text = value.as_str()?;
            let fits = text.starts_with('/') && !text.contains(|c: char| c == ',' || c.is_control());
            fits.then(|| PathBuf::from(text))
        })
    }
}

fn is_file_path(text: &&str) -> bool {
    text.starts_with('/') && !text.ends_with('/') && !text.contains(char::is_control)
}

/// A text with an IEC unit.
pub(super) fn bytes(value: &Value) -> Option<u64> {
    value.as_str()?.parse().ok().map(|Bytes(bytes)| bytes)
}

const DURATION_UNITS: [(char, u64); 4] = [('d', 24 * 3600), ('h', 3600), ('m', 60), ('s', 1)];

/// A whole number and a unit, such as `30m`.
#[must_use]
pub fn duration(text: &str) -> Option<Duration> {
    let (number, seconds) =
        DURATION_UNITS.iter().find_map(|(unit, seconds)| Some((text.strip_suffix(*unit)?, *seconds)))?;
    // `parse` would take a leading plus sign.
    let number: u64 = number.bytes().all(|byte| byte.is_ascii_digit()).then(|| number.parse().ok())??;
    number.checked_mul(seconds).map(Duration::from_secs)
}

/// The duration as one would write it.
pub(super) fn in_units(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let whole = |(_, unit): &&(char, u64)| seconds >= *unit && seconds.is_multiple_of(*unit);
    let (name, unit) = DURATION_UNITS.iter().find(whole).copied().unwrap_or(('s', 1));
    format!("{}{name}", seconds / unit)
}
