//! The requests that a ring has taken and not answered, by what each of them waits for. The bounds are here: how many
//! there may be, and how much of the writeback file may be on its way for them.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::waiting::Waiting;
use crate::device::blk::execute::Execution;
use crate::device::blk::request::{Malformed, Request};
use crate::device::fetches::{Fetches, OnTheirWay};
use crate::store::vm::{Fetched, InFile, VmStore};

/// A head that was taken off the available ring.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taken {
    pub(super) head: u16,
    pub(super) at: Instant,
}

/// A head, and what its descriptors ask for.
pub(super) type Parsed = (Taken, Result<Request, Malformed>);

/// A request that was started.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) head: u16,
    /// When its head was taken.
    pub(super) taken: Instant,
    pub(super) execution: Execution,
    /// Since when it has waited for room, if it ever had to.
    pub(super) since: Option<Instant>,
}

impl Job {
    pub(super) fn new(Taken { head, at: taken }: Taken, execution: Execution) -> Self {
        Self { head, taken, execution, since: None }
    }
}

/// What was read for a request.
#[derive(Debug)]
struct Mail {
    /// Of the request that asked.
    ticket: u64,
    fetched: Vec<Fetched>,
    /// Ends when this is collected, or when nobody is left who would.
    _on_their_way: OnTheirWay,
}

/// Where the I/O thread leaves what was read.
type Mailbox = Arc<Mutex<Vec<Mail>>>;

#[derive(Debug)]
struct Fetching {
    job: Job,
    pages: usize,
}

#[derive(Debug)]
pub(super) struct Jobs {
    /// Heads that were not started.
    pub(super) taken: VecDeque<Taken>,
    /// The head before those, which was parsed ahead of time.
    pub(super) parsed: Option<Parsed>,
    /// Requests that can go on.
    ready: VecDeque<Job>,
    /// Requests that need pages of the file while as many as may be are on their way.
    stalled: VecDeque<Job>,
    /// Requests whose pages are on their way, by ticket.
    fetching: HashMap<u64, Fetching>,
    fetching_pages: usize,
    /// What the whole VM has on its way.
    fetches: Arc<Fetches>,
    next_ticket: u64,
    mailbox: Mailbox,
    /// Stores that wait for room.
    pub(super) waiting: Waiting,
}

impl Jobs {
    /// None yet, for a ring of the VM with these `fetches`, whose stores wait for at most `store_deadline`.
    pub(super) fn new(fetches: Arc<Fetches>, store_deadline: Duration) -> Self {
        Self {
            taken: VecDeque::new(),
            parsed: None,
            ready: VecDeque::new(),
            stalled: VecDeque::new(),
            fetching: HashMap::new(),
            fetching_pages: 0,
            fetches,
            next_ticket: 0,
            mailbox: Mailbox::default(),
            waiting: Waiting::new(store_deadline),
        }
    }

    /// Requests that were taken and not answered.
    pub(super) fn count(&self) -> usize {
        let lists = [&self.ready, &self.stalled].map(VecDeque::len);
        let parsed = usize::from(self.parsed.is_some());
        let counts = [self.taken.len(), parsed, self.fetching.len(), self.waiting.len()];
        lists.into_iter().chain(counts).fold(0, usize::saturating_add)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.count() == 0
    }

    /// Whether any request can go on now.
    pub(super) fn any_to_do(&self) -> bool {
        !self.taken.is_empty()
            || self.parsed.is_some()
            || !self.ready.is_empty()
            || self.waiting.is_due()
            || (!self.stalled.is_empty() && self.fetch_pages_left() > 0)
    }

    /// The next request that was started and can go on.
    pub(super) fn next_started(&mut self) -> Option<Job> {
        if let Some(job) = self.waiting.next_due().or_else(|| self.ready.pop_front()) {
            return Some(job);
        }
        if self.fetch_pages_left() > 0 { self.stalled.pop_front() } else { None }
    }

    /// Keeps a request whose turn is over; it is the next one.
    pub(super) fn keep(&mut self, job: Job) {
        self.ready.push_front(job);
    }

    /// Pages that may be asked for from the file now.
    pub(super) fn fetch_pages_left(&self) -> usize {
        self.fetches.ring_pages_max().saturating_sub(self.fetching_pages).min(self.fetches.left())
    }

    /// Whether requests have to wait until pages come that others asked for: nobody tells them of that.
    pub(super) fn stalled_by_others(&self) -> bool {
        !self.stalled.is_empty() && self.fetching.is_empty()
    }

    /// Has `wanted` read for a request. `call` is called on the I/O thread when it is there.
    pub(super) fn fetch(
        &mut self,
        job: Job,
        wanted: Vec<InFile>,
        vm: &VmStore,
        call: impl FnOnce() + Send + 'static,
    ) {
        let (ticket, pages) = (self.next_ticket, wanted.len());
        let may = pages <= self.fetch_pages_left();
        let Some(on_their_way) = may.then(|| self.fetches.take(pages)).flatten() else {
            // It looks again later. Meanwhile it pins nothing in the file.
            self.stalled.push_back(job);
            return;
        };
        self.next_ticket = self.next_ticket.wrapping_add(1);
        self.fetching_pages = self.fetching_pages.saturating_add(pages);
        self.fetching.insert(ticket, Fetching { job, pages });
        let mailbox = Arc::clone(&self.mailbox);
        vm.fetch(wanted, move |fetched| {
            mailbox.lock().push(Mail { ticket, fetched, _on_their_way: on_their_way });
            call();
        });
    }

    pub(super) fn has_mail(&self) -> bool {
        !self.fetching.is_empty() && !self.mailbox.lock().is_empty()
    }

    /// Lets the requests go on whose pages have come.
    pub(super) fn collect_mail(&mut self) {
        if self.fetching.is_empty() {
            return;
        }
        let mail = std::mem::take(&mut *self.mailbox.lock());
        for Mail { ticket, fetched, .. } in mail {
            if let Some(Fetching { mut job, pages }) = self.fetching.remove(&ticket) {
                self.fetching_pages = self.fetching_pages.saturating_sub(pages);
                job.execution.give(fetched);
                self.ready.push_back(job);
            }
        }
    }
}
