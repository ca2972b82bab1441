//! What a daemon was told while it ran and is to know after its next start, too: a TOML file of its own with the
//! configuration's names. A `[[vm]]` with a size is a VM that was added; one without changes a VM of the configuration.
//! The file is replaced whole, durably, before anything is done; its last line has a checksum, so that what was cut short
//! or damaged is never taken for less that was remembered. Who edits it by hand ends it with [`EDITED`] instead.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io;
use std::path::Path;

use serde::Deserialize;
use toml::{Table, Value};

use super::{ConfigError, VM_KEYS, vm};
use crate::private;
use crate::store::codec::Compressor;

/// The last line of a file that somebody has edited.
pub(super) const EDITED: &str = "# end: edited";
const END: &str = "# end: crc32c ";
const HEAD: &str = "# What `ballast vm add`, `vm set`, `vm remove` and `pool set` are remembered by. Written by the daemon, \
                    which reads it when it\n# starts; if you edit it, do so while none runs, and make the last line \"# end: edited\".\n";

/// What is remembered.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Remembered {
    /// What new pages are compressed with.
    pub compressor: Option<Compressor>,
    /// The keys of VMs, by their names; the name itself is not among them.
    pub vms: BTreeMap<String, Table>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    pool: Pool,
    #[serde(default, deserialize_with = "vm::sections")]
    vm: Vec<Table>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, expecting = "the section [pool] with its key: compressor")]
struct Pool {
    compressor: Option<String>,
}

impl Remembered {
    /// What the file at `path` says; a file that is not there says nothing. Whether the VMs' values are right is seen when
    /// they are laid over a configuration.
    ///
    /// # Errors
    /// When it can't be read, or is not what a daemon wrote.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(err) if err.kind() == io::ErrorKind::InvalidData => {
                let source = Box::new(ConfigError::Damaged { what: "it is no text" });
                return Err(ConfigError::InFile { path: path.to_owned(), source });
            }
            Err(source) => return Err(ConfigError::Read { path: path.to_owned(), source }),
        };
        Self::parse(&text)
            .map_err(|source| ConfigError::InFile { path: path.to_owned(), source: Box::new(source) })
    }

    /// What a file's text says.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        check_end(text)?;
        let file: File = toml::from_str(text).map_err(ConfigError::syntax)?;
        let compressor = file.pool.compressor.map(|text| {
            text.parse().map_err(|_| ConfigError::Value {
                key: "pool.compressor".to_owned(),
                given: format!("{text:?}"),
                allowed: "must be \"lz4\", \"zstd\" or \"zstd:LEVEL\" with a level from -7 to 22".to_owned(),
            })
        });
        let mut vms = BTreeMap::new();
        for (index, mut keys) in file.vm.into_iter().enumerate() {
            let Some(Value::String(name)) = keys.remove("name") else {
                let key = format!("[[vm]] number {}: name", index + 1);
                return Err(ConfigError::Missing { key, allowed: "must be the name of a VM".to_owned() });
            };
            if vms.insert(name.clone(), keys).is_some() {
                return Err(ConfigError::Value {
                    key: format!("[[vm]] number {}: name", index + 1),
                    given: format!("{name:?}"),
                    allowed: "must be unique, and an earlier [[vm]] has this name".to_owned(),
                });
            }
        }
        Ok(Self { compressor: compressor.transpose()?, vms })
    }

    /// Replaces the file at `path`; when this returns, the change outlives the process and the host.
    ///
    /// # Errors
    /// Those of making, writing and renaming files.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        private::replace(path, self.to_text().as_bytes())
    }

    /// The file's text.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut text = HEAD.to_owned();
        // Writing to a string can't fail.
        if let Some(compressor) = self.compressor {
            let _ = write!(text, "\n[pool]\ncompressor = \"{compressor}\"\n");
        }
        for (name, keys) in &self.vms {
            let _ = write!(text, "\n[[vm]]\nname = {}\n", Value::String(name.clone()));
            for key in VM_KEYS {
                if let Some(value) = keys.get(key) {
                    let _ = writeln!(text, "{key} = {value}");
                }
            }
        }
        let checksum = crc32c::crc32c(text.as_bytes());
        let _ = writeln!(text, "{END}{checksum:08x}");
        text
    }
}

fn check_end(text: &str) -> Result<(), ConfigError> {
    let damaged = |what| Err(ConfigError::Damaged { what });
    let last = text.trim_end().rsplit('\n').next().unwrap_or_default();
    if last.trim_end() == EDITED {
        return Ok(());
    }
    let Some(checksum) = last.strip_prefix(END).filter(|_| text.ends_with('\n')) else {
        return damaged("its last line is missing");
    };
    let before = &text[..text.len() - last.len() - 1];
    match u32::from_str_radix(checksum, 16) {
        Ok(checksum) if checksum == crc32c::crc32c(before.as_bytes()) => Ok(()),
        _ => damaged("it is not as the checksum in its last line says"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Remembered {
        let keys = |text: &str| text.parse::<Table>().unwrap();
        let vms = BTreeMap::from([
            ("web1".to_owned(), keys("weight = 7\nlimit = \"1GiB\"")),
            (
                "web2".to_owned(),
                keys(
                    "size = \"8GiB\"\nlabel = 'a\"b'\nwriteback = false\n\
                  squeeze = { vmm = \"vhost-user\", min = \"1GiB\" }",
                ),
            ),
        ]);
        Remembered { compressor: Some(Compressor::Zstd(3)), vms }
    }

    #[test]
    fn what_is_written_is_read_back() {
        for remembered in [Remembered::default(), example()] {
            assert_eq!(Remembered::parse(&remembered.to_text()).unwrap(), remembered);
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vms.toml");
        assert_eq!(Remembered::load(&path).unwrap(), Remembered::default());
        example().save(&path).unwrap();
        assert_eq!(Remembered::load(&path).unwrap(), example());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left");
    }

    #[test]
    fn a_file_that_was_cut_or_changed_anywhere_is_refused() {
        let text = example().to_text();
        for length in 0..text.len() {
            assert!(Remembered::parse(&text[..length]).is_err(), "{length} bytes of it");
        }
        for at in 0..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[at] ^= 1;
            let changed = String::from_utf8(bytes).unwrap();
            // The checksum's digits stand behind what it is about.
            assert!(Remembered::parse(&changed).is_err() || at >= text.len() - 9, "byte {at}");
        }
        let message = Remembered::parse(&text[..text.len() - 20]).unwrap_err().to_string();
        assert!(message.starts_with("its last line is missing, so") && message.contains(EDITED), "{message}");
    }

    #[test]
    fn who_edits_it_says_so() {
        let text = "[[vm]]\nname = \"a\"\nweight = 5\n# end: edited\n";
        assert_eq!(Remembered::parse(text).unwrap().vms["a"]["weight"].as_integer(), Some(5));
        for (text, part) in [
            ("[[vm]]\nweight = 5\n", "number 1: name is missing"),
            ("[[vm]]\nname = \"a\"\n[[vm]]\nname = \"a\"\n", "number 2: name = \"a\": must be unique"),
            ("[poll]\n", "did you mean `pool`?"),
            ("[pool]\ncompressor = \"gzip\"\n", "pool.compressor = \"gzip\": must be"),
        ] {
            let message = Remembered::parse(&format!("{text}{EDITED}\n")).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }
}
