//! Recovery: what the entries of a page table say, told to the arena. The entries are the only authority; the objects
//! themselves are not read here, each is verified when it is loaded. A few entries that fail their check are lost pages:
//! bits flip one at a time. A table with anything else wrong in it takes its VM out of service and is left as it is, and
//! what its sound entries name stays untouched too.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::VmSpec;
use super::accounting::{Held, Share, object_bytes};
use super::arena;
use super::entry::{BadEntry, Entry, Location};
use super::lru::Age;
use super::pool::PoolId;
use super::room::Shared;
use super::sharing::{Contradiction, Sharing};
use super::table::{Table, TableError};
use super::vm::Tag;
use super::walk::Walk;
use crate::ids::Slot;
use crate::writeback::{self, Place};

/// More entries than this that fail their check are not a few flipped bits: somebody wrote over the table.
const LOST_ENTRIES_MAX: usize = 16;
/// Slots between two looks at the clock, and how often the log is told how far a table is.
const SLOTS_PER_LOOK: u64 = 1 << 16;
const TOLD_EVERY: Duration = Duration::from_secs(2);

/// What became of a page table.
#[derive(Debug)]
pub enum Recovered {
    /// Every entry is sound.
    Whole {
        /// The table, ready for use.
        table: Box<Table>,
        /// What its entries hold.
        held: Held,
        /// Which slots share objects.
        sharing: Sharing,
    },
    /// The table does not say whose it is, or can't be read everywhere. What its entries name is found by [`salvage`],
    /// after all other tables were recovered: it may be a copy of one of them.
    Unusable {
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
    /// Objects in the arena, each once.
    pub objects: Vec<Location>,
    /// Records in the writeback file.
    pub places: Vec<Place>,
}

impl Named {
    /// What the sound entries before `end` name, all of which were adopted.
    fn before(table: &Table, end: Slot) -> Self {
        let (mut named, mut shared) = (Self::default(), BTreeSet::new());
        for slot in table.backed_slots().take_while(|slot| *slot < end) {
            let entry = table.record(slot).map(|record| record.entry.load(Ordering::Acquire));
            match entry.map(|entry| Entry::unpack(entry, slot)) {
                Some(Ok(Entry::Arena(location))) => named.objects.push(location),
                Some(Ok(Entry::Shared(location))) if shared.insert(location.offset) => {
                    named.objects.push(location)
                }
                Some(Ok(Entry::File(place))) => named.places.push(place),
                _ => {}
            }
        }
        named
    }
}

/// Opens the page table at `path` and adopts what it names.
///
/// # Errors
/// When the file can't be opened or mapped, which says nothing about what is in it.
pub fn recover(
    path: &Path,
    name: &str,
    spec: Option<&VmSpec>,
    shared: &Shared,
    walk: &mut Walk<'_>,
) -> io::Result<Recovered> {
    let advice =
        format!("power the VM off and run `ballast vm clear {name}` to start it afresh without its pages");
    let table = match Table::open(path, name) {
        Ok(table) => table,
        Err(TableError::Io(err)) => return Err(err),
        Err(err) => {
            let reason = format!("{}: {err}; {advice}", path.display());
            return Ok(Recovered::Unusable { reason });
        }
    };
    let mut held = Held::default();
    let mut adoption = Adoption::default();
    let (mut first_damage, mut lost) = (None, Vec::new());
    let mut told = Instant::now();
    for (slots, slot) in (0u64..).zip(table.backed_slots()) {
        if slots.is_multiple_of(SLOTS_PER_LOOK) {
            walk.look(slot, table.slots());
            if told.elapsed() >= TOLD_EVERY {
                tracing::info!(vm = name, slots, of = table.slots(), "the VM's page table is being read");
                told = Instant::now();
            }
        }
        match adoption.adopt(&table, slot, shared) {
            Ok(share) => held.add(share),
            Err(Damage::Entry(bad)) if lost.len() < LOST_ENTRIES_MAX => lost.push((slot, bad)),
            Err(damage) => {
                first_damage.get_or_insert(damage);
                adoption.named.get_or_insert_with(|| Named::before(&table, slot));
            }
        }
    }
    let Adoption { named, sharing } = adoption;
    if let Some(damage) = first_damage {
        let named = named.unwrap_or_default();
        return Ok(Recovered::Damaged { reason: format!("{}: {damage}; {advice}", path.display()), named });
    }
    Ok(match spec {
        Some(spec) if spec.slots != table.slots() => {
            let err = TableError::Size { found: table.slots(), wanted: spec.slots };
            let named = Named::before(&table, Slot(table.slots()));
            Recovered::Damaged { reason: format!("{err}: configure the size it has, or {advice}"), named }
        }
        _ => {
            for (slot, bad) in lost {
                tracing::error!(vm = name, "{bad}: its page is lost");
                held.add(give_up(&table, slot));
            }
            Recovered::Whole { table: Box::new(table), held, sharing }
        }
    })
}

/// Makes the page of a damaged entry a lost one. What it named is free from here on, as nothing else names it.
fn give_up(table: &Table, slot: Slot) -> Share {
    if let Some(record) = table.record(slot) {
        record.entry.store(Entry::Lost.pack(slot), Ordering::Release);
    }
    Share { entry: Entry::Lost, ..Share::NONE }
}

/// Finds what the sound entries of a table name that has no sound header, or parts that can't be read, so that it stays
/// untouched until somebody mends or clears the VM.
///
/// # Errors
/// When the file can't be opened or mapped.
pub fn salvage(path: &Path, shared: &Shared) -> io::Result<Named> {
    let table = Table::open_without_header(path)?;
    let mut adoption = Adoption { named: Some(Named::default()), ..Adoption::default() };
    for slot in table.backed_slots() {
        // What is not sound, or belongs to another VM, is not this one's to keep.
        let _ = adoption.adopt(&table, slot, shared);
    }
    Ok(adoption.named.unwrap_or_default())
}

/// What is wrong with an entry.
#[derive(Debug, thiserror::Error)]
enum Damage {
    /// It fails its check.
    #[error(transparent)]
    Entry(#[from] BadEntry),
    /// It names a place that can't be, or is another's.
    #[error("slot {slot}: {source}")]
    Object { slot: Slot, source: arena::AdoptError },
    /// It names a shared object that can't be the one that an entry before it named.
    #[error("slot {slot}: {source}")]
    Sharer { slot: Slot, source: Contradiction },
    /// The same as of objects, in the writeback file.
    #[error("slot {slot}: {source}")]
    Record { slot: Slot, source: writeback::AdoptError },
}

/// What was told to arena and writeback file of one table.
#[derive(Debug, Default)]
struct Adoption {
    /// Kept of a VM that stays out of service: of a sound one it would be as much again as its table.
    named: Option<Named>,
    sharing: Sharing,
}

impl Adoption {
    /// Tells arena and writeback file what the entry of `slot` names, which is in a backed chunk.
    fn adopt(&mut self, table: &Table, slot: Slot, shared: &Shared) -> Result<Share, Damage> {
        let Some(record) = table.record(slot) else { return Ok(Share::NONE) };
        let entry = Entry::unpack(record.entry.load(Ordering::Acquire), slot)?;
        let age = Age::from_bits(record.age.load(Ordering::Relaxed));
        let mut share = Share { entry, loaded: age.is_loaded(), ..Share::NONE };
        match entry {
            Entry::Arena(location) | Entry::Shared(location) => {
                let bytes = object_bytes(location);
                share.others = self.is_known(entry).map_err(|source| Damage::Sharer { slot, source })?;
                if !share.others {
                    let adopted = shared.arena.adopt(location.offset, bytes);
                    adopted.map_err(|source| Damage::Object { slot, source })?;
                    if let Some(named) = &mut self.named {
                        named.objects.push(location);
                    }
                }
                if matches!(entry, Entry::Shared(_)) {
                    self.sharing.join(location, slot, PoolId::EARLIER);
                }
                if share.loaded {
                    Tag::of(record.tag).loaded().keep_in(record.tag);
                }
                share.charged_bytes = shared.arena.charged_bytes(bytes) as u64;
            }
            Entry::File(place) => {
                if let Some(file) = &shared.file {
                    file.adopt(place).map_err(|source| Damage::Record { slot, source })?;
                }
                if let Some(named) = &mut self.named {
                    named.places.push(place);
                }
            }
            Entry::Empty | Entry::SameFilled(_) | Entry::Lost => {}
        }
        Ok(share)
    }

    /// Whether an entry before this one named the same shared object.
    fn is_known(&self, entry: Entry) -> Result<bool, Contradiction> {
        match entry {
            Entry::Shared(location) => self.sharing.knows(location),
            _ => Ok(false),
        }
    }
}
