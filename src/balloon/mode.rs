//! How far the controller may go with a VM.

use serde::{Deserialize, Serialize};

/// Who decides how much memory a guest has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Somebody else: the balloon isn't touched.
    #[default]
    Off,
    /// Somebody else; what the policy would do is worked out and shown.
    Observe,
    /// The policy.
    Auto,
    /// The operator: the guest has this many bytes, whatever it thinks of that.
    Fixed(u64),
}
