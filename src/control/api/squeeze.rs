//! How a VM is squeezed, as it is asked for. The names are the configuration's, and so are the rules and what is said of
//! them: nothing is checked here.

use serde::{Deserialize, Serialize};
use toml::Value;
use utoipa::ToSchema;

use crate::balloon::Mode;
use crate::config;

/// How a VM's guest is made to give up memory that it doesn't use; what is left out has the default of the
/// configuration's `squeeze`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Squeeze {
    /// What its balloon is reached by: `qemu`, `cloud-hypervisor` or `vhost-user`; or `none` for not at all, with nothing
    /// else.
    pub vmm: String,
    /// The VMM's socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
    /// Who decides how much memory the guest has: `auto`, `observe`, `off` or `fixed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// What the guest has when that is `fixed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_bytes: Option<u64>,
    /// The least that it is left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_bytes: Option<u64>,
    /// The most that it is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<u64>,
    /// The share of its working set that may come back in a minute, such as `0.2%`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub promotion_rate: Option<String>,
}

/// Who decides from now on how much memory a guest has, however its balloon is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SqueezeMode {
    /// Somebody else.
    Off,
    /// Somebody else, and what the policy would do is shown.
    Observe,
    /// The policy.
    Auto,
    /// Whoever asks: it has so many bytes.
    Fixed(u64),
}

impl From<SqueezeMode> for Mode {
    fn from(mode: SqueezeMode) -> Self {
        match mode {
            SqueezeMode::Off => Self::Off,
            SqueezeMode::Observe => Self::Observe,
            SqueezeMode::Auto => Self::Auto,
            SqueezeMode::Fixed(bytes) => Self::Fixed(bytes),
        }
    }
}

impl Squeeze {
    /// The value that the configuration would have.
    #[must_use]
    pub fn value(&self) -> Value {
        let text = |text: &String| Value::String(text.clone());
        let keys = [
            ("socket", self.socket.as_ref().map(text)),
            ("mode", self.mode.as_ref().map(text)),
            ("to", self.to_bytes.map(config::size)),
            ("min", self.min_bytes.map(config::size)),
            ("max", self.max_bytes.map(config::size)),
            ("promotion_rate", self.promotion_rate.as_ref().map(text)),
        ];
        let others: Vec<_> =
            keys.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect();
        if self.vmm == config::NOT_SQUEEZED && others.is_empty() {
            return text(&self.vmm);
        }
        let all = [("vmm".to_owned(), text(&self.vmm))].into_iter().chain(others);
        Value::Table(all.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_value_is_what_the_configuration_would_have() {
        let none = Squeeze { vmm: "none".to_owned(), ..Squeeze::default() };
        assert_eq!(none.value(), Value::String("none".to_owned()));
        let json = r#"{"vmm":"qemu","socket":"/run/a.qmp","min_bytes":536870912}"#;
        let squeeze: Squeeze = serde_json::from_str(json).unwrap();
        let expected = "s = { vmm = \"qemu\", socket = \"/run/a.qmp\", min = \"512MiB\" }";
        assert_eq!(squeeze.value(), expected.parse::<toml::Table>().unwrap()["s"]);
        assert_eq!(serde_json::to_string(&squeeze).unwrap(), json);
    }
}
