//! What the queues of a balloon ask for, carried out: pages that are given up, taken back or reported, and statistics. It
//! knows guest memory and what was given up, but no rings, and counts what it does.

use vm_memory::{Bytes, GuestAddress};

use super::given::Given;
use super::numbers::Numbers;
use super::pages::{self, Returned};
use super::stats::{self, Stats};
use crate::device::complaints::Complaint;
use crate::device::guest_memory::{Memory, is_lost};
use crate::device::segments::Segments;
use crate::device::vm::DeviceVm;
use crate::page::PAGE_SIZE_U64;

/// What a turn may cost; a page that is reported costs one, being one of many in one system call.
pub const TURN_COST: u32 = 16384;
/// What a page costs that may take a system call of its own, and what a head costs that asks for nothing.
pub const CALL_COST: u32 = 64;

/// What a ring has at hand for a turn, and what it leaves there.
pub struct Turn<'a> {
    /// The guest's memory.
    pub memory: &'a Memory,
    /// Whose memory it is.
    pub vm: &'a DeviceVm,
    /// What was given up.
    pub given: &'a mut Given,
    /// Whether free pages have to keep what is in them.
    pub poisoned: bool,
    /// Whether new statistics are wanted; taken by the ring that asks for them.
    pub wish: bool,
    /// Statistics that came.
    pub stats: Option<Stats>,
    /// Whether the session's driver has begun from nothing.
    pub is_new_driver: bool,
    /// It has done so just now: no page is given up.
    pub begins: bool,
    /// What was counted.
    pub numbers: Numbers,
    /// What the turn may still cost.
    pub cost_left: u32,
    /// Numbers of pages.
    pub batch: Vec<u32>,
}

impl Turn<'_> {
    /// Returns the pages of the batch to the host.
    pub fn inflate(&mut self) {
        let batch = u32::try_from(self.batch.len()).unwrap_or(u32::MAX);
        self.cost_left = self.cost_left.saturating_sub(batch.saturating_mul(CALL_COST));
        let (taken, memory) = (self.batch.len() as u64, self.memory);
        self.batch.retain(|page| pages::is_there(memory, *page));
        self.refuse(taken.saturating_sub(self.batch.len() as u64));
        let there = self.batch.len() as u64;
        self.batch.sort_unstable();
        self.batch.dedup();
        let mut returned = Returned::default();
        for (first, count) in pages::runs(&self.batch) {
            let [start, bytes] = [first, count].map(|pages| u64::from(pages).saturating_mul(PAGE_SIZE_U64));
            pages::give_back(memory, start, bytes, &mut returned);
        }
        let new = self.batch.iter().filter(|page| self.given.add(**page)).count() as u64;
        let numbers = &mut self.numbers;
        numbers.inflated_pages = numbers.inflated_pages.saturating_add(new);
        numbers.inflated_again_pages = numbers.inflated_again_pages.saturating_add(there.saturating_sub(new));
        self.count(returned);
    }

    /// Notes that the guest has the pages of the batch again. Each is there as soon as it is touched, so nothing else is to
    /// be done about it.
    pub fn deflate(&mut self) {
        let batch = u32::try_from(self.batch.len()).unwrap_or(u32::MAX);
        self.cost_left = self.cost_left.saturating_sub(batch);
        let known = self.batch.iter().filter(|page| self.given.remove(**page)).count() as u64;
        let unknown = self.batch.iter().filter(|page| !pages::is_there(self.memory, **page)).count() as u64;
        self.numbers.deflated_pages = self.numbers.deflated_pages.saturating_add(known);
        self.refuse(unknown);
    }

    /// Returns a range that is free. It is the guest's again as soon as the head is answered.
    pub fn report(&mut self, address: GuestAddress, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE_SIZE_U64).unwrap_or(u32::MAX);
        self.cost_left = self.cost_left.saturating_sub(pages.saturating_add(CALL_COST));
        self.numbers.reported_bytes = self.numbers.reported_bytes.saturating_add(bytes);
        if self.poisoned {
            self.numbers.poisoned_bytes = self.numbers.poisoned_bytes.saturating_add(bytes);
            return;
        }
        let mut returned = Returned::default();
        pages::give_back(self.memory, address.0, bytes, &mut returned);
        self.count(returned);
    }

    /// Reads statistics, unless they are old.
    pub fn read_stats(&mut self, list: &mut Segments, are_old: bool) {
        let mut buffer = [0; stats::BYTES_MAX];
        let mut filled = 0usize;
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let Some((address, length)) = list.take_front(rest.len()) else { break };
            let Some(Ok(())) = rest.get_mut(..length).map(|part| self.memory.read_slice(part, address))
            else {
                break;
            };
            filled = filled.saturating_add(length);
        }
        if !are_old && !is_lost(self.memory) {
            self.numbers.statistics = self.numbers.statistics.saturating_add(1);
            self.stats = Some(Stats::parse(buffer.get(..filled).unwrap_or_default()));
        }
    }

    fn count(&mut self, returned: Returned) {
        let numbers = &mut self.numbers;
        numbers.punched_bytes = numbers.punched_bytes.saturating_add(returned.punched_bytes);
        numbers.kept_bytes = numbers.kept_bytes.saturating_add(returned.kept_bytes);
        self.refuse(returned.outside_bytes.div_ceil(PAGE_SIZE_U64));
        if let Some(refusal) = returned.refusal
            && self.vm.complaints().is_news(Complaint::NotReturned)
        {
            let vm = self.vm.name();
            tracing::warn!(
                vm,
                "memory that the guest gave up stays with the VMM, whose file takes no holes: {refusal}; have the memory in \
                 a memfd or on a tmpfs, without seals"
            );
        }
    }

    /// Counts pages that the guest doesn't have.
    pub fn refuse(&mut self, pages: u64) {
        self.numbers.refused_pages = self.numbers.refused_pages.saturating_add(pages);
        if pages > 0 && self.vm.complaints().is_news(Complaint::NoSuchPage) {
            tracing::warn!(
                vm = self.vm.name(),
                pages,
                "the guest gave up pages that it doesn't have: they are ignored"
            );
        }
    }
}
