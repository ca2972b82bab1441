//! Recovery: what the entries of a page table say, told to the arena. The entries are the only authority; the objects
//! themselves are not read here, each is verified when it is loaded. A table with anything wrong in it takes its VM
//! out of service and is left as it is, and what its sound entries name stays untouched too.

use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;

use super::VmSpec;
use super::accounting::{Held, object_bytes};
use super::arena::Arena;
use super::entry::{Entry, Location};
use super::table::{Table, TableError};

/// What became of a page table.
#[derive(Debug)]
pub enum Recovered {
    /// Every entry is sound.
    Whole {
        /// The table, ready for use.
        table: Box<Table>,
        /// What its entries hold.
        held: Held,
    },
    /// Something is wrong.
    Damaged {
        /// What, and what to do, in a sentence.
        reason: String,
        /// The objects of its sound entries.
        objects: Vec<Location>,
    },
}

/// Opens the page table at `path` and adopts the objects that it names.
///
/// # Errors
/// When the file can't be opened or mapped, which says nothing about what is in it.
pub fn recover(path: &Path, name: &str, spec: Option<&VmSpec>, arena: &Arena) -> io::Result<Recovered> {
    let advice =
        format!("power the VM off and run `ballast vm clear {name}` to start it afresh without its pages");
    let table = match Table::open(path, name) {
        Ok(table) => table,
        Err(TableError::Io(err)) => return Err(err),
        Err(err) => {
            let reason = format!("{}: {err}; {advice}", path.display());
            return Ok(Recovered::Damaged { reason, objects: Vec::new() });
        }
    };
    let mut held = Held::default();
    let mut objects = Vec::new();
    let mut first_damage = None;
    for slot in table.backed_slots() {
        let Some(record) = table.record(slot) else { continue };
        let entry = match Entry::unpack(record.entry.load(Ordering::Acquire), slot) {
            Ok(entry) => entry,
            Err(err) => {
                first_damage.get_or_insert_with(|| err.to_string());
                continue;
            }
        };
        if let Entry::Arena(location) = entry {
            if let Err(err) = arena.adopt(location.offset, object_bytes(location)) {
                first_damage.get_or_insert_with(|| format!("slot {slot}: {err}"));
                continue;
            }
            objects.push(location);
            held.add(entry, arena.charged_bytes(object_bytes(location)) as u64);
        } else {
            held.add(entry, 0);
        }
    }
    if let Some(damage) = first_damage {
        return Ok(Recovered::Damaged { reason: format!("{}: {damage}; {advice}", path.display()), objects });
    }
    Ok(match spec {
        Some(spec) if spec.slots != table.slots() => {
            let err = TableError::Size { found: table.slots(), wanted: spec.slots };
            let reason = format!("{err}: configure the size it has, or {advice}");
            Recovered::Damaged { reason, objects }
        }
        _ => Recovered::Whole { table: Box::new(table), held },
    })
}
