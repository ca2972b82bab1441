//! A turn of a ring: taking heads, carrying requests out until the budget is used up, answering.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use vhost_user_backend::VringT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestAddressSpace};

use super::jobs::{Job, Parsed, Taken};
use super::{Broken, Ending, Progress, Ring, Workbench};
use crate::crash_point;
use crate::device::blk::config_space::SECTOR_BYTES;
use crate::device::blk::execute::{Execution, Outcome, Turn};
use crate::device::blk::request::{self, Kind, Malformed, Request, Status};
use crate::device::chain::{DESCRIPTOR_BYTES, DescriptorTable};
use crate::device::complaints::{Chain, Complaint};
use crate::device::doorbell;
use crate::device::guest_memory::{Memory, is_lost};
use crate::device::inflight::InflightQueue;
use crate::device::prefetch::prefetch;
use crate::device::signals::blame;
use crate::device::view::View;
use crate::page::{PAGE_SIZE, PAGE_SIZE_U64};
use crate::store::lru::Age;
use crate::store::vm::{InFile, StoreError};

/// Heads that wait to be started. More would only make the in-flight region longer to go through.
const TAKEN_MAX: usize = 64;
/// Bytes of a chain's descriptors when they lie one behind the other: header, data and status.
const CHAIN_BYTES: usize = 48;

/// What goes onto the used ring.
struct Answer {
    head: u16,
    status: Status,
    /// Bytes of data written for the driver to see.
    written: u32,
    /// Where the status goes, if there is a place for it.
    address: Option<GuestAddress>,
}

/// What became of the next request.
enum Step {
    Answer(Answer),
    /// It got further, waits for something else, or is left in flight.
    SetAside,
    /// It found no room and waits on.
    NoRoom,
    /// There is none that can go on.
    Nothing,
}

impl Ring {
    /// Carries requests out, on so many pages at most. `others_wait` says whether other rings are likely to have some as well.
    pub(super) fn work(
        &mut self,
        bench: &mut Workbench,
        budget_pages: u32,
        others_wait: bool,
    ) -> Result<Progress, Broken> {
        let memory = self.memory.memory();
        if is_lost(&memory) || self.inflight.as_ref().is_some_and(InflightQueue::is_lost) {
            return Err(Broken);
        }
        let vring = self.vring.clone();
        let mut vring = vring.get_mut();
        self.jobs.collect_mail();
        let places = usize::from(vring.get_queue().size() / 2);
        self.jobs.waiting.look(self.roster.room(), self.stop.is_some(), places);
        self.take_heads(vring.get_queue_mut(), &memory)?;
        if !self.jobs.any_to_do() {
            return Ok(Progress::Idle);
        }
        let vm = Arc::clone(&self.vm);
        let store = vm.store();
        let _working = blame::working(store.table());
        let view = View::new(&memory);
        let mut turn = Turn {
            memory: &view,
            vm: &store,
            serial: vm.serial(),
            now: Age::now(),
            budget_pages,
            fetch_pages: 0,
            others_wait,
            ways: self.ways,
            complaints: vm.complaints(),
            log: Vec::new(),
        };
        let (mut answers, mut worked) = (0u32, false);
        while turn.budget_pages > 0 {
            turn.others_wait = others_wait;
            match self.step(vring.get_queue_mut(), &mut turn, bench) {
                Step::Answer(answer) => {
                    self.answer(vring.get_queue_mut(), &view, &answer)?;
                    answers = answers.saturating_add(1);
                    worked = true;
                }
                Step::SetAside => worked = true,
                Step::NoRoom => {}
                Step::Nothing => break,
            }
        }
        if answers > 0 && vring.needs_notification()? {
            doorbell::call(&vring)?;
        }
        drop(vring);
        self.ways = turn.ways;
        for line in turn.log {
            tracing::warn!(vm = vm.name(), "{line}");
        }
        // A store that was tried in vain is no reason to keep looking.
        Ok(if worked { Progress::Busy } else { Progress::Idle })
    }

    /// Heads that may be taken now: a guest that offers one head over and over has no more than a ring's worth.
    pub(super) fn places(&self, queue_size: u16) -> usize {
        let unstarted = self.jobs.taken.len();
        if self.stop.is_some() || unstarted >= TAKEN_MAX / 2 {
            return 0;
        }
        let free = usize::from(queue_size).saturating_sub(self.jobs.count());
        free.min(TAKEN_MAX.saturating_sub(unstarted))
    }

    fn take_heads(&mut self, queue: &mut Queue, memory: &Memory) -> Result<(), Broken> {
        let size = queue.size();
        let places = self.places(size);
        if places == 0 {
            return Ok(());
        }
        let offered = queue.avail_idx(memory, Ordering::Acquire)?.0;
        let (table, mut at) = (queue.desc_table(), None);
        for chain in queue.iter(memory)?.take(places) {
            let head = chain.head_index();
            if head >= size {
                return Err(Broken);
            }
            if let Some(inflight) = &mut self.inflight {
                inflight.take(head);
            }
            let offset = u64::from(head).saturating_mul(u64::from(DESCRIPTOR_BYTES));
            prefetch(memory, GuestAddress(table.saturating_add(offset)), CHAIN_BYTES);
            // One look at the clock for all that are there.
            self.jobs.taken.push_back(Taken { head, at: *at.get_or_insert_with(Instant::now) });
        }
        // An index that says there is more than can be read would keep us looking for ever.
        if at.is_none() && offered != queue.next_avail() {
            return Err(Broken);
        }
        Ok(())
    }

    /// Carries the next request on.
    fn step(&mut self, queue: &Queue, turn: &mut Turn<'_>, bench: &mut Workbench) -> Step {
        if let Some(job) = self.jobs.waiting.next_excess() {
            turn.budget_pages = turn.budget_pages.saturating_sub(1);
            return self.fail_store(&job, turn, || {
                "a store failed: half of the ring has waited for room for longer".to_owned()
            });
        }
        if let Some(job) = self.jobs.next_started() {
            return self.proceed(job, turn, bench);
        }
        let (taken, request) = match self.next_taken(queue, turn) {
            None => return Step::Nothing,
            Some((taken, Ok(request))) => (taken, request),
            Some((taken, Err(malformed))) => return Step::Answer(self.refuse(taken.head, malformed, turn)),
        };
        if self.inflight.as_ref().is_some_and(|inflight| inflight.is_fatal(taken.head)) {
            return Step::Answer(self.refuse_fatal(taken.head, &request, turn));
        }
        let job = Job::new(taken, Execution::new(request));
        if job.execution.is_store() && !self.jobs.waiting.is_empty() && self.stop.is_none() {
            turn.budget_pages = turn.budget_pages.saturating_sub(1);
            return self.wait(job, None, turn);
        }
        self.proceed(job, turn, bench)
    }

    /// The next head that was not started. The one behind it is parsed as well, so that its page is on its way to the
    /// cache while this one is worked on.
    fn next_taken(&mut self, queue: &Queue, turn: &Turn<'_>) -> Option<Parsed> {
        let table = DescriptorTable { address: GuestAddress(queue.desc_table()), size: queue.size() };
        let capacity = u64::from(turn.vm.slots()).saturating_mul(PAGE_SIZE_U64);
        let (jobs, inflight) = (&mut self.jobs, &self.inflight);
        let parse = |taken: Taken| {
            let _executing = inflight.as_ref().and_then(|inflight| inflight.executing(taken.head));
            (taken, request::parse(turn.memory, table, taken.head, capacity))
        };
        let next = jobs.parsed.take().or_else(|| jobs.taken.pop_front().map(parse))?;
        jobs.parsed = jobs.taken.pop_front().map(parse);
        // Not where a load goes: asking for lines that are only overwritten made loads slower (PERFORMANCE.md).
        if let Some((_, Ok(request))) = &jobs.parsed
            && request.kind != Kind::Load
            && let Some(segment) = request.data.left().first()
        {
            prefetch(turn.memory.memory(), segment.address, PAGE_SIZE.min(segment.length as usize));
        }
        Some(next)
    }

    fn refuse(&mut self, head: u16, malformed: Malformed, turn: &mut Turn<'_>) -> Answer {
        // Answering costs time too: a guest that sends nothing else is held to the same budget.
        turn.budget_pages = turn.budget_pages.saturating_sub(1);
        self.vm.count_error();
        let (address, status) = match malformed {
            Malformed::Answer(address, status) => (Some(address), status),
            Malformed::NoAnswer => (None, Status::IoErr),
        };
        if status == Status::IoErr {
            turn.complain(Complaint::Malformed, || {
                "a request failed: it makes no sense, or lies outside the memory that the VMM shares"
                    .to_owned()
            });
        }
        Answer { head, status, written: 0, address }
    }

    /// Fails a request at which the daemon has crashed before, and again when it was carried out again.
    fn refuse_fatal(&mut self, head: u16, request: &Request, turn: &mut Turn<'_>) -> Answer {
        turn.budget_pages = turn.budget_pages.saturating_sub(1);
        self.vm.count_error();
        turn.vm.count(|events| events.reject_fatal = events.reject_fatal.saturating_add(1));
        turn.complain(Complaint::Fatal, || {
            let (kind, sector) = (request.kind, request.position / SECTOR_BYTES);
            format!("a request failed, because the daemon crashed twice while it carried it out: {kind:?} of sector {sector}")
        });
        Answer { head, status: Status::IoErr, written: 0, address: Some(request.status) }
    }

    fn proceed(&mut self, mut job: Job, turn: &mut Turn<'_>, bench: &mut Workbench) -> Step {
        turn.fetch_pages = self.jobs.fetch_pages_left();
        turn.others_wait |= self.jobs.any_to_do();
        let executing = self.inflight.as_ref().and_then(|inflight| inflight.executing(job.head));
        job.execution.crash_if_told(self.vm.name());
        let outcome = job.execution.proceed(turn, &mut bench.scratch, &mut bench.page.0);
        drop(executing);
        match outcome {
            Outcome::Done(status, written) => Step::Answer(self.end(&job, status, written, turn)),
            Outcome::Unfinished => {
                self.jobs.keep(job);
                Step::SetAside
            }
            Outcome::InFile(wanted) => {
                if job.since.is_some() {
                    // Those behind it would only be read, tried in vain and forgotten again.
                    self.jobs.waiting.pause(Instant::now());
                }
                self.fetch(job, wanted, turn);
                Step::SetAside
            }
            Outcome::NoRoom(err) => self.wait(job, Some(err), turn),
        }
    }

    fn fetch(&mut self, job: Job, wanted: Vec<InFile>, turn: &Turn<'_>) {
        let (roster, id) = (Arc::clone(&self.roster), self.id);
        self.jobs.fetch(job, wanted, turn.vm, move || {
            if let Some(id) = id {
                roster.call(id);
            }
        });
    }

    /// Lets a store wait for room. Without an error it was not tried, because others wait already.
    fn wait(&mut self, mut job: Job, err: Option<StoreError>, turn: &mut Turn<'_>) -> Step {
        let now = Instant::now();
        let hopeless = err.as_ref().is_some_and(|err| self.stop.is_some() || !turn.vm.may_wait(err));
        if !hopeless && self.jobs.waiting.admit(&mut job, now) {
            self.jobs.waiting.insert(job);
            if err.is_none() {
                return Step::SetAside;
            }
            self.jobs.waiting.pause(now);
            return Step::NoRoom;
        }
        if self.stays_in_flight(job.head) {
            return Step::SetAside;
        }
        self.fail_store(&job, turn, || {
            let what = if hopeless { "" } else { " for want of room in time" };
            match &err {
                Some(err) => format!("a store failed{what}: {}", Chain(err)),
                None => format!("a store failed{what}: others wait for room already"),
            }
        })
    }

    /// Whether a store that finds no room is left to the VMM's next connection.
    fn stays_in_flight(&self, head: u16) -> bool {
        let noted = || self.inflight.as_ref().is_some_and(|inflight| inflight.is_taken(head));
        self.stop.is_some() && self.ending == Ending::LeaveInFlight && noted()
    }

    fn fail_store(&mut self, job: &Job, turn: &mut Turn<'_>, message: impl FnOnce() -> String) -> Step {
        turn.vm.count(|events| events.reject_reclaim_fail = events.reject_reclaim_fail.saturating_add(1));
        turn.complain(Complaint::Store, message);
        Step::Answer(self.end(job, Status::IoErr, 0, turn))
    }

    fn end(&mut self, job: &Job, status: Status, written: u32, turn: &Turn<'_>) -> Answer {
        // However it ended: those that waited in vain have waited longest.
        if let Some(waited) = job.since.map(|since| since.elapsed()) {
            turn.vm.count(|events| events.delayed(waited));
        }
        if let Some(path) = job.execution.path() {
            self.latencies.count(path, job.taken.elapsed());
        }
        if status != Status::Ok {
            self.vm.count_error();
        } else if job.since.is_some() {
            self.jobs.waiting.go_on();
        }
        let address = Some(job.execution.status_address());
        Answer { head: job.head, status, written, address }
    }

    fn answer(&mut self, queue: &mut Queue, memory: &View<'_>, answer: &Answer) -> Result<(), Broken> {
        let mut length = 0;
        if let Some(address) = answer.address
            && memory.write(answer.status as u8, address).is_ok()
        {
            length = answer.written.saturating_add(1);
        }
        if let Some(inflight) = &self.inflight {
            inflight.answering(answer.head);
        }
        crash_point::after(queue.add_used(memory.memory(), answer.head, length))?;
        if let Some(inflight) = &self.inflight {
            inflight.answered(answer.head, queue.next_used());
        }
        Ok(())
    }
}
