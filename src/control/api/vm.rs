//! VMs that come and go while the daemon runs: what is said to add one, what removing one comes to, and what is shown of
//! one, each value with where it comes from.

use serde::{Deserialize, Serialize};
use toml::{Table, Value};
use utoipa::{IntoParams, ToSchema};

use super::{MigrationName, SettingValue, Squeeze, VmStatus};
use crate::config::{self, ConfigError, VmConfig};

/// `PUT /api/v1/vms/NAME`: a VM that is to be added. What is left out has the default of the configuration's `[[vm]]`. The
/// answer is the VM's [`VmDetails`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewVm {
    /// The disk that the guest sees; a multiple of 4096, and more than a mebibyte.
    pub size_bytes: u64,
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
    /// Virtqueues of its device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// Where its guest may move to while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationName>,
    /// What the guest's fstab calls the disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// The disk's UUID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// How long after a VMM was connected last its pages are dropped; 0 for never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clear_after_seconds: Option<u64>,
    /// How its guest is made to give up memory; not at all when it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub squeeze: Option<Squeeze>,
    /// Whether it is forgotten when the daemon starts again. Its pages are kept then, and the VM is unconfigured.
    #[serde(default)]
    pub runtime: bool,
}

impl NewVm {
    /// The keys that a configuration would have for it.
    #[must_use]
    pub fn keys(&self) -> Table {
        let size = |bytes: u64| config::size(bytes);
        let text = |text: &String| Value::String(text.clone());
        let keys = [
            ("size", Some(size(self.size_bytes))),
            ("limit", self.limit_bytes.map(size)),
            ("reserve", self.reserve_bytes.map(size)),
            ("weight", self.weight.map(|weight| Value::Integer(weight.into()))),
            ("writeback", self.writeback.map(Value::Boolean)),
            ("queues", self.queues.map(|queues| Value::Integer(queues.into()))),
            (
                "migration",
                self.migration.map(|name| Value::String(config::migration(name.into()).to_owned())),
            ),
            ("label", self.label.as_ref().map(text)),
            ("uuid", self.uuid.as_ref().map(text)),
            ("clear_after", self.clear_after_seconds.map(super::change::clear_after)),
            ("squeeze", self.squeeze.as_ref().map(Squeeze::value)),
        ];
        keys.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect()
    }
}

/// How `DELETE /api/v1/vms/NAME` is meant. The answer is a [`VmRemoved`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Removal {
    /// Also a VM that is connected, whose VMM is hung up on, or that holds pages, which are dropped.
    #[serde(default)]
    pub force: bool,
    /// Only until the daemon starts again.
    #[serde(default)]
    pub runtime: bool,
}

/// How `POST /api/v1/vms/NAME/clear` is meant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Clearing {
    /// Also a VM that is connected: its VMM is hung up on.
    #[serde(default)]
    pub force: bool,
}

/// A VM that was removed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct VmRemoved {
    /// Its name.
    pub removed: String,
    /// Pages that were dropped, its swap header not included.
    pub dropped_pages: u64,
    /// Whether it comes back when the daemon starts again, empty.
    pub returns: bool,
}

/// `GET /api/v1/vms`: all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct VmList {
    /// Those that are served in the configuration's order, then those that only the state directory knows.
    pub vms: Vec<VmStatus>,
}

/// `GET /api/v1/vms/NAME`: all that is known of one VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct VmDetails {
    /// The VM as it is now.
    pub status: VmStatus,
    /// The socket that its VMM connects to; null when it is not served.
    pub socket: Option<String>,
    /// Seconds since a VMM was connected last, or since the daemon first looked for one, to a minute; null while one is
    /// connected, and where it isn't known.
    pub disconnected_seconds: Option<u64>,
    /// Its keys in the configuration's order, whoever gave them; none when it is not served.
    pub settings: Vec<Setting>,
}

impl VmDetails {
    /// The VM as a configuration would have it.
    ///
    /// # Errors
    /// When the daemon is another version, whose keys these are not.
    pub fn config(&self) -> Result<VmConfig, ConfigError> {
        let given = self.settings.iter().map(|setting| (setting.key.clone(), setting.value.value()));
        let name = ("name".to_owned(), Value::String(self.status.name.clone()));
        config::parse_vm(&given.chain([name]).collect())
    }
}

/// A key of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Setting {
    /// Its name in the configuration's `[[vm]]`.
    pub key: String,
    /// Its value as the configuration would have it.
    pub value: SettingValue,
    /// Where that comes from.
    pub source: SettingSource,
}

/// Where a value comes from. What stands further down here lies over what stands above.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum SettingSource {
    /// Nobody gave it.
    Default,
    /// The configuration file.
    File,
    /// It was set while the daemon ran, and is remembered.
    Remembered,
    /// It was set for as long as the daemon runs.
    Runtime,
}

impl SettingSource {
    /// The word that `vm show` has for it; the same as in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::File => "file",
            Self::Remembered => "remembered",
            Self::Runtime => "runtime",
        }
    }
}

impl From<config::Source> for SettingSource {
    fn from(source: config::Source) -> Self {
        match source {
            config::Source::Default => Self::Default,
            config::Source::File => Self::File,
            config::Source::Remembered => Self::Remembered,
            config::Source::Runtime => Self::Runtime,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_vm_has_the_keys_that_were_given_and_no_others() {
        let vm = NewVm {
            size_bytes: 8 << 30,
            writeback: Some(false),
            clear_after_seconds: Some(0),
            ..NewVm::default()
        };
        let expected = "size = \"8GiB\"\nwriteback = false\nclear_after = \"never\"";
        assert_eq!(vm.keys(), expected.parse::<Table>().unwrap());
        let vm = NewVm { migration: Some(MigrationName::SameHost), queues: Some(2), ..vm };
        assert_eq!(vm.keys()["migration"].as_str(), Some("same-host"));
        assert_eq!(serde_json::to_value(&vm).unwrap()["migration"], "same-host");
    }
}
