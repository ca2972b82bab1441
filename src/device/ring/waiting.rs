//! Stores that wait for room, in the order in which they began to. Only the first of them is tried again, and the
//! next ones when it succeeded: a full pool must not become a storm of compressions. They hold half of the ring at
//! most, so that the VM's own loads get through; what is beyond waits a moment all the same. Without that moment a guest
//! writes to a pool that hardly keeps up with it as fast as stores can fail: two guests whose pool overflowed onto a
//! slow file wrote 870 thousand pages instead of 200 thousand, a tenth of them in vain.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::jobs::Job;

/// How long after a try the next one comes when nobody has said that there is room.
const TRY_EVERY: Duration = Duration::from_millis(2);

/// How long a store beyond half of the ring waits. The VM's loads may be held up for as long, if it fills the other
/// half too.
const EXCESS_WAIT: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(super) struct Waiting {
    jobs: VecDeque<Job>,
    /// Those that can't wait any longer, because as many as may have waited longer.
    excess: VecDeque<Job>,
    deadline: Duration,
    /// Whether the first one is to be tried.
    due: bool,
    next_try: Option<Instant>,
    /// How often room had been made at the last try.
    room_seen: u64,
}

impl Waiting {
    pub(super) fn new(deadline: Duration) -> Self {
        Self {
            jobs: VecDeque::new(),
            excess: VecDeque::new(),
            deadline,
            due: false,
            next_try: None,
            room_seen: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.jobs.len().saturating_add(self.excess.len())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Finds out whether the first one is to be tried: `room` counts how often room was made. And which can't wait any
    /// longer, when only `places` may for long.
    pub(super) fn look(&mut self, room: u64, at_once: bool, places: usize) {
        let too_long = |job: &Job| job.since.is_some_and(|since| since.elapsed() >= EXCESS_WAIT);
        while self.jobs.get(places).is_some_and(too_long) {
            self.excess.extend(self.jobs.remove(places));
        }
        if !self.jobs.is_empty()
            && (at_once
                || self.room_made(room)
                || self.next_try.is_none_or(|next_try| next_try <= Instant::now()))
        {
            self.due = true;
        }
        self.room_seen = room;
    }

    /// Whether room was made since the last look, for somebody who waits.
    pub(super) fn room_made(&self, room: u64) -> bool {
        !self.jobs.is_empty() && room != self.room_seen
    }

    pub(super) fn is_due(&self) -> bool {
        !self.excess.is_empty() || (self.due && !self.jobs.is_empty())
    }

    /// One that can't wait any longer.
    pub(super) fn next_excess(&mut self) -> Option<Job> {
        self.excess.pop_front()
    }

    /// The first one, if it is to be tried.
    pub(super) fn next_due(&mut self) -> Option<Job> {
        if self.due { self.jobs.pop_front() } else { None }
    }

    /// Whether a store may wait, or go on waiting: not beyond the deadline.
    pub(super) fn admit(&self, job: &mut Job, now: Instant) -> bool {
        let since = job.since.unwrap_or(now);
        let admitted = now.saturating_duration_since(since) < self.deadline;
        if admitted {
            job.since = Some(since);
        }
        admitted
    }

    /// Lets a store wait that was admitted. It keeps its place if it has waited before.
    pub(super) fn insert(&mut self, job: Job) {
        let later = self.jobs.iter().rev().take_while(|other| other.since > job.since).count();
        self.jobs.insert(self.jobs.len().saturating_sub(later), job);
    }

    /// Forgets those that `may_be` forgotten.
    pub(super) fn forget(&mut self, mut may_be: impl FnMut(&Job) -> bool) {
        self.jobs.retain(|job| !may_be(job));
        self.excess.retain(|job| !may_be(job));
    }

    /// A store found no room, or has to be read for first: there is no use in trying others soon.
    pub(super) fn pause(&mut self, now: Instant) {
        self.due = false;
        self.next_try = now.checked_add(TRY_EVERY);
    }

    /// A store that had to wait found room: the next one may, too.
    pub(super) fn go_on(&mut self) {
        self.due = true;
    }
}

#[cfg(test)]
mod tests {
    use super::super::jobs::Taken;
    use super::*;
    use crate::device::blk::execute::Execution;
    use crate::device::blk::request::{Kind, Request};
    use crate::device::segments::Segments;
    use vm_memory::GuestAddress;

    const DEADLINE: Duration = Duration::from_secs(5);

    fn job(head: u16) -> Job {
        let request = Request {
            kind: Kind::Store,
            position: 0,
            length: 0,
            data: Segments::default(),
            status: GuestAddress(0),
        };
        Job::new(Taken { head, at: Instant::now() }, Execution::new(request))
    }

    fn wait(waiting: &mut Waiting, head: u16, since: Instant) -> bool {
        let mut job = job(head);
        let admitted = waiting.admit(&mut job, since);
        if admitted {
            waiting.insert(job);
        }
        admitted
    }

    #[test]
    fn only_the_first_is_tried_and_it_keeps_its_place() {
        let mut waiting = Waiting::new(DEADLINE);
        let start = Instant::now();
        for (n, head) in [5, 3, 9].into_iter().enumerate() {
            assert!(wait(&mut waiting, head, start + Duration::from_millis(n as u64)));
        }
        waiting.pause(start + Duration::from_secs(60));
        waiting.look(0, false, 10);
        assert!(waiting.next_due().is_none(), "no time has passed, and no room was made");
        waiting.look(1, false, 10);
        let mut first = waiting.next_due().unwrap();
        assert_eq!(first.head, 5);
        assert!(waiting.admit(&mut first, Instant::now()));
        waiting.insert(first);
        waiting.pause(Instant::now());
        assert!(!waiting.is_due());
        waiting.look(1, true, 10);
        assert_eq!([(); 3].map(|()| waiting.next_due().unwrap().head), [5, 3, 9]);
    }

    #[test]
    fn nobody_waits_beyond_the_deadline_and_few_for_long() {
        let mut waiting = Waiting::new(DEADLINE);
        let now = Instant::now();
        let long_ago = now.checked_sub(EXCESS_WAIT * 2).unwrap();
        for head in [1, 2, 3] {
            assert!(wait(&mut waiting, head, long_ago));
        }
        assert!(wait(&mut waiting, 4, now + DEADLINE));
        waiting.look(0, false, 2);
        assert_eq!(waiting.next_excess().map(|job| job.head), Some(3));
        assert!(waiting.next_excess().is_none(), "the fourth has just begun to wait");
        assert_eq!(waiting.len(), 3);
        let mut first = waiting.next_due().unwrap();
        assert!(!waiting.admit(&mut first, now + DEADLINE));
        assert!(!wait(&mut Waiting::new(Duration::ZERO), 1, now));
    }
}
