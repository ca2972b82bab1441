//! What can be wrong with a configuration. Every message names the key, what was given and what is allowed; the
//! commands end with exit status 2 on any of these.

use std::io;
use std::path::PathBuf;

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file isn't there or can't be read.
    #[error("the configuration {} can't be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file was read and is refused.
    #[error("the configuration {} is refused", path.display())]
    InFile {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        source: Box<ConfigError>,
    },
    /// Not TOML, or a key that doesn't exist; the message shows the line.
    #[error("{0}")]
    Syntax(Box<toml::de::Error>),
    /// A value that isn't allowed.
    #[error("{key} = {given}: {allowed}")]
    Value {
        /// The key, with the VM it belongs to.
        key: String,
        /// The value as TOML.
        given: String,
        /// What would have been right.
        allowed: String,
    },
    /// A key that must be there isn't.
    #[error("{key} is missing: {allowed}")]
    Missing {
        /// The key, with the VM it belongs to.
        key: String,
        /// What would be right.
        allowed: String,
    },
}
