//! The in-flight region: which requests a back end had taken when it died. The VMM keeps the memory and hands it to
//! the next back end, which carries these out again. The layout of a queue's part is the vhost-user specification's
//! `QueueRegionSplit`; behind the last queue, where no VMM looks, stands the id of the state directory that the pages
//! went to.
//!
//! ```text
//! per queue, a multiple of 64 bytes:
//!   0 features u64   8 version u16   10 descriptors u16   12 last batch head u16   14 used index u16
//!   16 + 16 n: 0 in flight u8   1 crashes u8 (of ours, padding elsewhere)   6 next u16   8 counter u64
//! behind all queues: the state id, 16 bytes, the VM number xored into the first four
//! ```

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use super::handed::{self, Unusable};
use super::signals::blame::{self, Executing};
use super::signals::watch::Watch;
use crate::crash_point;
use crate::ids::VmId;
use crate::store::state::StateId;

const HEADER_BYTES: usize = 16;
const DESCRIPTOR_BYTES: usize = 16;
const QUEUE_ALIGN: usize = 64;
const ID_BYTES: usize = 16;
const VERSION: u16 = 1;

const VERSION_AT: usize = 8;
const DESCRIPTORS_AT: usize = 10;
const LAST_BATCH_HEAD_AT: usize = 12;
const USED_INDEX_AT: usize = 14;
const CRASHES_AT: usize = 1;
const COUNTER_AT: usize = 8;

/// A request that was carried out at so many crashes of the daemon is not carried out again.
const CRASHES_MAX: u8 = 2;

/// The region of one device, mapped.
#[derive(Debug)]
pub struct InflightRegion {
    // Dropped before the mapping, in this order.
    watch: Watch,
    map: MmapRegion<()>,
    queue_size: u16,
    queues: u16,
}

/// Why a region was refused.
#[derive(Debug, thiserror::Error)]
pub enum InflightError {
    /// It can't be made or mapped.
    #[error("the in-flight region can't be mapped")]
    Map(#[from] std::io::Error),
    /// Its file is none to be mapped.
    #[error("an in-flight region that is not one of this daemon's: {0}")]
    Unusable(#[from] Unusable),
    /// The VMM's numbers don't fit together.
    #[error("the in-flight region is {found} bytes long, and {queues} queues of {queue_size} need {needed}")]
    Size {
        /// Bytes the VMM gave.
        found: u64,
        /// Bytes needed.
        needed: u64,
        /// Queues.
        queues: u16,
        /// Descriptors per queue.
        queue_size: u16,
    },
    /// Its pages are not these.
    #[error(
        "the VM was attached to pages that are not here any more: the state directory is another, or the VM's page table \
         was removed or cleared; bring that back, or power the VM off and on again, so that its swap starts afresh"
    )]
    OtherState,
}

/// What the region of a VM in this state ends in: a table that was removed is made anew with another VM number, and its
/// old guest must not find zeros in it.
#[must_use]
pub fn stamp(state_id: &StateId, vm: VmId) -> StateId {
    let mut stamp = *state_id;
    for (byte, number) in stamp.iter_mut().zip(vm.0.to_le_bytes()) {
        *byte ^= number;
    }
    stamp
}

fn queue_bytes(queue_size: u16) -> usize {
    let bytes = usize::from(queue_size).saturating_mul(DESCRIPTOR_BYTES).saturating_add(HEADER_BYTES);
    bytes.next_multiple_of(QUEUE_ALIGN)
}

fn region_bytes(queues: u16, queue_size: u16) -> usize {
    queue_bytes(queue_size).saturating_mul(usize::from(queues)).saturating_add(ID_BYTES)
}

impl InflightRegion {
    /// Makes a fresh region for a VMM to keep. Returns it, its file and its length.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn create(queues: u16, queue_size: u16, id: &StateId) -> Result<(Self, File, u64), InflightError> {
        let fd = rustix::fs::memfd_create(
            "ballast-inflight",
            rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING,
        )
        .map_err(std::io::Error::from)?;
        let file = File::from(fd);
        let length = region_bytes(queues, queue_size) as u64;
        file.set_len(length)?;
        // A VMM that cut it short would end the daemon by a signal.
        let seals = rustix::fs::SealFlags::SHRINK | rustix::fs::SealFlags::GROW | rustix::fs::SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals).map_err(std::io::Error::from)?;
        let region = Self::map(&file, 0, length, queues, queue_size)?;
        region.write(region_bytes(queues, queue_size).saturating_sub(ID_BYTES), id);
        Ok((region, file, length))
    }

    /// Maps a region that a VMM kept.
    ///
    /// # Errors
    /// When it is too short, can't be mapped, or belongs to another state directory.
    pub fn open(
        file: &File,
        offset: u64,
        length: u64,
        (queues, queue_size): (u16, u16),
        id: &StateId,
    ) -> Result<Self, InflightError> {
        let region = Self::map(file, offset, length, queues, queue_size)?;
        let mut found = [0; ID_BYTES];
        let at = region_bytes(queues, queue_size).saturating_sub(ID_BYTES);
        region.map.as_volatile_slice().read_slice(&mut found, at).map_err(std::io::Error::other)?;
        if &found == id { Ok(region) } else { Err(InflightError::OtherState) }
    }

    fn map(
        file: &File,
        offset: u64,
        length: u64,
        queues: u16,
        queue_size: u16,
    ) -> Result<Self, InflightError> {
        let needed = region_bytes(queues, queue_size);
        let backed = file.metadata()?.len().saturating_sub(offset);
        let found = length.min(backed);
        if queues == 0 || queue_size == 0 || found < needed as u64 {
            return Err(InflightError::Size { found, needed: needed as u64, queues, queue_size });
        }
        handed::check_memory(file, offset, needed as u64)?;
        let map = MmapRegion::from_file(FileOffset::new(file.try_clone()?, offset), needed)
            .map_err(std::io::Error::other)?;
        let watch = Watch::new(map.as_ptr(), map.size())?;
        Ok(Self { watch, map, queue_size, queues })
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        self.map.as_volatile_slice().write_slice(bytes, at).expect("offsets are within the region");
        crash_point::passed();
    }

    /// Forgets what was taken and where the used rings were: the guest's driver starts over.
    pub fn forget(self: &Arc<Self>) {
        for queue in (0..self.queues).filter_map(|index| self.queue(index)) {
            // One store, after which the rest of the queue's part says nothing.
            queue.set_u16(VERSION_AT, 0);
        }
    }

    /// The part of queue `index`, if the region has one.
    #[must_use]
    pub fn queue(self: &Arc<Self>, index: u16) -> Option<InflightQueue> {
        let base = queue_bytes(self.queue_size).checked_mul(usize::from(index))?;
        (index < self.queues).then(|| InflightQueue { region: Arc::clone(self), base, counter: 0 })
    }
}

/// One queue's part of the region. Each change is a single store, in an order that leaves every crash decidable.
#[derive(Debug)]
pub struct InflightQueue {
    region: Arc<InflightRegion>,
    base: usize,
    /// Counts requests, so that they are carried out again in their order.
    counter: u64,
}

impl InflightQueue {
    fn u16_at(&self, at: usize) -> u16 {
        self.region.map.as_volatile_slice().load(self.base.saturating_add(at), Ordering::Acquire).unwrap_or(0)
    }

    fn set_u16(&self, at: usize, value: u16) {
        let at = self.base.saturating_add(at);
        self.region
            .map
            .as_volatile_slice()
            .store(value, at, Ordering::Release)
            .expect("offsets are within the region");
        crash_point::passed();
    }

    fn descriptor_at(&self, head: u16) -> usize {
        usize::from(head).saturating_mul(DESCRIPTOR_BYTES).saturating_add(HEADER_BYTES)
    }

    /// Whether `head` is noted as taken and not answered. One beyond the region's queue is not.
    #[must_use]
    pub fn is_taken(&self, head: u16) -> bool {
        if head >= self.region.queue_size {
            return false;
        }
        let at = self.base.saturating_add(self.descriptor_at(head));
        self.region.map.as_volatile_slice().load::<u8>(at, Ordering::Acquire).unwrap_or(0) == 1
    }

    /// Notes whether `head` is taken. It has crashed nobody yet, then: both are one store.
    fn set_taken(&self, head: u16, taken: bool) {
        let at = self.base.saturating_add(self.descriptor_at(head));
        self.region
            .map
            .as_volatile_slice()
            .store(u16::from_ne_bytes([u8::from(taken), 0]), at, Ordering::Release)
            .expect("heads are below the queue's size");
        crash_point::passed();
    }

    /// Where the crashes of `head` are counted, if it is noted as taken.
    fn crashes(&self, head: u16) -> Option<&AtomicU8> {
        let at = self.base.saturating_add(self.descriptor_at(head)).saturating_add(CRASHES_AT);
        // The mapping lives as long as the region, which this is a part of.
        let crashes = self.region.map.get_atomic_ref(at).ok();
        crashes.filter(|_| self.is_taken(head))
    }

    /// Until the answer is dropped, a crash of this thread counts against `head`.
    pub fn executing(&self, head: u16) -> Option<Executing<'_>> {
        self.crashes(head).map(blame::executing)
    }

    /// Whether `head` was carried out at so many crashes that it is not to be carried out again.
    #[must_use]
    pub fn is_fatal(&self, head: u16) -> bool {
        self.crashes(head).is_some_and(|crashes| crashes.load(Ordering::Relaxed) >= CRASHES_MAX)
    }

    /// Whether the VMM has cut the region's file short.
    pub fn is_lost(&self) -> bool {
        self.region.watch.is_lost()
    }

    /// Makes the region agree with the guest's used ring, and returns the heads that were taken and not answered, in
    /// the order in which they were taken. `used_index` is the guest's; it has the last word on what was answered.
    pub fn resume(&mut self, used_index: u16) -> Vec<u16> {
        if self.u16_at(VERSION_AT) != VERSION {
            (0..self.region.queue_size).for_each(|head| self.set_taken(head, false));
            self.set_u16(DESCRIPTORS_AT, self.region.queue_size);
            self.set_u16(USED_INDEX_AT, used_index);
            self.set_u16(VERSION_AT, VERSION);
        }
        if self.u16_at(USED_INDEX_AT) != used_index {
            // Died after answering the last head and before noting so.
            let last = self.u16_at(LAST_BATCH_HEAD_AT);
            if last < self.region.queue_size {
                self.set_taken(last, false);
            }
            self.set_u16(USED_INDEX_AT, used_index);
        }
        let mut taken: Vec<(u64, u16)> = (0..self.region.queue_size)
            .filter(|head| self.is_taken(*head))
            .map(|head| {
                let at = self.base.saturating_add(self.descriptor_at(head)).saturating_add(COUNTER_AT);
                (self.region.map.as_volatile_slice().load(at, Ordering::Acquire).unwrap_or(0), head)
            })
            .collect();
        taken.sort_unstable();
        self.counter = taken.last().map_or(0, |(counter, _)| counter.saturating_add(1));
        taken.into_iter().map(|(_, head)| head).collect()
    }

    /// Notes that `head` was taken from the available ring.
    pub fn take(&mut self, head: u16) {
        if head >= self.region.queue_size {
            return;
        }
        let at = self.base.saturating_add(self.descriptor_at(head)).saturating_add(COUNTER_AT);
        let counter = self.region.map.as_volatile_slice().store(self.counter, at, Ordering::Release);
        counter.expect("heads are below the queue's size");
        crash_point::passed();
        self.counter = self.counter.wrapping_add(1);
        self.set_taken(head, true);
    }

    /// Notes that `head` is about to be answered.
    pub fn answering(&self, head: u16) {
        self.set_u16(LAST_BATCH_HEAD_AT, head);
    }

    /// Notes that `head` was answered and the guest's used index is now `used_index`.
    pub fn answered(&self, head: u16, used_index: u16) {
        if head < self.region.queue_size {
            self.set_taken(head, false);
        }
        self.set_u16(USED_INDEX_AT, used_index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: StateId = [9; 16];

    #[test]
    fn what_was_taken_and_not_answered_comes_back_in_order() {
        let (region, file, length) = InflightRegion::create(2, 128, &ID).unwrap();
        let mut queue = Arc::new(region).queue(1).unwrap();
        assert!(queue.resume(500).is_empty());
        for head in [5, 3, 100, 7] {
            queue.take(head);
        }
        queue.answering(3);
        queue.answered(3, 501);
        // Dies between the used ring and the region: the guest has seen the answer to 100.
        queue.answering(100);

        let region = InflightRegion::open(&file, 0, length, (2, 128), &ID).unwrap();
        let region = Arc::new(region);
        assert_eq!(region.queue(1).unwrap().resume(502), [5, 7]);
        assert!(region.queue(0).unwrap().resume(0).is_empty());
        assert!(region.queue(2).is_none());
    }

    #[test]
    fn crashes_count_against_the_request_that_was_carried_out() {
        let (region, file, length) = InflightRegion::create(1, 128, &ID).unwrap();
        let mut queue = Arc::new(region).queue(0).unwrap();
        queue.resume(0);
        [5, 6].into_iter().for_each(|head| queue.take(head));
        let crash = |queue: &InflightQueue| queue.crashes(6).unwrap().fetch_add(1, Ordering::Relaxed);
        crash(&queue);

        let region = InflightRegion::open(&file, 0, length, (1, 128), &ID).unwrap();
        let mut queue = Arc::new(region).queue(0).unwrap();
        assert_eq!(queue.resume(0), [5, 6]);
        assert!(!queue.is_fatal(6));
        crash(&queue);
        assert_eq!([5, 6, 7, 128].map(|head| queue.is_fatal(head)), [false, true, false, false]);
        queue.answered(6, 1);
        queue.take(6);
        assert!(!queue.is_fatal(6), "another request in the same place");
    }

    #[test]
    fn what_was_taken_before_a_reset_is_forgotten() {
        let (region, file, length) = InflightRegion::create(2, 128, &ID).unwrap();
        let region = Arc::new(region);
        let mut queue = region.queue(1).unwrap();
        queue.resume(500);
        queue.take(7);
        region.forget();

        let region = Arc::new(InflightRegion::open(&file, 0, length, (2, 128), &ID).unwrap());
        let mut queue = region.queue(1).unwrap();
        assert!(queue.resume(0).is_empty());
        queue.take(9);
        assert_eq!(region.queue(1).unwrap().resume(0), [9]);
    }

    #[test]
    fn a_foreign_or_short_region_is_refused() {
        let (_, file, length) = InflightRegion::create(2, 128, &ID).unwrap();
        let open = |shape, id: &StateId| InflightRegion::open(&file, 0, length, shape, id);
        assert!(matches!(open((2, 128), &[1; 16]), Err(InflightError::OtherState)));
        assert!(matches!(open((2, 128), &stamp(&ID, VmId(1))), Err(InflightError::OtherState)));
        assert_ne!(stamp(&ID, VmId(1)), stamp(&ID, VmId(1 << 24)));
        assert!(matches!(open((3, 128), &ID), Err(InflightError::Size { .. })));
        assert!(matches!(open((0, 0), &ID), Err(InflightError::Size { .. })));
    }
}
