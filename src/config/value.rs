//! One value of the file: takes the TOML value of a key and gives back what it means, or the error that names the
//! key, what was given and what is allowed. The types are checked here rather than by serde, whose messages would
//! speak of Rust's types.

use std::ops::RangeInclusive;
use std::path::PathBuf;

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

    /// A whole number.
    pub(super) fn number(&self, default: u32, allowed: RangeInclusive<u32>) -> Result<u32, ConfigError> {
        let text = format!("must be a whole number from {} to {}", allowed.start(), allowed.end());
        self.or(default, &text, |value| {
            let number = u32::try_from(value.as_integer()?).ok()?;
            allowed.contains(&number).then_some(number)
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
            "must be a size from {} to {}, for example \"512MiB\"",
            Bytes(*allowed.start()),
            Bytes(*allowed.end())
        );
        if multiple > 1 {
            text = format!("{text}, and a multiple of {}", Bytes(multiple));
        }
        let Some(value) = self.value else { return default.ok_or_else(|| self.error(text)) };
        bytes(value)
            .filter(|bytes| allowed.contains(bytes) && bytes.is_multiple_of(multiple))
            .ok_or_else(|| self.error(text))
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

/// A number of bytes, or a text with an IEC unit.
pub(super) fn bytes(value: &Value) -> Option<u64> {
    match value {
        Value::Integer(bytes) => u64::try_from(*bytes).ok(),
        Value::String(text) => text.parse().ok().map(|Bytes(bytes)| bytes),
        _ => None,
    }
}
