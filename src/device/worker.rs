//! A worker: one thread, one event loop, the rings of any number of VMs. It never blocks on anything but its epoll.
//! After activity it looks at the rings itself for a short while before it sleeps, because a wake-up across cores
//! costs more than decompressing a page.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use event_manager::{EventManager, RemoteEndpoint, SubscriberId, SubscriberOps};

use super::ring::{Ending, Progress, Ring, Workbench};
use super::roster::Roster;
use crate::threads::{self, Role};

/// How often the event loop is asked for kicks, control calls and timers while rings are being looked at: what a guest
/// that just woke up waits for at most, at a cost of a hundredth.
const EVENTS_EVERY: Duration = Duration::from_micros(50);
const EVENTS_EVERY_LOOKS: u32 = 64;
/// Pages that a ring may work on before the next one has its turn. It is what a VM's load waits for behind a neighbour
/// that stores without a pause.
const SHARED_TURN_PAGES: u32 = 2;
/// The same for a ring that is the only one, so that a batch of requests has one signal.
const LONE_TURN_PAGES: u32 = 8;
/// How long a ring whose stores wait for room is left alone. Whoever makes room says so; this is for room that comes
/// about otherwise, and for deadlines.
const WAITING_EVERY: Duration = Duration::from_millis(5);
const WAITING_EVERY_MS: i32 = 5;
/// When the log first says that a ring takes long to stop; it says so again each time twice as much has passed.
const SLOW_STOP: Duration = Duration::from_secs(5);

/// A worker thread. Dropping it stops and joins the thread.
pub struct Worker {
    endpoint: RemoteEndpoint<Ring>,
    roster: Arc<Roster>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// A ring's place at a worker.
#[derive(Clone, Copy, Debug)]
pub struct Seat(SubscriberId);

impl Worker {
    /// Starts a worker that keeps looking for `poll` after it last found something.
    ///
    /// # Errors
    /// When there can be no epoll or no thread.
    pub fn start(index: usize, poll: Duration) -> io::Result<Self> {
        let manager = EventManager::<Ring>::new().map_err(|err| io::Error::other(format!("{err:?}")))?;
        let endpoint = manager.remote_endpoint();
        let roster = Arc::new(Roster::new(endpoint.clone()));
        let stop = Arc::new(AtomicBool::new(false));
        let mut state = Loop {
            manager,
            roster: Arc::clone(&roster),
            poll,
            bench: Workbench::default(),
            looked_at_waiting: Instant::now(),
            busy: 0,
        };
        let stopped = Arc::clone(&stop);
        let thread = threads::spawn(format!("worker-{index}"), Role::Worker, move || state.run(&stopped))?;
        Ok(Self { endpoint, roster, stop, thread: Some(thread) })
    }

    /// Which of the worker's rings are to have a turn.
    #[must_use]
    pub fn roster(&self) -> Arc<Roster> {
        Arc::clone(&self.roster)
    }

    /// Hands a ring to the worker.
    ///
    /// # Errors
    /// When the worker is gone.
    pub fn add(&self, ring: Ring) -> io::Result<Seat> {
        self.call(move |ops| {
            let id = ops.add_subscriber(ring);
            ops.subscriber_mut(id)?.activate(id);
            Ok(Seat(id))
        })
    }

    /// Takes a ring back. When this returns, every request that it had taken was answered, or left in flight as
    /// `ending` says, and the worker has forgotten it. The caller waits for that, the worker does not: the ring finishes
    /// in its turns, while others have theirs. `slow` is told now and then how long it has taken.
    ///
    /// # Errors
    /// When the worker is gone.
    pub fn remove(&self, seat: Seat, ending: Ending, slow: impl Fn(Duration)) -> io::Result<()> {
        let (told, stopped) = mpsc::channel();
        self.call(move |ops| {
            ops.subscriber_mut(seat.0)?.stop(told, ending);
            Ok(())
        })?;
        let start = Instant::now();
        let mut patience = SLOW_STOP;
        loop {
            match stopped.recv_timeout(patience) {
                Ok(()) => break,
                Err(RecvTimeoutError::Timeout) => {
                    slow(start.elapsed());
                    patience = patience.saturating_mul(2);
                }
                Err(RecvTimeoutError::Disconnected) => return Err(io::ErrorKind::BrokenPipe.into()),
            }
        }
        let roster = self.roster();
        self.call(move |ops| {
            // It may have been told that it has stopped before the turn in which it would take itself off.
            roster.forget(seat.0);
            ops.remove_subscriber(seat.0).map(|_| ())
        })
    }

    /// Waits until the turn that the worker is in has ended, so that none looks at what was replaced before.
    ///
    /// # Errors
    /// When the worker is gone.
    pub fn pass_turn(&self) -> io::Result<()> {
        self.call(|_| Ok(()))
    }

    /// Lets stores that wait for room try again, now that there is some. Costs one read when none waits.
    pub fn wake_waiting(&self) {
        self.roster.room_made();
    }

    fn call<O: Send + 'static>(
        &self,
        f: impl FnOnce(&mut dyn SubscriberOps<Subscriber = Ring>) -> Result<O, event_manager::Error>
        + Send
        + 'static,
    ) -> io::Result<O> {
        self.endpoint.call_blocking(f).map_err(|err| io::Error::other(format!("{err:?}")))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.roster.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Loop {
    manager: EventManager<Ring>,
    roster: Arc<Roster>,
    poll: Duration,
    bench: Workbench,
    looked_at_waiting: Instant,
    /// Rings that found something to do in the last round.
    busy: usize,
}

impl Loop {
    fn run(&mut self, stop: &AtomicBool) {
        let mut round: Vec<SubscriberId> = Vec::new();
        let mut last_busy = Instant::now();
        let (mut last_events, mut looks) = (last_busy, 0u32);
        while !stop.load(Ordering::Acquire) {
            let due = last_busy.saturating_duration_since(last_events) >= EVENTS_EVERY;
            if round.is_empty() || due || looks >= EVENTS_EVERY_LOOKS {
                (last_events, looks) = (last_busy, 0);
                self.handle_events(round.is_empty());
            }
            self.roster.copy_to(&mut round);
            let busy = self.round(&round);
            looks = looks.saturating_add(1);
            if busy {
                last_busy = Instant::now();
            } else if last_busy.elapsed() >= self.poll {
                self.sleep(&round);
            } else {
                std::hint::spin_loop();
            }
            self.roster.copy_to(&mut round);
        }
    }

    /// Handles kicks and control calls; waits for them when no ring is to have a turn.
    fn handle_events(&mut self, idle: bool) {
        let sleeps = idle && self.roster.fall_asleep();
        let timeout_ms = match (sleeps, self.roster.any_waiting()) {
            (false, _) => 0,
            (true, true) => WAITING_EVERY_MS,
            (true, false) => -1,
        };
        if let Err(err) = self.manager.run_with_timeout(timeout_ms) {
            tracing::error!(?err, "a worker's event loop failed");
            std::process::abort();
        }
        if sleeps {
            self.roster.awake();
        }
        if self.roster.any_waiting() && self.looked_at_waiting.elapsed() >= WAITING_EVERY {
            self.looked_at_waiting = Instant::now();
            self.roster.put_waiting();
        }
    }

    /// Gives every active ring a turn; says whether any found something to do.
    fn round(&mut self, round: &[SubscriberId]) -> bool {
        let turn_pages = if round.len() > 1 { SHARED_TURN_PAGES } else { LONE_TURN_PAGES };
        let others_wait = std::mem::take(&mut self.busy) > 1;
        for id in round {
            let ring = self.manager.subscriber_mut(*id);
            match ring.map(|ring| ring.turn(&mut self.bench, turn_pages, others_wait)) {
                Ok(Progress::Busy) => self.busy = self.busy.saturating_add(1),
                Ok(Progress::Idle | Progress::Parked) => {}
                // It was stopped.
                Err(_) => self.roster.remove(*id),
            }
        }
        self.busy > 0
    }

    /// Has every ring ask for a kick, and forgets those that have nothing to do.
    fn sleep(&mut self, round: &[SubscriberId]) {
        for id in round {
            if let Ok(ring) = self.manager.subscriber_mut(*id) {
                ring.sleep();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use vhost_user_backend::VringT;

    use super::*;
    use crate::device::guest_memory::Memory;
    use crate::device::ring::{GuestMemory, Owner, Vring};
    use crate::device::vm::DeviceVm;

    #[test]
    fn nobody_looks_at_a_ring_that_is_gone() {
        let worker = Worker::start(0, Duration::ZERO).unwrap();
        let owner = Owner { vm: Arc::new(DeviceVm::new("web1", 1, false, None)), session: 1 };
        let memory = GuestMemory::new(Memory::new());
        let vring = Vring::new(memory.clone(), 16).unwrap();
        let ring = Ring::new(owner, vring, memory, None, Duration::ZERO, worker.roster());
        let seat = worker.add(ring).unwrap();
        // As if stores had waited for room in its last turn.
        worker.roster().set_waiting(seat.0, true);
        worker.remove(seat, Ending::LeaveInFlight, |_| ()).unwrap();
        assert!(!worker.roster().any_waiting(), "the worker would look every few milliseconds, for ever");
    }
}
