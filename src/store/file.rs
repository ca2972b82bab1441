//! The writeback file at start. A state whose pages are in one that is not to be had is served all the same: those
//! pages' loads fail, their entries stay as they are, and a start with the right file has them all back. The state
//! goes on naming that file for as long as an entry refers to it, so no other takes its place before.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::entry::Entry;
use super::state::{StateDir, StateError};
use super::table::Table;
use crate::writeback::{OpenError, Writeback, forget_file, known_file};

/// The file, or why there is none although there should be one.
pub(super) type Opened = (Option<Arc<Writeback>>, Option<OpenError>);

/// Opens the file, or finds out what to do without. `open_file` is called again when the state named a file that it
/// needs no more.
///
/// # Errors
/// When somebody has to mend something before a daemon may start.
pub(super) fn open(
    dir: &StateDir,
    mut open_file: impl FnMut() -> Result<Option<Writeback>, OpenError>,
) -> Result<Opened, StateError> {
    let state_path = dir.writeback_state_path();
    let failed = match open_file() {
        Ok(Some(file)) => return Ok((Some(Arc::new(file)), None)),
        Ok(None) => match known_file(&state_path).map_err(OpenError::from)? {
            Some(expected) => OpenError::NotConfigured { expected },
            None => return Ok((None, None)),
        },
        Err(err) if err.refuses_start() => return Err(err.into()),
        Err(err) => err,
    };
    if !failed.is_about_known_file() || entries_name_places(dir)? {
        return Ok((None, Some(failed)));
    }
    forget_file(&state_path).map_err(OpenError::from)?;
    match open_file() {
        Err(err) if err.refuses_start() => Err(err.into()),
        Err(err) => Ok((None, Some(err))),
        Ok(file) => Ok((file.map(Arc::new), None)),
    }
}

/// Whether any sound entry of any table names a record, whatever else is wrong with the table.
fn entries_name_places(dir: &StateDir) -> Result<bool, StateError> {
    for name in dir.vm_names()? {
        let path = dir.table_path(&name);
        let table = Table::open_without_header(&path).map_err(StateError::io("open", &path))?;
        let names_one = table.backed_slots().any(|slot| {
            let entry = table.record(slot).map(|record| record.entry.load(Ordering::Acquire));
            matches!(entry.map(|entry| Entry::unpack(entry, slot)), Some(Ok(Entry::File(_))))
        });
        if names_one {
            return Ok(true);
        }
    }
    Ok(false)
}
