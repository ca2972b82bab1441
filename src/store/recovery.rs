//! Recovery: what the entries of a page table say, told to the arena. The entries are the only authority; the objects
//! themselves are not read here, each is verified when it is loaded. A table with anything wrong in it takes its VM
//! out of service and is left as it is, and what its sound entries name stays untouched too.

use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;

use super::VmSpec;
use super::accounting::{Held, Share, object_bytes};
use super::entry::{Entry, Location};
use super::lru::Age;
use super::pool::PoolId;
use super::room::Shared;
use super::table::{Table, TableError};
use crate::ids::Slot;
use crate::writeback::Place;

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
    /// The table does not say whose it is. What its entries name is found by [`salvage`], after all other tables were
    /// recovered: it may be a copy of one of them.
    NoHeader {
        /// What is wrong, and what to do, in a sentence.
        reason: String,
    },
    /// Something else is wrong.
    Damaged {
        /// What, and what to do, in a sentence.
        reason: String,
        /// What its sound entries name.
        named: Named,
    },
}

/// What the entries of a page table name.
#[derive(Debug, Default)]
pub struct Named {
    /// Objects in the arena.
    pub objects: Vec<Location>,
    /// Records in the writeback file.
    pub places: Vec<Place>,
}

/// Opens the page table at `path` and adopts what it names.
///
/// # Errors
/// When the file can't be opened or mapped, which says nothing about what is in it.
pub fn recover(path: &Path, name: &str, spec: Option<&VmSpec>, shared: &Shared) -> io::Result<Recovered> {
    let advice =
        format!("power the VM off and run `ballast vm clear {name}` to start it afresh without its pages");
    let table = match Table::open(path, name) {
        Ok(table) => table,
        Err(TableError::Io(err)) => return Err(err),
        Err(err) => {
            let reason = format!("{}: {err}; {advice}", path.display());
            return Ok(Recovered::NoHeader { reason });
        }
    };
    let mut held = Held::default();
    let mut named = Named::default();
    let mut first_damage = None;
    for slot in table.backed_slots() {
        let adopted = adopt(&table, slot, shared, &mut named);
        match adopted {
            Ok(share) => held.add(share),
            Err(damage) => {
                first_damage.get_or_insert(damage);
            }
        }
    }
    if let Some(damage) = first_damage {
        return Ok(Recovered::Damaged { reason: format!("{}: {damage}; {advice}", path.display()), named });
    }
    Ok(match spec {
        Some(spec) if spec.slots != table.slots() => {
            let err = TableError::Size { found: table.slots(), wanted: spec.slots };
            Recovered::Damaged { reason: format!("{err}: configure the size it has, or {advice}"), named }
        }
        _ => Recovered::Whole { table: Box::new(table), held },
    })
}

/// Finds what the sound entries of a table without a sound header name, so that it stays untouched until somebody mends
/// or clears the VM.
///
/// # Errors
/// When the file can't be opened or mapped.
pub fn salvage(path: &Path, shared: &Shared) -> io::Result<Named> {
    let table = Table::open_without_header(path)?;
    let mut named = Named::default();
    for slot in table.backed_slots() {
        // What is not sound, or belongs to another VM, is not this one's to keep.
        let _ = adopt(&table, slot, shared, &mut named);
    }
    Ok(named)
}

/// Tells arena and writeback file what the entry of `slot` names. What is wrong with it, if anything is.
fn adopt(table: &Table, slot: Slot, shared: &Shared, named: &mut Named) -> Result<Share, String> {
    let record = table.record(slot).ok_or_else(|| format!("slot {slot} is beyond the table"))?;
    let entry = Entry::unpack(record.entry.load(Ordering::Acquire), slot).map_err(|err| err.to_string())?;
    let age = Age::from_bits(record.age.load(Ordering::Relaxed));
    let mut share = Share { entry, charged_bytes: 0, pool: PoolId::EARLIER, loaded: age.is_loaded() };
    match entry {
        Entry::Arena(location) => {
            let bytes = object_bytes(location);
            shared.arena.adopt(location.offset, bytes).map_err(|err| format!("slot {slot}: {err}"))?;
            named.objects.push(location);
            share.charged_bytes = shared.arena.charged_bytes(bytes) as u64;
        }
        Entry::File(place) => {
            if let Some(file) = &shared.file {
                file.adopt(place).map_err(|err| format!("slot {slot}: {err}"))?;
            }
            named.places.push(place);
        }
        Entry::Empty | Entry::SameFilled(_) | Entry::Lost => {}
    }
    Ok(share)
}
