//! The `[balloon]` section, and what the VMs' values of `squeeze` have to do with it, with each other and with the rest.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use serde::Deserialize;
use toml::Value;

use super::super::value::{self, Key};
use super::super::{Config, ConfigError};
use super::MEMORY_BYTES;
use crate::ids::Bytes;

/// Guests say how they are every two seconds at most, and a guest that is looked at once a minute suffers for a minute.
const INTERVAL: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(60);
const INTERVAL_DEFAULT: Duration = Duration::from_secs(5);

/// The `[balloon]` section.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, expecting = "the section [balloon] with its keys: budget, interval")]
pub(in crate::config) struct Balloon {
    budget: Option<Value>,
    interval: Option<Value>,
}

/// From one look at the guests to the next; all times of the policy follow it.
pub(in crate::config) fn interval(balloon: &Balloon) -> Result<Duration, ConfigError> {
    let key = Key::new("balloon.interval", balloon.interval.as_ref());
    Ok(key.optional_duration(INTERVAL)?.unwrap_or(INTERVAL_DEFAULT))
}

/// The most memory that all guests that are squeezed may have together.
pub(in crate::config) fn budget(balloon: &Balloon, host_bytes: u64) -> Result<Option<u64>, ConfigError> {
    let least = *MEMORY_BYTES.start();
    let allowed = format!(
        "must be a share of the host's memory from \"1%\" to \"100%\", or a size from {} to that memory ({})",
        Bytes(least),
        Bytes(host_bytes)
    );
    let read = |value: &Value| match value.as_str().and_then(|text| text.strip_suffix('%')) {
        Some(percent) => {
            let percent: u64 = percent.trim().parse().ok().filter(|percent| (1..=100).contains(percent))?;
            Some(Some(host_bytes / 100 * percent))
        }
        None => value::bytes(value).filter(|bytes| (least..=host_bytes).contains(bytes)).map(Some),
    };
    Key::new("balloon.budget", balloon.budget.as_ref()).size_or(None, &allowed, read)
}

/// What the VMs' values have to do with each other and with the rest.
pub(in crate::config) fn check(config: &Config) -> Result<(), ConfigError> {
    let mut owners = BTreeMap::new();
    for vm in &config.vms {
        let Some(socket) = vm.squeeze.as_ref().and_then(|squeeze| squeeze.vmm.socket()) else { continue };
        let refused = |allowed: String| ConfigError::Value {
            key: format!("the VM {:?}: squeeze.socket", vm.name),
            given: format!("{socket:?}"),
            allowed,
        };
        if socket.starts_with(&config.runtime_dir) {
            let allowed =
                "must be in another directory than runtime_dir, where the daemon has its own sockets";
            return Err(refused(allowed.to_owned()));
        }
        if let Some(other) = owners.insert(socket, &vm.name) {
            return Err(refused(format!("must be this VM's own, and the VM {other:?} has it")));
        }
    }
    let squeezed = config.vms.iter().filter_map(|vm| vm.squeeze.as_ref());
    let needed_bytes = squeezed.fold(0, |sum: u64, vm| sum.saturating_add(vm.needed_bytes()));
    match config.balloon_budget_bytes {
        Some(budget_bytes) if needed_bytes > budget_bytes => Err(ConfigError::Value {
            key: "sum of squeeze.min, or squeeze.to, over all [[vm]]".to_owned(),
            given: format!("\"{}\"", Bytes(needed_bytes)),
            allowed: format!("must be at most balloon.budget ({})", Bytes(budget_bytes)),
        }),
        _ => Ok(()),
    }
}
