//! Keeping the writeback file in shape: segments in which little lives are emptied, so are those beyond a size that was
//! lowered, and what is free is given back. A record that was read and is damaged, twice, has no other copy: its slot
//! is lost, so that neither its segment nor its guest waits for it any longer.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::cold::ColdEnd;
use super::stats::ShrinkerStats;
use crate::ids::VmId;
use crate::store::vm::{InFile, VmStore};
use crate::writeback::{RecordRef, SegmentIndex, Writeback};

/// Half-dead segments are cleaned when less than this share of the file is free.
const FREE_SEGMENTS_PERCENT_MIN: u64 = 25;
/// Segments that are looked at for one that can be cleaned: some hold what can't be moved.
const CLEAN_TRIES: usize = 4;
/// Damaged records that are read once more at a time.
const READ_AGAIN_MAX: usize = 256;

/// The VMs in use, in the order of their numbers.
pub(super) type Vms = BTreeMap<VmId, (Arc<VmStore>, ColdEnd)>;

/// See [`Cleaning::look_at_suspect`].
pub(super) type Suspects = RefCell<BTreeSet<SegmentIndex>>;

/// What cleaning works with.
pub(super) struct Cleaning<'a> {
    pub(super) file: &'a Writeback,
    pub(super) vms: &'a Vms,
    pub(super) stats: &'a ShrinkerStats,
    /// Segments of which something was left when they were to be emptied.
    pub(super) suspects: &'a Suspects,
}

impl Cleaning<'_> {
    /// Gives dead segments of the file back, cleans half-dead ones, and empties those beyond a size that was lowered.
    /// Whether there may be more to do.
    pub(super) fn tidy(&self) -> bool {
        let file = self.file;
        if file.give_back() || self.clean(|| file.half_dead(FREE_SEGMENTS_PERCENT_MIN)) {
            return true;
        }
        file.is_oversized() && self.clean(|| file.beyond_size().or_else(|| file.emptiest()))
    }

    /// Empties a segment that `choose` finds. Whether one was.
    pub(super) fn clean(&self, choose: impl Fn() -> Option<SegmentIndex>) -> bool {
        for _ in 0..CLEAN_TRIES {
            let Some(segment) = choose() else { return false };
            let Ok(records) = self.file.read_segment(segment) else { continue };
            if self.empty(segment, records) {
                self.stats.cleaned();
                return true;
            }
        }
        false
    }

    /// Moves those of the records that entries name. Whether there were any. What entries name and is none of them is a
    /// matter for [`Self::look_at_suspect`].
    fn empty(&self, segment: SegmentIndex, records: Vec<RecordRef>) -> bool {
        let Some(moved) = self.move_live(records) else { return false };
        if self.file.live_bytes(segment) > 0 {
            self.suspects.borrow_mut().insert(segment);
        }
        moved > 0
    }

    /// Gives up what is damaged in one of the segments that could not be emptied. That takes a walk through all page
    /// tables, so nobody may wait meanwhile. Whether there was one.
    pub(super) fn look_at_suspect(&self) -> bool {
        let Some(segment) = self.suspects.borrow_mut().pop_first() else { return false };
        if self.file.live_bytes(segment) > 0 {
            self.give_up_damaged(segment);
        }
        true
    }

    /// How many were moved; `None` when they could not be written.
    fn move_live(&self, records: Vec<RecordRef>) -> Option<usize> {
        let (mut live, mut owners) = (Vec::new(), Vec::new());
        for record in records {
            let Some((vm, _)) = self.vms.get(&record.owner.vm) else { continue };
            if let Some(generation) = vm.generation_in_file(record.owner.slot, record.place)
                && record.is_authentic(vm.cipher())
            {
                owners.push((record.owner, generation));
                live.push(record);
            }
        }
        if live.is_empty() {
            return Some(0);
        }
        let places = self.file.append_raw(&live).ok()?;
        for ((owner, generation), place) in owners.iter().zip(places) {
            self.vms[&owner.vm].0.move_in_file(owner.slot, *generation, place);
        }
        Some(live.len())
    }

    /// Reads what is left in a segment once more, record by record, and gives up those that came and are damaged: the
    /// first time they were found to be so when the segment was read. A read that fails proves nothing.
    fn give_up_damaged(&self, segment: SegmentIndex) {
        for (vm, _) in self.vms.values() {
            let mut left = vm.in_segment(segment);
            while !left.is_empty() {
                let some: Vec<InFile> = left.split_off(left.len().saturating_sub(READ_AGAIN_MAX));
                let (sender, receiver) = std::sync::mpsc::sync_channel(1);
                vm.fetch(some, move |fetched| {
                    // The receiver waits below; it can't be gone.
                    let _ = sender.send(fetched);
                });
                let Ok(fetched) = receiver.recv() else { continue };
                for record in fetched {
                    vm.give_up_if_damaged(record);
                }
            }
        }
    }
}
