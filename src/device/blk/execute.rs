//! Carrying out a request, a bounded number of pages at a time: a long one keeps its place and goes on at the next
//! turn. So does one whose page is in the writeback file, once the page was read, and one whose page finds no room.
//! A step of a request is done whole or not at all, so all of them go on in the same way.
//!
//! Every page is copied out of guest memory once a try, before anyone looks at it; the guest may change its copy
//! meanwhile, ours it can't reach.

use std::collections::VecDeque;
use std::ops::Range as StdRange;

use vm_memory::GuestAddress;

use super::copy::{Unreachable, advance, first_page, gather, scatter, slot_of};
use super::ranges::Range;
use super::request::{Kind, Request, Status};
use crate::crash_point;
use crate::device::complaints::{Chain, Complaint, Complaints};
use crate::device::latency::Path;
use crate::device::stream::Ways;
use crate::device::view::View;
use crate::ids::Slot;
use crate::page::{PAGE_SIZE, PAGE_SIZE_U64, Page};
use crate::store::codec::Scratch;
use crate::store::lru::Age;
use crate::store::vm::{
    Fetched, InFile, LoadError, Loaded, Source, StoreError, UpdateError, Updated, VmStore,
};

/// Bytes of the serial number that GET_ID asks for.
pub const SERIAL_BYTES: usize = 20;
/// Pages of one request that are read from the file together: as many as a turn works on.
pub const FETCH_PAGES_MAX: usize = 32;

/// How far a request is.
#[derive(Debug)]
#[must_use = "a request that did not end has to go on"]
pub enum Outcome {
    /// It ended: the answer, and how many bytes were written for the driver to see, the status not among them.
    Done(Status, u32),
    /// The budget of this turn is used up; call again.
    Unfinished,
    /// These pages have to be read from the writeback file first: [`Execution::give`] what comes and call again.
    InFile(Vec<InFile>),
    /// A page found no room, for this reason; call again when there may be some.
    NoRoom(StoreError),
}

/// A request that is being carried out.
#[derive(Debug)]
pub struct Execution {
    pub(super) request: Request,
    /// Ranges of a discard or write-zeroes that are still to do.
    pub(super) ranges: Option<VecDeque<Range>>,
    written: u32,
    /// Pages that came from the file and were not used yet.
    fetched: Vec<Fetched>,
    /// The page at hand found no room before, and that was counted.
    refused: bool,
    /// The slowest source of the pages that were loaded.
    source: Source,
}

/// What a turn works with.
#[derive(Debug)]
pub struct Turn<'a> {
    /// The guest's memory, as it is mapped now.
    pub memory: &'a View<'a>,
    /// The VM's pages.
    pub vm: &'a VmStore,
    /// The disk's serial number.
    pub serial: &'a [u8; SERIAL_BYTES],
    /// The time of this turn.
    pub now: Age,
    /// Pages that may still be worked on in this turn.
    pub budget_pages: u32,
    /// Pages that may be asked for from the file now.
    pub fetch_pages: usize,
    /// Whether requests wait behind the one that is worked on, in this ring or, likely, in others.
    pub others_wait: bool,
    /// Which way pages go into the guest's memory while others wait.
    pub ways: Ways,
    /// What went wrong before.
    pub complaints: &'a Complaints,
    /// Lines for the log, which is written when the turn is over and no lock is held.
    pub log: Vec<String>,
}

impl Turn<'_> {
    /// Notes something for the log, unless it was told often enough.
    pub fn complain(&mut self, complaint: Complaint, message: impl FnOnce() -> String) {
        if self.complaints.is_news(complaint) {
            self.log.push(message());
        }
    }

    pub(super) fn spend_page(&mut self) -> Result<(), Pause> {
        self.budget_pages = self.budget_pages.checked_sub(1).ok_or(Pause::Budget)?;
        Ok(())
    }

    /// A page can't be loaded. One that is bad is told once, however often it is wanted.
    fn fail_load(&mut self, slot: Slot, what: &str, err: &LoadError) -> Pause {
        let is_news = match err.is_damage() {
            true => self.vm.note_bad(slot),
            false => self.complaints.is_news(Complaint::Load),
        };
        if is_news {
            self.log.push(format!("{what} of slot {slot} failed: {}", Chain(err)));
        }
        Pause::Failed(Status::IoErr)
    }

    pub(super) fn unreachable(&mut self) -> Pause {
        self.complain(Complaint::Memory, || {
            "a request failed: the guest memory that it names is not shared any more".to_owned()
        });
        Pause::Failed(Status::IoErr)
    }
}

/// Why a request does not go on now, or ever.
pub(super) enum Pause {
    Failed(Status),
    Budget,
    InFile(Vec<InFile>),
    NoRoom(StoreError),
}

impl Execution {
    /// Starts on `request`.
    #[must_use]
    pub fn new(request: Request) -> Self {
        Self {
            request,
            ranges: None,
            written: 0,
            fetched: Vec::new(),
            refused: false,
            source: Source::SameFilled,
        }
    }

    /// Where the status of the request goes.
    #[must_use]
    pub fn status_address(&self) -> GuestAddress {
        self.request.status
    }

    /// Whether it stores pages, and so needs room.
    #[must_use]
    pub fn is_store(&self) -> bool {
        self.request.kind == Kind::Store
    }

    /// What its latency counts as; `None` for what neither stores nor loads.
    #[must_use]
    pub fn path(&self) -> Option<Path> {
        match self.request.kind {
            Kind::Store => Some(Path::Store(self.source)),
            Kind::Load => Some(Path::Load(self.source)),
            Kind::Flush | Kind::GetId | Kind::Discard | Kind::WriteZeroes => None,
        }
    }

    /// Where tests make the daemon crash: at a store of a VM.
    pub fn crash_if_told(&self, vm: &str) {
        if self.is_store() {
            let start = self.request.position / PAGE_SIZE_U64;
            crash_point::storing(vm, start..start.saturating_add(self.request.length / PAGE_SIZE_U64));
        }
    }

    /// Hands over the pages that were asked for, whether or not they could be read.
    pub fn give(&mut self, fetched: Vec<Fetched>) {
        self.fetched = fetched;
    }

    /// Works on the request until it ends or can't go on.
    pub fn proceed(&mut self, turn: &mut Turn<'_>, scratch: &mut Scratch, page: &mut Page) -> Outcome {
        let result = match self.request.kind {
            Kind::Flush => Ok(()),
            Kind::GetId => self.serial(turn),
            Kind::Load | Kind::Store => self.transfer(turn, scratch, page),
            Kind::Discard | Kind::WriteZeroes => self.drop_ranges(turn, scratch, page),
        };
        match result {
            Ok(()) => Outcome::Done(Status::Ok, self.written),
            Err(Pause::Failed(status)) => Outcome::Done(status, self.written),
            Err(Pause::Budget) => Outcome::Unfinished,
            Err(Pause::InFile(wanted)) => Outcome::InFile(wanted),
            Err(Pause::NoRoom(err)) => Outcome::NoRoom(err),
        }
    }

    fn serial(&mut self, turn: &mut Turn<'_>) -> Result<(), Pause> {
        let serial = turn.serial;
        let copy_in = |address, bytes: &[u8]| turn.memory.copy_in(address, bytes);
        scatter(&mut self.request.data, serial, copy_in).map_err(|Unreachable| turn.unreachable())?;
        self.written = u32::try_from(self.request.length.min(SERIAL_BYTES as u64)).unwrap_or(0);
        Ok(())
    }

    fn transfer(&mut self, turn: &mut Turn<'_>, scratch: &mut Scratch, page: &mut Page) -> Result<(), Pause> {
        while self.request.length > 0 {
            turn.spend_page()?;
            let (slot, part) = first_page(self.request.position, self.request.length);
            let length = part.len();
            if self.request.kind == Kind::Load {
                self.load_part(turn, slot, part, page, scratch)?;
            } else {
                self.store_part(turn, slot, part, page, scratch)?;
            }
            self.request.position = self.request.position.saturating_add(length as u64);
            self.request.length = self.request.length.saturating_sub(length as u64);
        }
        Ok(())
    }

    fn load_part(
        &mut self,
        turn: &mut Turn<'_>,
        slot: Slot,
        part: StdRange<usize>,
        page: &mut Page,
        scratch: &mut Scratch,
    ) -> Result<(), Pause> {
        let fetched = self.take_fetched(slot);
        match turn.vm.load(slot, fetched, page, turn.now, scratch) {
            Ok(Loaded::Page(source)) => self.source = self.source.max(source),
            Ok(Loaded::InFile(first)) => return Err(self.want(turn, slot, first)),
            Err(err) => return Err(turn.fail_load(slot, "a load", &err)),
        }
        let length = part.len();
        let loaded = page.get(part).ok_or(Pause::Failed(Status::IoErr))?;
        // The last page is read next, and sooner if our cache has it. Of others it is the copy that is waited for.
        let is_last = !turn.others_wait && self.request.length == length as u64;
        let (memory, ways) = (turn.memory, &mut turn.ways);
        let copy_in = |address, bytes: &[u8]| match is_last {
            true => memory.copy_in(address, bytes),
            false => memory.copy_page_in(address, bytes, ways),
        };
        scatter(&mut self.request.data, loaded, copy_in).map_err(|Unreachable| turn.unreachable())?;
        self.written = self.written.saturating_add(u32::try_from(length).unwrap_or(0));
        Ok(())
    }

    fn store_part(
        &mut self,
        turn: &mut Turn<'_>,
        slot: Slot,
        part: StdRange<usize>,
        page: &mut Page,
        scratch: &mut Scratch,
    ) -> Result<(), Pause> {
        let target = page.get_mut(part.clone()).ok_or(Pause::Failed(Status::IoErr))?;
        gather(turn.memory, &self.request.data, target).map_err(|Unreachable| turn.unreachable())?;
        let length = part.len();
        if length < PAGE_SIZE {
            let new = *page;
            let change = |page: &mut Page| {
                for (target, source) in page.iter_mut().zip(new).take(part.end).skip(part.start) {
                    *target = source;
                }
            };
            self.change_part(turn, slot, page, scratch, change)?;
        } else {
            let stored = turn.vm.try_store(slot, page, turn.now, scratch);
            self.source = self.source.max(stored.map_err(|err| self.no_room(turn, err))?);
            self.refused = false;
        }
        advance(&mut self.request.data, length);
        Ok(())
    }

    /// Changes a part of the page in `slot`.
    pub(super) fn change_part(
        &mut self,
        turn: &mut Turn<'_>,
        slot: Slot,
        page: &mut Page,
        scratch: &mut Scratch,
        change: impl FnMut(&mut Page),
    ) -> Result<(), Pause> {
        let fetched = self.take_fetched(slot);
        match turn.vm.update(slot, fetched, page, turn.now, scratch, change) {
            Ok(Updated::Done) => {
                self.source = self.source.max(Source::Pool);
                self.refused = false;
                Ok(())
            }
            Ok(Updated::InFile(first)) => Err(self.want(turn, slot, first)),
            Err(UpdateError::Store(err)) => Err(self.no_room(turn, err)),
            Err(UpdateError::Load(err)) => Err(turn.fail_load(slot, "a load for a partial store", &err)),
        }
    }

    fn no_room(&mut self, turn: &Turn<'_>, err: StoreError) -> Pause {
        if !std::mem::replace(&mut self.refused, true) {
            turn.vm.count_refused(&err);
        }
        // It may take long until they could be used.
        self.fetched = Vec::new();
        Pause::NoRoom(err)
    }

    fn take_fetched(&mut self, slot: Slot) -> Option<Fetched> {
        let index = self.fetched.iter().position(|fetched| fetched.slot() == slot)?;
        Some(self.fetched.swap_remove(index))
    }

    /// Asks for the page in `slot`, which is in the file, and for others there that the request is about to need.
    fn want(&mut self, turn: &Turn<'_>, slot: Slot, first: InFile) -> Pause {
        self.fetched = Vec::new();
        self.source = Source::File;
        let more = turn.fetch_pages.min(FETCH_PAGES_MAX).saturating_sub(1);
        let end = self.request.position.saturating_add(self.request.length);
        let next = Slot(slot.0.saturating_add(1));
        let end_slot = slot_of(end.saturating_add(PAGE_SIZE_U64.saturating_sub(1)));
        let from = match self.request.kind {
            Kind::Load => next,
            // All between the first page and a last one that is not stored whole will be overwritten.
            Kind::Store if !end.is_multiple_of(PAGE_SIZE_U64) => slot_of(end).max(next),
            _ => end_slot,
        };
        let mut wanted = vec![first];
        if more > 0 {
            wanted.extend(turn.vm.in_file(from, end_slot, more));
        }
        Pause::InFile(wanted)
    }
}
