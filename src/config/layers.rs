//! Where a VM's keys come from: the configuration file, over it what the daemon remembers, over that what it was told for
//! as long as it runs, and below all of them the defaults. Each layer has just the keys that somebody gave; what holds is
//! found by laying them over each other, key by key, and checked then as a whole.

use std::collections::{BTreeMap, BTreeSet};

use toml::{Table, Value};

use super::vm::{check_number, check_reserves, parse_one};
use super::{Config, ConfigError, Remembered, VmConfig, file};
use crate::store::codec::Compressor;

/// All layers.
#[derive(Clone, Debug, PartialEq)]
pub struct Layers {
    /// The configuration file.
    pub file: Config,
    /// What is remembered.
    pub remembered: Remembered,
    /// What is not.
    pub runtime: Runtime,
}

/// What the daemon was told for as long as it runs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Runtime {
    /// What new pages are compressed with.
    pub compressor: Option<Compressor>,
    /// The keys of VMs, by their names; the name itself is not among them.
    pub vms: BTreeMap<String, Table>,
    /// VMs that were removed and come back.
    pub removed: BTreeSet<String>,
}

/// The layer that a value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Nobody gave it.
    Default,
    /// The configuration file.
    File,
    /// What is remembered.
    Remembered,
    /// What is not.
    Runtime,
}

impl Layers {
    /// The layers of a daemon that starts.
    ///
    /// # Errors
    /// When what is remembered can't be read, is damaged, or doesn't go with the configuration.
    pub fn load(file: Config) -> Result<Self, ConfigError> {
        let remembered = Remembered::load(&file.vms_file)?;
        let layers = Self { file, remembered, runtime: Runtime::default() };
        layers.effective_within_pool().map_err(|source| match source {
            source @ ConfigError::InFile { .. } => source,
            source => ConfigError::InFile { path: layers.file.vms_file.clone(), source: Box::new(source) },
        })?;
        Ok(layers)
    }

    /// What holds.
    ///
    /// # Errors
    /// When a VM's keys don't go together, or with other VMs', or a socket's path gets too long. That the pool has all reserves is not looked
    /// at.
    pub fn effective(&self) -> Result<Config, ConfigError> {
        let mut config = self.file.clone();
        let compressor = self.runtime.compressor.or(self.remembered.compressor);
        config.pool.compressor = compressor.unwrap_or(config.pool.compressor);
        let names = self.names();
        check_number(names.len())?;
        config.vms = names.into_iter().map(|name| self.vm(name)).collect::<Result<_, _>>()?;
        file::check_together(&config)?;
        Ok(config)
    }

    /// The same, and that the pool has what is reserved.
    ///
    /// # Errors
    /// Those of [`Self::effective`], and when the reserves are more than nine tenths of the pool.
    pub fn effective_within_pool(&self) -> Result<Config, ConfigError> {
        let config = self.effective()?;
        check_reserves(&config.vms, config.pool.max_bytes)?;
        Ok(config)
    }

    /// The VMs that there are to be: the file's in its order, then those that were added, remembered or not.
    fn names(&self) -> Vec<&str> {
        let file = self.file.vms.iter().map(|vm| vm.name.as_str());
        let added = [&self.remembered.vms, &self.runtime.vms].into_iter().flatten();
        let added = added.filter(|(_, keys)| keys.contains_key("size")).map(|(name, _)| name.as_str());
        let mut names: Vec<&str> = Vec::new();
        let mut seen = BTreeSet::new();
        for name in file.chain(added) {
            if seen.insert(name) && !self.runtime.removed.contains(name) {
                names.push(name);
            }
        }
        names
    }

    /// One VM, by all layers.
    fn vm(&self, name: &str) -> Result<VmConfig, ConfigError> {
        let mut keys = Table::from_iter([("name".to_owned(), Value::String(name.to_owned()))]);
        for layer in [self.in_file(name), self.remembered.vms.get(name), self.runtime.vms.get(name)] {
            keys.extend(layer.into_iter().flatten().map(|(key, value)| (key.clone(), value.clone())));
        }
        parse_one(&keys)
    }

    /// The VM's section in the configuration file.
    #[must_use]
    pub fn in_file(&self, name: &str) -> Option<&Table> {
        let is_it = |section: &&Table| section.get("name").and_then(Value::as_str) == Some(name);
        self.file.vm_sections.iter().find(is_it)
    }

    /// Where a VM's key has its value from.
    #[must_use]
    pub fn source(&self, name: &str, key: &str) -> Source {
        let layers = [
            (Source::Runtime, self.runtime.vms.get(name)),
            (Source::Remembered, self.remembered.vms.get(name)),
            (Source::File, self.in_file(name)),
        ];
        let given = |keys: Option<&Table>| keys.is_some_and(|keys| keys.contains_key(key));
        // Whoever added a VM named it.
        let names =
            |keys: Option<&Table>| key == "name" && keys.is_some_and(|keys| keys.contains_key("size"));
        let found = layers.into_iter().find(|(_, keys)| given(*keys) || names(*keys));
        found.map_or(Source::Default, |(source, _)| source)
    }

    /// Gives a VM keys, to be remembered or not. What is remembered takes the place of what was not.
    pub fn give(&mut self, name: &str, keys: Table, runtime: bool) {
        let layer = if runtime {
            &mut self.runtime.vms
        } else {
            if let Some(over) = self.runtime.vms.get_mut(name) {
                over.retain(|key, _| !keys.contains_key(key));
            }
            &mut self.remembered.vms
        };
        layer.entry(name.to_owned()).or_default().extend(keys);
        self.runtime.removed.remove(name);
        self.runtime.vms.retain(|_, keys| !keys.is_empty());
    }

    /// Forgets what was changed of a VM; one that was added stays, as it is remembered.
    pub fn forget_changes(&mut self, name: &str) {
        if self.in_file(name).is_some() {
            self.remembered.vms.remove(name);
        }
        let added =
            |layer: &BTreeMap<String, Table>| layer.get(name).is_some_and(|keys| keys.contains_key("size"));
        if self.in_file(name).is_some() || added(&self.remembered.vms) {
            self.runtime.vms.remove(name);
        }
    }

    /// Takes a VM out of all layers but the file; or, when that isn't to be remembered, until the next start.
    pub fn remove(&mut self, name: &str, runtime: bool) {
        self.runtime.vms.remove(name);
        if runtime {
            self.runtime.removed.insert(name.to_owned());
        } else {
            self.remembered.vms.remove(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layers() -> Layers {
        let text = "[pool]\nmax = \"1GiB\"\n[[vm]]\nname = \"web1\"\nsize = \"1GiB\"\nweight = 5\n";
        let file = Config::parse(text, 4 << 30).unwrap();
        Layers { file, remembered: Remembered::default(), runtime: Runtime::default() }
    }

    fn keys(text: &str) -> Table {
        text.parse().unwrap()
    }

    fn weights(layers: &Layers) -> Vec<(String, u32)> {
        layers.effective().unwrap().vms.into_iter().map(|vm| (vm.name, vm.weight)).collect()
    }

    #[test]
    fn the_upper_layer_wins_key_by_key() {
        let mut layers = layers();
        let sources = |layers: &Layers| ["size", "weight", "limit"].map(|key| layers.source("web1", key));
        assert_eq!(sources(&layers), [Source::File, Source::File, Source::Default]);
        layers.give("web1", keys("weight = 6"), false);
        layers.give("web1", keys("limit = \"2MiB\""), true);
        assert_eq!(sources(&layers), [Source::File, Source::Remembered, Source::Runtime]);
        assert_eq!(weights(&layers), [("web1".to_owned(), 6)]);
        layers.give("web1", keys("weight = 7"), true);
        assert_eq!(weights(&layers)[0].1, 7);
        layers.give("web1", keys("weight = 8"), false);
        assert_eq!((weights(&layers)[0].1, layers.source("web1", "weight")), (8, Source::Remembered));
        layers.forget_changes("web1");
        assert_eq!((weights(&layers)[0].1, layers.remembered.vms.len()), (5, 0));
    }

    #[test]
    fn vms_are_added_and_removed_for_good_or_for_now() {
        let mut layers = layers();
        layers.give("db", keys("size = \"1MiB\""), false);
        layers.give("tmp", keys("size = \"1MiB\""), true);
        let names = |layers: &Layers| weights(layers).into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(names(&layers), ["web1", "db", "tmp"]);
        assert_eq!(
            [layers.source("db", "name"), layers.source("tmp", "name")],
            [Source::Remembered, Source::Runtime]
        );
        layers.forget_changes("db");
        layers.remove("web1", true);
        assert_eq!(names(&layers), ["db", "tmp"], "what was added is not only changed");
        layers.runtime = Runtime::default();
        assert_eq!(names(&layers), ["web1", "db"]);
        layers.remove("db", false);
        assert_eq!(names(&layers), ["web1"]);
    }

    #[test]
    fn a_change_to_a_vm_that_is_in_no_file_any_more_waits_for_it() {
        let mut layers = layers();
        layers.give("web2", keys("weight = 6"), false);
        assert_eq!(weights(&layers), [("web1".to_owned(), 5)]);
    }

    #[test]
    fn what_does_not_go_together_is_refused_with_the_vms_name() {
        for (given, message) in [
            (
                "reserve = \"2GiB\"",
                "the VM \"web1\": reserve = \"2GiB\": must be a size from 0B to the VM's limit (1.01GiB)",
            ),
            ("wieght = 1", "the VM \"web1\": unknown field `wieght`"),
        ] {
            let mut layers = layers();
            layers.give("web1", keys(given), false);
            let error = layers.effective().unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
        let mut layers = layers();
        layers.give("web1", keys("reserve = \"1GiB\""), false);
        assert!(layers.effective().is_ok());
        assert!(layers.effective_within_pool().unwrap_err().to_string().contains("nine tenths"));
    }
}
