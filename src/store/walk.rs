//! How far a start is with the page tables, as a whole: the tables weigh what their files are long, holes and all, because
//! that is known before any of them is opened. A number and whom to tell it; knows no table.

use std::path::PathBuf;

use super::state::StateError;
use super::{Store, StoreConfig, VmSpec};
use crate::ids::Slot;
use crate::writeback::{OpenError, Writeback};

impl Store {
    /// Opens the state directory for somebody who is not told how far that is.
    ///
    /// # Errors
    /// Those of [`Self::open_telling`].
    pub fn open(
        config: StoreConfig,
        specs: Vec<VmSpec>,
        open_file: impl FnMut() -> Result<Option<Writeback>, OpenError>,
    ) -> Result<Self, StateError> {
        Self::open_telling(config, specs, open_file, &mut |_| ())
    }
}

/// The tables of a start, one after the other.
pub struct Walk<'a> {
    table_bytes: Vec<u64>,
    /// The table at hand.
    at: usize,
    /// What was told last, in hundredths.
    told: Option<u64>,
    tell: &'a mut dyn FnMut(u64),
}

impl<'a> Walk<'a> {
    /// Over the tables at these paths; `tell` hears hundredths, each number once.
    pub fn over(tables: impl Iterator<Item = PathBuf>, tell: &'a mut dyn FnMut(u64)) -> Self {
        let bytes = |path: PathBuf| path.metadata().map_or(0, |metadata| metadata.len());
        Self { table_bytes: tables.map(bytes).collect(), at: 0, told: None, tell }
    }

    /// This slot of so many of the table at hand is looked at.
    pub fn look(&mut self, slot: Slot, slots: u32) {
        let table_bytes = self.table_bytes.get(self.at).copied().unwrap_or(0);
        self.tell(u128::from(table_bytes) * u128::from(slot.0) / u128::from(slots.max(1)));
    }

    /// The table at hand was read.
    pub fn end_table(&mut self) {
        self.at += 1;
        self.tell(0);
    }

    fn tell(&mut self, bytes_of_this: u128) {
        let sum = |tables: &[u64]| tables.iter().copied().map(u128::from).sum::<u128>();
        let before = sum(self.table_bytes.get(..self.at).unwrap_or(&self.table_bytes));
        let percent = (before + bytes_of_this) * 100 / sum(&self.table_bytes).max(1);
        let percent = u64::try_from(percent).unwrap_or(100).min(100);
        if self.told.replace(percent) != Some(percent) {
            (self.tell)(percent);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_weigh_what_their_files_are_long() {
        let dir = tempfile::tempdir().unwrap();
        let paths = [("a", 3000), ("b", 0), ("c", 1000)].map(|(name, bytes)| {
            let path = dir.path().join(name);
            std::fs::write(&path, vec![0; bytes]).unwrap();
            path
        });
        let mut told = Vec::new();
        let mut tell = |percent| told.push(percent);
        let mut walk = Walk::over(paths.into_iter(), &mut tell);
        for slot in [0, 50, 50, 99] {
            walk.look(Slot(slot), 100);
        }
        for _ in 0..3 {
            walk.end_table();
        }
        walk.look(Slot(7), 100);
        assert_eq!(told, [0, 37, 74, 75, 100]);
    }
}
