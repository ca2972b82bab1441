//! The parts of a run, each a [`Work`] for the engine: store in order, load shuffled, overwrite, load one by
//! one, discard. Which page belongs in a slot follows from the slot and from one bit per block: whether it
//! was overwritten.

use vm_memory::GuestAddress;

use super::drive::{Figures, Plan, Work, drive};
use super::report::Report;
use super::source::{Shuffle, Source};
use super::{Phase, Span};
use crate::frontend::{BlkConfig, Error, Op, Queue, Range, SECTORS_PER_PAGE, Status};
use crate::page::{PAGE_SIZE, PAGE_SIZE_U64};

/// Requests of the depth-1 phase: enough for a p99.9, few enough for a slow device.
const LATENCY_REQUESTS: u64 = 20_000;

/// Pages of the write-zeroes check.
const ZEROED_PAGES: u64 = 1024;

/// A run over one span of a device.
pub(crate) struct Run<'a> {
    source: &'a Source,
    pages_at: GuestAddress,
    span: Span,
    depth: u16,
    overwritten: Vec<bool>,
    buffer: Vec<u8>,
    mismatched_pages: u64,
    failed_requests: u64,
}

/// What a load must bring back.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Expect {
    Stored,
    Zeros,
    Anything,
}

impl<'a> Run<'a> {
    pub(crate) fn new(source: &'a Source, pages_at: GuestAddress, span: Span, depth: u16) -> Self {
        let blocks = usize::try_from(span.blocks).unwrap_or(usize::MAX);
        let buffer = vec![0; span.block_pages * PAGE_SIZE];
        let overwritten = vec![false; blocks];
        Self { source, pages_at, span, depth, overwritten, buffer, mismatched_pages: 0, failed_requests: 0 }
    }

    /// Runs the wanted phases in their order. `ratio` is asked once, when all pages are there:
    /// after the first store, or from an earlier run.
    pub(crate) fn all(
        &mut self,
        wanted: &[Phase],
        queue: &mut Queue,
        config: &BlkConfig,
        report: &mut Report,
        ratio: &dyn Fn() -> Option<f64>,
    ) -> Result<(), Error> {
        let has = |phase| wanted.contains(&phase);
        let (blocks, depth) = (self.span.blocks, self.depth);
        let phases = &mut report.phases;
        if has(Phase::Store) {
            phases.store = Some(self.store("store", queue, Order::Ascending(0..blocks), 0)?);
        }
        report.compression_ratio = ratio();
        if has(Phase::Load) {
            phases.load = Some(self.load("load", queue, blocks, depth, Expect::Stored)?);
        }
        if has(Phase::Overwrite) {
            phases.overwrite = Some(self.overwrite(queue)?);
            phases.load_overwritten =
                Some(self.load("load overwritten", queue, blocks, depth, Expect::Stored)?);
        }
        if has(Phase::Latency) {
            let requests = blocks.min(LATENCY_REQUESTS);
            phases.load_depth_1 = Some(self.load("load depth 1", queue, requests, 1, Expect::Stored)?);
        }
        if has(Phase::Discard) && config.discard_sectors_max > 0 {
            self.discard(queue, config)?;
            report.discarded_pages = self.span.pages();
            // Contents are unspecified now, but the device must still answer.
            phases.load_discarded =
                Some(self.load("load discarded", queue, blocks, depth, Expect::Anything)?);
        }
        if has(Phase::Discard) && config.write_zeroes_sectors_max > 0 {
            report.zeroed_pages = self.zero(queue, config)?;
        }
        report.mismatched_pages = self.mismatched_pages;
        report.failed_requests = self.failed_requests;
        Ok(())
    }

    fn store(
        &mut self,
        name: &str,
        queue: &mut Queue,
        order: Order,
        generation: u64,
    ) -> Result<Figures, Error> {
        let plan = self.plan(name, order.requests(self.span.blocks), self.depth);
        let mut work =
            Store { source: self.source, pages_at: self.pages_at, span: self.span, order, generation };
        let (figures, failed) = drive(queue, &plan, &mut work)?;
        self.failed_requests += failed;
        Ok(figures)
    }

    /// Overwrites half of the blocks, spread at random.
    fn overwrite(&mut self, queue: &mut Queue) -> Result<Figures, Error> {
        let half = self.span.blocks.div_ceil(2);
        for block in Shuffle::new(self.span.blocks, 1).take(usize::try_from(half).unwrap_or(usize::MAX)) {
            self.overwritten[usize::try_from(block).unwrap_or(0)] = true;
        }
        self.store("overwrite", queue, Order::Shuffled(Shuffle::new(self.span.blocks, 1), half), 1)
    }

    fn load(
        &mut self,
        name: &str,
        queue: &mut Queue,
        requests: u64,
        depth: u16,
        expect: Expect,
    ) -> Result<Figures, Error> {
        let plan = self.plan(name, requests, depth);
        let order = Order::Shuffled(Shuffle::new(self.span.blocks, 2), requests);
        let mut work = Load { run: self, order, expect };
        let (figures, failed) = drive(queue, &plan, &mut work)?;
        self.failed_requests += failed;
        Ok(figures)
    }

    fn plan<'n>(&self, name: &'n str, requests: u64, depth: u16) -> Plan<'n> {
        Plan { name, requests, pages_per_request: self.span.block_pages as u64, depth }
    }

    fn discard(&mut self, queue: &mut Queue, config: &BlkConfig) -> Result<(), Error> {
        let sectors = self.span.pages() * SECTORS_PER_PAGE;
        for range in ranges(self.span.first_slot, sectors, config.discard_sectors_max) {
            self.run_range(queue, range, Op::Discard { ranges: 1 })?;
        }
        Ok(())
    }

    /// Makes the first pages zeros and checks that they are; returns how many.
    fn zero(&mut self, queue: &mut Queue, config: &BlkConfig) -> Result<u64, Error> {
        let pages = self.span.pages().min(ZEROED_PAGES);
        let (first_slot, block_pages) = (self.span.first_slot, self.span.block_pages as u64);
        for range in ranges(first_slot, pages * SECTORS_PER_PAGE, config.write_zeroes_sectors_max) {
            self.run_range(queue, range, Op::WriteZeroes { ranges: 1 })?;
        }
        let blocks = pages / block_pages;
        let plan = self.plan("load zeroed", blocks, self.depth);
        let mut work = Load { run: self, order: Order::Ascending(0..blocks), expect: Expect::Zeros };
        let (_, failed) = drive(queue, &plan, &mut work)?;
        self.failed_requests += failed;
        Ok(pages)
    }

    fn run_range(&mut self, queue: &mut Queue, range: Range, op: Op) -> Result<(), Error> {
        queue.write_ranges(0, &[range])?;
        if queue.run(op)? != Status::Ok {
            self.failed_requests += 1;
        }
        Ok(())
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

/// In which order blocks are visited.
enum Order {
    Ascending(std::ops::Range<u64>),
    /// Shuffled, and how many of them.
    Shuffled(Shuffle, u64),
}

impl Order {
    fn requests(&self, blocks: u64) -> u64 {
        match self {
            Self::Ascending(range) => range.end - range.start,
            Self::Shuffled(_, count) => blocks.min(*count),
        }
    }

    #[inline]
    fn next(&mut self) -> Option<u64> {
        match self {
            Self::Ascending(range) => range.next(),
            Self::Shuffled(shuffle, left) => {
                *left = left.checked_sub(1)?;
                shuffle.next()
            }
        }
    }
}

impl Span {
    fn sector(&self, block: u64) -> u64 {
        (self.first_slot + block * self.block_pages as u64) * SECTORS_PER_PAGE
    }

    fn block_bytes(&self) -> u32 {
        u32::try_from(self.block_pages * PAGE_SIZE).unwrap_or(u32::MAX)
    }
}

struct Store<'a> {
    source: &'a Source,
    pages_at: GuestAddress,
    span: Span,
    order: Order,
    generation: u64,
}

impl Work for Store<'_> {
    #[inline]
    fn stage(&mut self, queue: &mut Queue, tag: u16) -> Result<Option<u64>, Error> {
        let Some(block) = self.order.next() else { return Ok(None) };
        let index = self.source.index(block * self.span.block_pages as u64, self.generation);
        let at = GuestAddress(self.pages_at.0 + index as u64 * PAGE_SIZE_U64);
        let bytes = self.span.block_bytes();
        queue.stage_buffers(tag, Op::Write { sector: self.span.sector(block), bytes }, &[(at, bytes)])?;
        Ok(Some(block))
    }

    fn finish(&mut self, _: &Queue, _: u16, _: u64) -> Result<(), Error> {
        Ok(())
    }
}

struct Load<'r, 'a> {
    run: &'r mut Run<'a>,
    order: Order,
    expect: Expect,
}

impl Work for Load<'_, '_> {
    #[inline]
    fn stage(&mut self, queue: &mut Queue, tag: u16) -> Result<Option<u64>, Error> {
        let Some(block) = self.order.next() else { return Ok(None) };
        let span = &self.run.span;
        queue.stage(tag, Op::Read { sector: span.sector(block), bytes: span.block_bytes() })?;
        Ok(Some(block))
    }

    #[inline]
    fn finish(&mut self, queue: &Queue, tag: u16, block: u64) -> Result<(), Error> {
        if self.expect == Expect::Anything {
            return Ok(());
        }
        let Run { source, span, overwritten, buffer, mismatched_pages, .. } = &mut *self.run;
        queue.read_data(tag, 0, buffer)?;
        if self.expect == Expect::Zeros {
            *mismatched_pages += wrong_pages(buffer, None);
            return Ok(());
        }
        let generation = u64::from(overwritten[usize::try_from(block).unwrap_or(0)]);
        let index = source.index(block * span.block_pages as u64, generation);
        let right = source.bytes_at(index, span.block_pages);
        if buffer.as_slice() != right {
            *mismatched_pages += wrong_pages(buffer, Some(right));
        }
        Ok(())
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
