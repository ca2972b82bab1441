//! Stores that wait for room, in the order in which they began to. Only the first of them is tried again, and the
//! next ones when it succeeded: a full pool must not become a storm of compressions. They hold a part of the ring at
//! most, so that the VM's own loads get through.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::jobs::Job;

/// How long after a try the next one comes when nobody has said that there is room.
const TRY_EVERY: Duration = Duration::from_millis(2);

/// Why a store may not wait (any longer).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoWait {
    /// As many wait as may.
    TooMany,
    /// It has waited as long as it may.
    TooLong,
}

#[derive(Debug)]
pub(super) struct Waiting {
    jobs: VecDeque<Job>,
    /// Requests that had to wait and have not ended; some may be on their way from the file.
    held: usize,
    deadline: Duration,
    /// Whether the first one is to be tried.
    due: bool,
    next_try: Option<Instant>,
    /// How often room had been made at the last try.
    room_seen: u64,
}

impl Waiting {
    pub(super) fn new(deadline: Duration) -> Self {
        Self { jobs: VecDeque::new(), held: 0, deadline, due: false, next_try: None, room_seen: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.jobs.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Finds out whether the first one is to be tried: `room` counts how often room was made.
    pub(super) fn look(&mut self, room: u64, at_once: bool) {
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
        self.due && !self.jobs.is_empty()
    }

    /// The first one, if it is to be tried.
    pub(super) fn next_due(&mut self) -> Option<Job> {
        if self.due { self.jobs.pop_front() } else { None }
    }

    /// Whether a store may wait, if at most `places` may. From here on it counts as one that does, until it ended.
    pub(super) fn admit(&mut self, job: &mut Job, now: Instant, places: usize) -> Result<(), NoWait> {
        let since = *job.since.get_or_insert_with(|| {
            self.held = self.held.saturating_add(1);
            now
        });
        if now.saturating_duration_since(since) >= self.deadline {
            return Err(NoWait::TooLong);
        }
        if self.held > places { Err(NoWait::TooMany) } else { Ok(()) }
    }

    /// Lets a store wait that was admitted. It keeps its place if it has waited before.
    pub(super) fn insert(&mut self, job: Job) {
        let later = self.jobs.iter().rev().take_while(|other| other.since > job.since).count();
        self.jobs.insert(self.jobs.len().saturating_sub(later), job);
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

    /// A request ended. How long ago it began to wait, if it had to.
    pub(super) fn ended(&mut self, job: &Job) -> Option<Duration> {
        let since = job.since?;
        self.held = self.held.saturating_sub(1);
        Some(since.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::blk::execute::Execution;
    use crate::device::blk::request::{Kind, Request};
    use vm_memory::GuestAddress;

    const DEADLINE: Duration = Duration::from_secs(5);

    fn job(head: u16) -> Job {
        let request = Request {
            kind: Kind::Store,
            position: 0,
            length: 0,
            data: VecDeque::new(),
            status: GuestAddress(0),
        };
        Job::new(head, Execution::new(request))
    }

    fn admit(waiting: &mut Waiting, head: u16, now: Instant, places: usize) -> Result<(), NoWait> {
        let mut job = job(head);
        let admitted = waiting.admit(&mut job, now, places);
        match admitted {
            Ok(()) => waiting.insert(job),
            Err(_) => assert!(waiting.ended(&job).is_some()),
        }
        admitted
    }

    #[test]
    fn only_the_first_is_tried_and_it_keeps_its_place() {
        let mut waiting = Waiting::new(DEADLINE);
        let start = Instant::now();
        for (n, head) in [5, 3, 9].into_iter().enumerate() {
            admit(&mut waiting, head, start + Duration::from_millis(n as u64), 10).unwrap();
        }
        waiting.pause(start + Duration::from_secs(60));
        waiting.look(0, false);
        assert!(waiting.next_due().is_none(), "no time has passed, and no room was made");
        waiting.look(1, false);
        let mut first = waiting.next_due().unwrap();
        assert_eq!(first.head, 5);
        waiting.admit(&mut first, Instant::now(), 10).unwrap();
        waiting.insert(first);
        waiting.pause(Instant::now());
        assert!(!waiting.is_due());
        waiting.look(1, true);
        assert_eq!([(); 3].map(|()| waiting.next_due().unwrap().head), [5, 3, 9]);
    }

    #[test]
    fn so_many_wait_and_so_long() {
        let mut waiting = Waiting::new(DEADLINE);
        let now = Instant::now();
        admit(&mut waiting, 1, now, 2).unwrap();
        admit(&mut waiting, 2, now, 2).unwrap();
        assert_eq!(admit(&mut waiting, 3, now, 2), Err(NoWait::TooMany));
        waiting.look(0, true);
        let mut first = waiting.next_due().unwrap();
        assert_eq!(admit(&mut waiting, 3, now, 2), Err(NoWait::TooMany), "one that is tried holds its place");
        assert_eq!(waiting.admit(&mut first, now + DEADLINE, 2), Err(NoWait::TooLong));
        waiting.ended(&first).unwrap();
        admit(&mut waiting, 3, now, 2).unwrap();
        assert_eq!(admit(&mut Waiting::new(Duration::ZERO), 1, now, 2), Err(NoWait::TooLong));
    }
}
