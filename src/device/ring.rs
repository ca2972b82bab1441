//! One running virtqueue, as its worker sees it: takes heads off the available ring, carries the requests out a
//! bounded number of pages a turn, and puts answers on the used ring, with one signal for all of a turn. Lives on its
//! worker's thread from start to stop; a ring that makes no sense is latched as broken and left alone.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use event_manager::{EventOps, Events, MutEventSubscriber, SubscriberId};
use parking_lot::Mutex;
use vhost_user_backend::{VringMutex, VringState, VringT};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic};
use vmm_sys_util::epoll::EventSet;

use super::Memory;
use super::blk::execute::{Execution, Outcome, Turn};
use super::blk::request::{self, DescriptorTable, Malformed, Status};
use super::inflight::InflightQueue;
use super::vm::DeviceVm;
use crate::page::{PAGE_SIZE_U64, Page};
use crate::store::codec::Scratch;
use crate::store::lru::Age;

/// The guest's memory as the session changes it.
pub type GuestMemory = GuestMemoryAtomic<Memory>;
/// A virtqueue that session and worker share.
pub type Vring = VringMutex<GuestMemory>;

/// Pages that one ring may work on before the next ring has its turn: about a tenth of a millisecond.
const TURN_PAGES: u32 = 32;
/// Heads that are taken at once. Taking more would only make the in-flight region longer to go through.
const TAKEN_MAX: usize = 64;

/// The rings of a worker that have work or had some a moment ago.
pub type Active = Arc<Mutex<Vec<SubscriberId>>>;

/// What a ring did in its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Worked on this many pages; there may be more.
    Busy(u32),
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
    active: Active,
    id: Option<SubscriberId>,
    phase: Phase,
    /// Nothing more is taken: the ring is about to stop.
    stopping: bool,
    /// Heads that were taken and not started.
    taken: VecDeque<u16>,
    /// The request that is being carried out.
    current: Option<(u16, Execution)>,
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
    /// A ring that starts when its worker gives it a turn.
    pub fn new(
        vm: Arc<DeviceVm>,
        session: u64,
        vring: Vring,
        memory: GuestMemory,
        inflight: Option<InflightQueue>,
        active: Active,
    ) -> Self {
        Self {
            vm,
            session,
            vring,
            memory,
            inflight,
            active,
            id: None,
            phase: Phase::Waiting,
            stopping: false,
            taken: VecDeque::new(),
            current: None,
        }
    }

    /// Tells the ring its number at the worker, and gives it a first turn.
    pub fn activate(&mut self, id: SubscriberId) {
        self.id = Some(id);
        let mut active = self.active.lock();
        if !active.contains(&id) {
            active.push(id);
        }
    }

    /// Works for one turn.
    pub fn turn(&mut self, bench: &mut Workbench) -> Progress {
        if self.phase == Phase::Waiting {
            if !self.vm.claim(self.session, self.id, &self.active) {
                return Progress::Parked;
            }
            self.phase = if self.start().is_ok() { Phase::Running } else { self.broken() };
        }
        if self.phase == Phase::Broken {
            return Progress::Parked;
        }
        self.work(bench, TURN_PAGES).unwrap_or_else(|Broken| {
            self.phase = self.broken();
            Progress::Parked
        })
    }

    fn broken(&self) -> Phase {
        self.active.lock().retain(|other| Some(*other) != self.id);
        // A guest can do this as often as it likes; the log grows with the logarithm of that.
        if self.vm.count_error().saturating_add(1).is_power_of_two() {
            let vm = self.vm.name();
            tracing::warn!(vm, "a virtqueue makes no sense and is left alone until the guest resets it");
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
            self.taken = inflight.resume(used_index).into();
            let behind = u16::try_from(self.taken.len()).map_err(|_| Broken)?;
            queue.set_next_avail(used_index.wrapping_add(behind));
        }
        // A predecessor may have died between an answer and its signal.
        let _ = vring.signal_used_queue();
        Ok(())
    }

    fn work(&mut self, bench: &mut Workbench, budget_pages: u32) -> Result<Progress, Broken> {
        let memory = self.memory.memory();
        let vring = self.vring.clone();
        let mut vring = vring.get_mut();
        self.take_heads(vring.get_queue_mut(), &memory)?;
        if self.current.is_none() && self.taken.is_empty() {
            return Ok(Progress::Idle);
        }
        let vm = Arc::clone(&self.vm);
        let store = vm.store();
        let mut turn =
            Turn { memory: &memory, vm: &store, serial: vm.serial(), now: Age::now(), budget_pages };
        let mut answers = 0u32;
        while turn.budget_pages > 0 {
            let Some((head, status, written, address)) =
                self.next_answer(vring.get_queue_mut(), &mut turn, bench)
            else {
                break;
            };
            self.answer(vring.get_queue_mut(), &memory, head, status, written, address)?;
            answers = answers.saturating_add(1);
        }
        if answers > 0 && vring.needs_notification()? {
            // A call eventfd that can't be written is the VMM's loss; the answers are in the ring.
            let _ = vring.signal_used_queue();
        }
        Ok(Progress::Busy(budget_pages.saturating_sub(turn.budget_pages).max(answers).max(1)))
    }

    fn take_heads(&mut self, queue: &mut Queue, memory: &Memory) -> Result<(), Broken> {
        if self.stopping || self.taken.len() >= TAKEN_MAX / 2 {
            return Ok(());
        }
        let room = TAKEN_MAX.saturating_sub(self.taken.len());
        let size = queue.size();
        let offered = queue.avail_idx(memory, Ordering::Acquire)?.0;
        let mut any = false;
        for chain in queue.iter(memory)?.take(room) {
            let head = chain.head_index();
            if head >= size {
                return Err(Broken);
            }
            if let Some(inflight) = &mut self.inflight {
                inflight.take(head);
            }
            self.taken.push_back(head);
            any = true;
        }
        // An index that says there is more than can be read would keep us looking for ever.
        if !any && offered != queue.next_avail() {
            return Err(Broken);
        }
        Ok(())
    }

    /// Carries requests out until one ends: its head, its answer, what was written, and where the status goes.
    /// `None` when the budget is used up or nothing is left.
    fn next_answer(
        &mut self,
        queue: &Queue,
        turn: &mut Turn<'_>,
        bench: &mut Workbench,
    ) -> Option<(u16, Status, u32, Option<GuestAddress>)> {
        let (head, mut execution) = match self.current.take() {
            Some(current) => current,
            None => {
                let head = self.taken.pop_front()?;
                let table = DescriptorTable { address: GuestAddress(queue.desc_table()), size: queue.size() };
                let capacity = u64::from(turn.vm.slots()).saturating_mul(PAGE_SIZE_U64);
                match request::parse(turn.memory, table, head, capacity) {
                    Ok(request) => (head, Execution::new(request)),
                    Err(malformed) => {
                        // Answering costs time too: a guest that sends nothing else is held to the same budget.
                        turn.budget_pages = turn.budget_pages.saturating_sub(1);
                        self.vm.count_error();
                        return Some(match malformed {
                            Malformed::Answer(address, status) => (head, status, 0, Some(address)),
                            Malformed::NoAnswer => (head, Status::IoErr, 0, None),
                        });
                    }
                }
            }
        };
        match execution.proceed(turn, &mut bench.scratch, &mut bench.page.0) {
            Outcome::Done(status, written) => {
                if status != Status::Ok {
                    self.vm.count_error();
                }
                Some((head, status, written, Some(execution.status_address())))
            }
            Outcome::Unfinished => {
                self.current = Some((head, execution));
                None
            }
        }
    }

    fn answer(
        &mut self,
        queue: &mut Queue,
        memory: &Memory,
        head: u16,
        status: Status,
        written: u32,
        address: Option<GuestAddress>,
    ) -> Result<(), Broken> {
        let mut length = 0;
        if let Some(address) = address
            && memory.write_obj(status as u8, address).is_ok()
        {
            length = written.saturating_add(1);
        }
        if let Some(inflight) = &self.inflight {
            inflight.answering(head);
        }
        queue.add_used(memory, head, length)?;
        if let Some(inflight) = &self.inflight {
            inflight.answered(head, queue.next_used());
        }
        Ok(())
    }

    /// Asks the guest for a kick from now on. False when something arrived meanwhile.
    pub fn sleep(&mut self) -> bool {
        // One that waits or is broken took itself off the list, and may be back on it for a reason.
        self.phase == Phase::Running && matches!(self.vring.enable_notification(), Ok(false) | Err(_))
    }

    /// Carries out everything that was taken, and takes nothing more, so that the ring stops between two requests.
    pub fn drain(&mut self, bench: &mut Workbench) {
        self.stopping = true;
        while self.phase == Phase::Running && (self.current.is_some() || !self.taken.is_empty()) {
            if self.work(bench, u32::MAX).is_err() {
                self.phase = self.broken();
            }
        }
    }
}

impl MutEventSubscriber for Ring {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        // Only the wake-up matters; what there is to do, the ring itself says.
        let _ = self.vring.read_kick();
        if let Some(id) = self.id {
            self.activate(id);
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let vring = self.vring.get_ref();
        let added = kick(&vring).map(|kick| ops.add(Events::new(kick, EventSet::IN)));
        if let Some(Err(err)) = added {
            tracing::error!(?err, vm = self.vm.name(), "a kick eventfd can't be watched");
        }
    }
}

fn kick(vring: &VringState<GuestMemory>) -> Option<&vmm_sys_util::event::EventConsumer> {
    vring.get_kick().as_ref()
}
