//! Carrying out a request, a bounded number of pages at a time: a long one keeps its place and goes on at the next
//! turn. Every page is copied out of guest memory once, before anyone looks at it; the guest may change its copy
//! meanwhile, ours it can't reach.

use std::collections::VecDeque;

use vm_memory::{Bytes, GuestAddress};

use super::config_space::SECTOR_BYTES;
use super::request::{Kind, Request, Segment, Status, take_front};
use crate::device::Memory;
use crate::ids::Slot;
use crate::page::{PAGE_SIZE, PAGE_SIZE_U64, Page};
use crate::store::codec::Scratch;
use crate::store::lru::Age;
use crate::store::vm::VmStore;

/// Bytes of the serial number that GET_ID asks for.
pub const SERIAL_BYTES: usize = 20;

const RANGE_BYTES: usize = 16;
const UNMAP: u32 = 1;

/// How far a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It ended: the answer, and how many bytes were written for the driver to see, the status not among them.
    Done(Status, u32),
    /// The budget of this turn is used up; call again.
    Unfinished,
}

/// A request that is being carried out.
#[derive(Debug)]
pub struct Execution {
    request: Request,
    /// Ranges of a discard or write-zeroes that are still to do.
    ranges: Option<VecDeque<Range>>,
    written: u32,
}

/// A part of the disk, in bytes.
#[derive(Clone, Copy, Debug)]
struct Range {
    start: u64,
    end: u64,
}

/// What a turn works with.
#[derive(Debug)]
pub struct Turn<'a> {
    /// The guest's memory, as it is mapped now.
    pub memory: &'a Memory,
    /// The VM's pages.
    pub vm: &'a VmStore,
    /// The disk's serial number.
    pub serial: &'a [u8; SERIAL_BYTES],
    /// The time of this turn.
    pub now: Age,
    /// Pages that may still be worked on in this turn.
    pub budget_pages: u32,
}

/// The request can't be carried out; the reason is counted where it arises.
struct Failed(Status);

impl From<vm_memory::GuestMemoryError> for Failed {
    fn from(_: vm_memory::GuestMemoryError) -> Self {
        Self(Status::IoErr)
    }
}

impl Execution {
    /// Starts on `request`.
    #[must_use]
    pub fn new(request: Request) -> Self {
        Self { request, ranges: None, written: 0 }
    }

    /// Where the status of the request goes.
    #[must_use]
    pub fn status_address(&self) -> GuestAddress {
        self.request.status
    }

    /// Works on the request until it ends or the turn's budget is used up.
    pub fn proceed(&mut self, turn: &mut Turn<'_>, scratch: &mut Scratch, page: &mut Page) -> Outcome {
        let result = match self.request.kind {
            Kind::Flush => Ok(true),
            Kind::GetId => self.serial(turn),
            Kind::Load | Kind::Store => self.transfer(turn, scratch, page),
            Kind::Discard | Kind::WriteZeroes => self.drop_ranges(turn, scratch, page),
        };
        match result {
            Ok(true) => Outcome::Done(Status::Ok, self.written),
            Ok(false) => Outcome::Unfinished,
            Err(Failed(status)) => Outcome::Done(status, self.written),
        }
    }

    fn serial(&mut self, turn: &Turn<'_>) -> Result<bool, Failed> {
        scatter(turn.memory, &mut self.request.data, turn.serial)?;
        self.written = u32::try_from(self.request.length.min(SERIAL_BYTES as u64)).unwrap_or(0);
        Ok(true)
    }

    fn transfer(
        &mut self,
        turn: &mut Turn<'_>,
        scratch: &mut Scratch,
        page: &mut Page,
    ) -> Result<bool, Failed> {
        while self.request.length > 0 {
            if turn.budget_pages == 0 {
                return Ok(false);
            }
            turn.budget_pages = turn.budget_pages.saturating_sub(1);
            let (slot, part) = first_page(self.request.position, self.request.length);
            let length = part.len();
            if self.request.kind == Kind::Load {
                load(turn, slot, page, scratch)?;
                let part = page.get(part).ok_or(Failed(Status::IoErr))?;
                scatter(turn.memory, &mut self.request.data, part)?;
                self.written = self.written.saturating_add(u32::try_from(length).unwrap_or(0));
            } else {
                self.store_part(turn, slot, part, page, scratch)?;
            }
            self.request.position = self.request.position.saturating_add(length as u64);
            self.request.length = self.request.length.saturating_sub(length as u64);
        }
        Ok(true)
    }

    fn store_part(
        &mut self,
        turn: &Turn<'_>,
        slot: Slot,
        part: std::ops::Range<usize>,
        page: &mut Page,
        scratch: &mut Scratch,
    ) -> Result<(), Failed> {
        let target = page.get_mut(part.clone()).ok_or(Failed(Status::IoErr))?;
        gather(turn.memory, &mut self.request.data, target)?;
        if part.len() == PAGE_SIZE {
            return turn.vm.store(slot, page, turn.now, scratch).map_err(|_| Failed(Status::IoErr));
        }
        let new = *page;
        let change = |page: &mut Page| {
            for (target, source) in page.iter_mut().zip(new).take(part.end).skip(part.start) {
                *target = source;
            }
        };
        turn.vm
            .update(slot, None, page, turn.now, scratch, change)
            .map(|_| ())
            .map_err(|_| Failed(Status::IoErr))
    }

    fn drop_ranges(
        &mut self,
        turn: &mut Turn<'_>,
        scratch: &mut Scratch,
        page: &mut Page,
    ) -> Result<bool, Failed> {
        let mut ranges = match self.ranges.take() {
            Some(ranges) => ranges,
            None => self.read_ranges(turn)?,
        };
        while let Some(range) = ranges.front_mut() {
            if turn.budget_pages == 0 {
                self.ranges = Some(ranges);
                return Ok(false);
            }
            turn.budget_pages = turn.budget_pages.saturating_sub(1);
            range.start = self.drop_some(*range, turn, scratch, page)?;
            if range.start >= range.end {
                ranges.pop_front();
            }
        }
        Ok(true)
    }

    /// Drops the beginning of a range; returns where the rest starts.
    fn drop_some(
        &self,
        range: Range,
        turn: &mut Turn<'_>,
        scratch: &mut Scratch,
        page: &mut Page,
    ) -> Result<u64, Failed> {
        let (slot, part) = first_page(range.start, range.end.saturating_sub(range.start));
        if part.len() < PAGE_SIZE {
            // A discard may leave the edges as they are; zeroes were promised.
            if self.request.kind == Kind::WriteZeroes {
                let change =
                    |page: &mut Page| page.iter_mut().take(part.end).skip(part.start).for_each(|b| *b = 0);
                let _ = turn
                    .vm
                    .update(slot, None, page, turn.now, scratch, change)
                    .map_err(|_| Failed(Status::IoErr))?;
            }
            return Ok(range.start.saturating_add(part.len() as u64));
        }
        let end = slot_of(range.end);
        // A chunk's worth of slots costs as much as some pages of data.
        turn.budget_pages = turn.budget_pages.saturating_sub(8);
        Ok(match turn.vm.invalidate_some(slot, end) {
            Some(next) => u64::from(next.0).saturating_mul(PAGE_SIZE_U64),
            None => u64::from(end.0).saturating_mul(PAGE_SIZE_U64),
        })
    }

    /// Reads the ranges of a discard or write-zeroes and checks them all before any is dropped.
    fn read_ranges(&mut self, turn: &Turn<'_>) -> Result<VecDeque<Range>, Failed> {
        let capacity = u64::from(turn.vm.slots()).saturating_mul(PAGE_SIZE_U64);
        let mut ranges = VecDeque::new();
        let mut dropped = 0u64;
        while !self.request.data.is_empty() {
            let mut bytes = [0; RANGE_BYTES];
            gather(turn.memory, &mut self.request.data, &mut bytes)?;
            let [sector @ .., _, _, _, _, _, _, _, _] = bytes;
            let [_, _, _, _, _, _, _, _, sectors @ .., _, _, _, _] = bytes;
            let [_, _, _, _, _, _, _, _, _, _, _, _, flags @ ..] = bytes;
            let flags = u32::from_le_bytes(flags);
            let allowed = if self.request.kind == Kind::WriteZeroes { UNMAP } else { 0 };
            if flags & !allowed != 0 {
                return Err(Failed(Status::Unsupported));
            }
            let start = u64::from_le_bytes(sector).checked_mul(SECTOR_BYTES);
            let length = u64::from(u32::from_le_bytes(sectors)).saturating_mul(SECTOR_BYTES);
            let end = start.and_then(|start| start.checked_add(length)).filter(|end| *end <= capacity);
            let (Some(start), Some(end)) = (start, end) else {
                return Err(Failed(Status::IoErr));
            };
            // A request that drops more than there is names something twice, only to keep us busy.
            dropped = dropped.saturating_add(length);
            if dropped > capacity {
                return Err(Failed(Status::IoErr));
            }
            if start < end {
                ranges.push_back(Range { start, end });
            }
        }
        Ok(ranges)
    }
}

fn load(turn: &Turn<'_>, slot: Slot, page: &mut Page, scratch: &mut Scratch) -> Result<(), Failed> {
    turn.vm.load(slot, None, page, turn.now, scratch).map(|_| ()).map_err(|_| Failed(Status::IoErr))
}

fn slot_of(position: u64) -> Slot {
    // A position on the disk was checked against its capacity, which is less than 2^32 pages.
    Slot(u32::try_from(position / PAGE_SIZE_U64).unwrap_or(u32::MAX))
}

/// The slot at `position` and the part of its page that a run of `length` bytes covers.
fn first_page(position: u64, length: u64) -> (Slot, std::ops::Range<usize>) {
    let from = usize::try_from(position % PAGE_SIZE_U64).unwrap_or(0);
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    (slot_of(position), from..from.saturating_add(length).min(PAGE_SIZE))
}

fn gather(memory: &Memory, data: &mut VecDeque<Segment>, mut target: &mut [u8]) -> Result<(), Failed> {
    while !target.is_empty() {
        let (address, length) = take_front(data, target.len()).ok_or(Failed(Status::IoErr))?;
        let (now, later) = target.split_at_mut_checked(length).ok_or(Failed(Status::IoErr))?;
        memory.read_slice(now, address)?;
        target = later;
    }
    Ok(())
}

/// Copies `source` to the data segments, as far as they reach.
fn scatter(memory: &Memory, data: &mut VecDeque<Segment>, mut source: &[u8]) -> Result<(), Failed> {
    while let Some((address, length)) = take_front(data, source.len()).filter(|(_, length)| *length > 0) {
        let (now, later) = source.split_at_checked(length).ok_or(Failed(Status::IoErr))?;
        memory.write_slice(now, address)?;
        source = later;
    }
    Ok(())
}
