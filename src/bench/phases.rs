//! The parts of a run, each a [`Work`] for the engine: store in order, load shuffled, overwrite, both mixed, load one by
//! one, discard. Which page belongs in a block follows from the block and from how often it was overwritten. A part
//! visits no block twice, so no request in flight can change what another is to bring back.

use vm_memory::GuestAddress;

use super::drive::{Figures, Plan, Work, drive};
use super::lanes::Lanes;
use super::order::Order;
use super::report::{Phases, Report};
use super::source::Source;
use super::{Phase, Span};
use crate::frontend::{BlkConfig, Error, Op, Queue, Range, SECTORS_PER_PAGE, Status};
use crate::page::{PAGE_SIZE, PAGE_SIZE_U64};

/// Requests of the depth-1 phase: enough for a p99.9, few enough for a slow device.
const LATENCY_REQUESTS: u64 = 20_000;

/// Bytes of a sector, as requests count them.
const SECTOR: u32 = 512;

/// Pages of the write-zeroes check.
const ZEROED_PAGES: u64 = 1024;

/// A run over one span of each device.
pub(crate) struct Run<'a> {
    source: &'a Source,
    pages_at: GuestAddress,
    span: Span,
    depth: u16,
    /// How often each block was overwritten.
    generations: Vec<u8>,
    buffer: Vec<u8>,
    mismatched_pages: u64,
    failed_requests: u64,
}

/// What a request does to its block, and what comes back.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Deed {
    /// Stores the pages of its generation.
    Store,
    /// Stores those of the next one.
    Overwrite,
    /// Loads those of its generation.
    Load,
    /// Overwrites one block and loads another, as a guest does that swaps both ways.
    Mixed,
    /// Loads zeros.
    LoadZeros,
    /// Loads, whatever comes.
    LoadAnything,
    /// Gives the block up.
    Discard,
}

impl<'a> Run<'a> {
    pub(crate) fn new(source: &'a Source, pages_at: GuestAddress, span: Span, depth: u16) -> Self {
        let blocks = usize::try_from(span.blocks).unwrap_or(usize::MAX);
        let buffer = vec![0; span.block_pages * PAGE_SIZE];
        let generations = vec![0; blocks];
        Self { source, pages_at, span, depth, generations, buffer, mismatched_pages: 0, failed_requests: 0 }
    }

    /// Runs the wanted phases in their order. `ratio` is asked once, when all pages are there:
    /// after the first store, or from an earlier run.
    pub(crate) fn all(
        &mut self,
        wanted: &[Phase],
        lanes: &mut Lanes,
        config: &BlkConfig,
        report: &mut Report,
        ratio: &dyn Fn() -> Option<f64>,
    ) -> Result<(), Error> {
        let has = |phase| wanted.contains(&phase);
        if has(Phase::Store) {
            let all = Order::ascending(self.span.blocks, lanes.count());
            report.phases.store = Some(self.run("store", lanes, all, Deed::Store)?);
        }
        report.compression_ratio = ratio();
        self.loads(wanted, lanes, &mut report.phases)?;
        if has(Phase::Discard) && config.discard_sectors_max > 0 {
            let sectors_max = u64::from(config.discard_sectors_max);
            if self.span.block_pages as u64 * SECTORS_PER_PAGE > sectors_max {
                return Err(Error::Usage(
                    "the device discards no block as large as that at once: take smaller ones",
                ));
            }
            let all = self.shuffled(lanes, 4);
            report.phases.discard = Some(self.run("discard", lanes, all, Deed::Discard)?);
            report.discarded_pages = self.span.pages();
            // Contents are unspecified now, but the device must still answer.
            let all = self.shuffled(lanes, 2);
            report.phases.load_discarded =
                Some(self.run("load discarded", lanes, all, Deed::LoadAnything)?);
        }
        if has(Phase::Discard) && config.write_zeroes_sectors_max > 0 {
            report.zeroed_pages = self.zero(lanes, config)?;
        }
        report.mismatched_pages = self.mismatched_pages;
        report.failed_requests = self.failed_requests;
        Ok(())
    }

    /// The phases between storing and discarding.
    fn loads(&mut self, wanted: &[Phase], lanes: &mut Lanes, phases: &mut Phases) -> Result<(), Error> {
        let has = |phase| wanted.contains(&phase);
        if has(Phase::Load) {
            let all = self.shuffled(lanes, 2);
            phases.load = Some(self.run("load", lanes, all, Deed::Load)?);
        }
        if has(Phase::Overwrite) {
            let half =
                Order::shuffled(self.span.blocks, lanes.count(), 1).first(self.span.blocks.div_ceil(2));
            phases.overwrite = Some(self.run("overwrite", lanes, half, Deed::Overwrite)?);
            let all = self.shuffled(lanes, 2);
            phases.load_overwritten = Some(self.run("load overwritten", lanes, all, Deed::Load)?);
        }
        if has(Phase::Mixed) {
            let all = self.shuffled(lanes, 3);
            phases.mixed = Some(self.run("mixed", lanes, all, Deed::Mixed)?);
        }
        if has(Phase::Latency) {
            let some = self.shuffled(lanes, 2).first(LATENCY_REQUESTS);
            let depth = std::mem::replace(&mut self.depth, 1);
            phases.load_depth_1 = Some(self.run("load depth 1", lanes, some, Deed::Load)?);
            self.depth = depth;
        }
        Ok(())
    }

    fn shuffled(&self, lanes: &Lanes, seed: u64) -> Order {
        Order::shuffled(self.span.blocks, lanes.count(), seed)
    }

    fn run(&mut self, name: &str, lanes: &mut Lanes, order: Order, deed: Deed) -> Result<Figures, Error> {
        let pages_per_request = self.span.block_pages as u64;
        let plan = Plan { name, requests: order.requests(), pages_per_request, depth: self.depth };
        let (figures, failed) = drive(lanes, &plan, &mut Part { run: self, order, deed })?;
        self.failed_requests += failed;
        Ok(figures)
    }

    /// Makes the first pages of the first device zeros and checks that they are; returns how many.
    fn zero(&mut self, lanes: &mut Lanes, config: &BlkConfig) -> Result<u64, Error> {
        let pages = (self.span.pages() / self.span.vms).min(ZEROED_PAGES);
        let (first_slot, block_pages) = (self.span.first_slot, self.span.block_pages as u64);
        for range in ranges(first_slot, pages * SECTORS_PER_PAGE, config.write_zeroes_sectors_max) {
            let zeroes = |queue: &mut Queue, tag| {
                queue.write_ranges(tag, &[range])?;
                Ok(Op::WriteZeroes { ranges: 1 })
            };
            if lanes.run(zeroes)? != Status::Ok {
                self.failed_requests += 1;
            }
        }
        let order =
            Order::ascending(pages / block_pages * self.span.vms, lanes.count()).of_first_vm(self.span.vms);
        self.run("load zeroed", lanes, order, Deed::LoadZeros)?;
        Ok(pages)
    }
}

/// A stretch of sectors from a slot on, cut into ranges that the device takes.
fn ranges(first_slot: u64, sectors: u64, sectors_max: u32) -> impl Iterator<Item = Range> {
    // Whole pages, so that no page is given up in halves.
    let step = (u64::from(sectors_max) / SECTORS_PER_PAGE).max(1) * SECTORS_PER_PAGE;
    (0..sectors.div_ceil(step)).map(move |n| {
        let left = sectors - n * step;
        let sectors = u32::try_from(left.min(step)).unwrap_or(u32::MAX);
        Range { sector: first_slot * SECTORS_PER_PAGE + n * step, sectors, flags: 0 }
    })
}

impl Span {
    /// Where a block begins on its device. Blocks go round the VMs, so that all have as many.
    fn sector(&self, block: u64) -> u64 {
        (self.first_slot + block / self.vms * self.block_pages as u64) * SECTORS_PER_PAGE
    }

    fn block_bytes(&self) -> u32 {
        u32::try_from(self.block_pages * PAGE_SIZE).unwrap_or(u32::MAX)
    }
}

/// A part that is being run.
struct Part<'r, 'a> {
    run: &'r mut Run<'a>,
    order: Order,
    deed: Deed,
}

impl Part<'_, '_> {
    /// What becomes of this block.
    fn deed_for(&self, block: u64) -> Deed {
        match self.deed {
            // Known from its number alone, by the highest bit of a multiplicative hash: a lane's are every n-th.
            Deed::Mixed if block.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 63 == 0 => Deed::Overwrite,
            Deed::Mixed => Deed::Load,
            deed => deed,
        }
    }
}

impl Work for Part<'_, '_> {
    #[inline]
    fn stage(&mut self, lane: usize, queue: &mut Queue, tag: u16) -> Result<Option<u64>, Error> {
        let Some(block) = self.order.next(lane) else { return Ok(None) };
        let deed = self.deed_for(block);
        let span = self.run.span;
        let (sector, bytes) = (span.sector(block), span.block_bytes());
        match deed {
            Deed::Store | Deed::Overwrite => {
                let generation = &mut self.run.generations[usize::try_from(block).unwrap_or(0)];
                *generation = generation.wrapping_add(u8::from(deed == Deed::Overwrite));
                let index = self.run.index(block);
                let at = GuestAddress(self.run.pages_at.0 + index as u64 * PAGE_SIZE_U64);
                queue.stage_buffers(tag, Op::Write { sector, bytes }, &[(at, bytes)])?;
            }
            Deed::Discard => {
                queue.write_ranges(tag, &[Range { sector, sectors: bytes / SECTOR, flags: 0 }])?;
                queue.stage(tag, Op::Discard { ranges: 1 })?;
            }
            _ => queue.stage(tag, Op::Read { sector, bytes })?,
        }
        Ok(Some(block))
    }

    #[inline]
    fn finish(&mut self, queue: &Queue, tag: u16, block: u64) -> Result<(), Error> {
        let deed = self.deed_for(block);
        if deed != Deed::Load && deed != Deed::LoadZeros {
            return Ok(());
        }
        let index = self.run.index(block);
        let Run { source, span, buffer, mismatched_pages, .. } = &mut *self.run;
        queue.read_data(tag, 0, buffer)?;
        if deed == Deed::LoadZeros {
            *mismatched_pages += wrong_pages(buffer, None);
            return Ok(());
        }
        let right = source.bytes_at(index, span.block_pages);
        if buffer.as_slice() != right {
            *mismatched_pages += wrong_pages(buffer, Some(right));
        }
        Ok(())
    }
}

impl Run<'_> {
    /// Where the pages that belong in a block are in the source.
    fn index(&self, block: u64) -> usize {
        let generation = self.generations[usize::try_from(block).unwrap_or(0)];
        self.source.index(block * self.span.block_pages as u64, u64::from(generation))
    }
}

/// Number of pages in a block that are not what they should be: zeros, or a part of `right`.
fn wrong_pages(block: &[u8], right: Option<&[u8]>) -> u64 {
    let pages = block.chunks(PAGE_SIZE).enumerate();
    let wrong = pages.filter(|(n, page)| match right {
        Some(right) => *page != &right[n * PAGE_SIZE..(n + 1) * PAGE_SIZE],
        None => page.iter().any(|byte| *byte != 0),
    });
    wrong.count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_cover_the_stretch_in_whole_pages() {
        let cut: Vec<Range> = ranges(1, 100, 33).collect();
        assert_eq!(cut.iter().map(|r| r.sectors).collect::<Vec<_>>(), [32, 32, 32, 4]);
        assert_eq!(cut.iter().map(|r| r.sector).collect::<Vec<_>>(), [8, 40, 72, 104]);
        assert_eq!(ranges(0, 8, 1).count(), 1);
        assert_eq!(ranges(0, 1 << 20, u32::MAX).count(), 1);
    }

    #[test]
    fn every_wrong_page_of_a_block_is_counted() {
        let right = [7; 3 * PAGE_SIZE];
        let mut block = right;
        assert_eq!(wrong_pages(&block, Some(&right)), 0);
        block[0] = 8;
        block[3 * PAGE_SIZE - 1] = 8;
        assert_eq!(wrong_pages(&block, Some(&right)), 2);
        assert_eq!(wrong_pages(&[0; PAGE_SIZE], None), 0);
    }
}
