//! Reading back: a guest that was given memory will soon want what it had pushed out, and what of that is in the writeback
//! file is brought back into the pool ahead of its faults. A burst for each such VM, the hottest pages first, a batch of them
//! on its way at a time, at a bounded rate, and only while the shrinker has nothing to do and there is room: nobody leaves
//! for it. It runs on the shrinker's thread, which never waits for a read: what has come is published at the next turn.
//!
//! How much: as many pages as the guest was given room for, less those that it loads from the file itself meanwhile. To
//! load more it has to push others out. Pages keep their ages, so whatever nobody loads is the first to leave again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::time::{Duration, Instant};

use super::cleaning::Vms;
use super::cold::ColdEnd;
use super::requests::Requests;
use crate::ids::{Slot, VmId};
use crate::store::accounting::object_bytes_max;
use crate::store::lru::{Age, hottest_in_file};
use crate::store::room::Bell;
use crate::store::vm::{Fetched, LoadError, ReadBack, VmStore};

/// Pages that come back in a second, of all VMs together: 32 MiB of guests' memory. That is a tenth of a core, and what a
/// disk reads beside guests' loads without making them wait; a guest given a gigabyte has it back in half a minute.
const PAGES_PER_SECOND: u32 = 8192;
/// Pages on their way at a time: a load that comes meanwhile has no more than these before it in the file's queue.
const BATCH_PAGES: usize = 32;
/// So much may be caught up with after the thread slept: as long as it does while there is more to read.
const BEHIND_MAX: Duration = Duration::from_millis(100);
/// Pages found by one scan, which reads the age of every slot: some seconds' worth.
const SCAN_PAGES: u64 = 32_768;

/// What is asked for a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Its guest was given room for so many pages more.
    Given(u64),
    /// Its guest gives memory up again.
    Taken,
}

/// Why a burst ended, in words for an operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Enough,
    NothingLeft,
    Unwanted,
    Unreadable,
    NoRoom,
    Taken,
    HostShort,
    SwitchedOff,
    FileFails,
    VmGone,
}

impl End {
    fn words(self) -> &'static str {
        match self {
            Self::Enough => "as many as the guest was given memory for",
            Self::NothingLeft => "there are no more of them",
            Self::Unwanted => "the others would leave again at once, or the guest has just loaded them",
            Self::Unreadable => "the others are damaged",
            Self::NoRoom => "there is no room for more",
            Self::Taken => "the guest is squeezed again",
            Self::HostShort => "the host is short of memory",
            Self::SwitchedOff => "the file failed, and is left alone until the next start",
            Self::FileFails => "the file doesn't give them",
            Self::VmGone => "the VM is gone",
        }
    }
}

/// Pages of one VM that come back.
#[derive(Debug)]
struct Burst {
    name: String,
    /// When it began, as ages have it.
    since: Age,
    /// Pages that may still come.
    left_pages: u64,
    /// Loads from the file that were counted when that was last reduced by them.
    loaded_from_file: u64,
    /// What the last scan found, the hottest last.
    found: Vec<Slot>,
    /// How many that were, and how many had failed when it was made. What is damaged is found again by each scan.
    last_scan: Option<(usize, u64)>,
    back_pages: u64,
    failed_pages: u64,
}

/// A batch on its way.
#[derive(Debug)]
struct OnItsWay {
    vm: VmId,
    /// Whether the burst that asked for it goes on.
    wanted: bool,
    fetched: Receiver<Vec<Fetched>>,
}

/// What keeps pages from coming back, or from staying.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Bytes that the pool may still take before it has to shrink again.
    pub(super) room_bytes: u64,
    /// After how long an unused page leaves again.
    pub(super) idle: Option<Duration>,
}

/// All bursts.
#[derive(Debug)]
pub(super) struct ReadingBack {
    bursts: BTreeMap<VmId, Burst>,
    /// Whose turn it was last.
    last: VmId,
    on_its_way: Option<OnItsWay>,
    /// When the next batch may be asked for.
    due: Instant,
    bell: Arc<Bell>,
}

impl ReadingBack {
    /// There are none yet. The bell is rung when a batch has come.
    pub(super) fn new(bell: Arc<Bell>) -> Self {
        Self { bursts: BTreeMap::new(), last: VmId(0), on_its_way: None, due: Instant::now(), bell }
    }

    /// Takes what is asked for. While the host is short of memory the pool doesn't grow for what may be wanted.
    pub(super) fn follow(&mut self, requests: &Requests, vms: &Vms, host_is_short: bool) {
        for (id, order) in requests.take_read_back() {
            match order {
                Order::Given(pages) => self.begin(id, pages, vms),
                Order::Taken => self.end(id, End::Taken),
            }
        }
        let ended = |id: &VmId| match vms.contains_key(id) {
            false => Some((*id, End::VmGone)),
            true => host_is_short.then_some((*id, End::HostShort)),
        };
        for (id, why) in self.bursts.keys().filter_map(ended).collect::<Vec<_>>() {
            self.end(id, why);
        }
        requests.show_reading_back(self.bursts.iter().map(|(id, burst)| (*id, burst.left_pages)));
    }

    fn begin(&mut self, id: VmId, pages: u64, vms: &Vms) {
        let Some((vm, _)) = vms.get(&id) else { return };
        let accounting = vm.accounting();
        if accounting.held.file_pages == 0 {
            return;
        }
        let burst = self.bursts.entry(id).or_insert_with(|| Burst {
            name: vm.table().name().to_owned(),
            since: Age::now(),
            left_pages: 0,
            loaded_from_file: accounting.events.loaded_from_file,
            found: Vec::new(),
            last_scan: None,
            back_pages: 0,
            failed_pages: 0,
        });
        burst.left_pages = burst.left_pages.saturating_add(pages);
    }

    fn end(&mut self, id: VmId, why: End) {
        if let Some(on_its_way) = self.on_its_way.as_mut().filter(|on_its_way| on_its_way.vm == id) {
            on_its_way.wanted = false;
        }
        if let Some(Burst { name, back_pages, failed_pages, .. }) = self.bursts.remove(&id) {
            tracing::info!(
                vm = name,
                pages = back_pages,
                failed_pages,
                "pages were read back from the writeback file, because the guest was given memory: {}",
                why.words()
            );
        }
    }

    /// Ends all of them: the file failed. It would still be read, and what has it left is better kept for loads.
    pub(super) fn give_up(&mut self) {
        for id in self.bursts.keys().copied().collect::<Vec<_>>() {
            self.end(id, End::SwitchedOff);
        }
    }

    /// Publishes what has come, and asks for the next batch when its time has come. Whether there is more to do.
    pub(super) fn some(&mut self, vms: &Vms, bounds: Bounds) -> bool {
        self.arrive(vms);
        if self.on_its_way.is_some() || Instant::now() < self.due {
            return !self.bursts.is_empty();
        }
        while let Some(id) = self.next() {
            match self.ask(id, vms, bounds) {
                // All of them have changed; there is a bound to what one turn looks at.
                Ok(0) => return true,
                Ok(pages) => {
                    let earliest = Instant::now().checked_sub(BEHIND_MAX).unwrap_or(self.due);
                    self.due = self.due.max(earliest) + Duration::from_secs(1) / PAGES_PER_SECOND * pages;
                    return true;
                }
                Err(why) => self.end(id, why),
            }
        }
        false
    }

    /// The VM whose turn it is.
    fn next(&mut self) -> Option<VmId> {
        let after = self.bursts.keys().find(|id| **id > self.last).or_else(|| self.bursts.keys().next());
        self.last = *after?;
        Some(self.last)
    }

    /// Asks for a VM's next batch. How many pages that is: none when those that were found have all changed.
    fn ask(&mut self, id: VmId, vms: &Vms, bounds: Bounds) -> Result<u32, End> {
        let (vm, cold) = vms.get(&id).ok_or(End::VmGone)?;
        let burst = self.bursts.get_mut(&id).ok_or(End::VmGone)?;
        let slots = burst.take(vm, cold, bounds)?;
        let one = |slot: &Slot| vm.in_file(*slot, Slot(slot.0.saturating_add(1)), 1);
        let wanted: Vec<_> = slots.iter().flat_map(one).collect();
        let pages = u32::try_from(wanted.len()).unwrap_or(u32::MAX);
        if pages > 0 {
            let (tell, fetched) = mpsc::channel();
            let bell = Arc::clone(&self.bell);
            vm.fetch(wanted, move |pages| {
                // Nobody hears it once the shrinker is gone.
                let _ = tell.send(pages);
                bell.ring();
            });
            self.on_its_way = Some(OnItsWay { vm: id, wanted: true, fetched });
        }
        Ok(pages)
    }

    /// Publishes what has come of the batch on its way.
    fn arrive(&mut self, vms: &Vms) {
        let Some(OnItsWay { vm: id, wanted, fetched }) = &self.on_its_way else { return };
        let (id, wanted, fetched) = match fetched.try_recv() {
            Ok(pages) => (*id, *wanted, pages),
            Err(TryRecvError::Empty) => return,
            Err(TryRecvError::Disconnected) => (*id, false, Vec::new()),
        };
        self.on_its_way = None;
        if wanted
            && let (Some((vm, _)), Some(burst)) = (vms.get(&id), self.bursts.get_mut(&id))
            && let Err(why) = burst.bring_back(vm, fetched)
        {
            self.end(id, why);
        }
    }
}

impl Burst {
    /// The next slots to be looked at.
    fn take(&mut self, vm: &VmStore, cold: &ColdEnd, bounds: Bounds) -> Result<Vec<Slot>, End> {
        let loads = vm.accounting().events.loaded_from_file;
        let new_loads = loads.saturating_sub(std::mem::replace(&mut self.loaded_from_file, loads));
        self.left_pages = self.left_pages.saturating_sub(new_loads);
        if self.left_pages == 0 {
            return Err(End::Enough);
        }
        let batch_bytes = (BATCH_PAGES * object_bytes_max()) as u64;
        if bounds.room_bytes.min(cold.room_bytes()) < batch_bytes {
            return Err(End::NoRoom);
        }
        let now = Age::now();
        if self.found.is_empty() {
            let all_failed =
                |(found, failed_pages)| found as u64 == self.failed_pages.saturating_sub(failed_pages);
            if self.last_scan.is_some_and(all_failed) {
                return Err(End::Unreadable);
            }
            self.find(vm, now, bounds.idle);
        }
        let most = BATCH_PAGES.min(usize::try_from(self.left_pages).unwrap_or(usize::MAX));
        let mut slots = self.found.split_off(self.found.len().saturating_sub(most));
        if slots.is_empty() {
            let none = vm.accounting().held.file_pages == 0;
            return Err(if none { End::NothingLeft } else { End::Unwanted });
        }
        // Some seconds may have passed since they were found.
        slots.retain(|slot| {
            let record = vm.table().record(*slot);
            record.is_some_and(|record| {
                self.is_wanted(Age::from_bits(record.age.load(Ordering::Relaxed)), now, bounds.idle)
            })
        });
        self.left_pages -= slots.len() as u64;
        Ok(slots)
    }

    /// Not those that would leave again at once, nor those that the guest has loaded since it was given memory: it has no
    /// reason to drop its copies.
    fn is_wanted(&self, age: Age, now: Age, idle: Option<Duration>) -> bool {
        let unused = age.until(now);
        idle.is_none_or(|idle| unused < idle) && !(age.is_loaded() && unused <= self.since.until(now))
    }

    /// Looks for the hottest pages of those that are wanted.
    fn find(&mut self, vm: &VmStore, now: Age, idle: Option<Duration>) {
        let count = usize::try_from(self.left_pages.min(SCAN_PAGES)).unwrap_or(usize::MAX);
        let found = hottest_in_file(vm.table(), count, now, |age| self.is_wanted(age, now, idle));
        self.found = found.into_iter().rev().map(|(_, slot)| slot).collect();
        self.last_scan = Some((self.found.len(), self.failed_pages));
    }

    fn bring_back(&mut self, vm: &VmStore, fetched: Vec<Fetched>) -> Result<(), End> {
        for page in fetched {
            match vm.read_back(page) {
                Ok(ReadBack::Yes) => self.back_pages += 1,
                Ok(ReadBack::Stale) => {}
                Ok(ReadBack::NoRoom) => return Err(End::NoRoom),
                Err(err) => {
                    self.failed_pages += 1;
                    // A damaged record is its load's affair; where reads fail, others' loads are better left in peace.
                    if matches!(err, LoadError::Read(_)) {
                        return Err(End::FileFails);
                    }
                }
            }
        }
        Ok(())
    }
}
