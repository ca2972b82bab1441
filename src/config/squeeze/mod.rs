//! How a VM is squeezed: the `squeeze` of a `[[vm]]`, and the `[balloon]` section, which is about all of them. `squeeze` is one
//! value: whoever gives another one while the daemon runs gives all of it. What goes on between VMs (sockets, the
//! budget) is looked at when all of them are known.

mod parse;
mod promotion_rate;
#[cfg(test)]
mod tests;
mod together;

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use toml::Value;

pub(super) use self::parse::parse;
pub(super) use self::together::{Balloon, budget, check, interval};
use super::keys;
use crate::balloon::Mode;

/// How the configuration says that a VM isn't squeezed.
pub const NONE: &str = "none";

/// With less a Linux does nothing but swap; with more than the end no host has ever booted a guest.
const MEMORY_BYTES: RangeInclusive<u64> = 64 << 20..=16 << 40;

/// How a VM is squeezed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SqueezeConfig {
    /// What its balloon is reached by.
    pub vmm: SqueezeVmm,
    /// Who decides how much memory its guest has.
    pub mode: Mode,
    /// The least that the policy leaves it, in bytes; there for [`Mode::Auto`] and [`Mode::Observe`].
    pub min_bytes: Option<u64>,
    /// The most that the policy gives it, in bytes; `None` for what it was booted with.
    pub max_bytes: Option<u64>,
    /// The share of its working set that may come back from the pool or the file in a minute before it is squeezed less,
    /// in millionths, 100 to 100000.
    pub promotion_rate_ppm: u32,
}

/// What a VM's balloon is reached by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SqueezeVmm {
    /// QEMU, by a QMP monitor at this socket that nobody else uses.
    Qemu(PathBuf),
    /// cloud-hypervisor, by its API at this socket.
    CloudHypervisor(PathBuf),
    /// Whichever VMM attaches our own balloon device.
    VhostUser,
}

impl SqueezeVmm {
    /// The configuration's word for it.
    #[must_use]
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Qemu(_) => "qemu",
            Self::CloudHypervisor(_) => "cloud-hypervisor",
            Self::VhostUser => "vhost-user",
        }
    }

    /// The VMM's socket, if the daemon is the one that connects.
    #[must_use]
    pub fn socket(&self) -> Option<&Path> {
        match self {
            Self::Qemu(socket) | Self::CloudHypervisor(socket) => Some(socket),
            Self::VhostUser => None,
        }
    }
}

impl SqueezeConfig {
    /// The value as the configuration would have it.
    #[must_use]
    pub fn value(&self) -> Value {
        let text = |text: &str| Some(Value::String(text.to_owned()));
        let (mode, to) = match self.mode {
            Mode::Off => ("off", None),
            Mode::Observe => ("observe", None),
            Mode::Auto => ("auto", None),
            Mode::Fixed(bytes) => ("fixed", Some(keys::size(bytes))),
        };
        let keys = [
            ("vmm", text(self.vmm.as_str())),
            ("socket", self.vmm.socket().and_then(|socket| text(&socket.display().to_string()))),
            ("mode", text(mode)),
            ("to", to),
            ("min", self.min_bytes.map(keys::size)),
            ("max", self.max_bytes.map(keys::size)),
            ("promotion_rate", text(&promotion_rate::to_text(self.promotion_rate_ppm))),
        ];
        let given = keys.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?)));
        Value::Table(given.collect())
    }

    /// The least that its guest has to be left, in bytes; nothing where nobody takes anything.
    fn needed_bytes(&self) -> u64 {
        match self.mode {
            Mode::Off | Mode::Observe => 0,
            Mode::Auto => self.min_bytes.unwrap_or(0),
            Mode::Fixed(bytes) => bytes,
        }
    }
}
