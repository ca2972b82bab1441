//! All queues of all VMs that a run drives; each is a lane. One thread polls them, and so many requests are in flight in
//! all of them together, however many there are: the load is the same for one VM and for hundreds. Lanes take turns at
//! requests; those in which nothing is in flight are not looked at. While nothing comes back, their connections are looked
//! after. What a request is, is not known here.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::PATIENCE;
use super::fleet::Fleet;
use crate::frontend::{Completion, Error, Op, Queue, Status, Wait};

/// How many rounds without an answer pass between two looks at the clock.
const SPINS_PER_CLOCK: u32 = 64;

/// How long nothing comes back between two looks at the connections.
const LOOK_INTERVAL: Duration = Duration::from_millis(1);

/// One queue.
struct Lane {
    queue: Queue,
    /// Tags that are not in flight.
    free: Vec<u16>,
    /// Whether it is among those that are looked at.
    active: bool,
    /// Whether something was staged and not yet sent.
    staged: bool,
}

/// The queues of a run, one of each VM, then the next of each: lane n belongs to VM n modulo the number of VMs.
pub(crate) struct Lanes {
    lanes: Vec<Lane>,
    /// Those in which something is in flight.
    active: Vec<usize>,
    /// Those in which something was staged.
    staged: Vec<usize>,
    /// Whose turn it is to get a request.
    turn: usize,
    /// The place among the active ones that is looked at next.
    place: usize,
    wait: Wait,
    fleet: Fleet,
    pauses: Pauses,
}

/// When a back end went and was connected to again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Pauses {
    /// How often.
    pub count: u64,
    /// The longest time between two answers in which that happened, in milliseconds.
    pub longest_ms: f64,
}

/// A request of this lane that is back.
pub(crate) type Back = (usize, Completion);

impl Lanes {
    /// Of the fleet's queues, in which nothing is in flight. Only a single one can be slept on.
    pub(super) fn new(queues: Vec<Queue>, wait: Wait, fleet: Fleet) -> Self {
        let lane = |mut queue: Queue| {
            queue.set_wait(wait);
            Lane { free: (0..queue.depth()).rev().collect(), queue, active: false, staged: false }
        };
        let lanes = queues.into_iter().map(lane).collect();
        let (active, staged, pauses) = (Vec::new(), Vec::new(), Pauses::default());
        Self { lanes, active, staged, turn: 0, place: 0, wait, fleet, pauses }
    }

    /// Stops all queues, in which nothing is in flight; when their back ends went.
    pub(super) fn stop(&mut self) -> Result<Pauses, Error> {
        self.fleet.stop()?;
        Ok(self.pauses)
    }

    pub(crate) fn count(&self) -> usize {
        self.lanes.len()
    }

    pub(crate) fn queue(&mut self, lane: usize) -> &mut Queue {
        &mut self.lanes[lane].queue
    }

    /// Whether anything is in flight.
    pub(crate) fn busy(&self) -> bool {
        !self.active.is_empty()
    }

    /// Has `stage` prepare a request in the next lane that has a tag for it. It is told the lane and the tag, and answers
    /// false when this lane gets no more. Returns whether there was one.
    pub(crate) fn stage(
        &mut self,
        mut stage: impl FnMut(usize, &mut Queue, u16) -> Result<bool, Error>,
    ) -> Result<bool, Error> {
        for _ in 0..self.lanes.len() {
            let number = self.turn;
            self.turn = (number + 1) % self.lanes.len();
            let lane = &mut self.lanes[number];
            let Some(tag) = lane.free.last().copied() else { continue };
            if !stage(number, &mut lane.queue, tag)? {
                continue;
            }
            lane.free.pop();
            if !std::mem::replace(&mut lane.active, true) {
                self.active.push(number);
            }
            if !std::mem::replace(&mut lane.staged, true) {
                self.staged.push(number);
            }
            return Ok(true);
        }
        Ok(false)
    }

    /// Sends what was staged.
    pub(crate) fn publish(&mut self) -> Result<(), Error> {
        for number in self.staged.drain(..) {
            let lane = &mut self.lanes[number];
            lane.staged = false;
            lane.queue.publish()?;
        }
        Ok(())
    }

    /// A request that is back; `None` once all lanes were looked at and none has any.
    #[inline]
    pub(crate) fn poll(&mut self) -> Result<Option<Back>, Error> {
        while let Some(number) = self.active.get(self.place).copied() {
            let lane = &mut self.lanes[number];
            if let Some(done) = lane.queue.poll()? {
                lane.free.push(done.tag);
                return Ok(Some((number, done)));
            }
            if lane.queue.in_flight() == 0 {
                lane.active = false;
                self.active.swap_remove(self.place);
            } else {
                self.place += 1;
            }
        }
        self.place = 0;
        Ok(None)
    }

    /// A request that is back, and how long it had to be waited for. Something must be in flight.
    pub(crate) fn wait(&mut self) -> Result<(Back, Duration), Error> {
        if let Some(back) = self.poll()? {
            return Ok((back, Duration::ZERO));
        }
        let start = Instant::now();
        if let (Wait::Sleep, [only]) = (self.wait, &mut *self.lanes) {
            let done = only.queue.wait(PATIENCE)?;
            only.free.push(done.tag);
            return Ok(((0, done), start.elapsed()));
        }
        let (mut since, mut look_at, mut paused) = (start, start + LOOK_INTERVAL, false);
        loop {
            for _ in 0..SPINS_PER_CLOCK {
                if let Some(back) = self.poll()? {
                    let waited = start.elapsed();
                    if paused {
                        self.pauses.note(waited);
                    }
                    return Ok((back, waited));
                }
                std::hint::spin_loop();
            }
            let now = Instant::now();
            if now > look_at {
                if self.fleet.mend()? {
                    (since, paused) = (Instant::now(), true);
                }
                look_at = Instant::now() + LOOK_INTERVAL;
            }
            if now.saturating_duration_since(since) > PATIENCE {
                return Err(Error::Timeout(PATIENCE));
            }
        }
    }

    /// Sends one request in the first lane and waits for its answer, while nothing else is in flight. `op` is told the tag
    /// that it has, writes the data, and says what it is.
    pub(crate) fn run(&mut self, op: impl Fn(&mut Queue, u16) -> Result<Op, Error>) -> Result<Status, Error> {
        self.turn = 0;
        self.stage(|_, queue, tag| {
            let op = op(queue, tag)?;
            queue.stage(tag, op).map(|()| true)
        })?;
        self.publish()?;
        let ((_, done), _) = self.wait()?;
        Ok(done.status)
    }
}

impl Pauses {
    fn note(&mut self, pause: Duration) {
        self.count += 1;
        self.longest_ms = self.longest_ms.max(pause.as_secs_f64() * 1e3);
    }
}
