//! Discard and write-zeroes: their ranges are read and checked once, and then dropped some at a time.

use std::collections::VecDeque;

use super::config_space::SECTOR_BYTES;
use super::copy::{Unreachable, advance, first_page, gather, slot_of};
use super::execute::{Execution, Pause, Turn};
use super::request::{Kind, Status};
use crate::page::{PAGE_SIZE, PAGE_SIZE_U64, Page};
use crate::store::codec::Scratch;

const RANGE_BYTES: usize = 16;
const UNMAP: u32 = 1;
/// What dropping a chunk's worth of slots costs, in pages of data.
const CHUNK_PAGES: u32 = 8;

/// A part of the disk, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Range {
    start: u64,
    end: u64,
}

impl Execution {
    pub(super) fn drop_ranges(
        &mut self,
        turn: &mut Turn<'_>,
        scratch: &mut Scratch,
        page: &mut Page,
    ) -> Result<(), Pause> {
        if self.ranges.is_none() {
            self.ranges = Some(self.read_ranges(turn)?);
        }
        while let Some(range) = self.ranges.as_ref().and_then(|ranges| ranges.front().copied()) {
            turn.spend_page()?;
            let start = self.drop_some(range, turn, scratch, page)?;
            let ranges = self.ranges.get_or_insert_default();
            ranges.pop_front();
            if start < range.end {
                ranges.push_front(Range { start, ..range });
            }
        }
        Ok(())
    }

    /// Drops the beginning of a range; returns where the rest starts.
    fn drop_some(
        &mut self,
        range: Range,
        turn: &mut Turn<'_>,
        scratch: &mut Scratch,
        page: &mut Page,
    ) -> Result<u64, Pause> {
        let (slot, part) = first_page(range.start, range.end.saturating_sub(range.start));
        if part.len() < PAGE_SIZE {
            // A discard may leave the edges as they are; zeroes were promised.
            if self.request.kind == Kind::WriteZeroes {
                let (from, to) = (part.start, part.end);
                let change = |page: &mut Page| page.iter_mut().take(to).skip(from).for_each(|b| *b = 0);
                self.change_part(turn, slot, page, scratch, change)?;
            }
            return Ok(range.start.saturating_add(part.len() as u64));
        }
        let end = slot_of(range.end);
        turn.budget_pages = turn.budget_pages.saturating_sub(CHUNK_PAGES);
        Ok(match turn.vm.invalidate_some(slot, end) {
            Some(next) => u64::from(next.0).saturating_mul(PAGE_SIZE_U64),
            None => u64::from(end.0).saturating_mul(PAGE_SIZE_U64),
        })
    }

    /// Reads the ranges of a discard or write-zeroes and checks them all before any is dropped.
    fn read_ranges(&mut self, turn: &mut Turn<'_>) -> Result<VecDeque<Range>, Pause> {
        let capacity = u64::from(turn.vm.slots()).saturating_mul(PAGE_SIZE_U64);
        let mut ranges = VecDeque::new();
        let mut dropped = 0u64;
        while !self.request.data.is_empty() {
            let mut bytes = [0; RANGE_BYTES];
            gather(turn.memory, &self.request.data, &mut bytes).map_err(|Unreachable| turn.unreachable())?;
            advance(&mut self.request.data, RANGE_BYTES);
            let [sector @ .., _, _, _, _, _, _, _, _] = bytes;
            let [_, _, _, _, _, _, _, _, sectors @ .., _, _, _, _] = bytes;
            let [_, _, _, _, _, _, _, _, _, _, _, _, flags @ ..] = bytes;
            let flags = u32::from_le_bytes(flags);
            let allowed = if self.request.kind == Kind::WriteZeroes { UNMAP } else { 0 };
            if flags & !allowed != 0 {
                return Err(Pause::Failed(Status::Unsupported));
            }
            let start = u64::from_le_bytes(sector).checked_mul(SECTOR_BYTES);
            let length = u64::from(u32::from_le_bytes(sectors)).saturating_mul(SECTOR_BYTES);
            let end = start.and_then(|start| start.checked_add(length)).filter(|end| *end <= capacity);
            let (Some(start), Some(end)) = (start, end) else {
                return Err(Pause::Failed(Status::IoErr));
            };
            // A request that drops more than there is names something twice, only to keep us busy.
            dropped = dropped.saturating_add(length);
            if dropped > capacity {
                return Err(Pause::Failed(Status::IoErr));
            }
            if start < end {
                ranges.push_back(Range { start, end });
            }
        }
        Ok(ranges)
    }
}
