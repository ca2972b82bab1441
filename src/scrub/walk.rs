//! A walk over the pages of some VMs, a few at a time. Knows VMs by name and looks each up anew, so that one that is
//! cleared meanwhile is gone at once.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use super::progress::{BAD_SHOWN_MAX, BadPage};
use crate::ids::Slot;
use crate::page::ZERO_PAGE;
use crate::store::Store;
use crate::store::codec::Scratch;
use crate::store::vm::{Checked, InFile, LoadError, VmStore};

/// Slots of one step, empty ones included.
const STEP_SLOTS_MAX: u32 = 4096;
/// Records that are asked for at once: those that guests wait for come in between.
const FETCH_PAGES_MAX: usize = 8;
/// How often somebody who waits for the file looks whether he is to stop.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Where the walk is.
#[derive(Debug)]
pub(super) struct Walk {
    names: VecDeque<String>,
    next: Slot,
}

/// What a step looked at.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub same_filled_pages: u32,
    pub arena_pages: u32,
    pub file_pages: u32,
    pub bad_pages: u32,
    /// Pages in a file that is missing, which are not looked at.
    pub missing_pages: u32,
    pub bad: Vec<BadPage>,
    /// Whether the walk has come to its end.
    pub ended: bool,
}

impl Seen {
    /// Pages that were looked at.
    pub fn pages(&self) -> u32 {
        self.same_filled_pages + self.arena_pages + self.file_pages + self.bad_pages
    }
}

impl Walk {
    /// A walk over the VMs of these names.
    pub fn over(names: impl IntoIterator<Item = String>) -> Self {
        Self { names: names.into_iter().collect(), next: Slot(0) }
    }

    /// Looks at the next pages, `pages_max` at most. `None` when `stopped` said so while the file took its time; the same
    /// pages are then looked at again.
    pub fn step(
        &mut self,
        store: &Store,
        pages_max: u32,
        scratch: &mut Scratch,
        stopped: impl Fn() -> bool,
    ) -> Option<Seen> {
        let mut seen = Seen::default();
        if let Some(name) = self.names.front() {
            let next = match store.usable(name) {
                Some(vm) => {
                    let mut look = Look { name, vm: &vm, scratch, seen, in_file: Vec::new() };
                    let next = look.at_slots(self.next, pages_max);
                    look.at_records(stopped)?;
                    seen = look.seen;
                    vm.count(|events| events.checked_pages += u64::from(seen.pages()));
                    next
                }
                None => None,
            };
            if next.is_none() {
                self.names.pop_front();
            }
            self.next = next.unwrap_or(Slot(0));
        }
        seen.ended = self.names.is_empty();
        Some(seen)
    }
}

/// A look at some pages of one VM.
struct Look<'a> {
    name: &'a str,
    vm: &'a Arc<VmStore>,
    scratch: &'a mut Scratch,
    seen: Seen,
    in_file: Vec<InFile>,
}

impl Look<'_> {
    /// Looks at slots from `next` on. The slot to go on with; `None` when there are no more.
    fn at_slots(&mut self, mut next: Slot, pages_max: u32) -> Option<Slot> {
        // What is in them is nobody's business here.
        let mut page = ZERO_PAGE;
        for _ in 0..STEP_SLOTS_MAX {
            let in_file = u32::try_from(self.in_file.len()).unwrap_or(u32::MAX);
            if self.seen.pages().saturating_add(in_file) >= pages_max {
                break;
            }
            let slot = self.vm.table().next_backed(next)?;
            match self.vm.check(slot, &mut page, self.scratch) {
                Ok(Checked::Empty) => {}
                Ok(Checked::SameFilled) => self.seen.same_filled_pages += 1,
                Ok(Checked::Arena(_)) => self.seen.arena_pages += 1,
                Ok(Checked::InFile(wanted)) => self.in_file.push(wanted),
                Err(LoadError::FileMissing) => self.seen.missing_pages += 1,
                Err(err) => self.bad(slot, &err),
            }
            next = Slot(slot.0.checked_add(1)?);
        }
        Some(next)
    }

    /// Reads what was found in the file, and looks at it.
    fn at_records(&mut self, stopped: impl Fn() -> bool) -> Option<()> {
        let mut wanted = std::mem::take(&mut self.in_file).into_iter();
        loop {
            let batch: Vec<_> = wanted.by_ref().take(FETCH_PAGES_MAX).collect();
            if batch.is_empty() {
                return Some(());
            }
            let (tell, told) = mpsc::channel();
            self.vm.fetch(batch, move |fetched| {
                let _ = tell.send(fetched);
            });
            let fetched = loop {
                match told.recv_timeout(LOOK_EVERY) {
                    Ok(fetched) => break fetched,
                    Err(mpsc::RecvTimeoutError::Timeout) if !stopped() => {}
                    Err(_) => return None,
                }
            };
            for fetched in fetched {
                let slot = fetched.slot();
                match self.vm.check_fetched(fetched, self.scratch) {
                    Ok(is_there) => self.seen.file_pages += u32::from(is_there),
                    Err(err) => self.bad(slot, &err),
                }
            }
        }
    }

    fn bad(&mut self, slot: Slot, err: &LoadError) {
        let reason = err.to_string();
        if self.vm.note_bad(slot) {
            tracing::error!(vm = self.name, "the page in slot {slot} is bad: {reason}");
        }
        self.seen.bad_pages += 1;
        if self.seen.bad.len() < BAD_SHOWN_MAX {
            self.seen.bad.push(BadPage { vm: self.name.to_owned(), slot, reason });
        }
    }
}
