//! What can be wrong with a configuration. Every message names the key, what was given and what is allowed; the
//! commands end with exit status 2 on any of these.

use std::io;
use std::path::PathBuf;

use super::file::KEYS_WITHOUT_SECTION;
use super::nearest;
use super::remembered::EDITED;

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file isn't there or can't be read.
    #[error("the configuration {} can't be read{}", path.display(), next_step(.source))]
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
    #[error("{error}{}", meant(.error))]
    Syntax {
        /// What the parser says.
        error: Box<toml::de::Error>,
    },
    /// The keys of one VM are refused, wherever they came from.
    #[error("the VM {name:?}: {error}")]
    InVm {
        /// The VM.
        name: String,
        /// What is wrong with them. It is told with this, so it is no source.
        error: Box<ConfigError>,
    },
    /// The value of a key that has keys of its own, one of which doesn't exist.
    #[error("{key}: {error}")]
    InKey {
        /// The key, with the VM it belongs to.
        key: String,
        /// What is wrong in it. It is told with this, so it is no source.
        error: Box<ConfigError>,
    },
    /// What a daemon remembers is not as it wrote it.
    #[error(
        "{what}, so what was remembered there can't be trusted: bring the file back from a copy; or mend it by hand and \
         end it with the line \"{EDITED}\"; or remove it, and add its VMs again with `ballast vm add` (their pages are kept)"
    )]
    Damaged {
        /// How that shows.
        what: &'static str,
    },
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

impl ConfigError {
    pub(super) fn syntax(error: toml::de::Error) -> Self {
        Self::Syntax { error: Box::new(error) }
    }

    /// The error and what caused it, on one line.
    #[must_use]
    pub fn chain(&self) -> String {
        match self {
            Self::Read { source, .. } => format!("{self}: {source}"),
            Self::InFile { source, .. } => format!("{self}: {}", source.chain()),
            _ => self.to_string().trim_end().to_owned(),
        }
    }
}

/// What to do about a configuration that can't be read.
fn next_step(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound => {
            "; write one (an empty file says that everything is as usual), or name another with --config"
        }
        io::ErrorKind::PermissionDenied => "; run this as root or as the daemon's user",
        _ => "; it must be a text file: name another with --config",
    }
}

/// What was probably meant by a key that doesn't exist: another one, or the same in another place. TOML takes a line at the
/// file's end for one of its last section.
fn meant(error: &toml::de::Error) -> String {
    let unknown = nearest::unknown_key(error.message());
    if let Some(key) = unknown.filter(|key| KEYS_WITHOUT_SECTION.contains(key)) {
        return format!("`{key}` belongs to no section: move it above the first [section] of the file\n");
    }
    nearest::to_unknown_key(error.message()).map(|key| format!("did you mean `{key}`?\n")).unwrap_or_default()
}
