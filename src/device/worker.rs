//! A worker: one thread, one event loop, the rings of any number of VMs. It never blocks on anything but its epoll.
//! After activity it looks at the rings itself for a short while before it sleeps, because a wake-up across cores
//! costs more than decompressing a page.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use event_manager::{EventManager, RemoteEndpoint, SubscriberId, SubscriberOps};

use super::ring::{Active, Progress, Ring, Workbench};

/// How often the event loop is asked for kicks, control calls and timers while rings are being looked at.
const EVENTS_EVERY_PAGES: u32 = 32;
const EVENTS_EVERY_LOOKS: u32 = 64;

/// A worker thread. Dropping it stops and joins the thread.
pub struct Worker {
    endpoint: RemoteEndpoint<Ring>,
    active: Active,
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
        let (active, stop) = (Active::default(), Arc::new(AtomicBool::new(false)));
        let mut state = Loop { manager, active: Arc::clone(&active), poll, bench: Workbench::default() };
        let stopped = Arc::clone(&stop);
        let thread =
            std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || state.run(&stopped))?;
        Ok(Self { endpoint, active, stop, thread: Some(thread) })
    }

    /// The list of rings that this worker looks at.
    #[must_use]
    pub fn active(&self) -> Active {
        Arc::clone(&self.active)
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

    /// Takes a ring back. When this returns, every request that it had taken was answered and the worker has
    /// forgotten it.
    ///
    /// # Errors
    /// When the worker is gone.
    pub fn remove(&self, seat: Seat) -> io::Result<()> {
        self.call(move |ops| {
            let mut ring = ops.remove_subscriber(seat.0)?;
            ring.drain(&mut Workbench::default());
            Ok(())
        })
    }

    /// Makes the worker look at the rings that were put on its active list from outside.
    pub fn wake(&self) {
        if let Err(err) = self.endpoint.kick() {
            tracing::error!(?err, "a worker can't be woken");
        }
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
        self.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Loop {
    manager: EventManager<Ring>,
    active: Active,
    poll: Duration,
    bench: Workbench,
}

impl Loop {
    fn run(&mut self, stop: &AtomicBool) {
        let mut round: Vec<SubscriberId> = Vec::new();
        let mut last_busy = Instant::now();
        let (mut pages, mut looks) = (0u32, 0u32);
        while !stop.load(Ordering::Acquire) {
            let asleep = round.is_empty();
            if asleep || pages >= EVENTS_EVERY_PAGES || looks >= EVENTS_EVERY_LOOKS {
                (pages, looks) = (0, 0);
                if let Err(err) = self.manager.run_with_timeout(if asleep { -1 } else { 0 }) {
                    tracing::error!(?err, "a worker's event loop failed");
                    std::process::abort();
                }
            }
            round.clear();
            round.extend(self.active.lock().iter());
            let done = self.round(&round);
            pages = pages.saturating_add(done);
            looks = looks.saturating_add(1);
            if done > 0 {
                last_busy = Instant::now();
            } else if last_busy.elapsed() >= self.poll {
                self.sleep(&round);
            } else {
                std::hint::spin_loop();
            }
            round.clear();
            round.extend(self.active.lock().iter());
        }
    }

    /// Gives every active ring a turn; returns how many pages they worked on together.
    fn round(&mut self, round: &[SubscriberId]) -> u32 {
        let mut done = 0u32;
        for id in round {
            match self.manager.subscriber_mut(*id).map(|ring| ring.turn(&mut self.bench)) {
                Ok(Progress::Busy(pages)) => done = done.saturating_add(pages),
                Ok(Progress::Idle | Progress::Parked) => {}
                // It was stopped.
                Err(_) => self.active.lock().retain(|other| other != id),
            }
        }
        done
    }

    /// Has every ring ask for a kick, and forgets those that have nothing to do.
    fn sleep(&mut self, round: &[SubscriberId]) {
        for id in round {
            if self.manager.subscriber_mut(*id).map_or(true, Ring::sleep) {
                self.active.lock().retain(|other| other != id);
            }
        }
    }
}
