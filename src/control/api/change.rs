//! What may be changed while the daemon runs. It is remembered, and lies over the configuration, unless it is only for as
//! long as the daemon runs.

use std::ops::RangeInclusive;

use std::time::Duration;

use serde::{Deserialize, Serialize};
use toml::{Table, Value};
use utoipa::ToSchema;

use super::{Squeeze, SqueezeMode};
use crate::config::{self, LIMIT_BYTES, SqueezeConfig, VmConfig, WEIGHT, known_vms, reserves_max_bytes};
use crate::ids::Bytes;
use crate::store::codec::Compressor;

/// `POST /api/v1/vms/NAME`: what is to be another, and the rest stays. The answer is the VM's status.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmChange {
    /// Most pool bytes that it may hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit_bytes: Option<u64>,
    /// Pool bytes that it keeps whatever the others need.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reserve_bytes: Option<u64>,
    /// Its share of the pool against the other VMs'.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
    /// Whether its pages may move to the writeback file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub writeback: Option<bool>,
    /// How long after a VMM was connected last its pages are dropped; 0 for never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clear_after_seconds: Option<u64>,
    /// How its guest is made to give up memory: all of it, whatever was said before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub squeeze: Option<Squeeze>,
    /// Who decides how much memory its guest has; the rest of how it is squeezed stays. Not together with `squeeze`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub squeeze_mode: Option<SqueezeMode>,
    /// Whether the change is forgotten when the daemon starts again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub runtime: bool,
    /// Whether what was changed before is forgotten first: the VM is as the configuration file has it, or as it was added.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub forget: bool,
}

/// How long after its last connection a VM is cleared, as the configuration would have it; 0 for never.
pub(super) fn clear_after(seconds: u64) -> Value {
    config::duration((seconds > 0).then(|| Duration::from_secs(seconds)))
}

impl VmChange {
    /// The keys that a configuration would have for it, of a VM that was `vm` before.
    ///
    /// # Errors
    /// [`SetError::Invalid`] when it changes who decides about a balloon that nobody knows how to reach.
    pub fn keys(&self, vm: &VmConfig) -> Result<Table, SetError> {
        let squeeze = match (&self.squeeze, self.squeeze_mode) {
            (Some(squeeze), None) => Some(squeeze.value()),
            (None, Some(mode)) => Some(with_mode(vm, mode)?),
            (None, None) => None,
            (Some(_), Some(_)) => {
                let message =
                    "`squeeze` and `squeeze_mode` can't both be there: `squeeze` has the mode in it";
                return Err(SetError::Invalid { message: message.to_owned() });
            }
        };
        let keys = [
            ("limit", self.limit_bytes.map(config::size)),
            ("reserve", self.reserve_bytes.map(config::size)),
            ("weight", self.weight.map(|weight| Value::Integer(weight.into()))),
            ("writeback", self.writeback.map(Value::Boolean)),
            ("clear_after", self.clear_after_seconds.map(clear_after)),
            ("squeeze", squeeze),
        ];
        Ok(keys.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect())
    }

    /// The VM after this change, when it was `vm` before; the same holds as for the configuration. How it is squeezed is not
    /// looked at: its keys are the configuration's.
    ///
    /// # Errors
    /// [`SetError::Invalid`] when a value is out of its range, or the pool is too small for this reserve and those of the
    /// other VMs.
    pub fn applied(
        &self,
        vm: &VmConfig,
        other_reserves_bytes: u64,
        pool_max_bytes: u64,
    ) -> Result<VmConfig, SetError> {
        let limit_bytes = self.limit_bytes.unwrap_or(vm.limit_bytes);
        let reserve_bytes = self.reserve_bytes.unwrap_or(vm.reserve_bytes);
        let weight = self.weight.unwrap_or(vm.weight);
        if self.limit_bytes.is_some() {
            check("limit_bytes", limit_bytes, &LIMIT_BYTES)?;
        }
        check("weight", weight, &WEIGHT)?;
        if reserve_bytes > limit_bytes {
            return Err(SetError::Invalid {
                message: format!(
                    "the reserve {} must be at most the VM's limit ({})",
                    Bytes(reserve_bytes),
                    Bytes(limit_bytes)
                ),
            });
        }
        let all_reserves_bytes = reserve_bytes.saturating_add(other_reserves_bytes);
        // Room that was taken away meanwhile keeps nobody from asking for less.
        let max_bytes = reserves_max_bytes(pool_max_bytes);
        if reserve_bytes > vm.reserve_bytes && all_reserves_bytes > max_bytes {
            return Err(SetError::Invalid {
                message: format!(
                    "the reserves of all VMs would be {}, and must be at most nine tenths of pool.max ({})",
                    Bytes(all_reserves_bytes),
                    Bytes(max_bytes)
                ),
            });
        }
        let writeback = self.writeback.unwrap_or(vm.writeback);
        let clear_after = match self.clear_after_seconds {
            None => vm.clear_after,
            Some(seconds) => Some(Duration::from_secs(seconds)).filter(|after| !after.is_zero()),
        };
        Ok(VmConfig { limit_bytes, reserve_bytes, weight, writeback, clear_after, ..vm.clone() })
    }
}

/// How a VM is squeezed, with another mode.
fn with_mode(vm: &VmConfig, mode: SqueezeMode) -> Result<Value, SetError> {
    let Some(squeeze) = vm.squeeze.clone() else {
        let name = &vm.name;
        return Err(SetError::Invalid {
            message: format!(
                "how the balloon of {name:?} is reached isn't known: say so first, for example with `ballast vm set {name} \
                 --squeeze vmm=qemu,socket=/run/vms/{name}.qmp,min=512MiB`; `ballast vm args {name}` then has what its VMM needs"
            ),
        });
    };
    Ok(SqueezeConfig { mode: mode.into(), ..squeeze }.value())
}

fn check<T: PartialOrd + std::fmt::Display>(
    name: &str,
    value: T,
    allowed: &RangeInclusive<T>,
) -> Result<(), SetError> {
    if allowed.contains(&value) {
        return Ok(());
    }
    let (start, end) = (allowed.start(), allowed.end());
    Err(SetError::Invalid { message: format!("{name} = {value}: must be from {start} to {end}") })
}

/// `POST /api/v1/pool`: a new current pool. The answer is the pool's status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PoolChange {
    /// What new pages are compressed with: `lz4`, `zstd` or `zstd:LEVEL`; what it was when it is left out.
    #[serde(default, with = "compressor", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub compressor: Option<Compressor>,
    /// Whether the pages that are there are compressed again, a few at a time.
    #[serde(default)]
    pub recompress: bool,
    /// Whether the change is forgotten when the daemon starts again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub runtime: bool,
    /// Whether what was changed before is forgotten: new pages are compressed as the configuration file says.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub forget: bool,
}

impl PoolChange {
    /// A change to this compressor that is remembered.
    #[must_use]
    pub fn to(compressor: Compressor) -> Self {
        Self { compressor: Some(compressor), recompress: false, runtime: false, forget: false }
    }

    /// This change, if it says what it is.
    ///
    /// # Errors
    /// [`SetError::Invalid`] when it changes nothing, or names a compressor and is to forget one.
    pub fn checked(self) -> Result<Self, SetError> {
        let message = match (self.compressor, self.forget) {
            (Some(_), true) => "`compressor` and `forget` can't both be there: leave one of them out",
            (None, false) if !self.recompress => {
                "it changes nothing: `compressor` must be there, or `forget` or `recompress` be true"
            }
            _ => return Ok(self),
        };
        Err(SetError::Invalid { message: message.to_owned() })
    }

    /// Whether new pages are compressed as before.
    #[must_use]
    pub fn keeps_compressor(&self) -> bool {
        self.compressor.is_none() && !self.forget
    }
}

/// A compressor as the text that the configuration has for it.
mod compressor {
    use serde::{Deserialize, Deserializer, Serializer, de};

    use crate::store::codec::Compressor;

    #[allow(clippy::ref_option, reason = "serde asks for this")]
    pub(super) fn serialize<S: Serializer>(
        value: &Option<Compressor>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match value {
            Some(compressor) => serializer.collect_str(compressor),
            None => serializer.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Compressor>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| text.parse().map_err(de::Error::custom)).transpose()
    }
}

/// Why nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SetError {
    /// There is no such VM (404).
    #[error("there is no VM {name:?}; {}", known_vms(.known))]
    Unknown {
        /// What was asked for.
        name: String,
        /// What exists.
        known: Vec<String>,
    },
    /// What there is stands against it (409).
    #[error("{message}")]
    Conflict {
        /// What does, and what to do.
        message: String,
    },
    /// What was asked for isn't allowed (400).
    #[error("{message}")]
    Invalid {
        /// What it is, and what would be right.
        message: String,
    },
    /// It went wrong (500).
    #[error("{message}")]
    Failed {
        /// What happened.
        message: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    const MIB: u64 = 1 << 20;

    fn vm() -> VmConfig {
        let text = "[[vm]]\nname = \"a\"\nsize = \"1GiB\"\nlimit = \"100MiB\"\nreserve = \"10MiB\"\n";
        Config::parse(text, 1 << 30).unwrap().vms.remove(0)
    }

    fn refusal(change: VmChange) -> String {
        change.applied(&vm(), 50 * MIB, 100 * MIB).unwrap_err().to_string()
    }

    #[test]
    fn what_is_not_named_stays() {
        assert_eq!(VmChange::default().applied(&vm(), 0, MIB).unwrap(), vm());
        let change = VmChange { weight: Some(7), writeback: Some(false), ..VmChange::default() };
        let after = change.applied(&vm(), 0, 100 * MIB).unwrap();
        assert_eq!(after, VmConfig { weight: 7, writeback: false, ..vm() });
        let change =
            VmChange { limit_bytes: Some(60 * MIB), reserve_bytes: Some(40 * MIB), ..VmChange::default() };
        let after = change.applied(&vm(), 50 * MIB, 100 * MIB).unwrap();
        assert_eq!(after, VmConfig { limit_bytes: 60 * MIB, reserve_bytes: 40 * MIB, ..vm() });
    }

    #[test]
    fn what_the_configuration_refuses_is_refused() {
        let nothing = VmChange::default;
        for (change, parts) in [
            (VmChange { limit_bytes: Some(1), ..nothing() }, ["limit_bytes = 1:", "1048576 to"]),
            (VmChange { limit_bytes: Some(5 * MIB), ..nothing() }, ["reserve 10MiB", "limit (5MiB)"]),
            (VmChange { reserve_bytes: Some(101 * MIB), ..nothing() }, ["reserve 101MiB", "(100MiB)"]),
            (VmChange { reserve_bytes: Some(51 * MIB), ..nothing() }, ["would be 101MiB", "max (90MiB)"]),
            (VmChange { weight: Some(0), ..nothing() }, ["weight = 0:", "1 to 10000"]),
        ] {
            let message = refusal(change);
            assert!(parts.iter().all(|part| message.contains(part)), "{message}");
        }
    }

    #[test]
    fn a_smaller_reserve_is_allowed_even_when_the_sum_stays_too_large() {
        let change = VmChange { reserve_bytes: Some(9 * MIB), ..VmChange::default() };
        assert_eq!(change.applied(&vm(), 200 * MIB, 100 * MIB).unwrap().reserve_bytes, 9 * MIB);
    }

    #[test]
    fn changes_are_json_with_the_names_of_the_configuration() {
        let change = VmChange { weight: Some(7), ..VmChange::default() };
        assert_eq!(serde_json::to_string(&change).unwrap(), r#"{"weight":7}"#);
        assert!(serde_json::from_str::<VmChange>(r#"{"wieght":7}"#).is_err());
        let change: PoolChange = serde_json::from_str(r#"{"compressor":"zstd:3"}"#).unwrap();
        assert_eq!(change, PoolChange::to(Compressor::Zstd(3)));
        assert_eq!(serde_json::to_string(&change).unwrap(), r#"{"compressor":"zstd:3","recompress":false}"#);
        let error = serde_json::from_str::<PoolChange>(r#"{"compressor":"gzip"}"#).unwrap_err().to_string();
        assert!(error.contains("\"gzip\" is not a compressor"), "{error}");
    }
}
