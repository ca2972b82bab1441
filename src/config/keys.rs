//! A checked configuration as keys and values again, written as an operator would write them: for whoever compares two
//! of them, shows where a value comes from, or remembers it.

use std::time::Duration;

use toml::Value;

use super::value::in_units;
use super::{Config, Migration, VmConfig, squeeze, uuid};
use crate::ids::Bytes;

/// The keys that a `[[vm]]` may have, in the order in which they are shown and written.
pub const VM_KEYS: [&str; 12] = [
    "name",
    "size",
    "limit",
    "reserve",
    "weight",
    "writeback",
    "queues",
    "migration",
    "label",
    "uuid",
    CLEAR_AFTER,
    "squeeze",
];
const CLEAR_AFTER: &str = "clear_after";
/// How a compressor is written that there is not to be.
pub(super) const NONE: &str = "none";

fn none() -> String {
    NONE.to_owned()
}

/// How a duration is written that takes one away which another place gives.
pub(super) const NEVER: &str = "never";

/// A key and its value; `None` where the key is not there.
pub type KeyValue = (&'static str, Option<Value>);

/// A size that is read back as exactly this many bytes.
#[must_use]
pub fn size(bytes: u64) -> Value {
    Value::String(Bytes(bytes).exact())
}

/// A duration of whole seconds, or of none at all.
#[must_use]
pub fn duration(duration: Option<Duration>) -> Value {
    Value::String(duration.map_or_else(|| NEVER.to_owned(), in_units))
}

/// How the configuration calls a kind of migration.
#[must_use]
pub fn migration(migration: Migration) -> &'static str {
    match migration {
        Migration::None => "none",
        Migration::SameHost => "same-host",
    }
}

fn number(number: impl Into<i64>) -> Option<Value> {
    Some(Value::Integer(number.into()))
}

fn text(text: impl ToString) -> Option<Value> {
    Some(Value::String(text.to_string()))
}

fn whole(number: u128) -> Option<Value> {
    i64::try_from(number).ok().map(Value::Integer)
}

impl VmConfig {
    /// All keys of the VM, in the order of [`VM_KEYS`].
    #[must_use]
    pub fn keys(&self) -> [KeyValue; 12] {
        [
            ("name", text(&self.name)),
            ("size", Some(size(self.size_bytes))),
            ("limit", Some(size(self.limit_bytes))),
            ("reserve", Some(size(self.reserve_bytes))),
            ("weight", number(self.weight)),
            ("writeback", Some(Value::Boolean(self.writeback))),
            ("queues", number(self.queues)),
            ("migration", text(migration(self.migration))),
            ("label", text(&self.label)),
            ("uuid", text(uuid::to_text(&self.uuid))),
            (CLEAR_AFTER, Some(duration(self.clear_after))),
            ("squeeze", self.squeeze.as_ref().map_or_else(|| text(squeeze::NONE), |it| Some(it.value()))),
        ]
    }
}

impl Config {
    /// All keys but those of the VMs.
    #[must_use]
    pub fn keys(&self) -> Vec<KeyValue> {
        let pool = &self.pool;
        let file = self.writeback.as_ref();
        vec![
            ("state_dir", text(self.state_dir.display())),
            ("runtime_dir", text(self.runtime_dir.display())),
            ("vms_file", text(self.vms_file.display())),
            ("socket_group", self.socket_group.as_ref().and_then(text)),
            ("control_group", self.control_group.as_ref().and_then(text)),
            ("workers", whole(self.workers as u128)),
            ("poll_us", whole(self.poll.as_micros())),
            ("sandbox", Some(Value::Boolean(self.sandbox))),
            ("lock_memory", Some(Value::Boolean(self.lock_memory))),
            ("metrics", self.metrics.as_ref().and_then(text)),
            ("scrub", self.scrub.map(|period| duration(Some(period)))),
            ("pool.max", Some(size(pool.max_bytes))),
            ("pool.compressor", text(pool.compressor)),
            (
                "pool.cold_compressor",
                Some(Value::String(pool.cold_compressor.map_or_else(none, |it| it.to_string()))),
            ),
            ("pool.cold_after", Some(duration(Some(pool.cold.after)))),
            ("pool.cold_cpu", Some(Value::String(format!("{}%", pool.cold.cpu_percent)))),
            ("pool.deduplicate", Some(Value::Boolean(pool.deduplicate))),
            ("pool.accept_threshold", number(pool.accept_threshold_percent)),
            ("pool.store_deadline_ms", whole(pool.store_deadline.as_millis())),
            ("pool.pressure", Some(Value::Boolean(pool.pressure))),
            ("writeback.path", file.and_then(|file| text(file.path.display()))),
            ("writeback.size", file.and_then(|file| file.size_bytes).map(size)),
            ("writeback.daily_limit", file.and_then(|file| file.daily_limit_bytes).map(size)),
            ("writeback.idle", file.and_then(|file| file.idle).map(|idle| duration(Some(idle)))),
            ("balloon.budget", self.balloon_budget_bytes.map(size)),
            ("balloon.interval", Some(duration(Some(self.balloon_interval)))),
        ]
    }
}
