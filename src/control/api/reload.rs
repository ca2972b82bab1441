//! What reading the configuration again comes to: each key that is another now, and what became of it.

use serde::{Deserialize, Serialize};
use toml::Value;
use utoipa::{IntoParams, ToSchema};

use crate::config::Migration;

/// How `POST /api/v1/reload` is meant. The answer is a [`ReloadReport`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Reloading {
    /// Only to see what would change.
    #[serde(default)]
    pub check: bool,
}

/// What differs between the configuration and what the daemon goes by.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct ReloadReport {
    /// The file that was read.
    pub path: String,
    /// Whether nothing was changed, because it was only asked what would be.
    pub check: bool,
    /// Each key that is another.
    pub changes: Vec<Change>,
}

/// A key that is another now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Change {
    /// Which: `pool.max`, or `vm.NAME.limit`; `vm.NAME` for a VM as a whole.
    pub key: String,
    /// What the daemon went by; null for what was not there.
    pub old: Option<SettingValue>,
    /// What the configuration says; null for what is not there any more.
    pub new: Option<SettingValue>,
    /// What becomes of it.
    pub outcome: ChangeOutcome,
    /// Why that, where it isn't plain; null otherwise.
    pub why: Option<String>,
}

/// What becomes of a change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ChangeOutcome {
    /// It holds from now on.
    #[default]
    Now,
    /// It holds when the daemon starts again.
    Restart,
    /// It is left as it was, until somebody does what is said.
    Kept,
    /// It went wrong.
    Failed,
}

impl ChangeOutcome {
    /// The words that `reload` has for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Now => "now",
            Self::Restart => "needs a restart",
            Self::Kept => "kept",
            Self::Failed => "failed",
        }
    }
}

/// A value as the configuration would have it: sizes and durations with their units.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum SettingValue {
    /// True or false.
    Flag(bool),
    /// A number.
    Number(i64),
    /// A text.
    Text(String),
}

impl SettingValue {
    /// As the configuration has it. What is neither a flag nor a number nor a text there is a table, and shown as its text.
    pub(super) fn value(&self) -> Value {
        match self {
            Self::Flag(flag) => Value::Boolean(*flag),
            Self::Number(number) => Value::Integer(*number),
            Self::Text(text) if text.starts_with('{') => {
                let table = format!("value = {text}").parse::<toml::Table>();
                table.ok().and_then(|mut table| table.remove("value")).unwrap_or(Value::String(text.clone()))
            }
            Self::Text(text) => Value::String(text.clone()),
        }
    }
}

impl std::fmt::Display for SettingValue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Flag(flag) => flag.fmt(f),
            Self::Number(number) => number.fmt(f),
            Self::Text(text) => f.pad(text),
        }
    }
}

impl From<Value> for SettingValue {
    fn from(value: Value) -> Self {
        match value {
            Value::Boolean(flag) => Self::Flag(flag),
            Value::Integer(number) => Self::Number(number),
            Value::String(text) => Self::Text(text),
            other => Self::Text(other.to_string()),
        }
    }
}

/// Where a running guest may move to, by the configuration's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationName {
    /// Nowhere.
    None,
    /// To another VMM on this host.
    SameHost,
}

impl From<MigrationName> for Migration {
    fn from(name: MigrationName) -> Self {
        match name {
            MigrationName::None => Self::None,
            MigrationName::SameHost => Self::SameHost,
        }
    }
}
