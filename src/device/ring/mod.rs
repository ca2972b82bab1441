//! One running virtqueue, as its worker sees it: takes heads off the available ring, carries the requests out a
//! bounded number of pages a turn, and puts answers on the used ring, with one signal for all of a turn. Lives on its
//! worker's thread from start to stop; a ring that makes no sense is latched as broken and left alone.

mod jobs;
mod waiting;
mod work;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use event_manager::{EventOps, Events, MutEventSubscriber, SubscriberId};
use vhost_user_backend::{VringMutex, VringState, VringT};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic};
use vmm_sys_util::epoll::EventSet;

use super::HOW_TO_SHARE;
use super::complaints::Complaint;
use super::doorbell;
use super::guest_memory::{Memory, is_lost};
use super::inflight::InflightQueue;
use super::latency::RingLatencies;
use super::roster::Roster;
use super::stream::Ways;
use super::vm::{DeviceVm, WaitingShare};
use crate::page::Page;
use crate::store::codec::Scratch;
use jobs::{Jobs, Taken};

/// The guest's memory as the session changes it.
pub type GuestMemory = GuestMemoryAtomic<Memory>;
/// A virtqueue that session and worker share.
pub type Vring = VringMutex<GuestMemory>;

/// Kicks without a request from which on a ring that never had one is suspicious: QEMU sends one when it starts a ring.
const EMPTY_KICKS_MAX: u32 = 2;

/// Whose a ring is.
pub struct Owner {
    /// The VM.
    pub vm: Arc<DeviceVm>,
    /// The number of its session.
    pub session: u64,
}

/// What becomes of stores that wait for room when their ring stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// They have one last try, and fail if there is no room: the VMM waits for the ring to be settled.
    Settle,
    /// They stay in flight: the VMM is gone, and its in-flight region brings them back with it. Without a region they
    /// are settled.
    LeaveInFlight,
}

/// What a ring did in its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Worked on some pages; there may be more.
    Busy,
    /// Found nothing to do.
    Idle,
    /// Can't run now, or ever, and is not on the active list any more.
    Parked,
}

/// What a worker lends to its rings.
#[derive(Default)]
pub struct Workbench {
    /// Buffers and codec contexts.
    pub scratch: Scratch,
    /// The page on its way.
    pub page: Box<PageBuffer>,
}

/// A page that starts as zeros.
pub struct PageBuffer(pub Page);

impl Default for PageBuffer {
    fn default() -> Self {
        Self(crate::page::ZERO_PAGE)
    }
}

/// A running virtqueue.
pub struct Ring {
    vm: Arc<DeviceVm>,
    /// The session that it belongs to.
    session: u64,
    vring: Vring,
    memory: GuestMemory,
    inflight: Option<InflightQueue>,
    roster: Arc<Roster>,
    id: Option<SubscriberId>,
    phase: Phase,
    /// The stores that wait for room, as the VM's status knows of them.
    waits: WaitingShare,
    /// How long its requests took.
    latencies: RingLatencies,
    /// Whether the roster knows that the ring has to be looked at now and then: stores wait for room, or loads for pages
    /// that others asked for to have come.
    looked_at: bool,
    /// Whom to tell when the ring has stopped; nothing more is taken then.
    stop: Option<Sender<()>>,
    /// How it stops.
    ending: Ending,
    store_deadline: Duration,
    /// Which way its pages go into the guest's memory.
    ways: Ways,
    /// Kicks while the guest has not put anything on the ring yet.
    empty_kicks: u32,
    jobs: Jobs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Not yet run: indices have to be read first, and another session may still own the VM.
    Waiting,
    Running,
    Broken,
}

/// The ring's indices or addresses make no sense.
struct Broken;

impl<E: std::error::Error> From<E> for Broken {
    fn from(_: E) -> Self {
        Self
    }
}

impl Ring {
    /// A ring that starts when its worker, the one with this roster, gives it a turn.
    pub fn new(
        owner: Owner,
        vring: Vring,
        memory: GuestMemory,
        inflight: Option<InflightQueue>,
        store_deadline: Duration,
        roster: Arc<Roster>,
    ) -> Self {
        let jobs = Jobs::new(Arc::clone(owner.vm.fetches()), store_deadline);
        let waits = WaitingShare::new(Arc::clone(&owner.vm));
        let latencies = owner.vm.latencies().begin_ring();
        Self {
            vm: owner.vm,
            session: owner.session,
            vring,
            memory,
            inflight,
            roster,
            id: None,
            phase: Phase::Waiting,
            waits,
            latencies,
            looked_at: false,
            stop: None,
            ending: Ending::Settle,
            store_deadline,
            ways: Ways::default(),
            empty_kicks: 0,
            jobs,
        }
    }

    /// Tells the ring its number at the worker, and gives it a first turn.
    pub fn activate(&mut self, id: SubscriberId) {
        self.id = Some(id);
        self.roster.put(id);
    }

    /// Works for one turn, on so many pages at most. `others_wait` says whether other rings are likely to have something to
    /// do as well.
    pub fn turn(&mut self, bench: &mut Workbench, pages: u32, others_wait: bool) -> Progress {
        let progress = self.take_turn(bench, pages, others_wait);
        self.waits.set(self.jobs.waiting.len() as u64);
        let later = self.waits.any() || self.jobs.stalled_by_others();
        if let Some(id) = self.id
            && later != self.looked_at
        {
            self.looked_at = later;
            self.roster.set_waiting(id, later);
        }
        self.tell_if_stopped();
        progress
    }

    fn take_turn(&mut self, bench: &mut Workbench, pages: u32, others_wait: bool) -> Progress {
        if self.phase == Phase::Waiting && self.stop.is_none() {
            if !self.vm.claim(self.session, self.id, &self.roster) {
                return Progress::Parked;
            }
            self.phase = if self.start().is_ok() { Phase::Running } else { self.broken() };
        }
        if self.phase != Phase::Running {
            self.id.inspect(|id| self.roster.remove(*id));
            return Progress::Parked;
        }
        self.work(bench, pages, others_wait).unwrap_or_else(|Broken| {
            self.phase = self.broken();
            Progress::Parked
        })
    }

    /// Kicks without a request, on a ring that never had one: memory that the VMM maps for itself alone looks like that.
    fn doubt_memory(&mut self) {
        let memory = self.memory.memory();
        let vring = self.vring.get_ref();
        let queue = vring.get_queue();
        let untouched = queue.next_avail() == 0
            && matches!(queue.avail_idx(&*memory, Ordering::Acquire), Ok(index) if index.0 == 0);
        if !untouched {
            return;
        }
        self.empty_kicks = self.empty_kicks.saturating_add(1);
        if self.empty_kicks == EMPTY_KICKS_MAX && self.vm.complaints().is_news(Complaint::NotShared) {
            tracing::warn!(
                vm = self.vm.name(),
                "the guest calls and has nothing to say: if it hangs, its memory is not shared; {HOW_TO_SHARE}"
            );
        }
    }

    fn broken(&mut self) -> Phase {
        self.id.inspect(|id| self.roster.remove(*id));
        // Nobody can be answered any more. What is on its way from the file finds nobody who asked for it, and counts
        // until it has come.
        self.jobs = Jobs::new(Arc::clone(self.vm.fetches()), self.store_deadline);
        self.vm.count_error();
        if self.vm.complaints().is_news(Complaint::BrokenRing) {
            let vm = self.vm.name();
            if is_lost(&self.memory.memory()) {
                tracing::warn!(
                    vm,
                    "the VMM has cut the guest's memory short, or the host's memory is failing there: the VM is not served any more"
                );
            } else {
                tracing::warn!(vm, "a virtqueue makes no sense and is left alone until the guest resets it");
            }
        }
        Phase::Broken
    }

    /// Finds out where to go on: behind what the guest's used ring says was answered, after carrying out again what
    /// was in flight.
    fn start(&mut self) -> Result<(), Broken> {
        let memory = self.memory.memory();
        let mut vring = self.vring.get_mut();
        let queue = vring.get_queue_mut();
        queue.set_ready(true);
        if !queue.is_valid(&*memory) {
            return Err(Broken);
        }
        let used_index = queue.used_idx(&*memory, Ordering::Acquire)?.0;
        queue.set_next_used(used_index);
        if let Some(inflight) = &mut self.inflight {
            let at = Instant::now();
            self.jobs.taken =
                inflight.resume(used_index).into_iter().map(|head| Taken { head, at }).collect();
            let behind = u16::try_from(self.jobs.taken.len()).map_err(|_| Broken)?;
            queue.set_next_avail(used_index.wrapping_add(behind));
        }
        // A predecessor may have died between an answer and its signal.
        doorbell::call(&vring)?;
        Ok(())
    }

    /// Leaves the list of rings that have turns, and asks the guest for a kick from now on.
    pub fn sleep(&mut self) {
        // One that waits for its session or is broken took itself off the list, and may be back on it for a reason.
        let (Phase::Running, Some(id)) = (self.phase, self.id) else { return };
        self.roster.remove(id);
        // What comes from here on puts the ring back by itself; what came before is found here.
        let size = self.vring.get_ref().get_queue().size();
        if self.jobs.has_mail()
            || self.jobs.waiting.room_made(self.roster.room())
            || (self.places(size) > 0 && matches!(self.vring.enable_notification(), Ok(true)))
        {
            self.roster.put(id);
        }
    }

    /// Takes nothing more, carries out what was taken, but for stores that wait for room as `ending` says, and then
    /// tells `told`.
    pub fn stop(&mut self, told: Sender<()>, ending: Ending) {
        (self.stop, self.ending) = (Some(told), ending);
        let inflight = self.inflight.as_ref().filter(|_| ending == Ending::LeaveInFlight);
        self.jobs.waiting.forget(|job| inflight.is_some_and(|inflight| inflight.is_taken(job.head)));
        if let Some(id) = self.id {
            if self.phase == Phase::Waiting {
                self.vm.forget_claim(id, &self.roster);
            }
            self.roster.put(id);
        }
        self.tell_if_stopped();
    }

    fn tell_if_stopped(&self) {
        if let Some(told) = &self.stop
            && (self.phase != Phase::Running || self.jobs.is_empty())
        {
            // Whoever asked may have given up.
            let _ = told.send(());
        }
    }
}

impl MutEventSubscriber for Ring {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let taken = doorbell::take_kicks(&self.vring.get_ref());
        if taken.is_err() {
            // It is not heard any more: each kick would hold the worker up.
            let _ = ops.remove(events);
            self.phase = self.broken();
            return;
        }
        self.doubt_memory();
        if let Some(id) = self.id {
            self.roster.put(id);
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let vring = self.vring.get_ref();
        let added = kick(&vring).map(|kick| ops.add(Events::new(kick, EventSet::IN)));
        if let Some(Err(err)) = added
            && self.vm.complaints().is_news(Complaint::BrokenRing)
        {
            tracing::error!(?err, vm = self.vm.name(), "a kick eventfd can't be watched");
        }
    }
}

fn kick(vring: &VringState<GuestMemory>) -> Option<&vmm_sys_util::event::EventConsumer> {
    vring.get_kick().as_ref()
}
