//! The shrinker: the one thread that takes pages off the cold end. It sleeps on the store's bell; when that rings, or
//! its period is over, it looks at every VM's numbers, asks the policy, copies the chosen pages out, writes them to the
//! file in one batch, and publishes those that have not changed meanwhile. Between batches it does what keeps memory
//! and file in shape: compaction, cleaning, recompression.
//!
//! Holds no lock while it writes. Everything it knows can be forgotten: a new daemon finds out again.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::cleaning::{Cleaning, Suspects, Vms};
use super::cold::ColdEnd;
pub use super::handle::Handle;
use super::isolate::{BATCH_BYTES_MAX, Isolated, isolate_some};
use super::policy::{BATCH_PAGES_MAX, Decision, Policy, PoolView, Reason, is_full};
use super::pressure::Level;
use super::read_back::{Bounds, Order, ReadingBack};
use super::recompress::{ColdOptions, Recompression};
use super::requests::Requests;
use super::stats::ShrinkerStats;
use crate::ids::{Owner, VmId};
use crate::store::Store;
use crate::store::arena::compact;
use crate::store::codec::Scratch;
use crate::store::lru::Age;
use crate::store::pool::PoolId;
use crate::store::room::{Marks, Outlook, Shared};
use crate::store::vm::VmStore;
use crate::threads::{self, Role};
use crate::writeback::{Outgoing, WriteError, Writeback};

/// How long the shrinker sleeps when nobody wakes it.
const PERIOD: Duration = Duration::from_secs(1);
/// The same while there are old pages to write or pages to compress anew, at a bounded rate.
const PERIOD_BUSY: Duration = Duration::from_millis(100);
/// How long after a refused write the file is tried again.
const RETRY: Duration = Duration::from_millis(500);
/// Room that the largest span needs, and some objects: a pool this close to its maximum is full.
const HEADROOM_BYTES: u64 = 128 << 10;
/// Half-dead segments are cleaned before pages leave when less than this share of the file is free: guests that write
/// without a pause leave no other time, and a file that is full makes them wait.
const FREE_SEGMENTS_PERCENT_LOW: u64 = 15;
/// Segments that are cleaned for the sake of one batch: each gains a sixteenth, and a batch is half a segment.
const CLEAN_FOR_BATCH_MAX: usize = 16;
/// The share of the arena that may be free places before objects are moved together. With headers and what is lost in
/// size classes the arena then stays within 12 % of the payload.
const SLACK_PERCENT_MAX: u64 = 7;
/// The same while nothing else is to be done: then moving objects costs nobody anything.
const SLACK_PERCENT_IDLE: u64 = 2;
/// Batches after which upkeep has its turn although there is more to write.
const UPKEEP_EVERY: u32 = 16;
/// Objects moved at a time, so that a VM at its limit need not wait for all of them.
const MOVES_MAX: usize = 2048;
/// A VM that loads more pages a second than this from the file keeps the disk busy.
const DISK_IDLE_LOADS: f64 = 20.0;

/// How the shrinker works.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// The rules.
    pub policy: Policy,
    /// Pages unused for longer than this leave while the disk is idle.
    pub idle: Option<Duration>,
    /// When a page is cold, and how much time may be spent on such pages.
    pub cold: ColdOptions,
}

/// The shrinker's state. [`Shrinker::turn`] does one step; [`Shrinker::start`] runs it on a thread of its own.
pub struct Shrinker {
    store: Arc<Store>,
    policy: Policy,
    made_room: Box<dyn Fn() + Send>,
    stats: Arc<ShrinkerStats>,
    requests: Arc<Requests>,
    vms: Vms,
    full: bool,
    /// Bytes that the arena may still take until it is where shrinking stops.
    room_bytes: u64,
    /// The arena has to come below this because the host runs short.
    goal_bytes: Option<u64>,
    refused: Option<Instant>,
    /// Whether somebody was told that pages can't leave.
    complained: bool,
    /// Where the search for a VM above its limit goes on.
    first: usize,
    /// Whether limits or the pool's maximum come first in this batch.
    limits_first: bool,
    steps: u32,
    recompression: Recompression,
    /// What the arena took when there was nothing to do last.
    used_at_rest_bytes: u64,
    reading_back: ReadingBack,
    suspects: Suspects,
    scratch: Scratch,
    buffer: Vec<u8>,
}

/// How a step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// There may be more to do at once.
    Again,
    /// There is something to do, but not all at once.
    Later,
    /// Nothing is to do.
    Rest,
}

impl Shrinker {
    /// A shrinker of `store`. `made_room` is called after pages have left.
    #[must_use]
    pub fn new(store: Arc<Store>, options: Options, made_room: impl Fn() + Send + 'static) -> Self {
        let requests = Arc::new(Requests::default());
        requests.set_idle(options.idle);
        requests.set_cold(options.cold);
        let reading_back = ReadingBack::new(Arc::clone(&store.shared().bell));
        Self {
            store,
            policy: options.policy,
            made_room: Box::new(made_room),
            stats: Arc::default(),
            requests,
            vms: Vms::new(),
            full: false,
            room_bytes: 0,
            goal_bytes: None,
            refused: None,
            complained: false,
            first: 0,
            limits_first: false,
            steps: 0,
            recompression: Recompression::default(),
            used_at_rest_bytes: 0,
            reading_back,
            suspects: Suspects::default(),
            scratch: Scratch::default(),
            buffer: Vec::new(),
        }
    }

    /// Runs it on a thread of its own.
    ///
    /// # Errors
    /// When the thread can't be started.
    pub fn start(mut self) -> io::Result<Handle> {
        let (store, stats, requests) =
            (Arc::clone(&self.store), Arc::clone(&self.stats), Arc::clone(&self.requests));
        let thread = threads::spawn("shrinker", Role::Shrinker, move || self.run())?;
        Ok(Handle::new(store, stats, requests, thread))
    }

    /// What has been done so far.
    #[must_use]
    pub fn stats(&self) -> &Arc<ShrinkerStats> {
        &self.stats
    }

    /// The host runs short of memory: some of the pool leaves in the steps that follow.
    pub fn request_pressure(&self, level: Level) {
        self.requests.press(level);
    }

    /// As many pages of a VM come back from the writeback file, in the steps that follow.
    pub fn request_read_back(&self, vm: VmId, pages: u64) {
        self.requests.read_back(vm, Order::Given(pages));
    }

    /// No more of them do.
    pub fn request_no_read_back(&self, vm: VmId) {
        self.requests.read_back(vm, Order::Taken);
    }

    /// Moves idle pages to the current pool, in the steps that follow.
    pub fn request_recompression(&self) {
        self.requests.recompress.store(true, Ordering::Relaxed);
    }

    fn run(&mut self) {
        let mut step = Step::Again;
        while !self.requests.stop.load(Ordering::Acquire) {
            let wait = match step {
                Step::Again => Duration::ZERO,
                Step::Later => PERIOD_BUSY,
                Step::Rest => PERIOD,
            };
            self.store.shared().bell.wait(wait);
            step = self.turn();
        }
    }

    /// Does one step: one batch of evictions, or else some housekeeping.
    pub fn turn(&mut self) -> Step {
        self.look();
        if self.refused.is_some_and(|at| at.elapsed() < RETRY) {
            return self.housekeeping();
        }
        self.refused = None;
        self.steps = self.steps.wrapping_add(1);
        if self.steps.is_multiple_of(UPKEEP_EVERY) {
            self.upkeep(true);
            self.with_cleaning(|cleaning| cleaning.tidy());
        }
        // Room between objects is room as well, and cheaper to have.
        if (self.full || self.goal_bytes.is_some()) && self.is_sparse(SLACK_PERCENT_MAX) && self.compact() > 0
        {
            return Step::Again;
        }
        let shared = Arc::clone(self.store.shared());
        let file = shared.file.as_ref().filter(|file| file.is_on());
        let (batch, reason) = if file.is_some() { self.isolate() } else { (Vec::new(), None) };
        let (Some(file), Some(reason)) = (file, reason) else {
            // Whoever could give something up has: what pages later must not pay for a shortage of today.
            self.goal_bytes = None;
            shared.set_outlook(if self.full { Outlook::NobodyGives } else { Outlook::Open });
            return self.housekeeping();
        };
        shared.set_outlook(Outlook::Open);
        if batch.is_empty() {
            // All of it had changed since it was found.
            return Step::Again;
        }
        self.stats.ran(reason);
        self.with_cleaning(|cleaning| cleaning.clean(|| file.half_dead(FREE_SEGMENTS_PERCENT_LOW)));
        let mut written = self.write(file, &batch);
        // What is dead in a full file is worth having however little it is, a segment at a time until the batch fits.
        for _ in 0..CLEAN_FOR_BATCH_MAX {
            let full = written == Err(WriteError::Full);
            if !full || !self.with_cleaning(|cleaning| cleaning.clean(|| file.emptiest())) {
                break;
            }
            written = self.write(file, &batch);
        }
        match written {
            Ok(()) if reason == Reason::Idle => {
                self.read_back();
                Step::Later
            }
            Ok(()) => Step::Again,
            Err(err) => self.refused(&err),
        }
    }

    /// Notes that pages can't leave for a while.
    fn refused(&mut self, err: &WriteError) -> Step {
        // Said once, until a batch is written again.
        if !self.complained {
            tracing::warn!(%err, "pages can't leave for the writeback file");
        }
        (self.refused, self.complained, self.goal_bytes) = (Some(Instant::now()), true, None);
        // Those that were to leave are still the coldest.
        self.vms.values_mut().for_each(|(_, cold)| cold.forget());
        // Those that wait need not wait longer: there will be no room soon.
        self.store.shared().set_outlook(Outlook::FileRefuses);
        (self.made_room)();
        Step::Later
    }

    /// Looks at all VMs, and forgets those that are gone.
    fn look(&mut self) {
        let shared = Arc::clone(self.store.shared());
        shared.tell_written_off();
        let mut known = std::mem::take(&mut self.vms);
        for vm in self.store.in_use() {
            let id = vm.id();
            let cold = known.remove(&id).map(|(_, cold)| cold);
            self.vms.insert(id, {
                let cold = cold.unwrap_or_else(|| ColdEnd::new(&vm));
                (vm, cold)
            });
        }
        for (vm, cold) in self.vms.values_mut() {
            cold.look(vm, |limit| headroom(shared.marks(limit), limit, HEADROOM_BYTES / 8));
        }
        let (used, marks) = (shared.arena.used_bytes(), pool_marks(&shared));
        self.full = is_full(self.full, used, marks);
        self.room_bytes = if self.full { 0 } else { marks.stop_bytes.saturating_sub(used) };
        self.stats.set_full(self.full);
        if shared.take_shortage() {
            self.requests.press(Level::Moderate);
        }
        match self.requests.pressure.swap(0, Ordering::Relaxed) {
            0 => {}
            percent => self.goal_bytes = Some(used - used / 100 * u64::from(percent)),
        }
        self.goal_bytes = self.goal_bytes.filter(|goal| used > *goal);
        self.reading_back.follow(&self.requests, &self.vms, self.goal_bytes.is_some());
    }

    /// What the policy is to know of the pool. VMs that may have to give something up have their cold ends looked for.
    fn view(&mut self) -> PoolView {
        self.limits_first = !self.limits_first;
        let disk_idle = self.vms.values().all(|(_, cold)| cold.loads_rate() < DISK_IDLE_LOADS);
        let pool = PoolView {
            now: Age::now(),
            first: self.first,
            limits_first: self.limits_first,
            full: self.full,
            pressure: self.goal_bytes.is_some(),
            idle: self.requests.idle().filter(|_| disk_idle),
        };
        let pressed = pool.full || pool.pressure;
        for (vm, cold) in self.vms.values_mut() {
            if (pressed && cold.is_above_reserve()) || cold.view().over_limit_bytes > 0 {
                cold.refill(vm, pool.now, None);
            } else if pool.idle.is_some() {
                cold.refill(vm, pool.now, pool.idle);
            }
        }
        pool
    }

    /// Copies out the pages that are to leave next, in the policy's order, until a batch is together.
    fn isolate(&mut self) -> (Vec<Isolated>, Option<Reason>) {
        let mut pool = self.view();
        let (mut batch, mut why) = (Vec::new(), None);
        self.buffer.clear();
        let mut vms: Vec<_> = self.vms.values_mut().collect();
        let arena = self.store.arena();
        let mut left = BATCH_PAGES_MAX;
        while left > 0 && self.buffer.len() < BATCH_BYTES_MAX {
            let views: Vec<_> = vms.iter().map(|(_, cold)| cold.view()).collect();
            let Decision::Evict { vm, pages, reason } = self.policy.decide(&pool, &views) else {
                break;
            };
            // One reason a batch: what is over its limit comes first, and is looked at again after each.
            if why.is_some_and(|why| why != reason) {
                break;
            }
            why = Some(reason);
            let runs = if reason == Reason::Limit {
                pool.first = vm + 1;
                vec![(vm, pages.min(left))]
            } else {
                self.policy.merge(&pool, &views, left)
            };
            for (vm, pages) in runs {
                left -= pages;
                isolate_some(vms[vm], (pages, reason), arena, &mut self.buffer, &mut batch);
            }
        }
        self.first = pool.first;
        (batch, why)
    }

    /// Writes a batch and publishes where it is.
    fn write(&mut self, file: &Writeback, batch: &[Isolated]) -> Result<(), WriteError> {
        let mut rest = &self.buffer[..];
        let outgoing: Vec<Outgoing<'_>> = batch
            .iter()
            .map(|page| {
                let (object, behind) = rest.split_at(page.object_bytes);
                rest = behind;
                let (vm, _) = &self.vms[&page.vm];
                Outgoing { owner: Owner { vm: page.vm, slot: page.slot }, cipher: vm.cipher(), object }
            })
            .collect();
        let places = file.append(&outgoing)?;
        self.complained = false;
        let (mut pages, mut bytes) = (0, 0);
        for (page, place) in batch.iter().zip(places) {
            if self.vms[&page.vm].0.write_back(page.slot, page.generation, place) {
                pages += 1;
                bytes += page.object_bytes as u64;
            }
        }
        self.stats.evicted(pages, bytes, batch.len() as u64 - pages);
        (self.made_room)();
        Ok(())
    }

    /// What keeps the file in shape, if it is there and well.
    fn with_cleaning(&self, does: impl FnOnce(&Cleaning<'_>) -> bool) -> bool {
        let shared = self.store.shared();
        let Some(file) = shared.file.as_ref().filter(|file| file.is_on()) else { return false };
        does(&Cleaning { file, vms: &self.vms, stats: &self.stats, suspects: &self.suspects })
    }

    /// What is done while nobody waits for room.
    fn housekeeping(&mut self) -> Step {
        if self.is_sparse(SLACK_PERCENT_MAX) && self.compact() > 0 {
            return Step::Again;
        }
        let reads = self.read_back();
        if self.with_cleaning(|cleaning| cleaning.tidy() || cleaning.look_at_suspect()) {
            return Step::Again;
        }
        let more = self.upkeep(false);
        // Guests that store and discard would make it go on and on.
        let used_before = std::mem::replace(&mut self.used_at_rest_bytes, self.store.arena().used_bytes());
        if !more
            && used_before == self.used_at_rest_bytes
            && self.is_sparse(SLACK_PERCENT_IDLE)
            && self.compact() > 0
        {
            self.used_at_rest_bytes = self.store.arena().used_bytes();
            return Step::Later;
        }
        if more || reads { Step::Later } else { Step::Rest }
    }

    /// Pages come back to guests that were given memory. Whether there are more to come.
    fn read_back(&mut self) -> bool {
        let shared = self.store.shared();
        if !shared.file.as_ref().is_some_and(|file| file.is_on()) {
            self.reading_back.give_up();
            return false;
        }
        let bounds = Bounds { room_bytes: self.room_bytes, idle: self.requests.idle() };
        self.reading_back.some(&self.vms, bounds)
    }

    /// What has to go on however busy the shrinker is, and is bounded by itself. Whether there is more to do.
    fn upkeep(&mut self, busy: bool) -> bool {
        self.store.end_drained_pools();
        if self.requests.recompress.swap(false, Ordering::Relaxed) {
            self.recompression.begin(self.objects_of_other_pools());
        }
        let vms: Vec<_> = self.vms.values().map(|(vm, _)| Arc::clone(vm)).collect();
        self.recompression.set_options(self.requests.cold());
        let burst = self.recompression.some(&self.store.shared().pools, &vms, busy, &mut self.scratch);
        self.stats.recompressed(burst.moved, self.recompression.objects(), self.recompression.waiting());
        burst.more
    }

    /// What there is to compress anew.
    fn objects_of_other_pools(&self) -> u64 {
        let pools = &self.store.shared().pools;
        let (current, cold) = (pools.current().id, pools.cold().map(|pool| pool.id));
        let stays = |id: PoolId| id == current || Some(id) == cold;
        let other = |vm: &VmStore| -> u64 {
            let by_pool = (0..).map(PoolId::from_bits).zip(vm.accounting().held.objects_by_pool);
            by_pool.filter(|(id, _)| !stays(*id)).map(|(_, objects)| objects).sum()
        };
        self.vms.values().map(|(vm, _)| other(vm)).sum()
    }

    /// Whether more of the arena lies between objects than should, and some of it can be had back: a few free places of
    /// each size class always remain.
    fn is_sparse(&self, slack_percent_max: u64) -> bool {
        let arena = &self.store.shared().arena;
        arena.slack_bytes() * 100 > arena.used_bytes() * slack_percent_max && arena.gain_bytes() > 0
    }

    /// Moves objects of sparse spans together, some at a time. How many were moved.
    fn compact(&mut self) -> u64 {
        let (vms, scratch) = (&self.vms, &mut self.scratch);
        let compacted = compact(&self.store.shared().arena, MOVES_MAX, |planned| {
            vms.get(&planned.owner.vm).is_some_and(|(vm, _)| vm.relocate(planned, scratch))
        });
        if compacted.freed_bytes > 0 {
            (self.made_room)();
        }
        self.stats.compacted(compacted.moved as u64);
        compacted.freed_bytes
    }
}

/// Where the pool is between: above the one the shrinker makes room, down to the other. What reserves may still claim is as
/// good as used.
#[must_use]
pub fn pool_marks(shared: &Shared) -> Marks {
    let max_bytes = shared.arena.max_bytes().saturating_sub(shared.unclaimed_bytes());
    headroom(shared.marks(max_bytes), max_bytes, HEADROOM_BYTES)
}

/// Marks that leave room for what the next store may need, however small the difference between them is.
fn headroom(marks: Marks, max_bytes: u64, headroom_bytes: u64) -> Marks {
    let start_bytes = marks.start_bytes.min(max_bytes.saturating_sub(headroom_bytes));
    let stop_bytes = marks.stop_bytes.min(start_bytes.saturating_sub(headroom_bytes));
    Marks { start_bytes, stop_bytes }
}
